"""The package as people get it: a wheel in a fresh environment, an editable install, an import that costs little."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("core", "pallas_kernels", "models", "sharding", "serve", "train")
JUNK = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(*command, cwd, **variables):
    """Standard output of a command that must succeed, run without this process's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built offline from a copy of the source tree, with this environment's setuptools."""
    copy, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheels")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*JUNK))
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--disable-pip-version-check", "-w", out, copy, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The folder of programs of a new environment that holds the wheel, and sees this one's libraries behind it."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    [packages] = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is appended, and its own .pth files (such as that of an editable install) are not read.
    (packages / "libraries.pth").write_text(str(pathlib.Path(pytest.__file__).parents[1]))
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
    )
    run(*pip, "--disable-pip-version-check", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    sources = [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]
    tuned = (ROOT / "pallas_kernels/tuned").glob("*.json")
    data = {"meshloom/py.typed", *(f"meshloom/{file.relative_to(ROOT).as_posix()}" for file in tuned)}
    expected = {f"meshloom/{file.relative_to(ROOT).as_posix()}" for file in sources} | data
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_carries_its_license_and_its_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    [metadata] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.12" in text
    assert {f"Provides-Extra: {extra}" for extra in ("tpu", "cuda", "ray", "dev")} <= set(text.splitlines())
    assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_the_installed_command_runs_from_another_folder(fresh, tmp_path):
    assert "usage: meshloom" in run(fresh / "meshloom", "--help", cwd=tmp_path)
    where = run(fresh / "python", "-c", "import meshloom; print(meshloom.__file__)", cwd=tmp_path)
    assert pathlib.Path(where).is_relative_to(fresh.parent)


def test_the_installed_package_plans_a_model(fresh, tmp_path):
    shown = run(fresh / "meshloom", "plan", "tiny", "--devices", "cpu:8", cwd=tmp_path, JAX_PLATFORMS="cpu")
    assert "embed.weight" in shown


def test_the_editable_install_is_this_tree_and_leaks_no_bare_rooms(tmp_path):
    script = (
        "import importlib.util as u, meshloom; print(meshloom.__file__, *map(u.find_spec, ['serve', 'train', 'cli']))"
    )
    where, *leaked = run(sys.executable, "-c", script, cwd=tmp_path).split()
    assert pathlib.Path(where).resolve() == ROOT / "__init__.py"
    assert leaked == ["None"] * 3


def test_importing_meshloom_imports_neither_jax_nor_flax(tmp_path):
    script = "import sys, meshloom; dir(meshloom); print(*{'jax', 'flax', 'numpy', 'rich'} & set(sys.modules))"
    assert run(sys.executable, "-c", script, cwd=tmp_path).split() == []


def test_help_imports_neither_jax_nor_flax(tmp_path):
    script = (
        "import sys\nfrom meshloom.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "main(['--help'])\nprint('heavy:', *{'jax', 'flax'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", script, cwd=tmp_path).splitlines()[-1].split() == ["heavy:"]


def test_no_module_starts_a_backend_when_imported(tmp_path):
    modules = [file.relative_to(ROOT).with_suffix("") for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    names = ["meshloom.cli", "meshloom.commands", *(".".join(("meshloom", *module.parts)) for module in modules)]
    script = (
        "import importlib, meshloom\n"
        "for name in meshloom.__all__: getattr(meshloom, name)\n"
        f"for name in {[name.removesuffix('.__init__') for name in names]}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert run(sys.executable, "-c", script, cwd=tmp_path).split() == ["False"]


def test_public_names_resolve_and_others_are_refused_by_name():
    import meshloom

    assert all(getattr(meshloom, name) is not None for name in meshloom.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'lode'; it offers .*load"):
        _ = meshloom.lode

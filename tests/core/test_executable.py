"""Compiled programs as files: they run elsewhere without a compiler, and nothing that does not belong is opened."""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core import executable
from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.compile import CompileGuard
from meshloom.core.executable import ExecutableError, load_executable, read_header, save_executable
from meshloom.core.program_report import compile_and_report
from meshloom.core.topology import make_mesh, parse_devices
from tests.core.test_ahead import FOR_GPU, FOR_TPU

SETTINGS = {"learning_rate": 0.1, "steps": 3}


def update(weights, x, rate=0.1, width=32):
    """Something like a training step: the weight is donated, and its gradient is summed over rows."""
    loss, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w["w"]) ** 2))(weights)
    return {"w": weights["w"] - rate * gradient["w"]}, {"loss": loss}


def lowered_on(mesh, width=32, **keywords):
    rows, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    weights = {"w": jax.ShapeDtypeStruct((64, width), jnp.float32, sharding=rows)}
    x = jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=rows)

    def step(weights, x):
        return update(weights, x, **keywords)

    return jax.jit(step, donate_argnums=0, out_shardings=({"w": rows}, whole)).lower(weights, x)


def arguments_on(mesh):
    rows, numbers = NamedSharding(mesh, PartitionSpec("fsdp")), np.random.default_rng(0)
    weights = {"w": jax.device_put(numbers.standard_normal((64, 32), np.float32), rows)}
    return weights, jax.device_put(numbers.standard_normal((128, 64), np.float32), rows)


def cpu_mesh(count):
    return make_mesh({"fsdp": count}, jax.devices()[:count])


def saved(path, mesh, where="cpu:8"):
    lowered = lowered_on(mesh)
    compiled, _ = compile_and_report(lowered, dict(mesh.shape), compiler_options(parse_devices(where)))
    return save_executable(path, compiled, lowered, mesh, SETTINGS)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("executable") / "step.bin"
    saved(path, cpu_mesh(8))
    return path


@pytest.mark.parametrize("count", [1, 8])
def test_a_program_saved_by_another_process_runs_without_a_compile_and_bitwise_alike(count, tmp_path):
    path = tmp_path / "step.bin"
    code = f"from tests.core import test_executable as t; t.saved({str(path)!r}, t.cpu_mesh({count}))"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as here
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, check=True, timeout=120)
    mesh = cpu_mesh(count)
    lowered, given = lowered_on(mesh), arguments_on(mesh)
    with CompileGuard():
        loaded = load_executable(path, lowered, mesh, SETTINGS)
        results = loaded(*given)
    assert given[0]["w"].is_deleted()  # donation survives
    expected = lowered.compile()(*arguments_on(mesh))
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.sharding.is_equivalent_to(theirs.sharding, mine.ndim)


@pytest.mark.parametrize("where", [FOR_TPU, FOR_GPU])
def test_a_program_for_devices_that_are_elsewhere_is_saved_and_refused_here(where, tmp_path):
    devices = target_devices(parse_devices(where))
    mesh, path = make_mesh({"fsdp": len(devices)}, devices), tmp_path / "step.bin"
    header = saved(path, mesh, where)
    assert read_header(path) == header
    assert (header.device_kind, len(header.devices)) == (devices[0].device_kind, len(devices))
    assert path.stat().st_size > 10_000
    other = cpu_mesh(8)
    with pytest.raises(ExecutableError, match=f"was compiled with compiler .* here is jaxlib|is for {len(devices)} x"):
        load_executable(path, lowered_on(other), other, SETTINGS)


@pytest.fixture
def never_unpickled(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the payload was interpreted")

    monkeypatch.setattr(serialize_executable, "deserialize_and_load", fail)


def rewritten(file, path, **changes):
    """The file with another header, which is whole and has the right hash."""
    header = read_header(file)
    text = json.dumps(dataclasses.asdict(header) | changes).encode()
    old = json.dumps(dataclasses.asdict(header)).encode()
    content = file.read_bytes()
    start = content.index(old)
    sized = len(executable._MAGIC)
    path.write_bytes(
        content[:sized]
        + len(text).to_bytes(8, "little")
        + hashlib.sha256(text).digest()
        + text
        + content[start + len(old) :]
    )
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of format 2, and this Meshloom reads 1"),
        ({"jax": "0.1"}, f"compiled with jax 0.1, and here is {jax.__version__}"),
        ({"jaxlib": "0.1"}, "compiled with jaxlib 0.1"),
        ({"compiler": "libtpu 0.1"}, "compiled with compiler libtpu 0.1, and here is jaxlib"),
        ({"platform": "tpu", "device_kind": "TPU v5e"}, "is for 8 x TPU v5e, mesh fsdp=8, and here are 8 x cpu"),
        ({"processor": "0"}, "for a CPU with other instructions"),
        ({"mesh": {"tensor": 8}}, r"is for mesh \{'tensor': 8\}"),
        ({"devices": [[7 - n] for n in range(8)]}, r"is for devices \[\[7\], \[6\]"),
        ({"processes": 2}, "is for processes 2"),
        ({"program": "0"}, "the model, its layout or the code differ"),
        ({"payload_sha256": "0"}, "is damaged"),
    ],
)
def test_a_file_for_something_else_is_refused_before_it_is_opened(file, tmp_path, never_unpickled, changes, message):
    mesh = cpu_mesh(8)
    with pytest.raises(ExecutableError, match=message) as refused:
        load_executable(rewritten(file, tmp_path / "other.bin", **changes), lowered_on(mesh), mesh, SETTINGS)
    assert "again" in str(refused.value)  # what to do


def test_another_step_is_refused_with_what_makes_it_another(file, never_unpickled):
    mesh = cpu_mesh(8)
    with pytest.raises(
        ExecutableError,
        match=r"another program: learning_rate is 0.1 in it and 0.5 here; use what it has, or compile it again",
    ):
        load_executable(file, lowered_on(mesh, rate=0.5), mesh, SETTINGS | {"learning_rate": 0.5})
    with pytest.raises(ExecutableError, match=r"argument 0.w is float32\[64, 32\] in it and float32\[64, 16\] here"):
        load_executable(file, lowered_on(mesh, width=16), mesh, SETTINGS)
    one = cpu_mesh(1)
    with pytest.raises(ExecutableError, match=r"mesh \{'fsdp': 8\} .8 x cpu, mesh fsdp=8., and here is \{'fsdp': 1\}"):
        load_executable(file, lowered_on(one), one, SETTINGS)


def test_settings_that_are_not_in_the_program_do_not_matter(file):
    mesh = cpu_mesh(8)
    loaded = load_executable(file, lowered_on(mesh), mesh, SETTINGS | {"steps": 5})
    assert jnp.isfinite(loaded(*arguments_on(mesh))[1]["loss"])


@pytest.mark.parametrize("kept", [0, 10, 50, 500, -1])
def test_a_truncated_file_is_refused_without_unpickling(file, tmp_path, never_unpickled, kept):
    path, mesh = tmp_path / "cut.bin", cpu_mesh(8)
    path.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ExecutableError, match=r"is damaged or not complete|is no compiled program"):
        load_executable(path, lowered_on(mesh), mesh, SETTINGS)


@pytest.mark.parametrize("place", [len(executable._MAGIC) + 3, 70, 700, -5])
def test_a_changed_byte_is_noticed_without_unpickling(file, tmp_path, never_unpickled, place):
    path, mesh, content = tmp_path / "changed.bin", cpu_mesh(8), bytearray(file.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ExecutableError, match="is damaged"):
        load_executable(path, lowered_on(mesh), mesh, SETTINGS)


def test_what_is_no_executable_is_refused(tmp_path, never_unpickled):
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(ExecutableError, match=r"plan.json is no compiled program; `meshloom plan ... --executable"):
        read_header(path)
    with pytest.raises(ExecutableError, match=r"cannot read the compiled program .*No such file"):
        read_header(tmp_path / "missing.bin")


def test_a_program_that_calls_python_cannot_be_saved_and_leaves_no_file(tmp_path):
    mesh = cpu_mesh(1)
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    lowered = jax.jit(lambda x: jax.pure_callback(np.sin, x, x)).lower(x)
    with pytest.raises(ExecutableError, match="this program cannot be saved"):
        save_executable(tmp_path / "step.bin", lowered.compile(), lowered, mesh)
    plain = jax.jit(jnp.sin).lower(x)
    with pytest.raises(ExecutableError, match=r"cannot write the compiled program to /no/step.bin: No such file"):
        save_executable("/no/step.bin", plain.compile(), plain, mesh)
    assert not list(tmp_path.iterdir())

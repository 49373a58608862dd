"""The rooms depend downwards only: every import of the package is read from its source and held against the table.

Imports in functions and under TYPE_CHECKING count like any other: what is imported for a type is depended on as well.
"""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Room -> rooms it may import. Modules at the root of the package may import everything, and no room may import them.
MAY_IMPORT = {
    "core": set(),
    "pallas_kernels": {"core"},
    "models": {"core", "pallas_kernels"},
    "sharding": {"core"},
    "serve": {"core", "pallas_kernels", "models", "sharding"},
    "train": {"core", "pallas_kernels", "models", "sharding", "serve"},
}


def imported(source: str, package: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Line and dotted name of all that a module of `package` imports from `meshloom`; names after `from` as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name[0] == "meshloom")


def violations(source: str, path: pathlib.PurePath) -> list[str]:
    """The upward imports of one file; `path` is relative to the root of the package."""
    room = path.parts[0]
    package = ["meshloom", *path.parts[:-1]]
    return [
        f"{path}:{line}: {room} imports {'.'.join(name)}"
        for line, name in imported(source, package)
        if len(name) < 2 or name[1] not in MAY_IMPORT[room] | {room}
    ]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_import_points_upward(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = [each for file in files for each in violations(file.read_text("utf-8"), file.relative_to(ROOT))]
    assert not found, "\n".join(found)


def test_every_package_is_a_known_room():
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "source",
    [
        "import meshloom.train.loop",
        "from meshloom.train import loop",
        "from meshloom import train",
        "from meshloom import load",
        "import meshloom",
        "from ..train import loop",
        "from .. import train",
        "from ..train.loop import Run",
        "def run():\n    from meshloom.train.loop import train\n    return train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from meshloom.train.loop import Run",
        "import jax, meshloom.train as t",
    ],
)
def test_a_planted_upward_import_is_found(source):
    assert len(violations(source, pathlib.PurePath("serve/planted.py"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from meshloom.core.errors import MeshloomError",
        "from . import request",
        "from .request import Request",
        "from ..models import load",
        "import meshloom_elsewhere",
    ],
)
def test_a_downward_import_is_not_a_violation(source):
    assert not violations(source, pathlib.PurePath("serve/planted.py"))


def test_relative_imports_of_deeper_packages_are_resolved():
    deep = pathlib.PurePath("serve/api/planted.py")
    assert violations("from ...train import loop", deep)
    assert not violations("from ..train import loop", deep)  # serve.train, were there such a module

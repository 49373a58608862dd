"""A plan as a file: what `meshloom plan --out` writes, people review and edit, and `meshloom train --plan` follows.

The file is the JSON of `meshloom plan --json`; its first candidate is the plan.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from meshloom.core.errors import ConfigError
from meshloom.core.topology import mesh_text


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How to train: `rows` of `sequence_length` tokens a step, in `parts` parts, on `mesh` over `devices`."""

    model: str
    devices: str
    mesh: dict[str, int]
    remat: str
    rows: int
    parts: int
    sequence_length: int

    @property
    def mesh_text(self) -> str:
        """`fsdp=4,tensor=2`, without axes of one device."""
        return mesh_text(self.mesh) or "fsdp=1"


def check_plan_path(path: pathlib.Path) -> None:
    """Refuses a place that no plan can be written to, before minutes of compiling go into it.

    Raises:
        ConfigError: the folder does not exist or cannot be written to, or the path is a folder.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write the plan to {path}: name a file in a folder that exists and can be written to")


def write_plan(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Writes what `meshloom plan --json` prints.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write the plan to {path}: {error.strerror}") from error


def read_plan(path: pathlib.Path) -> TrainingPlan:
    """The first candidate of a plan file.

    Raises:
        ConfigError: no such file, not a plan, or a plan that does not fit its devices.
    """
    try:
        content = json.loads(path.read_text())
        best, workload = content["candidates"][0], content["workload"]
        length, tokens = int(workload["sequence_length"]), int(workload["batch_tokens"])
        mesh = {str(axis): int(size) for axis, size in best["mesh"].items()}
        parts, fits = int(best["parts"]), bool(best["fits"])
        plan = TrainingPlan(content["model"], content["devices"], mesh, best["remat"], tokens // length, parts, length)
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{path} is no training plan ({type(error).__name__}: {error}); `meshloom plan MODEL --devices ... "
            "--batch-tokens ... --out plan.json` writes one"
        ) from error
    if not fits:
        raise ConfigError(f"the first candidate of {path} does not fit its devices; put one that does in its place")
    return plan

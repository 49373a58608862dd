"""A plan as a file: what `meshloom plan --out` writes, people review and edit, and `train` or `serve --plan` follows.

The file is the JSON of `meshloom plan --json`; its first candidate is the plan.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
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


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """How to serve: `batch` sequences at once on each of the replicas, which are the `data` axis of `mesh`.

    Attributes:
        input_length, output_length: tokens of the prompts and answers that it was made for.
    """

    model: str
    devices: str
    mesh: dict[str, int]
    batch: int
    kv_dtype: str
    weight_dtype: str
    input_length: int
    output_length: int


def check_plan_path(path: pathlib.Path, what: str = "plan") -> None:
    """Refuses a place that no plan, or other result of `what` it is, can be written to, before compiling for minutes.

    Raises:
        ConfigError: the folder does not exist or cannot be written to, or the path is a folder.
    """
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"cannot write the {what} to {path}: name a file in a folder that exists and can be written to"
        )


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
    with _reading(path, "training", "--batch-tokens"):
        content = json.loads(path.read_text())
        best, workload = content["candidates"][0], content["workload"]
        length, tokens = int(workload["sequence_length"]), int(workload["batch_tokens"])
        parts, fits = int(best["parts"]), bool(best["fits"])
        mesh = _mesh(best)
        plan = TrainingPlan(content["model"], content["devices"], mesh, best["remat"], tokens // length, parts, length)
    _check_fits(path, fits)
    return plan


def read_serving_plan(path: pathlib.Path) -> ServingPlan:
    """The first candidate of a file of serving plans; errors as in `read_plan`."""
    with _reading(path, "serving", "--requests"):
        content = json.loads(path.read_text())
        best, workload = content["candidates"][0], content["workload"]
        lengths = int(workload["input_length"]), int(workload["output_length"])
        formats, fits = (best["kv_dtype"], best["weight_dtype"]), bool(best["fits"])
        plan = ServingPlan(content["model"], content["devices"], _mesh(best), int(best["batch"]), *formats, *lengths)
    _check_fits(path, fits)
    return plan


@contextlib.contextmanager
def _reading(path: pathlib.Path, kind: str, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot read the plan {path}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{path} is no {kind} plan ({type(error).__name__}: {error}); `meshloom plan MODEL --devices ... "
            f"{flag} ... --out plan.json` writes one"
        ) from error


def _mesh(candidate: Mapping[str, Any]) -> dict[str, int]:
    return {str(axis): int(size) for axis, size in candidate["mesh"].items()}


def _check_fits(path: pathlib.Path, fits: bool) -> None:
    if not fits:
        raise ConfigError(f"the first candidate of {path} does not fit its devices; put one that does in its place")

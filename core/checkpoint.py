"""Checkpoints of a run: written in the background, complete or not there at all, readable on any other mesh.

A step lies in `folder/<step>/`, which appears by a rename when all of it is written; what a killed process leaves
behind has another name, is never read, and is removed by the next one that saves. Arrays are kept by name, so neither
the sharding nor the container they were saved from matters. Knows nothing of models or optimizers.
"""

import contextlib
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from meshloom.core.errors import CheckpointError

# The item that is JSON; all others are pytrees of arrays.
DATA = "data"

# Orbax logs a line per file and thread, and tracebacks of errors that reach us as exceptions anyway.
absl_logging.set_verbosity(absl_logging.FATAL)
logging.getLogger("orbax").setLevel(logging.CRITICAL)


def check_writable(folder: str | pathlib.Path, needed_bytes: int) -> None:
    """Makes `folder` and proves that files can be written to it, with room for `needed_bytes`.

    Raises:
        CheckpointError: it cannot be made or written, or the disk has less room; names both sizes.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"the disk of {folder} has {_gib(free)} free, but checkpoints need {_gib(needed_bytes)}; "
            "free some, choose another folder, or keep fewer checkpoints"
        )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, abstract or not, counted once however many devices hold them."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


class Checkpointer:
    """The checkpoints under one folder, which `save` makes; reading never writes.

    Args:
        keep: newest checkpoints kept; at least 1.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"at least 1 checkpoint must be kept to go on from; got keep={keep}")
        self.folder = pathlib.Path(folder).absolute()
        self.keep = keep
        self._writer: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that are complete, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdecimal())

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, items: Mapping[str, Any], wait: bool = False) -> None:
        """Starts to write a checkpoint; the arrays may be donated as soon as this returns.

        Args:
            items: pytrees of arrays by name ("params", "opt"), and under "data" a JSON value.
            wait: return only when it is complete.
        Raises:
            CheckpointError: this save, or an earlier one in the background, failed.
        """
        with self._failures(f"checkpoint of step {step} could not be written to {self.folder}"):
            if self._writer is None:
                self._writer = ocp.CheckpointManager(self.folder, options=self._options())
            # One at a time: a save must not start while an older one is deleted to make room for it.
            self._writer.wait_until_finished()
            # Host copies on a CPU are views of device memory; while one is held, JAX copies instead of donating.
            arguments = {
                name: ocp.args.JsonSave(value) if name == DATA else ocp.args.PyTreeSave(_by_name(value))
                for name, value in items.items()
            }
            self._writer.save(step, args=ocp.args.Composite(**arguments), force=True)
            if wait:
                self._writer.wait_until_finished()

    def _options(self) -> ocp.CheckpointManagerOptions:
        return ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, cleanup_tmp_directories=True, save_root_metadata=False
        )

    def wait(self) -> None:
        """Returns when nothing is being written; raises CheckpointError if that failed."""
        if self._writer is not None:
            with self._failures(f"a checkpoint could not be written to {self.folder}"):
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written and lets go of all threads."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._failures(f"a checkpoint could not be written to {self.folder}"):
                writer.close()

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """Reads items of a step.

        Args:
            abstract: for each item wanted, a pytree of `ShapeDtypeStruct`s with shardings, which says where arrays go
                and in which dtype; for "data" anything.
        Raises:
            CheckpointError: the step or an item is not there, or holds other arrays; names every difference.
        """
        if step not in self.steps():
            held = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no complete checkpoint of step {step}; there are: {held}")
        if absent := sorted(name for name in abstract if not (self.folder / str(step) / name).is_dir()):
            raise CheckpointError(f"the checkpoint {self.folder / str(step)} holds no {', '.join(absent)}")
        options = ocp.CheckpointManagerOptions(
            read_only=True, create=False, save_interval_steps=0, enable_async_checkpointing=False
        )
        with (
            self._failures(f"checkpoint {self.folder / str(step)} could not be read"),
            contextlib.closing(ocp.CheckpointManager(self.folder, options=options)) as reader,
        ):
            self._check(step, abstract)
            wanted = {name: _restore_args(name, tree) for name, tree in abstract.items()}
            found = reader.restore(step, args=ocp.args.Composite(**wanted))
        return {name: found[name] if name == DATA else _like(tree, found[name]) for name, tree in abstract.items()}

    def restore_params(self, abstract: Any, step: int | None = None) -> Any:
        """Reads "params" alone, of the newest step by default; nothing else is touched. See `restore`."""
        step = self.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no complete checkpoint")
        return self.restore(step, {"params": abstract})["params"]

    def _check(self, step: int, abstract: Mapping[str, Any]) -> None:
        """Compares names and shapes with what is on disk: a later misfit would be a cryptic one."""
        problems = []
        for item, tree in abstract.items():
            if item == DATA:
                continue
            handler = ocp.PyTreeCheckpointHandler()
            held = {
                name: tuple(meta.shape) for name, meta in handler.metadata(self.folder / str(step) / item).tree.items()
            }
            wanted = {name: tuple(leaf.shape) for name, leaf in _by_name(tree).items()}
            problems += [f"{item}: missing {name}" for name in wanted.keys() - held.keys()]
            problems += [f"{item}: unexpected {name}" for name in held.keys() - wanted.keys()]
            problems += [
                f"{item}: {name} is {held[name]}, expected {wanted[name]}"
                for name in wanted.keys() & held.keys()
                if wanted[name] != held[name]
            ]
        if problems:
            shown, more = sorted(problems)[:12], f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise CheckpointError(f"checkpoint {self.folder / str(step)} does not fit: {'; '.join(shown)}{more}")

    @contextlib.contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise ValueError, OSError, RuntimeError and others
            raise CheckpointError(f"{what}: {str(error).strip() or type(error).__name__}") from error


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by their path, joined with dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(_key(entry) for entry in path): leaf for path, leaf in leaves}


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def _like(tree: Any, values: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [values[name] for name in _by_name(tree)])


def _restore_args(name: str, tree: Any) -> Any:
    if name == DATA:
        return ocp.args.JsonRestore()
    wanted = _by_name(tree)
    return ocp.args.PyTreeRestore(item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"

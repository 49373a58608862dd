"""Checkpoints of a run: `folder/<step>/`, written by orbax in the background, complete or not there at all.

A checkpoint is parts: trees of arrays, and "data", plain JSON. Arrays are stored by their path in the tree, so that any
process with any mesh can read them back, or read one part only. A step is written to a folder with another name and
renamed when it is complete; what a killed process left of one is removed by the next that writes.

Knows no model: parts are trees of dicts, sequences and named tuples.
"""

import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from meshloom.core.errors import CheckpointError

DATA = "data"


def names_of(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by the names they are stored under: the path, joined by dots."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def size_in_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Checkpointer:
    """Writes and reads the checkpoints under one folder, keeping the newest `keep`.

    Reading changes nothing, so that a run can be read while another process trains it. One process may write.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        self._folder = pathlib.Path(folder).absolute()
        self._keep = keep
        self._writer: ocp.CheckpointManager | None = None
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every step of its work

    def _open_writer(self) -> ocp.CheckpointManager:
        if self._writer is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True, save_root_metadata=False
            )
            self._writer = ocp.CheckpointManager(self._folder, options=options)
        return self._writer

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        if not self._folder.is_dir():
            return []
        # A step is renamed to its number when it is complete; until then its name has a suffix.
        return sorted(int(each.name) for each in self._folder.iterdir() if each.name.isdecimal() and each.is_dir())

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, parts: Mapping[str, Any], *, wait: bool = False) -> None:
        """Writes a checkpoint; returns once the arrays are safe from the next step, which may donate them.

        Args:
            parts: trees of arrays by part name, and under "data" something that JSON can hold.
            wait: until it is on disk.
        Raises:
            CheckpointError: this save, or the one before it in the background, failed.
        """
        arrays = {name: ocp.args.PyTreeSave(names_of(tree)) for name, tree in parts.items() if name != DATA}
        data = {DATA: ocp.args.JsonSave({"value": parts[DATA]})} if DATA in parts else {}
        try:
            self._open_writer().save(step, args=ocp.args.Composite(**arrays, **data), force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed_to_write(step, error) from error
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until every save is on disk. Raises CheckpointError if one failed."""
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed_to_write(None, error) from error

    def close(self) -> None:
        """Waits for saves in the background, whatever became of them, and lets go of the folder."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def restore(self, step: int, abstract: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of a checkpoint.

        Args:
            abstract: by part name, trees of `jax.ShapeDtypeStruct` whose `sharding` says where each array goes; the
                mesh that wrote the checkpoint does not matter. "data" is returned in any case.
        Raises:
            CheckpointError: no such step, or arrays that are missing, too many or of another shape; all are named.
        """
        folder = self._folder / str(step)
        if step not in self.steps():
            raise CheckpointError(f"{self._folder} has no checkpoint of step {step}; it has {self.steps()}")
        wanted = {name: names_of(tree) for name, tree in abstract.items() if name != DATA}
        parts = {}
        try:
            with ocp.PyTreeCheckpointer() as reader:
                saved = {name: reader.metadata(folder / name).item_metadata.tree for name in wanted}
                _compare(folder, saved, wanted)
                for name, leaves in wanted.items():
                    places = ocp.checkpoint_utils.construct_restore_args(leaves)
                    values = reader.restore(folder / name, args=ocp.args.PyTreeRestore(leaves, restore_args=places))
                    in_order = [values[leaf] for leaf in leaves]
                    parts[name] = jax.tree.unflatten(jax.tree.structure(abstract[name]), in_order)
            if (folder / DATA).exists():
                with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                    parts[DATA] = reader.restore(folder / DATA)["value"]
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {_first_line(error)}") from error
        return parts

    def restore_params(self, abstract: Any) -> Any:
        """The part "params" of the newest checkpoint alone, placed by the shardings of `abstract`.

        Raises:
            CheckpointError: there is no complete checkpoint, or it does not fit; every difference is named.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self._folder} holds no complete checkpoint")
        return self.restore(step, {"params": abstract})["params"]

    def _failed_to_write(self, step: int | None, error: BaseException) -> CheckpointError:
        which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
        free = shutil.disk_usage(nearest_folder(self._folder)).free
        return CheckpointError(
            f"{which} could not be written to {self._folder} ({gigabytes(free)} free): {_first_line(error)}"
        )


def _compare(folder: pathlib.Path, saved: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]]):
    """Raises CheckpointError unless every part holds the wanted names with the wanted shapes, and no others."""
    problems = []
    for part, leaves in wanted.items():
        shapes = {name: tuple(array.shape) for name, array in saved[part].items()}
        problems += [f"{part}: {name} is missing" for name in leaves.keys() - shapes.keys()]
        problems += [f"{part}: {name} is not in the model" for name in shapes.keys() - leaves.keys()]
        for name in leaves.keys() & shapes.keys():
            if shapes[name] != tuple(leaves[name].shape):
                problems.append(f"{part}: {name} is {shapes[name]}, expected {tuple(leaves[name].shape)}")
    if problems:
        shown = "; ".join(sorted(problems)[:12])
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"checkpoint {folder} does not fit: {shown}{more}")


def check_writable(folder: str | pathlib.Path, needed_bytes: int) -> None:
    """Makes sure that `needed_bytes` can be written under `folder`, which need not exist; leaves nothing behind.

    Raises:
        CheckpointError: a file stands in the way, the folder cannot be written, or its disk has less room; names both.
    """
    folder = pathlib.Path(folder).absolute()
    above = nearest_folder(folder)
    if above.exists() and not above.is_dir():
        raise CheckpointError(f"{folder} cannot be a folder: {above} is a file")
    try:
        with tempfile.NamedTemporaryFile(dir=above) as probe:
            probe.write(b"\0")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror} ({above})") from error
    free = shutil.disk_usage(above).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder} needs room for {gigabytes(needed_bytes)}, and its disk has {gigabytes(free)} free"
        )


def nearest_folder(path: pathlib.Path) -> pathlib.Path:
    """The path itself, or the nearest one above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists() or each == each.parent)


def gigabytes(count: int) -> str:
    """Bytes for people: decimal units, three digits."""
    unit, size = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= s), ("bytes", 1))
    return f"{count / size:.3g} {unit}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__

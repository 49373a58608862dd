"""Weights from files into a model's state and back, one tensor at a time.

Loading checks every name, shape and byte range before it reads the first weight, and reports all that is wrong in one
error. Then each tensor of the file is mapped, cut into its parts and copied straight into its place: a slot of a
scan-stacked, expert-stacked or sharded array that is updated in place (donated), and cast on the device. Beyond the
arrays themselves the host holds at most one tensor. Saving goes the same way backwards, into a sibling folder that
replaces the target only when it is complete.
"""

import contextlib
import functools
import json
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.errors import CheckpointError
from meshloom.models.stack import parameter_slots
from meshloom.models.tensor_files import Planned, TensorSource, write_safetensors
from meshloom.models.weight_map import FileTensor, Part, Rule, expand

Path = tuple[str | int, ...]
Progress = Callable[[int], None]


def load_weights(
    module: nnx.Module,
    rules: Sequence[Rule],
    source: TensorSource,
    *,
    where: str,
    shardings: Any = None,
    renames: Sequence[tuple[str, str]] = (),
    ignored: Sequence[str] = (),
    progress: Progress | None = None,
) -> nnx.Module:
    """A concrete copy of the abstract `module`, filled from `source`.

    Args:
        module: from `nnx.eval_shape`; the dtypes of its parameters are those that the weights are cast to.
        rules: names of the weights in the files.
        where: what to call the source in errors.
        shardings: pytree of `NamedSharding` like `nnx.state(module, nnx.Param)`; None puts all on the default device.
        renames, ignored: as in `Family`.
        progress: called with the number of elements of each tensor read.
    Raises:
        CheckpointError: tensors are missing, unexpected, misshapen, truncated or not floating point; names them all.
    """
    graphdef, state = nnx.split(module)
    wanted = expand(rules, parameter_slots(module))
    found = _match(source, wanted, where=where, renames=renames, ignored=ignored)
    leaves = dict(nnx.to_flat_state(state))
    placed = {path: _sharding(shardings, path) for path in leaves}
    arrays = {path: _zeros(leaf.shape, leaf.dtype, placed[path])() for path, leaf in leaves.items()}
    for tensor, name in found.items():
        value = source.read(name)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise CheckpointError(f"{where}: {name} holds {value.dtype}, but weights are floating point")
        for part, piece in zip(wanted[tensor].parts, wanted[tensor].split(value), strict=True):
            if wanted[tensor].duplicate:
                _check_duplicate(arrays[part.slot.path], piece, name, part, where)
            else:
                arrays[part.slot.path] = _fill(arrays[part.slot.path], piece, part.leading)
        if progress is not None:
            progress(wanted[tensor].size)
    filled = nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves.items()])
    return nnx.merge(graphdef, filled)


def restack(module: nnx.Module, target: nnx.Module, *, shardings: Any = None) -> nnx.Module:
    """A concrete copy of the abstract `target` with the weights of `module`, whose layers are stacked otherwise.

    Both sets of weights are held until it is done.
    """
    graphdef, state = nnx.split(target)
    leaves = dict(nnx.to_flat_state(state))
    held = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    arrays = {path: _zeros(leaf.shape, leaf.dtype, _sharding(shardings, path))() for path, leaf in leaves.items()}
    slots = parameter_slots(module)
    for name, slot in parameter_slots(target).items():
        value = _host(held[slots[name].path], Part(name, slots[name], None))
        arrays[slot.path] = _fill(arrays[slot.path], value, Part(name, slot, None).leading)
    return nnx.merge(
        graphdef, nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves.items()])
    )


def _match(
    source: TensorSource,
    wanted: Mapping[str, FileTensor],
    *,
    where: str,
    renames: Sequence[tuple[str, str]],
    ignored: Sequence[str],
) -> dict[str, str]:
    """Our name -> the file's name of every tensor to read; one error for everything that does not fit."""
    names = {functools.reduce(lambda name, pair: re.sub(*pair, name), renames, name): name for name in source.shapes}
    names = {ours: name for ours, name in names.items() if not any(re.search(pattern, ours) for pattern in ignored)}
    problems = list(source.problems)
    # When a whole shard is gone, its tensors are already named; listing them again as missing would bury the cause.
    told = " ".join(problems)
    for name, tensor in wanted.items():
        if name not in names and not tensor.duplicate and name not in told:
            problems.append(f"missing: {name}, expected shape {tensor.shape}")
        if name in names and source.shapes[names[name]] != tensor.shape:
            problems.append(f"misshapen: {names[name]} has shape {source.shapes[names[name]]}, expected {tensor.shape}")
    problems += [
        f"unexpected: {name} of shape {source.shapes[name]}" for ours, name in names.items() if ours not in wanted
    ]
    if problems:
        raise CheckpointError(f"the weights in {where} do not fit their configuration:\n  " + "\n  ".join(problems))
    # Duplicates last, when what they repeat is in place.
    order = sorted((name for name in wanted if name in names), key=lambda name: wanted[name].duplicate)
    return {name: names[name] for name in order}


def _sharding(shardings: Any, path: Path) -> NamedSharding | None:
    """Where a leaf goes; None is the default device, not committed to it, so that it mixes with arrays anywhere."""
    if shardings is None:
        return None
    node = shardings
    for key in path:
        node = node[key]
    return node.get_value() if isinstance(node, nnx.Variable) else node


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> Callable[[], jax.Array]:
    """A program that makes zeros where they will stay; one per shape, not per parameter."""
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, piece: jax.Array, leading: tuple[jax.Array, ...]) -> jax.Array:
    piece = piece.astype(array.dtype).reshape((1,) * len(leading) + piece.shape)
    return jax.lax.dynamic_update_slice(array, piece, (*leading, *(0,) * (array.ndim - len(leading))))


def _fill(array: jax.Array, piece: np.ndarray, leading: tuple[int, ...]) -> jax.Array:
    """`array` with `piece` at `array[leading]`, in place."""
    sharding = None
    if isinstance(array.sharding, NamedSharding):
        sharding = array.sharding
        spec = (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec[len(leading) :]))
    # device_put copies only what each device keeps. Waiting bounds the host memory to this one tensor: transfers run
    # ahead otherwise.
    return jax.block_until_ready(_write(array, jax.device_put(piece, sharding), tuple(jnp.int32(i) for i in leading)))


def _check_duplicate(array: jax.Array, piece: np.ndarray, name: str, part: Part, where: str) -> None:
    """A repeated tensor must repeat: compare 64 rows spread over it (all of it would be read twice)."""
    rows = np.unique(np.linspace(0, piece.shape[0] - 1, 64).astype(int))
    stored = np.asarray(array[rows], np.float32)
    if not np.array_equal(stored, np.asarray(jnp.asarray(piece[rows]).astype(array.dtype), np.float32)):
        raise CheckpointError(
            f"{where}: {name} differs from {part.name}, with which the configuration says it is tied;"
            " set tie_word_embeddings to false in config.json if the model was trained untied"
        )


@jax.jit
def _take(array: jax.Array, leading: tuple[jax.Array, ...]) -> jax.Array:
    for index in leading:
        array = jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
    return array


def planned_tensors(module: nnx.Module, rules: Sequence[Rule]) -> list[Planned]:
    """Every tensor of the file that `module` is saved as, in the order of the rules, read when its turn comes."""
    leaves = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}

    def read(tensor: FileTensor) -> np.ndarray:
        return tensor.form.join([_host(leaves[part.slot.path], part) for part in tensor.parts])

    return [
        Planned(
            tensor.name,
            tensor.shape,
            np.dtype(leaves[tensor.parts[0].slot.path].dtype),
            functools.partial(read, tensor),
        )
        for tensor in expand(rules, parameter_slots(module)).values()
        if not tensor.duplicate
    ]


def _host(array: jax.Array, part: Part) -> np.ndarray:
    return np.asarray(_take(array, tuple(jnp.int32(i) for i in part.leading)) if part.leading else array)


def save_weights(folder: pathlib.Path, module: nnx.Module, rules: Sequence[Rule]) -> None:
    """Write the weights of `module` as safetensors into `folder`, one tensor in host memory at a time."""
    write_safetensors(folder, planned_tensors(module, rules))


# What a save may replace. A folder with anything else in it is someone's, not a model's.
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "README.md",
    ".gitattributes",
)


@contextlib.contextmanager
def replacing(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty sibling of `folder` to write into, which takes its place when the block ends without an error.

    Raises:
        CheckpointError: `folder` holds files that are not a model's, or cannot be written (the disk is full).
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        foreign = [p.name for p in sorted(folder.iterdir()) if p.is_dir() or not any(p.match(m) for m in _MODEL_FILES)]
        if foreign:
            raise CheckpointError(
                f"{folder} holds {', '.join(foreign)}, which no model has: save into a new or empty folder"
            )
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        yield partial
        partial.chmod(0o755)
        _swap(partial, folder)
    except OSError as error:
        raise CheckpointError(f"cannot save to {folder}: {error}; what was there is untouched") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _swap(new: pathlib.Path, folder: pathlib.Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_suffix(".replaced")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, sorted and indented as Hugging Face does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def count_parameters(module: nnx.Module) -> int:
    """Number of parameters of a concrete or abstract module."""
    return sum(math.prod(leaf.shape) for _, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)))

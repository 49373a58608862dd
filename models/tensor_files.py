"""Safetensors files: tensors by name, memory-mapped for reading, streamed for writing.

Reading maps the files and copies nothing; every defect (missing shard, truncated tensor, broken index) is collected, so
that one error can name them all. Writing takes tensors one at a time and never holds two. Format: an 8-byte
little-endian length, a JSON header with dtype, shape and byte range of every tensor, then the bytes. It knows names,
shapes and dtypes; what they mean is `weight_map`'s.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from meshloom.core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@runtime_checkable
class TensorSource(Protocol):
    """Where weights come from: names with shapes, tensors on request, and what is wrong with the files."""

    shapes: Mapping[str, tuple[int, ...]]
    problems: list[str]

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the file's dtype; a view of mapped memory where possible."""
        ...


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SafetensorsSource:
    """The tensors of one safetensors file, or of a folder with `model.safetensors` or an index over shards."""

    def __init__(self, path: str | pathlib.Path):
        self._path = pathlib.Path(path)
        self.problems: list[str] = []
        self._entries: dict[str, _Entry] = {}
        for file in self._files():
            self._add(file)
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file; nothing is copied until it is used."""
        entry = self._entries[name]
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, entry.dtype)
        mapped = np.memmap(entry.file, np.uint8, "r", entry.offset, (math.prod(entry.shape) * entry.dtype.itemsize,))
        return mapped.view(entry.dtype).reshape(entry.shape).view(np.ndarray)

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which the file holds a tensor."""
        return self._entries[name].dtype

    def _files(self) -> list[pathlib.Path]:
        if self._path.is_file():
            return [self._path]
        single, index = self._path / SINGLE, self._path / INDEX
        if index.is_file():
            return self._indexed(index)
        if single.is_file():
            return [single]
        legacy = [path.name for path in sorted(self._path.glob("*.bin"))]
        hint = (
            f"; {', '.join(legacy)} are pickles, which can run code: save them as safetensors first" if legacy else ""
        )
        self.problems.append(f"no weights: {self._path} holds neither {SINGLE} nor {INDEX}{hint}")
        return []

    def _indexed(self, index: pathlib.Path) -> list[pathlib.Path]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            paths = [self._path / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems.append(
                f"corrupted index: {index.name} has no readable weight_map ({type(error).__name__}: {error})"
            )
            return []
        for path in paths:
            if not path.is_file():
                held = sorted(tensor for tensor, name in weight_map.items() if name == path.name)
                self.problems.append(f"missing shard: {path.name}, which the index says holds {', '.join(held)}")
        return [path for path in paths if path.is_file()]

    def _add(self, file: pathlib.Path) -> None:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                self.problems.append(
                    f"truncated file: {file.name} has {size} bytes, its header alone needs {length + 8}"
                )
                return
            try:
                header: dict[str, Any] = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                for name, entry in header.items():
                    self._add_tensor(file, name, entry, start=8 + length, size=size)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.problems.append(f"corrupted header: {file.name} ({type(error).__name__}: {error})")

    def _add_tensor(self, file: pathlib.Path, name: str, entry: dict[str, Any], *, start: int, size: int) -> None:
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            self.problems.append(
                f"unknown dtype: {name} in {file.name} is {entry['dtype']}; known: {', '.join(DTYPES)}"
            )
            return
        dtype = DTYPES[entry["dtype"]]
        if end - begin != math.prod(shape) * dtype.itemsize:
            self.problems.append(
                f"corrupted header: {name} in {file.name} has {end - begin} bytes for {entry['dtype']}{shape}"
            )
        elif start + end > size:
            self.problems.append(
                f"truncated tensor: {name} ends at byte {start + end} of {file.name}, which has {size}"
            )
        elif name in self._entries:
            self.problems.append(f"tensor twice: {name} is in {self._entries[name].file.name} and in {file.name}")
        self._entries[name] = _Entry(file, start + begin, dtype, shape)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor about to be written: `read` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(folder: pathlib.Path, tensors: Iterable[Planned], *, shard_bytes: int = 5 * 10**9) -> None:
    """Write `model.safetensors`, or numbered shards of at most `shard_bytes` and their index; holds one tensor."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: pathlib.Path, tensors: list[Planned]) -> None:
    # transformers refuses a file whose metadata does not say which framework's conventions it follows.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which safetensors cannot hold")
        offsets = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            _write_tensor(stream, tensor)


def _write_tensor(stream: BinaryIO, tensor: Planned) -> None:
    value = np.ascontiguousarray(tensor.read())
    stream.write(value.reshape(-1).view(np.uint8).data)

"""GGUF files: metadata and tensors by name; each tensor is mapped, and dequantized when it is read.

The header is parsed here (the `gguf` package takes seconds for the 100,000 strings of a vocabulary, this 0.1 s); block
formats are that package's. It knows the container; `families.gguf` knows what names mean, `gguf_tokenizer` what the
vocabulary means.
"""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from meshloom.core.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F64: np.dtype(np.float64),
}
_Q = GGMLQuantizationType
_BLOCKS = {_Q.Q4_0, _Q.Q4_1, _Q.Q5_0, _Q.Q5_1, _Q.Q8_0, _Q.Q2_K, _Q.Q3_K, _Q.Q4_K, _Q.Q5_K, _Q.Q6_K}


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if length > len(self.data) - self.at:
            raise struct.error(f"a string of {length} bytes at byte {self.at}")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, length = self.scalar("I"), self.scalar("Q")
            if kind in (_STRING, _ARRAY):
                return [self.value(kind) for _ in range(length)]
            values = struct.unpack_from(f"<{length}{_SCALARS[kind]}", self.data, self.at)
            self.at += struct.calcsize(f"<{length}{_SCALARS[kind]}")
            return list(values)
        return self.scalar(_SCALARS[kind])


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


class GGUFSource:
    """The metadata and the tensors of one GGUF file (versions 2 and 3, little-endian).

    Attributes:
        metadata: key -> value, arrays as lists.
        shapes: tensor name -> shape, slowest axis first as in numpy (the file lists the fastest first).
        problems: defects of the tensor table, in words.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if self.path.stat().st_size < 24:
            raise CheckpointError(f"{self.path} is not a GGUF file: it has {self.path.stat().st_size} bytes")
        self._data = np.memmap(self.path, np.uint8, "r")
        self.problems: list[str] = []
        cursor = _Cursor(memoryview(self._data))
        magic, version = cursor.scalar("4s"), cursor.scalar("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise CheckpointError(
                f"{self.path} is not a GGUF file of version 2 or 3: it begins with {magic!r}, version {version}"
            )
        try:
            tensors, keys = cursor.scalar("Q"), cursor.scalar("Q")
            self.metadata: dict[str, Any] = {}
            for _ in range(keys):
                key = cursor.string()
                self.metadata[key] = cursor.value(cursor.scalar("I"))
            entries = [self._entry(cursor) for _ in range(tensors)]
        except (struct.error, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the header of {self.path} is truncated or corrupted at byte {cursor.at}: {error}"
            ) from error
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-cursor.at // alignment) * alignment
        self._tensors = {name: dataclasses.replace(entry, offset=start + entry.offset) for name, entry in entries}
        self.shapes = {name: entry.shape for name, entry in self._tensors.items()}
        self._check()

    @staticmethod
    def _entry(cursor: _Cursor) -> tuple[str, _Tensor]:
        name = cursor.string()
        shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
        kind = GGMLQuantizationType(cursor.scalar("I"))
        return name, _Tensor(shape, kind, cursor.scalar("Q"))

    def _check(self) -> None:
        for name, tensor in self._tensors.items():
            if tensor.kind not in _BLOCKS and tensor.kind not in _PLAIN:
                known = ", ".join(kind.name for kind in (*_PLAIN, *sorted(_BLOCKS)))
                self.problems.append(
                    f"quantization: {name} is {tensor.kind.name}, which is not supported; supported: {known}"
                )
            elif tensor.offset + tensor.nbytes > self._data.size:
                end = tensor.offset + tensor.nbytes
                self.problems.append(f"truncated tensor: {name} ends at byte {end} of a file of {self._data.size}")

    def read(self, name: str) -> np.ndarray:
        """The tensor: a view where the file holds plain floats, else dequantized to float32."""
        tensor = self._tensors[name]
        raw = np.asarray(self._data[tensor.offset : tensor.offset + tensor.nbytes])
        if tensor.kind in _PLAIN:
            return raw.view(_PLAIN[tensor.kind]).reshape(tensor.shape)
        return dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind)

    @property
    def quantized(self) -> bool:
        """Whether any tensor is kept in blocks of 8-bit numbers or smaller ones."""
        return any(tensor.kind in _BLOCKS for tensor in self._tensors.values())

    def plain_dtype(self) -> np.dtype:
        """The dtype of the weight matrices if all are of one half precision, else float32 (as norms always are)."""
        kinds = {tensor.kind for tensor in self._tensors.values() if len(tensor.shape) > 1}
        if kinds == {GGMLQuantizationType.BF16}:
            return _PLAIN[GGMLQuantizationType.BF16]
        return _PLAIN[GGMLQuantizationType.F16] if kinds == {GGMLQuantizationType.F16} else np.dtype(np.float32)

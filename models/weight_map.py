"""Names and layouts of a file's tensors, against the canonical parameters: one declaration, used to load and to save.

A `Rule` pairs the name of a file's tensor with the canonical parameters it holds, and says in which `Form` it holds
them. Names are templates over `{i}` (layer) and, in the file only, `{e}` (expert: the file has one tensor per expert,
the model one for all). Rules for parameters that a model does not have (a bias, a norm) fall away, so one list serves a
whole family. It knows no file and no device.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from meshloom.core.errors import ModelError
from meshloom.models.stack import Slot

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Parts follow each other along the first axis; one part is the tensor as it is.

    Attributes:
        transposed: the file holds `[in, out]`.
    """

    transposed: bool = False

    def file_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the file's tensor that holds parts of these shapes."""
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return joined[::-1] if self.transposed else joined

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """The parts, as views."""
        rows = tensor.T if self.transposed else tensor
        ends = np.cumsum([shape[0] for shape in shapes])
        return [rows[end - shape[0] : end] for end, shape in zip(ends, shapes, strict=True)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The file's tensor."""
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return rows.T if self.transposed else rows


@dataclasses.dataclass(frozen=True)
class PerHead:
    """Parts alternate head by head along the first axis: q, k, v of head 0, q, k, v of head 1, ... (GPT-NeoX)."""

    heads: int

    def file_shape(self, shapes: Sequence[Shape]) -> Shape:
        return Rows().file_shape(shapes)

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        by_head = tensor.reshape(self.heads, len(shapes), -1, *tensor.shape[1:])
        return [by_head[:, i].reshape(shape) for i, shape in enumerate(shapes)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        by_head = np.stack([part.reshape(self.heads, -1, *part.shape[1:]) for part in parts], axis=1)
        return by_head.reshape(-1, *parts[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class RotaryPairs:
    """Rows of each head in the order that rotates neighbours (GGUF's Llama), where the model rotates the two halves."""

    heads: int

    def file_shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        pairs = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
        return [pairs.swapaxes(1, 2).reshape(shapes[0])]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        halves = parts[0].reshape(self.heads, 2, -1, *parts[0].shape[1:])
        return halves.swapaxes(1, 2).reshape(parts[0].shape)


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The file holds the parameter plus a constant (GGUF bakes Gemma's `1 + weight` in)."""

    by: float

    def file_shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def split(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [tensor - np.asarray(self.by, tensor.dtype)]

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0] + np.asarray(self.by, parts[0].dtype)


AS_IS = Rows()
Form = Rows | PerHead | RotaryPairs | Shifted


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor (or one per layer and expert) of a file.

    Attributes:
        file: name template in the file.
        parts: canonical name templates of what it holds, in order.
        form: how it holds them.
        duplicate: the file may repeat here what another tensor already gave (a tied unembedding); checked, never
        written.
    """

    file: str
    parts: tuple[str, ...]
    form: Form = AS_IS
    duplicate: bool = False


def rule(file: str, *parts: str, form: Form = AS_IS, duplicate: bool = False) -> Rule:
    """A `Rule` with its parts written in line."""
    return Rule(file, parts, form, duplicate)


def linear(file: str, part: str, form: Form = AS_IS) -> tuple[Rule, Rule]:
    """Rules for the weight and the bias (if any) of a linear layer or a norm."""
    return rule(f"{file}.weight", f"{part}.weight", form=form), rule(f"{file}.bias", f"{part}.bias")


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one part of a file's tensor goes: a slot, and an expert of it if the file has one tensor per expert."""

    name: str
    slot: Slot
    expert: int | None

    @property
    def shape(self) -> Shape:
        """Shape of the part, without stack and expert axes."""
        return self.slot.shape if self.expert is None else self.slot.shape[1:]

    @property
    def leading(self) -> tuple[int, ...]:
        """Indices into the leading axes of the state leaf: stack, expert, both or none."""
        return tuple(index for index in (self.slot.index, self.expert) if index is not None)


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor that a file of this model holds."""

    name: str
    parts: tuple[Part, ...]
    form: Form
    duplicate: bool

    @property
    def shape(self) -> Shape:
        """Its shape in the file."""
        return self.form.file_shape([part.shape for part in self.parts])

    @property
    def size(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The parts it holds, in order."""
        return self.form.split(tensor, [part.shape for part in self.parts])


def expand(rules: Iterable[Rule], slots: Mapping[str, Slot]) -> dict[str, FileTensor]:
    """Every tensor a file of the model must hold, by name, in the order of the rules.

    Raises:
        ModelError: a parameter of the model that no rule names (a gap in the family's list).
    """
    tensors: dict[str, FileTensor] = {}
    layers = 1 + max((int(i) for name in slots for i in re.findall(r"\.(\d+)\.", name)), default=-1)
    for each in rules:
        for i in range(layers if "{i}" in each.file else 1):
            names = [part.replace("{i}", str(i)) for part in each.parts]
            present = [name for name in names if name in slots]
            if not present:
                continue
            if present != names:
                raise ModelError(f"{each.file} needs all of {names}, but the model has only {present}")
            tensors |= {tensor.name: tensor for tensor in _per_expert(each, i, names, slots)}
    covered = {part.name for tensor in tensors.values() if not tensor.duplicate for part in tensor.parts}
    if missing := sorted(slots.keys() - covered):
        raise ModelError(f"this family has no file name for the parameters {', '.join(missing)}")
    return tensors


def _per_expert(each: Rule, i: int, names: Sequence[str], slots: Mapping[str, Slot]) -> Iterator[FileTensor]:
    file = each.file.replace("{i}", str(i))
    experts: Iterable[int | None] = range(slots[names[0]].shape[0]) if "{e}" in file else (None,)
    for e in experts:
        parts = tuple(Part(name, slots[name], e) for name in names)
        yield FileTensor(file.replace("{e}", str(e)), parts, each.form, each.duplicate)

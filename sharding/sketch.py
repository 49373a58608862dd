"""What a picture of a layout shows: the weights of one layer in the order of dataflow, how they are cut, what moves.

Weights that wait for equally many others are a `Column`, columns between a read of the residual stream and the sum that
joins it a `Branch`, and branches that are scanned, or that follow one another and are alike, a `Frame`. It knows
neither where it is read from (`sketch_flow.py`) nor how it is drawn (`picture.py`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from meshloom.sharding.collectives import Kind as Collective
from meshloom.sharding.layout import Rule
from meshloom.sharding.provenance import Cause

TIMES = " \N{MULTIPLICATION SIGN} "


@dataclasses.dataclass(frozen=True)
class Cut:
    """`ways` equal stretches, one for each device along `axis`."""

    axis: str
    ways: int
    rule: Rule


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a rectangle, `size` elements long: dimensions that go the same way, named by their roles."""

    text: str
    size: int
    cuts: tuple[Cut, ...]

    @property
    def piece(self) -> int:
        """How many of its elements one device holds."""
        return self.size // math.prod(cut.ways for cut in self.cuts)


@dataclasses.dataclass(frozen=True)
class Moved:
    """Collectives of one kind over the same axes, for the same cause.

    Attributes:
        bytes: of their results on one device, in one layer of a forward pass.
    """

    collective: Collective
    axes: tuple[str, ...]
    bytes: int
    cause: Cause


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight where it meets activations.

    Attributes:
        down, across: what it carries of the residual stream, or else what it contracts; and its other dimensions.
        sheets: one matrix for each of these: experts, or the positions of a convolution's window.
        bytes: what one device holds of it, in one layer.
        moved: what its own bytes take before they are used.
        again: it was used before (a tied embedding).
    """

    name: str
    down: Side
    across: Side
    sheets: Side | None
    bytes: float
    moved: tuple[Moved, ...]
    again: bool


@dataclasses.dataclass(frozen=True)
class Column:
    """Weights that can be used side by side.

    Attributes:
        split: axes over which their results are split along a dimension that they produce.
        moved: what activations take between this column and the next.
    """

    weights: tuple[Weight, ...]
    split: tuple[str, ...]
    moved: tuple[Moved, ...]


@dataclasses.dataclass(frozen=True)
class Branch:
    """What is computed of the residual stream until it joins it again, or before the stream begins, or after it ends.

    Attributes:
        reads, joins: whether it begins at the residual stream, and whether it ends there.
        stack: layers of one scan that it stands for.
    """

    title: str
    columns: tuple[Column, ...]
    reads: bool
    joins: bool
    stack: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """Branches that follow one another `repeats` times."""

    branches: tuple[Branch, ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class Sketch:
    """All that is drawn.

    Attributes:
        stream: the residual stream, by its size and the axes over which its rows and tokens are split; empty where a
            program has none.
        vectors: how many parameters have one value for each feature: scales and biases, whole on every device.
        others: names of the other parameters that no product takes, such as positions.
        moved: bytes of results on one device in a whole forward pass, by kind.
    """

    mesh: Mapping[str, int]
    stream: str
    frames: tuple[Frame, ...]
    vectors: int
    others: tuple[str, ...]
    bytes_total: int
    bytes_per_device: int
    moved: Mapping[Collective, float]


def folded(branches: Sequence[Branch]) -> list[Frame]:
    """Branches with what repeats, up to four in a row, written once."""
    frames, start = [], 0
    likenesses = [likeness(each) for each in branches]
    while start < len(branches):
        best = (1, 1)
        for period in range(1, 5):
            repeats = 1
            while (
                likenesses[start : start + period]
                == likenesses[start + repeats * period : start + (repeats + 1) * period]
            ):
                repeats += 1
            if repeats > 1 and repeats * period > math.prod(best):
                best = (period, repeats)
        period, repeats = best
        if repeats == 1 and branches[start].stack > 1:
            period = len(branches) - start
        frames.append(Frame(tuple(branches[start : start + period]), repeats * branches[start].stack))
        start += period * repeats
    return frames


def likeness(branch: Branch) -> tuple:
    """Equal for branches that differ in the names of their weights alone."""
    columns = [
        (tuple(dataclasses.replace(each, name="") for each in column.weights), column.split, column.moved)
        for column in branch.columns
    ]
    return branch.title, branch.reads, branch.joins, tuple(columns)

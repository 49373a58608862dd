"""Arrays of a traced program as sharding sees them, and the facts about them that roles are read from.

A `Value` has dimensions and a kind and nothing else: no dtype, no contents, no name.
"""

import dataclasses
import enum
import math
from typing import Any

from meshloom.sharding.classes import Dim

Dims = tuple[Dim, ...]


class Kind(enum.IntEnum):
    """What an array depends on; the kind of a result is the greatest of its operands'."""

    CONSTANT = 0
    WEIGHT = 1  # on parameters alone: a parameter, or one cast, transposed, stacked, scaled
    ACTIVATION = 2  # on the inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of the program: its dimensions, and for a weight the indices of the parameters that it is made of."""

    dims: Dims
    kind: Kind = Kind.CONSTANT
    parameters: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Product:
    """The first operand is multiplied with the second and summed over `contracted`.

    `batch` picks one matrix of many: batch dimensions of both, or the groups of a ragged product. The free dimensions
    of each side go on into the result.
    """

    contracted: Dims
    batch: Dims
    lhs_free: Dims
    rhs_free: Dims


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Data (the second operand) picks `rows` of the first operand and keeps its `columns`."""

    rows: Dims
    columns: Dims

    @property
    def size(self) -> int:
        """Number of rows."""
        return math.prod(dim.size for dim in self.rows)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """The two operands are added, or the second replaces the first in a loop's carry."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The results enter here: as inputs of the program, or as the carry of a loop."""


Fact = Product | Lookup | Meeting | Source


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive's inputs and outputs, what it says about roles, if anything, and its equation, where it has one."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    fact: Fact | None = None
    equation: Any = None


@dataclasses.dataclass(frozen=True)
class Region:
    """Steps [first, end) of a program that `pallas_kernels` spreads over a mesh itself.

    Attributes:
        equation: the one whose body the steps are.
    """

    first: int
    end: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equation: Any

    @property
    def name(self) -> str:
        """Of the operation."""
        return self.equation.params["name"]

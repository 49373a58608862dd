"""A mesh with every axis cut into its prime factors, so that one axis can split two dimensions.

With two kv heads and `tensor=4`, queries are split over their 2 kv heads and, inside each, over groups of 2. On the
factored mesh that is one dimension for each axis, as the algebra has it.
"""

import math
from collections.abc import Mapping

from meshloom.core.topology import AXES
from meshloom.sharding.algebra import BROADCAST, Placement, State


def factored(mesh: Mapping[str, int]) -> dict[str, int]:
    """`{"tensor": 4}` becomes `{"tensor.0": 2, "tensor.1": 2}`, the outermost first, in the order of `AXES`."""
    return {f"{axis}.{place}": ways for axis in AXES for place, ways in enumerate(_primes(mesh.get(axis, 1)))}


def axis_of(factor: str) -> str:
    """The axis of the mesh that a factor belongs to."""
    return factor.partition(".")[0]


def merged(placement: Placement, mesh: Mapping[str, int]) -> dict[str, State]:
    """A placement on the factored mesh by axis, where all factors of an axis agree."""
    by_axis: dict[str, dict[str, State]] = {}
    for factor in mesh:
        by_axis.setdefault(axis_of(factor), {})[factor] = placement.get(factor, BROADCAST)
    result: dict[str, State] = {}
    for axis, states in by_axis.items():
        same = len(set(states.values())) == 1
        result |= {axis: next(iter(states.values()))} if same else states
    return {axis: state for axis, state in result.items() if state != BROADCAST}


def _primes(number: int) -> list[int]:
    """Ascending."""
    for divisor in range(2, math.isqrt(number) + 1):
        if number % divisor == 0:
            return [divisor, *_primes(number // divisor)]
    return [number] if number > 1 else []

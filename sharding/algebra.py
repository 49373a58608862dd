"""Split, broadcast, partial: how one array lies on a mesh, and what it costs to lay it out in another way.

On every axis of the mesh an array is split along one of its dimensions (`S(1)`), whole on each device (`B`), or a sum
that is still to be made of what the devices hold (`P`): the algebra of OneFlow (Yuan et al. 2021). To pass from one to
another takes one collective, or none:

    S -> B  all_gather        P -> B  all_reduce        S(i) -> S(j)  all_to_all
    B -> S  a slice, free     P -> S  reduce_scatter    B -> P, S -> P  zeros elsewhere, free

Bytes are those of the result on one device, as in `collectives.py`. Two things are left to XLA: where a split moves to
another place in the order of axes that split one dimension, it also permutes the stretches among devices; and of two
gathers it does the one of the later dimension first, even if that is not the smaller. It knows nothing of programs.
"""

import dataclasses
import math
from collections.abc import Mapping

from meshloom.sharding.collectives import Kind


@dataclasses.dataclass(frozen=True)
class Split:
    """Each device along the axis holds an equal stretch of one dimension, in the order of the axes of the mesh."""

    dimension: int

    def __str__(self) -> str:
        return f"S({self.dimension})"


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """Every device along the axis holds the same."""

    def __str__(self) -> str:
        return "B"


@dataclasses.dataclass(frozen=True)
class Partial:
    """The array is the sum of what the devices along the axis hold."""

    def __str__(self) -> str:
        return "P"


State = Split | Broadcast | Partial
BROADCAST, PARTIAL = Broadcast(), Partial()
Placement = Mapping[str, State]  # mesh axis -> state; an axis that is missing broadcasts


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective over the devices along `axes`, with the bytes of its result on one device."""

    kind: Kind
    axes: tuple[str, ...]
    bytes: float


def text(placement: Placement) -> str:
    """`fsdp S(0), tensor P`; `B` where every axis broadcasts."""
    return ", ".join(f"{axis} {state}" for axis, state in placement.items() if state != BROADCAST) or "B"


def local_bytes(placement: Placement, size: float | int, mesh: Mapping[str, int]) -> float:
    """What one device holds of an array of `size` bytes."""
    return size / math.prod(mesh[axis] for axis, state in placement.items() if isinstance(state, Split))


def conversion(
    before: Placement, after: Placement, size: float | int, mesh: Mapping[str, int]
) -> tuple[Collective, ...]:
    """The collectives that turn one placement of an array into another, in the order that moves the fewest bytes.

    What makes the local part smaller comes first: slices, then reduce-scatters; what makes it larger last: gathers,
    the one over the fewest devices in front. Axes that do the same to the same dimension take part in one collective.

    Args:
        size: bytes of the whole array.
        mesh: axis -> number of devices.
    """
    groups: dict[tuple[Kind, State, State], list[str]] = {}
    local = local_bytes(before, size, mesh)
    for axis, ways in mesh.items():
        old, new = before.get(axis, BROADCAST), after.get(axis, BROADCAST)
        if kind := _collective(old, new):
            groups.setdefault((kind, old, new), []).append(axis)
        elif isinstance(new, Split) and old == BROADCAST:
            local /= ways
        elif isinstance(old, Split) and new == PARTIAL:
            local *= ways

    def order(group: tuple[Kind, State, State]) -> tuple[int, int]:
        return _ORDER.index(group[0]), math.prod(mesh[axis] for axis in groups[group])

    found = []
    for kind, old, new in sorted(groups, key=order):
        axes = tuple(axis for axis in groups[kind, old, new] if mesh[axis] > 1)
        ways = math.prod(mesh[axis] for axis in axes)
        local *= {"reduce_scatter": 1 / ways, "all_gather": ways}.get(kind, 1)
        if axes:
            found.append(Collective(kind, axes, local))
    return tuple(found)


_ORDER: tuple[Kind, ...] = ("reduce_scatter", "all_to_all", "all_reduce", "all_gather")


def _collective(old: State, new: State) -> Kind | None:
    """What one axis takes; None for what is free."""
    match old, new:
        case Partial(), Split():
            return "reduce_scatter"
        case Partial(), Broadcast():
            return "all_reduce"
        case Split(), Broadcast():
            return "all_gather"
        case Split(), Split() if old != new:
            return "all_to_all"
    return None


def cost(before: Placement, after: Placement, size: float | int, mesh: Mapping[str, int]) -> float:
    """Bytes of the results, on one device, of all collectives of the conversion."""
    return sum((each.bytes for each in conversion(before, after, size, mesh)), 0.0)

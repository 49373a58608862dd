"""The two rules by which weights are split. Everything that `derive` decides is decided here.

**Pair rule.** A dimension that one weight produces and the next contracts is split over `tensor`, so that the pair costs one reduction.
Heads come first, then inner and vocab dimensions by the bytes of their weights; a weight is split over `tensor` once. Both sides of a pair
are split, or neither. Heads are split whole: `(K, G, H)` rows of a query projection divide by K, or by K and then G, never by H; kv heads
stay replicated where K alone does not divide. Matrices picked by expert are split over `expert`; a router is not, for its choice needs
all scores. What the program cuts open (the rows of a fused `[q | k | v]`) is never split across the cut.

**Store rule.** Of the dimensions left the largest that divides is split over `fsdp` and gathered where it is used. Vectors (one dimension
besides the stack) stay replicated: a gather costs more time than their bytes are worth. A stack of layers is never split.

`data` never splits a weight. A dimension carries one axis. Axes that are absent or of size 1 split nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from meshloom.sharding.classes import Dim, cuts, leaves
from meshloom.sharding.layout import Choice, Row, Rule
from meshloom.sharding.roles import Roles
from meshloom.sharding.trace import Parameter, Program

Place = tuple[int, int]  # index of a parameter, and one of its dimensions


@dataclasses.dataclass(frozen=True)
class Split:
    """The decision to split a dimension over `axis`."""

    axis: str
    rule: Rule
    reason: str


def decide(program: Program, roles: Roles, axes: Mapping[str, int]) -> tuple[tuple[Row, ...], str | None]:
    """Applies both rules.

    Args:
        axes: mesh axis -> size.
    Returns:
        a row per parameter, and the axis over which KV pages are split by kv head, or None.
    """
    rules = _Rules(program, roles, axes)
    rules.split_experts()
    rules.split_pairs()
    rules.store()
    return tuple(rules.row(index) for index in range(len(program.parameters))), rules.kv_heads_axis()


def divides(run: Sequence[Dim], ways: int) -> bool:
    """Whether `ways` equal stretches of the product of `run` never cut through what lies inside of it.

    The outermost factor takes as much as it can: `(2, 4)` splits 2, 4 and 8 ways, `(3, 4)` 3, 6 and 12 ways.
    """
    for factor in run:
        if factor.size % ways == 0:
            return True
        if ways % factor.size:
            return False
        ways //= factor.size
    return ways == 1


class _Rules:
    """Decisions so far (`splits`), and why dimensions were passed over (`refusals`)."""

    def __init__(self, program: Program, roles: Roles, axes: Mapping[str, int]):
        self.parameters = program.parameters
        self.roles = roles
        self.axes = axes
        self.splits: dict[Place, Split] = {}
        self.refusals: dict[Place, str] = {}

    # -- pair rule --

    def split_experts(self) -> None:
        """One matrix of many per expert: the experts are dealt out over `expert`."""
        ways = self.axes.get("expert", 1)
        for place, dim in self._places():
            run = self._run(dim, "expert")
            if not run or ways == 1:
                continue
            if self._only_scores(place[0], run[0]):
                self.refusals[place] = "a router's scores are compared over all experts"
            elif self._may_split(place, run, "expert", ways):
                holders = self._names(self.roles.picked.get(run[0], ()))
                self.splits[place] = Split("expert", "pair", f"experts: {holders} hold one matrix for each; tokens are summed over experts once")

    def split_pairs(self) -> None:
        """Heads, inner and vocab dimensions over `tensor`."""
        ways = self.axes.get("tensor", 1)
        if ways == 1:
            return
        groups: dict[Dim, list[tuple[Place, tuple[Dim, ...]]]] = {}
        for place, dim in self._places():
            if run := self._run(dim, "heads", "inner", "vocab"):
                groups.setdefault(run[0], []).append((place, run))
        for leaf in sorted(groups, key=lambda leaf: self._precedence(leaf, groups[leaf])):
            willing = [place for place, run in groups[leaf] if self._may_split(place, run, "tensor", ways)]
            reason = self._pair_reason(leaf, {index for index, _ in willing})
            for place in willing:
                if reason is None:
                    self.refusals[place] = "the other side of its pair cannot be split, and a pair is split together or not at all"
                elif self._splits(place[0], "tensor") is None:
                    self.splits[place] = Split("tensor", "pair", reason)

    def _precedence(self, leaf: Dim, members: list) -> tuple[bool, int, int]:
        """Heads first, then the class with the most bytes of weights; the first in the program among equals."""
        order = {each: position for position, each in enumerate(self.roles.produced)}
        weight_bytes = sum(_bytes(self.parameters[index]) for index in {place[0] for place, _ in members})
        return self.roles.by_leaf[leaf] != "heads", -weight_bytes, order.get(leaf, len(order))

    def _may_split(self, place: Place, run: Sequence[Dim], axis: str, ways: int) -> bool:
        """Whether nothing stands against the split; what does is noted."""
        index, dimension = place
        dim = self.parameters[index].dims[dimension]
        role = self.roles.of(index, dim)
        count = math.prod(factor.size for factor in run)
        taken = self._splits(index, axis)
        if not divides(run, ways):
            self.refusals[place] = f"{count} {_PLURAL[role]} do not divide over {axis}={ways}" + (
                " and are replicated; query heads may still be split" if role == "kv_heads" else ""
            )
        elif offsets := cuts(dim, ways):
            where = "at offsets known only at run time" if offsets == (0,) else "at " + ", ".join(map(str, offsets))
            self.refusals[place] = f"the program cuts it open {where} (a fused weight?); a split over {axis}={ways} would cross the cut"
        elif taken is not None:
            self.refusals[place] = f"{axis} already splits the {_PLURAL[self.roles.of(index, self.parameters[index].dims[taken])]} of this weight"
        return place not in self.refusals

    def _pair_reason(self, leaf: Dim, willing: set[int]) -> str | None:
        """Why the class is split over `tensor` if the weights in `willing` agree; None if that leaves half a pair."""
        producers = self.roles.produced.get(leaf, set())
        contractors = self.roles.contracted.get(leaf, set())
        role = self.roles.by_leaf[leaf]
        if role == "vocab":
            return f"vocab: {self._names(sorted(willing))} look it up or produce it; one reduction over the vocabulary"
        if not (producers & willing and contractors & willing):
            return None
        return f"{role}: {self._names(producers & willing)} produce, {self._names(contractors & willing)} contract; one reduction per pair"

    def _only_scores(self, index: int, expert: Dim) -> bool:
        """Whether the experts are all that the weight produces: a router."""
        produces = [leaf for leaf, producers in self.roles.produced.items() if index in producers]
        return produces == [expert]

    # -- store rule --

    def store(self) -> None:
        """The largest dimension left over `fsdp`."""
        ways = self.axes.get("fsdp", 1)
        if ways == 1:
            return
        for index, parameter in enumerate(self.parameters):
            free = [d for d, dim in enumerate(parameter.dims) if dim.size > 1 and self.roles.of(index, dim) != "stack"]
            if len(free) < 2:
                continue
            left = [d for d in free if (index, d) not in self.splits and parameter.shape[d] % ways == 0]
            if left:
                chosen = max(left, key=lambda d: parameter.shape[d])
                self.splits[index, chosen] = Split("fsdp", "store", f"the largest dimension left that divides by fsdp={ways}")

    # -- results --

    def row(self, index: int) -> Row:
        """What was decided for one parameter."""
        parameter = self.parameters[index]
        choices = tuple(self._choice((index, d)) for d in range(len(parameter.shape)))
        ways = math.prod(self.axes[choice.axis] for choice in choices if choice.axis)
        return Row(parameter.name, parameter.shape, parameter.dtype, choices, _bytes(parameter) // ways)

    def _choice(self, place: Place) -> Choice:
        dim = self.parameters[place[0]].dims[place[1]]
        role = self.roles.of(place[0], dim)
        if split := self.splits.get(place):
            return Choice(dim.size, role, split.axis, split.rule, split.reason)
        reasons = [self.refusals[place]] if place in self.refusals else []
        return Choice(dim.size, role, None, None, "; ".join([*reasons, self._not_stored(place)]))

    def _not_stored(self, place: Place) -> str:
        """Why the store rule left a dimension whole."""
        index, dimension = place
        parameter = self.parameters[index]
        ways = self.axes.get("fsdp", 1)
        stored = self._splits(index, "fsdp")
        wide = [dim for dim in parameter.dims if dim.size > 1 and self.roles.of(index, dim) != "stack"]
        if self.roles.of(index, parameter.dims[dimension]) == "stack":
            return "a stack of layers: every device runs every layer"
        if ways == 1:
            return "the mesh has no fsdp axis to store it over"
        if len(wide) < 2:
            return "a vector: gathering it would cost more time than its bytes are worth"
        if stored is not None:
            return f"fsdp is on dimension {stored}"
        return f"{parameter.shape[dimension]} does not divide by fsdp={ways}"

    def kv_heads_axis(self) -> str | None:
        """`tensor` if every attention splits its keys and values by whole kv heads."""
        ways = self.axes.get("tensor", 1)
        shared = {}
        for (index, _), dim in self._places():
            run = self._run(dim, "heads")
            if run and run[0] in self.roles.shared_heads and len(self.roles.produced.get(run[0], ())) > 1:
                shared.setdefault(run[0], set()).add(self._splits(index, "tensor") is not None)
        even = all(leaf.size % ways == 0 and split == {True} for leaf, split in shared.items())
        return "tensor" if ways > 1 and shared and even else None

    # -- reading the program --

    def _places(self):
        for index, parameter in enumerate(self.parameters):
            for dimension, dim in enumerate(parameter.dims):
                yield (index, dimension), dim

    def _run(self, dim: Dim, *wanted: str) -> tuple[Dim, ...]:
        """The outermost factors of `dim` that share one of the wanted roles; empty if the first has none of them."""
        factors = leaves(dim)
        role = self.roles.by_leaf.get(factors[0]) if factors else None
        if role not in wanted:
            return ()
        return tuple(itertools.takewhile(lambda leaf: self.roles.by_leaf.get(leaf) == role, factors))

    def _splits(self, index: int, axis: str) -> int | None:
        """The dimension of the parameter that is split over `axis`."""
        return next((d for (i, d), split in self.splits.items() if i == index and split.axis == axis), None)

    def _names(self, indices) -> str:
        names = [self.parameters[index].name for index in sorted(indices)]
        return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


_PLURAL = {"heads": "heads", "kv_heads": "kv heads", "inner": "inner features", "vocab": "vocabulary rows", "expert": "experts"}


def _bytes(parameter: Parameter) -> int:
    return math.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize

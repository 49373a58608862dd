"""The two rules by which weights are split. Everything that `derive` decides is decided here.

**Pair rule.** A dimension that one weight produces and the next contracts is split over `tensor`, so that the pair
costs one reduction. Heads come first, then inner and vocab dimensions by the bytes of their weights; a weight is split
over `tensor` once. Both sides of a pair are split, or neither. Heads are split whole: `(K, G, H)` rows of a query
projection divide by K, or by K and then G, never by H; kv heads stay replicated where K alone does not divide. Matrices
picked by expert are split over `expert`; a router is not, for its choice needs all scores. What the program cuts open
(the rows of a fused `[q | k | v]`) is never split across the cut.

**Store rule.** Of the dimensions left the largest that divides is split over `fsdp`, `expert` and `context` together
and gathered where it is used; where none divides by all, over those with the most devices that one divides by. An axis
that deals a weight's experts out does not store it as well. The vocabulary yields to the residual:
rows of it that are split tempt XLA to gather activations instead, and the gradient of the table is then summed whole;
and columns are what `lookup.py` looks up. Vectors stay replicated: a gather costs more time than their bytes are worth.
A vector has one dimension besides the stack, or it is spread over several: it is only ever added or multiplied element
by element, and one weight produces all of its dimensions, as the bias `[N, H]` of a projection to `N` heads. A table of
positions `[T, D]` is none, for no weight produces its rows. A stack of layers is never split.

`data` never splits a weight. A dimension is split by one rule. Axes that are absent or of size 1 split nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from meshloom.core.topology import STORE_AXES
from meshloom.sharding.classes import Dim, cuts, leaves
from meshloom.sharding.layout import Choice, Row, Rule
from meshloom.sharding.roles import Role, Roles
from meshloom.sharding.trace import Parameter, Program

Place = tuple[int, int]  # index of a parameter, and one of its dimensions


@dataclasses.dataclass(frozen=True)
class Split:
    """The decision to split a dimension over `axes`."""

    axes: tuple[str, ...]
    rule: Rule
    reason: str


def decide(
    program: Program, roles: Roles, axes: Mapping[str, int], storing: Collection[str] = STORE_AXES
) -> tuple[tuple[Row, ...], str | None]:
    """Applies both rules.

    Args:
        axes: mesh axis -> size.
        storing: the axes of the store rule.
    Returns:
        a row per parameter, and the axis over which KV pages are split by kv head, or None.
    """
    rules = _Rules(program, roles, axes, storing)
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
    """The decisions so far: `splits` per parameter and dimension, and why other dimensions were passed over."""

    def __init__(self, program: Program, roles: Roles, axes: Mapping[str, int], storing: Collection[str]):
        self.parameters = program.parameters
        self.roles = roles
        self.axes = axes
        self.storing = storing
        self.splits: list[dict[int, Split]] = [{} for _ in program.parameters]
        self.refusals: dict[Place, str] = {}

    # -- pair rule --

    def split_experts(self) -> None:
        """One matrix of many per expert: the experts are dealt out over `expert`."""
        if self._ways("expert") == 1:
            return
        for place, dim in self._places():
            run = self._run(dim, "expert")
            if not run:
                continue
            if self._only_scores(place[0], run[0]):
                self.refusals[place] = "a router's scores are compared over all experts"
            elif self._may_split(place, run, "expert"):
                holders = self._names(self.roles.picked.get(run[0], set()))
                reason = f"expert: {holders} hold a matrix for each; one reduction over them"
                self._split(place, ("expert",), "pair", reason)

    def split_pairs(self) -> None:
        """Heads, inner and vocab dimensions over `tensor`."""
        if self._ways("tensor") == 1:
            return
        groups: dict[Dim, list[tuple[Place, Sequence[Dim]]]] = {}
        for place, dim in self._places():
            if run := self._run(dim, "heads", "inner", "vocab"):
                groups.setdefault(run[0], []).append((place, run))
        for leaf in self._by_precedence(groups):
            willing = [place for place, run in groups[leaf] if self._may_split(place, run, "tensor")]
            reason = self._pair_reason(leaf, {index for index, _ in willing})
            for place in willing:
                if reason is None:
                    self.refusals[place] = "the other side of its pair cannot be split: together or not at all"
                elif self._dimension_over(place[0], "tensor") is None:
                    self._split(place, ("tensor",), "pair", reason)

    def _by_precedence(self, groups: Mapping[Dim, list[tuple[Place, Sequence[Dim]]]]) -> list[Dim]:
        """Heads first, then the class with the most bytes of weights; the first in the program among equals."""
        order = {leaf: position for position, leaf in enumerate(self.roles.produced)}

        def precedence(leaf: Dim) -> tuple[bool, int, int]:
            held = sum(_bytes(self.parameters[index]) for index in {place[0] for place, _ in groups[leaf]})
            return self.roles.by_leaf[leaf] != "heads", -held, order.get(leaf, len(order))

        return sorted(groups, key=precedence)

    def _may_split(self, place: Place, run: Sequence[Dim], axis: str) -> bool:
        """Whether nothing stands against the split; what does is noted."""
        index, dimension = place
        ways = self._ways(axis)
        role = self._role(index, dimension)
        taken = self._dimension_over(index, axis)
        if not divides(run, ways):
            count = math.prod(factor.size for factor in run)
            refusal = f"{count} {_PLURAL[role]} do not divide over {axis}={ways}"
            self.refusals[place] = refusal + ("; query heads may still be split" if role == "kv_heads" else "")
        elif offsets := cuts(self.parameters[index].dims[dimension], ways):
            where = "at run-time offsets" if offsets == (0,) else f"at {', '.join(map(str, offsets))}"
            self.refusals[place] = (
                f"the program cuts it open {where} (a fused weight?), which {axis}={ways} would cross"
            )
        elif taken is not None:
            self.refusals[place] = f"{axis} already splits the {_PLURAL[self._role(index, taken)]} of this weight"
        return place not in self.refusals

    def _pair_reason(self, leaf: Dim, willing: set[int]) -> str | None:
        """Why the class is split over `tensor` if the weights in `willing` are; None if that leaves half a pair."""
        role = self.roles.by_leaf[leaf]
        producers = self.roles.produced.get(leaf, set()) & willing
        if role == "vocab":
            holders = producers | self.roles.looked_up.get(leaf, set()) & willing
            names = self._names(holders)  # a bias alone holds half of what it is added to
            return f"vocab: looked up in or produced by {names}; one reduction over the vocabulary" if names else None
        contractors = self.roles.contracted.get(leaf, set()) & willing
        if not (producers and contractors):
            return None
        made, used = self._names(producers), self._names(contractors)
        return f"{role}: produced by {made}, contracted by {used}; one reduction per pair"

    def _only_scores(self, index: int, expert: Dim) -> bool:
        """Whether the experts are all that the weight produces: a router."""
        return [leaf for leaf, producers in self.roles.produced.items() if index in producers] == [expert]

    # -- store rule --

    def store(self) -> None:
        """One of the dimensions left over the axes that store: the largest, or the residual of a weight with a
        vocabulary."""
        for index in range(len(self.parameters)):
            if not self._is_vector(index):
                next(filter(None, (self._stored_over(index, axes) for axes in self._storing(index))), None)

    def _storing(self, index: int) -> list[tuple[str, ...]]:
        """Axes that may store a weight together, those with the most devices first."""
        paired = {axis for split in self.splits[index].values() if split.rule == "pair" for axis in split.axes}
        present = [axis for axis in self.storing if self._ways(axis) > 1 and axis not in paired]
        groups = (axes for count in range(len(present), 0, -1) for axes in itertools.combinations(present, count))
        return sorted(groups, key=self._devices, reverse=True)

    def _stored_over(self, index: int, axes: tuple[str, ...]) -> bool:
        """Whether a dimension divides by all of the axes, and is now split over them."""
        shape = self.parameters[index].shape
        left = [d for d in self._wide(index) if d not in self.splits[index] and shape[d] % self._devices(axes) == 0]
        if not left:
            return False
        reason = f"the largest dimension left that divides by {self._sizes(axes)}"
        residual = [d for d in left if self._role(index, d) == "residual"]
        if residual and any(self._role(index, d) == "vocab" for d in left):
            left, reason = residual, f"the residual, before the vocabulary; it divides by {self._sizes(axes)}"
        self._split((index, max(left, key=lambda d: shape[d])), axes, "store", reason)
        return True

    def _wide(self, index: int) -> list[int]:
        """Dimensions of a weight besides its stack of layers and those of size 1."""
        parameter = self.parameters[index]
        return [d for d, size in enumerate(parameter.shape) if size > 1 and self._role(index, d) != "stack"]

    def _is_vector(self, index: int) -> bool:
        """One value for each feature that a weight makes, whatever the number of dimensions these are laid out in."""
        wide = self._wide(index)
        if len(wide) < 2 or index in self.roles.multiplied:
            return len(wide) < 2
        makers = (
            self.roles.produced.get(leaf, set()) | self.roles.picked.get(leaf, set())
            for d in wide
            for leaf in leaves(self.parameters[index].dims[d])
        )
        return bool(set.intersection(*makers))

    # -- results --

    def row(self, index: int) -> Row:
        """What was decided for one parameter."""
        parameter = self.parameters[index]
        ways = math.prod(self._devices(split.axes) for split in self.splits[index].values())
        choices = tuple(self._choice(index, d) for d in range(len(parameter.shape)))
        return Row(
            parameter.name, parameter.shape, parameter.dtype, choices, _bytes(parameter) // ways, self._is_vector(index)
        )

    def _choice(self, index: int, dimension: int) -> Choice:
        size, role = self.parameters[index].shape[dimension], self._role(index, dimension)
        refusal = self.refusals.get((index, dimension))
        if split := self.splits[index].get(dimension):
            reason = f"{split.reason}; not by the pair rule: {refusal}" if refusal else split.reason
            return Choice(size, role, split.axes, split.rule, reason)
        if refusal is None and self._ways("tensor") > 1:
            refusal = _NO_PAIR.get(role)
        not_stored = self._not_stored(index, dimension)
        return Choice(size, role, (), None, f"{refusal}; {not_stored}" if refusal else not_stored)

    def _not_stored(self, index: int, dimension: int) -> str:
        """Why the store rule left a dimension whole."""
        storing, splits = self._storing(index), self.splits[index]
        if self._role(index, dimension) == "stack":
            return "a stack of layers: every device runs every layer"
        if not storing:
            return "the mesh has no axis left to store it over"
        if self._is_vector(index):
            return "a vector: gathering it would cost more time than its bytes are worth"
        for stored, split in splits.items():
            if split.rule == "store":
                return f"{' and '.join(split.axes)} {'is' if len(split.axes) == 1 else 'are'} on dimension {stored}"
        return f"{self.parameters[index].shape[dimension]} does not divide by {self._sizes(storing[-1])}"

    def kv_heads_axis(self) -> str | None:
        """`tensor` if every attention splits its keys and values by whole kv heads."""
        ways = self._ways("tensor")
        split: dict[Dim, bool] = {}
        for (index, _), dim in self._places():
            run = self._run(dim, "heads")
            # Keys and values have weights of their own: heads that queries alone produce are copies of one kv head.
            if run and run[0] in self.roles.shared_heads and len(self.roles.produced.get(run[0], ())) > 1:
                over_tensor = self._dimension_over(index, "tensor") is not None and run[0].size % ways == 0
                split[run[0]] = split.get(run[0], True) and over_tensor
        return "tensor" if ways > 1 and split and all(split.values()) else None

    # -- reading --

    def _split(self, place: Place, axes: tuple[str, ...], rule: Rule, reason: str) -> None:
        self.splits[place[0]][place[1]] = Split(axes, rule, reason)

    def _ways(self, axis: str) -> int:
        return self.axes.get(axis, 1)

    def _devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(map(self._ways, axes))

    def _sizes(self, axes: tuple[str, ...]) -> str:
        return " x ".join(f"{axis}={self._ways(axis)}" for axis in axes)

    def _places(self) -> Iterator[tuple[Place, Dim]]:
        for index, parameter in enumerate(self.parameters):
            for dimension, dim in enumerate(parameter.dims):
                yield (index, dimension), dim

    def _role(self, index: int, dimension: int) -> Role:
        return self.roles.of(index, self.parameters[index].dims[dimension])

    def _run(self, dim: Dim, *wanted: Role) -> tuple[Dim, ...]:
        """The outermost factors of `dim` that share one of the wanted roles; empty if the first has none of them."""
        factors = self.roles.factors(dim)
        role = self.roles.by_leaf.get(factors[0]) if factors else None
        if role not in wanted:
            return ()
        return tuple(itertools.takewhile(lambda leaf: self.roles.by_leaf.get(leaf) == role, factors))

    def _dimension_over(self, index: int, axis: str) -> int | None:
        """The dimension of the parameter that is split over `axis`."""
        return next((dimension for dimension, split in self.splits[index].items() if axis in split.axes), None)

    def _names(self, indices: set[int]) -> str:
        names = [self.parameters[index].name for index in sorted(indices)]
        return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


_PLURAL: dict[Role, str] = {
    "heads": "heads",
    "kv_heads": "kv heads",
    "inner": "inner features",
    "vocab": "vocabulary rows",
    "expert": "experts",
}
_NO_PAIR: dict[Role, str] = {
    "residual": "carried from layer to layer, so that no pair splits it",
    "head_dim": "within a head, which is never cut",
}


def _bytes(parameter: Parameter) -> int:
    return math.prod(parameter.shape) * np.dtype(parameter.dtype).itemsize

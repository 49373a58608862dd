"""Time and memory of one step on one device, from a program's work, a derived layout and a chip's data sheet.

Compute is a roofline per group of products: FLOPs over the peak times the chip's one efficiency constant, or bytes over
the bandwidth of its memory, whichever takes longer. Collectives follow from what the rules split:

* `fsdp`, `expert`, `context`: weights are gathered where they are used, in forward and again in backward when a scan
  runs over them; their gradients are reduce-scattered, those of weights that an axis does not split are all-reduced.
* `tensor`: each product that contracts a split class leaves partial sums, reduced once (the all-reduce, or the
  reduce-scatter and all-gather that XLA may make of it, which moves as much).
* `expert`: rows are gathered to the devices whose experts they may want, and the sums of what these make are
  reduce-scattered. Where rows are whole over it, as in serving, it is as `tensor`.
* `data`: gradients are all-reduced.
* `context`: keys and values go round a ring, and on the way back with float32 sums of their gradients.

`OVERLAP` is an assumption, not a measurement: the fraction of each class of collectives that runs behind compute.
Memory is what the program keeps, not what a compiler's allocator adds to it.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, cast

import numpy as np

from meshloom.core.errors import ConfigError
from meshloom.core.hardware import Chip
from meshloom.core.program_report import Collective
from meshloom.core.topology import AXES, BATCH_AXES, STORE_AXES, Devices, network
from meshloom.sharding import collectives
from meshloom.sharding.classes import Dim, find
from meshloom.sharding.collectives import Kind, Span, axis_spans
from meshloom.sharding.layout import Row
from meshloom.sharding.work import Leaves, Work

Purpose = Literal["weights", "gradients", "partial sums", "keys"]
# Weights of the next layer are gathered and gradients of the last one reduced while a layer computes; a partial sum is
# needed by the very next product, and only splitting that product into pieces hides some of it. Keys travel while those
# at hand are attended to.
OVERLAP: dict[Purpose, float] = {"weights": 0.9, "gradients": 0.9, "partial sums": 0.3, "keys": 0.9}


@dataclasses.dataclass(frozen=True)
class GroupCost:
    """One group of products on one device. `bound` is what limits it: "compute" or "memory"."""

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class CollectiveCost:
    """Collectives of one kind, axis and purpose in one step: `bytes` are those of their results on one device."""

    kind: Kind
    axis: str
    purpose: Purpose
    count: float | int
    bytes: float
    seconds: float
    level: str


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Where a step's time goes. `exposed_s` is the collectives' time that does not run behind compute."""

    groups: tuple[GroupCost, ...]
    optimizer_s: float
    collectives: tuple[CollectiveCost, ...]
    exposed_s: float

    @property
    def compute_s(self) -> float:
        return sum((group.seconds for group in self.groups), 0.0)

    @property
    def step_s(self) -> float:
        return self.compute_s + self.optimizer_s + self.exposed_s

    @property
    def bytes_by_kind(self) -> dict[str, float]:
        """Collective kind -> bytes of results per device and step."""
        totals: dict[str, float] = {}
        for each in self.collectives:
            totals[each.kind] = totals.get(each.kind, 0.0) + each.bytes
        return totals


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step; `logits` are what they take beyond a layer's activations."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float
    kv_cache: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class Split:
    """How a mesh divides the classes of a work.

    Attributes:
        ways: leaf -> {axis: ways}, by the pair rule alone.
        rows: axes that split the rows of a batch. Over one that splits a class as well, devices do their parts of it
            for each other's rows.
    """

    ways: Mapping[Dim, Mapping[str, int]]
    rows: Collection[str]
    # A search asks for the same classes for each micro-batch: found anew they take half of the time of 405B's plan.
    _over: dict[Leaves, dict[str, int]] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    _shares: dict[tuple[Leaves, Leaves], float] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def over(self, dims: Leaves) -> Mapping[str, int]:
        """Axis -> ways in which these classes are split together."""
        if dims not in self._over:
            found: dict[str, int] = {}
            for leaf in dims:
                for axis, ways in self.ways.get(leaf, {}).items():
                    found[axis] = found.get(axis, 1) * ways
            self._over[dims] = found
        return self._over[dims]

    def of_weights(self, amount: float, dims: Leaves) -> float:
        """What one device has of `amount`, which does not grow with the rows."""
        return amount / math.prod(self.over(dims).values())

    def share(self, amount: float, dims: Leaves, over: Leaves = frozenset()) -> float:
        """What one device has of `amount` of its own rows. Where an axis splits rows and `dims` it does a part in n for
        the rows of n devices, which is as much; what is kept for all rows of the classes `over` is n times as much."""
        if (dims, over) not in self._shares:
            parts = math.prod(ways for axis, ways in self.over(dims).items() if axis not in self.rows)
            times = math.prod(ways for axis, ways in self.over(over).items() if axis in self.rows)
            self._shares[dims, over] = times / parts
        return amount * self._shares[dims, over]


def split_of(work: Work, rows: Sequence[Row], mesh: Mapping[str, int], batch: Collection[str] = BATCH_AXES) -> Split:
    """Follows what the pair rule split in each weight to the classes of the program: outermost factors first.

    Args:
        batch: axes that split the rows of a batch.
    """
    ways: dict[Dim, dict[str, int]] = {}
    for row, dims in zip(rows, work.leaves, strict=True):
        for choice, factors in zip(row.choices, dims, strict=True):
            if choice.rule != "pair":
                continue
            (axis,) = choice.axes
            left = mesh[axis]
            for leaf in map(find, factors):
                taken = math.gcd(leaf.size, left)
                if taken > 1:
                    ways.setdefault(leaf, {})[axis] = taken
                left //= taken
    return Split(ways, batch)


class Pricer:
    """Prices works on one mesh of one kind of devices."""

    def __init__(self, chip: Chip, devices: Devices, mesh: dict[str, int], dtype: str):
        if dtype not in chip.flops:
            raise ConfigError(f"no {dtype} peak is known for {chip.name}; known: {', '.join(chip.flops)}")
        self.chip, self.mesh, self.dtype = chip, mesh, dtype
        self.peak = chip.flops[dtype] * chip.efficiency
        self._devices, self._levels = devices, network(devices, chip)
        self._spans: dict[tuple[int, ...], list[Span]] = {}

    def groups(self, work: Work, split: Split, rows: float | int, parts: float | int = 1) -> tuple[GroupCost, ...]:
        """Roofline of every group with `rows` rows on this device, `parts` times."""
        scale = rows / work.rows
        totals: dict[str, list[float]] = {}
        for table, index, share, factor in (
            (work.flops, 0, split.share, scale),
            (work.activation_bytes, 1, split.share, scale),
            (work.weight_bytes, 1, split.of_weights, 1.0),
        ):
            for (group, dims), amount in table.items():
                totals.setdefault(group, [0.0, 0.0])[index] += share(amount, dims) * factor * parts
        return tuple(self.group(name, flops, moved) for name, (flops, moved) in totals.items())

    def group(self, name: str, flops: float, moved: float) -> GroupCost:
        """Time of one group with these FLOPs and bytes."""
        compute, memory = flops / self.peak, moved / self.chip.hbm_bandwidth
        return GroupCost(name, flops, moved, max(compute, memory), "compute" if compute >= memory else "memory")

    def partial_sums(self, work: Work, split: Split, rows: float | int, parts: float | int = 1) -> list[CollectiveCost]:
        """The reductions that split classes cause, and the gathers of rows where rows are split as well."""
        found = []
        for each in work.reductions:
            amount, times = split.share(each.bytes, each.kept) * rows / work.rows, each.trips * parts
            over = split.over(each.over)
            if scattered := tuple(axis for axis in over if axis in split.rows):
                found.append(self.collective("reduce_scatter", scattered, "partial sums", amount, times))
            if summed := tuple(axis for axis in over if axis not in split.rows):
                found.append(self.collective("all_reduce", summed, "partial sums", amount, times))
        for need in work.needed:
            amount, times = split.share(need.bytes, need.kept, need.over) * rows / work.rows, need.trips * parts
            if gathered := tuple(axis for axis in split.over(need.over) if axis in split.rows):
                found.append(self.collective("all_gather", gathered, "partial sums", amount, times))
        return found

    def rings(
        self, forward: Work, split: Split, rows: float | int, parts: float | int, passes: int
    ) -> list[CollectiveCost]:
        """What attention sends over `context`, of a training step.

        Args:
            forward: work of the forward pass, which runs `passes` times.
        """
        ways = self.mesh.get("context", 1)
        found = []
        for each in forward.attended if ways > 1 else ():
            held, times = split.share(each.bytes, each.dims) * rows / forward.rows / ways, each.layers * parts
            sums = held * 4 / np.dtype(self.dtype).itemsize
            trips = (passes + 1) * (ways - 1)
            found.append(self.collective("collective_permute", "context", "keys", held, times * trips))
            found.append(self.collective("collective_permute", "context", "keys", sums, times * ways))
        return found

    def collective(
        self, kind: Kind, axes: str | tuple[str, ...], purpose: Purpose, result: float | int, count: float | int
    ) -> CollectiveCost:
        """`count` collectives with `result` bytes each, over one axis or several at once."""
        axes = (axes,) if isinstance(axes, str) else tuple(axis for axis in self.mesh if axis in axes)
        spans = self._spans_of(axes)
        time = count * collectives.seconds(kind, result, spans)
        return CollectiveCost(
            kind, "+".join(axes), purpose, count, count * result, time, spans[-1].level if spans else "none"
        )

    def of_program(self, found: Sequence[Collective]) -> list[CollectiveCost]:
        """Collectives as the compiler has them, which may be of other kinds and over several axes at once."""
        costs = []
        for each in found:
            spans = self._spans_of(each.axes)
            if spans and each.count:
                kind = cast(Kind, each.kind)
                time = each.count * collectives.seconds(kind, each.bytes / each.count, spans)
                if kind == "collective_permute" and _purpose(each) == "partial sums":
                    time /= 2  # rows of experts go around both ways at once
                told = kind, "+".join(each.axes), _purpose(each), each.count, each.bytes, time, spans[-1].level
                costs.append(CollectiveCost(*told))
        return costs

    def _spans_of(self, axes: Sequence[str]) -> Sequence[Span]:
        """The innermost first; axes next to each other are one ring, which has the links of all."""
        present = [axis for axis in AXES if self.mesh.get(axis, 1) > 1]
        places = tuple(place for place, axis in enumerate(present) if axis in axes)
        if places not in self._spans:
            # What lies side by side is as far from its place among those asked for.
            runs = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
            beside = [[present[place] for _, place in run] for _, run in runs]
            spans = (axis_spans(self._devices, self._levels, self.mesh, *run) for run in reversed(beside))
            self._spans[places] = list(itertools.chain.from_iterable(spans))
        return self._spans[places]

    def weights_and_gradients(self, rows: Sequence[Row], tables: Collection[int] = ()) -> list[CollectiveCost]:
        """Gathers of stored weights and reductions of gradients, in one part.

        Args:
            tables: indices of the rows that are only looked up, for which `lookups` takes the place of gathers.
        """
        item = np.dtype(self.dtype).itemsize
        found = []
        for index, row in enumerate(rows):
            layers, stored = stacked(row), row.stored
            shard = elements(row) * item / layers
            if stored and not _by_columns(index, row, tables):
                uses = 2 if layers > 1 or in_blocks(row) else 1
                whole = layer_elements(row, self.mesh) * item
                found.append(self.collective("all_gather", stored, "weights", whole, uses * layers))
                found.append(self.collective("reduce_scatter", stored, "gradients", shard, layers))
            for axis in (*(axis for axis in STORE_AXES if axis not in (*stored, *row.paired)), "data"):
                if self.mesh.get(axis, 1) > 1:
                    found.append(self.collective("all_reduce", axis, "gradients", shard, layers))
        return found

    def lookups(
        self, rows: Sequence[Row], tables: Collection[int], tokens: float | int, parts: int
    ) -> list[CollectiveCost]:
        """What is sent of tables that are stored by columns, for `tokens` that one device looks up in each of `parts`:
        results one way, their gradients the other."""
        item = np.dtype(self.dtype).itemsize
        return [
            self.collective("all_to_all", row.stored, "weights", float(tokens * row.choices[-1].size * item), 2 * parts)
            for index, row in enumerate(rows)
            if _by_columns(index, row, tables)
        ]

    def breakdown(
        self, groups: tuple[GroupCost, ...], parts: Sequence[CollectiveCost], optimizer_bytes: float
    ) -> Breakdown:
        """Adds up; what overlaps is at most as long as what it hides behind."""
        collectives = merged(parts)
        hidden = sum((OVERLAP[each.purpose] * each.seconds for each in collectives), 0.0)
        compute = sum((group.seconds for group in groups), 0.0)
        exposed = sum((each.seconds for each in collectives), 0.0) - min(hidden, compute)
        return Breakdown(groups, optimizer_bytes / self.chip.hbm_bandwidth, collectives, exposed)


def merged(costs: Sequence[CollectiveCost]) -> tuple[CollectiveCost, ...]:
    """Those of one kind, axis and purpose as one."""
    alike: dict[tuple, list[CollectiveCost]] = {}
    for each in costs:
        alike.setdefault((each.kind, each.axis, each.purpose), []).append(each)
    return tuple(each[0] if len(each) == 1 else _together(each) for each in alike.values())


def repeated(costs: Sequence[CollectiveCost], parts: int, reductions: int) -> list[CollectiveCost]:
    """Costs of one part in all `parts`; gradients that cross `data` alone do so in `reductions` of them."""
    found = []
    for each in costs:
        times = reductions if (each.axis, each.purpose) == ("data", "gradients") else parts
        amounts = each.count * times, each.bytes * times, each.seconds * times
        found.append(CollectiveCost(each.kind, each.axis, each.purpose, *amounts, each.level))
    return found


def _by_columns(index: int, row: Row, tables: Collection[int]) -> bool:
    return index in tables and row.choices[-1].rule == "store"


def _purpose(each: Collective) -> Purpose:
    """What a compiled collective is for, by its axes and kind. What crosses `expert` alone is taken as rows of experts,
    though weights do so as well where nothing else stores them."""
    if "tensor" in each.axes or each.axes == ("expert",):
        return "partial sums"
    if each.kind == "collective_permute" and "context" in each.axes:
        return "keys"
    return "weights" if each.kind in ("all_gather", "all_to_all") else "gradients"


def _together(costs: Sequence[CollectiveCost]) -> CollectiveCost:
    first, *_ = costs
    sums = sum(each.count for each in costs), sum(each.bytes for each in costs), sum(each.seconds for each in costs)
    return CollectiveCost(first.kind, first.axis, first.purpose, *sums, first.level)


def stacked(row: Row) -> int:
    """Layers that a parameter holds, 1 if it is not a stack."""
    return math.prod(choice.size for choice in row.choices if choice.role == "stack")


def elements(row: Row) -> float:
    """Elements of a parameter on one device."""
    return row.bytes_per_device / np.dtype(row.dtype).itemsize


def in_blocks(row: Row) -> bool:
    """Whether it has the vocabulary: of such weights training gathers a block at a time, in both passes."""
    return any(choice.role == "vocab" for choice in row.choices)


def gathered_elements(row: Row, mesh: Mapping[str, int]) -> float:
    """Elements that stand gathered at once: two layers of a stack (one is used, one under way), or all of the rest.

    Blocks of a vocabulary are counted with the loss.
    """
    if in_blocks(row) or not row.stored:
        return 0.0
    return layer_elements(row, mesh) * (2 if stacked(row) > 1 else 1)


def layer_elements(row: Row, mesh: Mapping[str, int]) -> float:
    """Elements of one layer of a parameter where it is used: gathered, and split by the pair rule alone."""
    return elements(row) / stacked(row) * math.prod(mesh[axis] for axis in row.stored)

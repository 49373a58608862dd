"""A sketch of a layout, read from the flow of a forward pass: from the traced program, the roles and what moves.

The depth of a value is the number of weights on the longest way to it from the inputs; weights of one depth are a
column. Where a sum joins the residual stream (`Roles.joins`) a branch ends, and it begins at the depth of what it is
added to. Names of parameters serve as captions, and decide nothing.
"""

import bisect
import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from meshloom.sharding.algebra import PARTIAL, Split
from meshloom.sharding.classes import Dim, constituents, find, leaves_of
from meshloom.sharding.collectives import Kind as Collective
from meshloom.sharding.flow import Flow
from meshloom.sharding.layout import Choice, Row
from meshloom.sharding.provenance import Cause, Conversion
from meshloom.sharding.roles import Roles, infer
from meshloom.sharding.sketch import TIMES, Branch, Column, Cut, Frame, Moved, Side, Sketch, Weight, folded, likeness
from meshloom.sharding.values import Dims, Kind, Lookup, Product, Step, Value
from meshloom.sharding.work import trips_of


def sketch(known: Flow) -> Sketch:
    """Reads a picture's contents from the flow of a forward pass."""
    return _Reader(known, infer(known.program)).sketch()


@dataclasses.dataclass(frozen=True)
class _Use:
    """A weight's meeting with activations: at which step, over which dimensions, and what comes of it."""

    parameter: int
    step: int
    depth: int
    contracted: Dims
    picked: Dims
    result: Value
    looked_up: bool


class _Reader:
    """Uses of weights in runs: those of one scan, or between two; encoder and decoder have depths of their own."""

    def __init__(self, known: Flow, roles: Roles):
        self.known, self.roles = known, roles
        self.rows, self.mesh = known.layout.rows, known.layout.mesh.shape
        self.steps, self.trips = known.program.steps, trips_of(known.program)
        self.depth: dict[Value, int] = {}
        self.uses: list[_Use] = []
        self.attends: set[int] = set()  # steps at which two activations are multiplied head by head
        for index, step in enumerate(self.steps):
            self._read(index, step)
        self.runs = [list(run) for _, run in itertools.groupby(self.uses, lambda use: self._stack_of(use.parameter))]
        self.starts = [run[0].step for run in self.runs]
        # Biases of scores join heads, and loops what they carry: those end no branch.
        joins = {id(step) for step in roles.joins if step.equation is not None}
        self.joins = {
            index: step
            for index, step in enumerate(self.steps)
            if id(step) in joins and self._in_stream(step.outputs[0].dims)
        }
        used = {use.parameter for use in self.uses}
        self.left_out = [row for index, row in enumerate(self.rows) if index not in used]
        self.captions = _captions([self.rows[index].name for index in sorted(used)])
        self.of_weights, self.between = self._conversions()

    def _read(self, index: int, step: Step) -> None:
        """Depths of a step's results, and the weights that it uses."""
        depth = max((self.depth.setdefault(value, 0) for value in step.inputs), default=0)
        found: list[tuple[Value, Dims, Dims, bool]] = []
        match step.fact:
            case Product(over, batch, _, _):
                kinds = [value.kind for value in step.inputs[:2]]
                if Kind.ACTIVATION in kinds and Kind.WEIGHT in kinds:
                    found.append((step.inputs[kinds.index(Kind.WEIGHT)], over, batch, False))
                elif any(self.roles.by_leaf.get(leaf) == "heads" for leaf in leaves_of(batch)):
                    self.attends.add(index)
            case Lookup(rows, _) if step.inputs[0].kind == Kind.WEIGHT and step.inputs[1].kind == Kind.ACTIVATION:
                found.append((step.inputs[0], rows, (), True))
        for weight, over, batch, looked_up in found:
            for parameter in sorted(weight.parameters):
                self.uses.append(_Use(parameter, index, depth + 1, over, batch, step.outputs[0], looked_up))
        for value in step.outputs:
            self.depth[value] = max(self.depth.get(value, 0), depth + bool(found))

    def _stack_of(self, parameter: int) -> Dim | None:
        """The scan that runs over a parameter."""
        dims = zip(self.known.program.parameters[parameter].dims, self.rows[parameter].choices, strict=True)
        return next((find(dim) for dim, choice in dims if choice.role == "stack"), None)

    def _run_at(self, step: int) -> int:
        """The run that a step belongs to: the last that has begun."""
        return max(bisect.bisect_right(self.starts, step) - 1, 0)

    def _column_before(self, run: int, depth: int) -> tuple[int, int]:
        """Run and depth of the last weights before a value of this depth; of the first for what comes before all."""
        depths = sorted({use.depth for use in self.runs[run] if use.depth <= depth})
        if depths:
            return run, depths[-1]
        uses = self.runs[run - 1] if run else self.runs[0]
        return max(run - 1, 0), (max if run else min)(use.depth for use in uses)

    def _conversions(
        self,
    ) -> tuple[dict[tuple[int, int, int], list[Conversion]], dict[tuple[int, int], list[Conversion]]]:
        """Those of weights, by run, depth of use and parameter; and those of activations, by run and depth before."""
        of_weights: dict[tuple[int, int, int], list[Conversion]] = collections.defaultdict(list)
        between: dict[tuple[int, int], list[Conversion]] = collections.defaultdict(list)
        for each in self.known.conversions if self.uses else ():
            depth, run = self.depth[each.value], self._run_at(each.step)
            if each.step < len(self.steps) and each.before != PARTIAL:
                depth = max([depth, *(self.depth[value] for value in self.steps[each.step].outputs)])
            if each.value.kind != Kind.WEIGHT:
                between[self._column_before(run, depth)].append(each)
                continue
            for parameter in each.origin.parameters:
                # A weight is turned or cast before its use; a tied one is used twice.
                used = [use for use in self.uses if use.parameter == parameter]
                later = [use for use in used if use.step >= each.step] or used[-1:]
                for use in later[:1]:
                    of_weights[self._run_at(use.step), use.depth, parameter].append(each)
        return of_weights, between

    def sketch(self) -> Sketch:
        frames: list[Frame] = []
        for number, run in enumerate(self.runs):
            for frame in folded(self._branches(number, run)):
                same = frames and [likeness(each) for each in frames[-1].branches] == [
                    likeness(each) for each in frame.branches
                ]
                if same:
                    frames[-1] = dataclasses.replace(frames[-1], repeats=frames[-1].repeats + frame.repeats)
                else:
                    frames.append(frame)
        return Sketch(
            dict(self.mesh),
            self._stream(),
            tuple(frames),
            sum(row.is_vector for row in self.left_out),
            tuple(row.name for row in self.left_out if not row.is_vector),
            sum(row.bytes_total for row in self.rows),
            self.known.layout.bytes_per_device,
            dict(self.known.bytes_by_kind()),
        )

    def _branches(self, number: int, run: Sequence[_Use]) -> list[Branch]:
        """The branches of a run: its depths, parted where sums join the residual stream, and at what they join."""
        ends: dict[int, int] = {}
        for index, step in self.joins.items():
            low, high = sorted(self.depth[value] for value in step.inputs)
            if self._run_at(index) == number and low < high:
                ends[high] = max(low, ends.get(high, 0))
        depths = [use.depth for use in run]
        first, last = min(depths) - 1, max(depths)
        bounds = sorted({first, last, *(depth for depth in (*ends, *ends.values()) if first < depth < last)})
        branches = []
        for start, end in itertools.pairwise(bounds):
            held = [use for use in run if start < use.depth <= end]
            if held:
                branches.append(self._branch(number, held, ends=end in ends))
        return branches

    def _stream(self) -> str:
        """`residual stream 16 x 4096 x 4096, split over fsdp`."""
        if not self.joins:
            return ""
        value = next(iter(self.joins.values())).outputs[0]
        axes = [axis for axis, state in self.known.placements[value].items() if isinstance(state, Split)]
        over = f", split over {', '.join(axes)}" if axes else ", whole on every device"
        return f"residual stream {TIMES.join(str(dim.size) for dim in value.dims)}{over}"

    def _in_stream(self, dims: Dims) -> bool:
        """Whether one of the dimensions is the residual's."""
        return any(self.roles.by_leaf.get(leaf) == "residual" for leaf in leaves_of(dims))

    def _branch(self, run: int, uses: Sequence[_Use], *, ends: bool) -> Branch:
        """Uses of one branch; `ends` if it ends in a sum."""
        dim = self._stack_of(uses[0].parameter)
        stack = 1 if dim is None else dim.size
        # Layers that share what they compute are visited in turn, and trips are an average: of uses and moves alike.
        trips = min(self.trips.get(id(self.steps[use.step].equation), (float(stack), None))[0] for use in uses)
        by_depth = itertools.groupby(sorted(uses, key=lambda use: use.depth), lambda use: use.depth)
        columns = tuple(self._column(run, depth, list(held), stack, trips) for depth, held in by_depth)
        reads = self._in_stream(uses[0].contracted)
        return Branch(self._title(uses), columns, reads, ends or self._in_stream(uses[-1].result.dims), stack)

    def _title(self, uses: Sequence[_Use]) -> str:
        """What an expert would call it, by what it computes and the roles of what it holds."""
        roles = {role for use in uses for role in self.rows[use.parameter].roles}
        attends = any(uses[0].step < step < uses[-1].step for step in self.attends)
        convolves = any("conv" in self.steps[use.step].equation.primitive.name for use in uses)
        is_mlp = any(
            self._in_stream(use.result.dims)
            and any(self.roles.by_leaf.get(leaf) == "inner" for leaf in leaves_of(use.contracted))
            for use in uses
        )
        names = [
            *(["attention"] if attends else []),
            *(["experts"] if "expert" in roles else ["convolutions"] if convolves else ["MLP"] if is_mlp else []),
            *((["embedding"] if uses[0].looked_up else ["unembedding"]) if "vocab" in roles else []),
        ]
        return " and ".join(names)

    def _column(self, run: int, depth: int, uses: Sequence[_Use], stack: int, trips: float) -> Column:
        weights, split = {}, set()
        for use in uses:
            moved = _summed(self.of_weights[run, depth, use.parameter])
            weight = weights[use.parameter] = self._weight(use, moved, stack)
            own = {cut.axis for side in (weight.across, weight.down) for cut in side.cuts if cut.rule == "pair"}
            placed = self.known.placements[use.result]
            split |= {axis for axis, state in placed.items() if isinstance(state, Split)} & own
        return Column(tuple(weights.values()), tuple(sorted(split)), _summed(self.between[run, depth], trips))

    def _weight(self, use: _Use, moved: tuple[Moved, ...], stack: int) -> Weight:
        row, dims = self.rows[use.parameter], self.known.program.parameters[use.parameter].dims
        contracted, picked = leaves_of(use.contracted), leaves_of(use.picked)
        down: list[int] = []
        across: list[int] = []
        sheets: list[int] = []
        real = [place for place, choice in enumerate(row.choices) if choice.size > 1 and choice.role != "stack"]
        residual = [place for place in real if row.choices[place].role == "residual"]
        for place in real:
            leaves, role = set(constituents(dims[place])), row.choices[place].role
            is_window = role == "feature" and not self._in_product(dims[place])
            if leaves & picked or is_window or (role == "expert" and len(real) > 2):
                sheets.append(place)
            elif place in residual if 0 < len(residual) < len(real) else leaves & contracted:
                down.append(place)
            else:
                across.append(place)
        if len(down) > 1 and not across:  # produced and contracted alike
            across.append(down.pop(0))
        again = any(use.parameter == other.parameter and other.step < use.step for other in self.uses)
        return Weight(
            self.captions[row.name],
            self._side(row, dims, down),
            self._side(row, dims, across),
            self._side(row, dims, sheets) if sheets else None,
            row.bytes_per_device / stack,
            moved,
            again,
        )

    def _side(self, row: Row, dims: Dims, places: Sequence[int]) -> Side:
        choices = [row.choices[place] for place in places]
        cuts = tuple(Cut(axis, self.mesh[axis], each.rule) for each in choices if each.rule for axis in each.axes)
        text = TIMES.join(self._named(row.choices[place], dims[place]) for place in places)
        return Side(text, math.prod(each.size for each in choices), cuts)

    def _named(self, choice: Choice, dim: Dim) -> str:
        """`8 experts`, `inner 14336`, or the heads and the size of each."""
        role = choice.role.replace("_", " ")
        factors = self.roles.factors(dim)
        if choice.role in ("heads", "kv_heads") and math.prod(leaf.size for leaf in factors) == choice.size:
            count = math.prod(leaf.size for leaf in factors if self.roles.by_leaf.get(leaf) == "heads")
            return f"{count} {role}" + (f"{TIMES}{choice.size // count}" if count < choice.size else "")
        if choice.role == "expert":
            return f"{choice.size} experts"
        is_window = choice.role == "feature" and not self._in_product(dim)
        return f"{'window' if is_window else role} {choice.size}"

    def _in_product(self, dim: Dim) -> bool:
        """Whether weights produce or contract it; the positions of a convolution's window are neither."""
        return bool(set(constituents(dim)) & (self.roles.produced.keys() | self.roles.contracted.keys()))


def _summed(conversions: Iterable[Conversion], trips: float | None = None) -> tuple[Moved, ...]:
    """Conversions of one kind, axes and cause as one; bytes are those of one of the trips, each once in it for None."""
    total: dict[tuple[Collective, tuple[str, ...], Cause], float] = collections.defaultdict(float)
    for each in conversions:
        total[each.collective, each.axes, each.origin.cause] += (
            each.bytes if trips is None else each.total_bytes / trips
        )
    return tuple(Moved(kind, axes, round(count), cause) for (kind, axes, cause), count in total.items())


def _captions(names: Sequence[str]) -> dict[str, str]:
    """Full name -> what tells it apart: without an ending that most share, or the way to its stack of layers."""
    endings = collections.Counter(name.rpartition(".")[2] for name in names)
    captions = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > 1 and 2 * endings[parts[-1]] > len(names):
            parts.pop()
        numbers = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
        captions[name] = ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
    return captions

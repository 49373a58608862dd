"""The walk through a traced program that places every array and records every conversion.

Each operator takes the signature (`signatures.py`) that its operands come to with the fewest bytes on one device; where
they agree on one, that is free. Loops are read once and count as often as they run; what a loop carries is split if
its body makes it so, for which the walk may need a second pass.

A partial sum stays one through casts, transposes, reshapes and the sum of two such, as long as nobody else wants it,
and is reduced where it is used otherwise. What was gathered or reduced once is not again, except for the next trip of
a loop. Weights that are stored in parts are gathered where they meet activations, and no weight is moved otherwise: it
is taken as the larger of the two.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from meshloom.core.topology import BATCH_AXES, axes_of
from meshloom.sharding.algebra import BROADCAST, PARTIAL, Split, State, conversion, cost
from meshloom.sharding.classes import find
from meshloom.sharding.collectives import Kind as Collective
from meshloom.sharding.layout import Layout
from meshloom.sharding.provenance import Conversion, Origin, Provenance
from meshloom.sharding.reshaping import reshaped
from meshloom.sharding.signatures import Signature, signatures
from meshloom.sharding.submesh import axis_of, factored
from meshloom.sharding.trace import Program, Step
from meshloom.sharding.values import Kind, Lookup, Meeting, Region, Source, Value
from meshloom.sharding.work import trips_of

# More bytes than any array has: weights stay where they are.
_NEVER = 1e30


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Attention over tokens that lie `over` factors of the mesh; `held` is how its inputs were placed."""

    region: Region
    over: tuple[str, ...]
    held: dict[Value, dict[str, State]]


class Walk:
    """One pass over the steps, on the factored mesh.

    Args:
        carries: the splits of loops' carries that an earlier pass found; `settle` adds to them.
    Attributes:
        made: every value as it was made; in `placements` sums that were reduced since are whole.
    """

    def __init__(self, program: Program, layout: Layout, carries: dict[Value, dict[str, State]]):
        self.program = program
        self.layout = layout
        self.carries = carries
        self.mesh = factored(layout.mesh.shape)
        self.made: dict[Value, dict[str, State]] = {}
        self.placements: dict[Value, dict[str, State]] = {}
        self.conversions: list[Conversion] = []
        self._provenance = Provenance(program, layout)
        self._proposed: dict[Value, dict[str, State]] = {}
        self._item_bytes: dict[Value, int] = {}
        self._sums: dict[Value, Origin] = {}
        self._gathered: set[tuple[Value, str]] = set()
        self._made_in: dict[Value, float] = {}  # how often what makes a value runs
        self._handed_on: set[Value] = set()  # into a loop or out of it: made anew in every trip
        self._trips = trips_of(program)
        self._share = 1.0  # of the tokens of an array, that one device has of a ring
        self._uses = collections.Counter(value for step in program.steps for value in step.inputs)
        self._uses.update(program.outputs)

    def run(self) -> None:
        """Fills `made`, `placements` and `conversions`."""
        for value in self.program.inputs:
            self.placements[value] = self._as_batch(value)
        regions = {index: region for region in self.program.regions for index in range(region.first, region.end)}
        attended = {region.first: region for region in self.program.attended}
        ring: _Ring | None = None
        for index, step in enumerate(self.program.steps):
            if region := attended.get(index):
                ring = self._begin_ring(index, region)
            self._read(step)
            if region := regions.get(index):
                self._within(index, step, region)
            elif isinstance(step.fact, Source):
                self._enter(index, step)
            elif isinstance(step.fact, Meeting) and step.equation is None:
                self._close(index, step)
            elif step.equation is not None and step.equation.primitive.name == "reshape":
                self._reshape(index, step)
            elif columns := self._columns(step):
                self._look_up(index, step, columns)
            else:
                self._operate(index, step)
            for value in (*step.inputs, *step.outputs):
                self.made.setdefault(value, dict(self.placements[value]))
            if ring is not None and index + 1 == ring.region.end:
                self._end_ring(ring)
                ring = None
        end = Step(self.program.outputs, ())
        for value in self.program.outputs:
            self._reduce(len(self.program.steps), end, value)

    def settle(self) -> bool:
        """Whether a loop turned out to split what it carries, so that another pass is needed."""
        for value, states in self._proposed.items():
            self.carries[value] = self.carries.get(value, {}) | states
        return bool(self._proposed)

    # -- what enters --

    def _as_batch(self, value: Value) -> dict[str, State]:
        """Rows and tokens as batches have them, where these are the value's first two dimensions."""
        rows = self.program.inputs[0].dims[:1]
        placement: dict[str, State] = {}
        if list(map(find, value.dims[:1])) != list(map(find, rows)):
            return placement
        for dimension, own in enumerate(value.dims[:2]):
            axes = axes_of(self.layout.batch_spec[dimension])
            factors = [factor for factor in self.mesh if axis_of(factor) in axes]
            if own.size % math.prod(self.mesh[factor] for factor in factors) == 0:
                placement |= dict.fromkeys(factors, Split(dimension))
        return placement

    def _read(self, step: Step) -> None:
        """Places parameters and constants at their first use; notes sizes of elements, trips and makers."""
        variables: Any = step.equation.invars if step.equation is not None else ()
        for value, var in zip(step.inputs, variables, strict=False):
            self._item_bytes[value] = _item_bytes(var)
        for value in step.inputs:
            if value not in self.placements:
                self.placements[value] = self._stored(value)
        inherited = max((self._item_bytes.get(value, 0) for value in step.inputs), default=0)
        variables = step.equation.outvars if step.equation is not None else ()
        trips = self._trips_of(step)
        for index, value in enumerate(step.outputs):
            self._item_bytes[value] = _item_bytes(variables[index]) if index < len(variables) else inherited
            self._made_in[value] = trips
        if step.equation is None:
            self._handed_on.update(step.outputs)
        self._provenance.note(step)

    def _stored(self, value: Value) -> dict[str, State]:
        """The layout's spec of a parameter; constants are whole."""
        if value.kind != Kind.WEIGHT or len(value.parameters) != 1:
            return {}
        (index,) = value.parameters
        if value.dims != self.program.parameters[index].dims:
            return {}
        self._item_bytes[value] = self.program.parameters[index].dtype.itemsize
        spec = map(axes_of, self.layout.rows[index].spec)
        dimension_of = {axis: dimension for dimension, axes in enumerate(spec) for axis in axes}
        return {factor: Split(dimension_of[axis_of(factor)]) for factor in self.mesh if axis_of(factor) in dimension_of}

    # -- steps --

    def _enter(self, index: int, step: Step) -> None:
        """The carry of a loop begins as what it is initialized with, split as the loop splits it."""
        for old, new in zip(step.inputs, step.outputs, strict=False):
            self._reduce(index, step, old)
            self.placements[new] = self.placements[old] | self.carries.get(new, {})

    def _close(self, index: int, step: Step) -> None:
        """What a loop hands on has to lie as what it began with."""
        before, after = step.inputs
        carried, result = self.placements[before], self.placements[after]
        gained: dict[str, State] = {
            axis: state
            for axis, state in result.items()
            if isinstance(state, Split) and carried.get(axis, BROADCAST) == BROADCAST
        }
        if gained:
            self._proposed[before] = gained
        self._convert(index, step, after, carried)
        self.placements[step.outputs[0]] = dict(carried)

    def _reshape(self, index: int, step: Step) -> None:
        value, result = step.inputs[0], step.outputs[0]
        if self._uses[value] > 1:
            self._reduce(index, step, value)
        before, after = (tuple(dim.size for dim in each.dims) for each in (value, result))
        needed, placement = reshaped(self.placements[value], before, after, self.mesh)
        self._convert(index, step, value, needed)
        self.placements[result] = dict(placement)
        self._hand_on(step, [])

    def _columns(self, step: Step) -> tuple[str, ...]:
        """Factors over which a table's columns are stored and the ids that are looked up in it are split."""
        if not isinstance(step.fact, Lookup) or step.inputs[0].kind != Kind.WEIGHT or len(step.inputs[0].dims) != 2:
            return ()
        table, ids = (self.placements[value] for value in step.inputs[:2])
        stored = tuple(factor for factor, state in table.items() if state == Split(1) and factor in ids)
        return () if any(state == Split(0) and factor in ids for factor, state in table.items()) else stored

    def _look_up(self, index: int, step: Step, columns: tuple[str, ...]) -> None:
        """As `sharding.lookup` does it: all ids to all that store columns, and rows to where their ids are."""
        (table, ids), (rows, *_) = step.inputs[:2], step.outputs
        placement = dict(self.placements[ids])
        axes, trips = tuple(dict.fromkeys(map(axis_of, columns))), self._trips_of(step)
        origin = self._provenance.of_lookup(step)
        ways = math.prod(self.mesh[factor] for factor in placement)
        gathered = self._bytes(ids) / (ways / math.prod(self.mesh[factor] for factor in columns))
        by_row, by_column = placement[columns[0]], Split(len(rows.dims) - 1)
        told: tuple[tuple[Value, State, State, Collective, float], ...] = (
            (ids, by_row, BROADCAST, "all_gather", gathered),
            (rows, by_column, by_row, "all_to_all", self._bytes(rows) / ways),
        )
        for value, before, after, kind, moved in told:
            self.conversions.append(Conversion(index, value, axes, before, after, kind, moved, trips, origin))
        held = [factor for factor, state in self.placements[table].items() if state == Split(0)]
        self.placements[rows] = placement | dict.fromkeys(held, PARTIAL)
        self._hand_on(step, [Signature((Split(0), BROADCAST), (PARTIAL,))] if held else [])

    def _within(self, index: int, step: Step, region: Region) -> None:
        """Nothing moves before the last step: weights have arrived gathered. Over the axes that split them otherwise,
        rows that lie over these as well are gathered, and one sum makes the result as the rows were."""
        for value in step.outputs:
            self.placements[value] = {}
        if index + 1 < region.end:
            return
        whole = Step(region.inputs, region.outputs, equation=region.equation)
        self._read(whole)
        weights = [value for value in region.inputs if value.kind == Kind.WEIGHT]
        over: set[str] = set()
        for value in weights:
            held = self.placements[value].items()
            kept = {factor: state for factor, state in held if not self._provenance.is_stored(value, axis_of(factor))}
            over |= kept.keys()
            self._convert(index, whole, value, kept)

        def as_batch(value: Value) -> dict[str, State]:
            return {
                factor: state
                for factor, state in self.placements[value].items()
                if axis_of(factor) in (*BATCH_AXES, "context") and isinstance(state, Split)
            }

        rows, out, chosen = region.inputs[0], region.outputs[0], region.inputs[2]
        known = next(each for each in range(region.first, region.end) if chosen in self.program.steps[each].inputs)
        for value in region.inputs:  # they move once it is known who wants them
            if value.kind != Kind.WEIGHT:
                kept = {factor: state for factor, state in as_batch(value).items() if factor not in over}
                self._convert(known, whole, value, kept)
        self.placements[out] = as_batch(rows) | dict.fromkeys(over, PARTIAL)
        self._sums[out] = self._provenance.of_region(whole, frozenset().union(*(each.parameters for each in weights)))
        self._convert(index, whole, out, as_batch(rows))

    def _begin_ring(self, index: int, region: Region) -> "_Ring | None":
        """Takes tokens off the axis that splits them, over which keys and values travel: what the steps of attention
        say of one device's tokens holds for each. None where it is no ring: a device of one has whole heads."""
        queries, keys, values = region.inputs[:3]
        over = tuple(factor for factor in self.mesh if axis_of(factor) == "context")
        along = [self.placements.get(each, {}).get(factor) for each in (queries, keys, values) for factor in over]
        whole_heads = queries.dims[2].size % self.layout.mesh.shape.get("tensor", 1) == 0
        if not over or set(along) != {Split(1)} or not whole_heads:
            return None
        self._share = 1 / math.prod(self.mesh[factor] for factor in over)
        whole = Step(region.inputs, region.outputs, equation=region.equation)
        trips = self._trips_of(whole) * (1 / self._share - 1)
        for value in (keys, values):
            ways = math.prod(self.mesh[factor] for factor in self.placements[value] if factor not in over)
            told = Conversion(
                index,
                value,
                ("context",),
                Split(1),
                Split(1),
                "collective_permute",
                self._bytes(value) / ways,
                trips,
                self._provenance.of_ring(whole, value),
            )
            self.conversions.append(told)
        held = {value: dict(self.placements[value]) for value in region.inputs if value in self.placements}
        for value, placement in held.items():
            self.placements[value] = {axis: state for axis, state in placement.items() if axis not in over}
        return _Ring(region, over, held)

    def _end_ring(self, ring: "_Ring") -> None:
        """Rows [B, T, N, H] and statistics [B, N, T] lie as the queries do."""
        self._share = 1.0
        self.placements |= ring.held
        for value, tokens in zip(ring.region.outputs, (1, 2), strict=True):
            self.placements[value] |= dict.fromkeys(ring.over, Split(tokens))
            self.made[value] = dict(self.placements[value])

    def _operate(self, index: int, step: Step) -> None:
        inputs = [self.placements[value] for value in step.inputs]
        for value in step.outputs:
            if value not in step.inputs:  # what a kernel writes into lies as it did
                self.placements[value] = {}
        if not any(inputs):
            return
        wanted: list[dict[str, State]] = [{} for _ in step.inputs]
        taken: list[Signature] = []
        known = signatures(step)
        choices = [self._cheapest(step, known, axes) for axes in self._alike(step)]
        # What costs nothing is settled first: the others then know how large the rest is.
        for price, axes, chosen in sorted(choices, key=lambda choice: choice[0]):
            chosen = self._cheapest(step, known, axes)[2] if price else chosen
            taken.append(chosen)
            for axis in axes:
                for placement, state in zip(wanted, chosen.operands, strict=True):
                    placement[axis] = state
                for value, state in zip(step.outputs, chosen.results, strict=True):
                    if state != BROADCAST:
                        self.placements[value][axis] = state
        for value, placement in zip(step.inputs, wanted, strict=True):
            self._convert(index, step, value, placement)
        self._hand_on(step, taken)
        if any(signature.eager for signature in taken):
            for value in step.outputs:
                self._reduce(index, step, value)

    def _alike(self, step: Step) -> list[tuple[str, ...]]:
        """Factors of each axis, together where all operands are placed alike over them; axes that split none are left
        out."""
        groups: dict[tuple[str, tuple[State, ...]], list[str]] = {}
        for factor in self.mesh:
            states = tuple(self.placements[value].get(factor, BROADCAST) for value in step.inputs)
            if any(state != BROADCAST for state in states):
                groups.setdefault((axis_of(factor), states), []).append(factor)
        return [tuple(factors) for factors in groups.values()]

    def _cheapest(
        self, step: Step, known: list[Signature], axes: tuple[str, ...]
    ) -> tuple[float, tuple[str, ...], Signature]:
        """Price, axes and signature with the fewest bytes over `axes`; partial results count their reduction."""
        with_activation = any(value.kind == Kind.ACTIVATION for value in step.inputs)
        gathered = {
            value for value in step.inputs if with_activation and self._provenance.is_stored(value, axis_of(axes[0]))
        }
        states = [
            BROADCAST if value in gathered else self.placements[value].get(axes[0], BROADCAST) for value in step.inputs
        ]

        def price(signature: Signature) -> tuple[float, int]:
            total = 0.0
            for value, old, new in zip(step.inputs, states, signature.operands, strict=True):
                moved = self._moved(value, axes, old, new)
                total += _NEVER if moved and value.kind == Kind.WEIGHT and with_activation else moved
            if PARTIAL in signature.results and PARTIAL not in signature.operands:
                total += sum(self._moved(value, axes, PARTIAL, BROADCAST) for value in step.outputs)
            return total, sum(old != new for old, new in zip(states, signature.operands, strict=True))

        whole = Signature((BROADCAST,) * len(step.inputs), (BROADCAST,) * len(step.outputs))
        best = min([*self._open_to(step, known, states), whole], key=price)
        return price(best)[0], axes, best

    def _open_to(self, step: Step, known: list[Signature], states: list[State]) -> list[Signature]:
        """Signatures that keep something split, or partial if all operands are and nobody else wants them."""
        forwards = all(state == PARTIAL for state in states) and all(self._uses[value] == 1 for value in step.inputs)
        return [
            each
            for each in known
            if (
                forwards
                if PARTIAL in each.operands
                else any(old == new != BROADCAST for old, new in zip(states, each.operands, strict=True))
            )
        ]

    def _moved(self, value: Value, axes: tuple[str, ...], old: State, new: State) -> float:
        if old == new:
            return 0.0
        others = {axis: state for axis, state in self.placements[value].items() if axis not in axes}
        before, after = (others | dict.fromkeys(axes, state) for state in (old, new))
        return cost(before, after, self._bytes(value), self.mesh)

    def _hand_on(self, step: Step, taken: list[Signature]) -> None:
        """Where the partial sums of the results come from."""
        made = any(PARTIAL in each.results and PARTIAL not in each.operands for each in taken)
        for value in step.outputs:
            axes = {axis_of(factor) for factor, state in self.placements[value].items() if state == PARTIAL}
            if axes:
                known = next((self._sums[each] for each in step.inputs if each in self._sums), None)
                self._sums[value] = self._provenance.of_sum(step, axes) if made or known is None else known

    # -- conversions --

    def _reduce(self, index: int, step: Step, value: Value) -> None:
        """Sums up what is partial."""
        placement = self.placements.setdefault(value, {})
        if PARTIAL in placement.values():
            whole = {axis: BROADCAST if state == PARTIAL else state for axis, state in placement.items()}
            self._convert(index, step, value, whole)

    def _convert(self, index: int, step: Step, value: Value, after: Mapping[str, State]) -> None:
        """Records what it takes to have `value` placed as `after`; what is gathered or summed stays so."""
        placement = self.placements[value]
        before = {axis: BROADCAST if (value, axis) in self._gathered else state for axis, state in placement.items()}
        for each in conversion(before, after, self._bytes(value), self.mesh):
            axes = tuple(dict.fromkeys(map(axis_of, each.axes)))
            old, new = before[each.axes[0]], after.get(each.axes[0], BROADCAST)
            summed = old == PARTIAL
            met = self._met(step, value, axes, old, new)
            origin = self._sums[value] if summed else self._provenance.of_operand(step, value, axes, old, new, met)
            # Where a value is made, not in a loop that it enters unchanged: XLA moves such work out of loops.
            made_here = summed or step.equation is None or value not in self._handed_on
            trips = self._made_in.get(value, 1.0) if made_here else self._trips_of(step)
            self.conversions.append(Conversion(index, value, axes, old, new, each.kind, each.bytes, trips, origin))
        for axis, old in before.items():
            new = after.get(axis, BROADCAST)
            if isinstance(old, Split) and new == BROADCAST:
                self._gathered.add((value, axis))
            elif old == PARTIAL and new != PARTIAL:
                placement[axis] = new

    def _met(self, step: Step, value: Value, axes: tuple[str, ...], old: State, new: State) -> bool:
        """Whether rows that lie over the axes meet what the pair rule splits over them, or what that made of rows goes
        back to where these are."""
        if not set(axes) <= set(BATCH_AXES):
            return False

        def is_paired(value: Value, state: State, axis: str) -> bool:
            return isinstance(state, Split) and self._provenance.is_paired(value, state.dimension, axis)

        others = [other for other in step.inputs if other != value]
        return all(
            any(is_paired(other, self._on(other, axis), axis) for other in others)
            or (isinstance(new, Split) and is_paired(value, old, axis))
            for axis in axes
        )

    def _on(self, value: Value, axis: str) -> State:
        """How a value lies on an axis, which has one state on all of its factors but for kv heads."""
        states = self.placements.get(value, {})
        return next((state for factor, state in states.items() if axis_of(factor) == axis), BROADCAST)

    # -- reading --

    def _bytes(self, value: Value) -> float:
        return self._share * math.prod(dim.size for dim in value.dims) * self._item_bytes.get(value, 0)

    def _trips_of(self, step: Step) -> float:
        if step.equation is not None:
            return self._trips.get(id(step.equation), (1.0, None))[0]
        return max((self._made_in.get(value, 1.0) for value in step.inputs), default=1.0)


def _item_bytes(var: Any) -> int:
    """Bytes of an element; random keys and references count as those that JAX says they have."""
    return getattr(getattr(var.aval, "dtype", None), "itemsize", 0)

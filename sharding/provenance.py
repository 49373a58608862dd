"""Why arrays move between devices: the rule that intends a conversion, and the line of the module that asks for it.

What the two rules of layouts intend:

* *store*: a weight that the store rule splits is gathered where it meets an activation; rows of a table that is split
  by columns come from where they are stored.
* *pair*, *vocab*: a product or a lookup over a dimension that the pair rule splits leaves sums to be made. Rows of a
  batch that lie over `expert` go to all that hold experts, or what these make of them comes back.
* *context*: keys and values go round a ring; any other product of two activations needs one of them for all tokens,
  or sums over them.
* *reduction*: sums and maxima over a split dimension, as in a softmax; they are small.

All else is *silent*: the partitioner would move activations or weights without being asked.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from jax.extend import source_info_util

from meshloom.sharding.algebra import BROADCAST, State
from meshloom.sharding.classes import Dim, leaves, leaves_of
from meshloom.sharding.collectives import Kind as Collective
from meshloom.sharding.layout import Layout
from meshloom.sharding.trace import Program, Step
from meshloom.sharding.values import Kind, Lookup, Product, Value
from meshloom.sharding.work import bodies_of

Cause = Literal["store", "pair", "vocab", "context", "reduction", "silent"]

# Flax's frames and those of Meshloom's kernels are not the user's.
_NOT_THE_USERS = ("/flax/", str(pathlib.Path(__file__).parents[1] / "pallas_kernels"))
# Calls on the way from a module to one of its operators.
_FRAMES = 64


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a conversion comes from.

    Attributes:
        cause: the rule that intends it, or "silent".
        parameters: indices of those that it is, or whose products it sums.
        source: `file:line` in the user's module, and `scope` the named scopes there; empty where unknown.
    """

    cause: Cause
    reason: str
    parameters: frozenset[int]
    source: str
    scope: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """One collective that an operator's operand, or a result of the program, needs.

    Attributes:
        step: index into the program's steps; the number of steps for a result of the program.
        value: what is converted.
        axes: of the mesh.
        before, after: its states on these axes.
        bytes: of the result on one device, each time.
        trips: how often it runs in one forward pass.
    """

    step: int
    value: Value
    axes: tuple[str, ...]
    before: State
    after: State
    collective: Collective
    bytes: float
    trips: float
    origin: Origin

    @property
    def total_bytes(self) -> float:
        """Of all trips."""
        return self.bytes * self.trips


class Provenance:
    """Knows which equation made a value, and which classes the pair rule splits."""

    def __init__(self, program: Program, layout: Layout):
        self._program = program
        self._makers: dict[Value, Any] = {}
        # JAX keeps the bodies of its own functions (`jnp.sort`) without the user's frames: those are on the call.
        self._around = dict(_enclosing(program.jaxpr))
        self._holders: dict[Dim, set[int]] = collections.defaultdict(set)
        for index, (parameter, row) in enumerate(zip(program.parameters, layout.rows, strict=True)):
            for dim, choice in zip(parameter.dims, row.choices, strict=True):
                if choice.rule == "pair":
                    self._holders[leaves(dim)[0]].add(index)
        self._stored = [row.stored for row in layout.rows]

    def is_stored(self, value: Value, axis: str) -> bool:
        """Whether the store rule splits a weight over the axis, or what the weight is made of."""
        return any(axis in self._stored[index] for index in value.parameters)

    def is_paired(self, value: Value, dimension: int, axis: str) -> bool:
        """Whether a dimension that is split over the axis is one of those that the pair rule splits."""
        held = self._holders.keys() & leaves_of([value.dims[dimension]])
        return bool(held) and not self.is_stored(value, axis)

    def note(self, step: Step) -> None:
        """Remembers what made the results of a step: its equation, or that of what it hands on."""
        made = (self._makers.get(value) for value in step.inputs)
        maker = step.equation or next((equation for equation in made if equation is not None), None)
        self._makers |= dict.fromkeys(step.outputs, maker)

    def of_sum(self, step: Step, axes: set[str]) -> Origin:
        """Of the reduction of the partial result of a step."""
        place = self._place(step, step.outputs[0])
        weights = frozenset().union(*(each.parameters for each in step.inputs[:2] if each.kind == Kind.WEIGHT))
        match step.fact:
            case Product() if weights:
                return Origin(
                    "pair", f"a product with {self._names(weights)} sums over a split dimension", weights, *place
                )
            case Product(contracted) if paired := self._holders.keys() & leaves_of(contracted):
                holders = frozenset().union(*(self._holders[leaf] for leaf in paired))
                return Origin("pair", f"a product sums over what {self._names(holders)} split", holders, *place)
            case Product() if axes == {"context"}:
                return Origin("context", "a product of two activations sums over the tokens", weights, *place)
            case Product():
                return Origin("silent", "a product of two activations sums over a split dimension", weights, *place)
            case Lookup() if weights:
                return Origin("vocab", f"each device looks up its own rows of {self._names(weights)}", weights, *place)
            case Lookup():
                return Origin("silent", "rows are picked from a split dimension of an activation", weights, *place)
        return Origin("reduction", "a reduction over a split dimension", weights, *place)

    def of_region(self, step: Step, weights: frozenset[int]) -> Origin:
        """Of the sum that ends what every device does by itself with its part of these weights."""
        reason = f"each device adds what its own part of {self._names(weights)} makes"
        return Origin("pair", reason, weights, *self._place(step, step.outputs[0]))

    def of_ring(self, step: Step, value: Value) -> Origin:
        """Of keys and values that attention sends from device to device."""
        sizes = [dim.size for dim in value.dims]
        return Origin(
            "context", f"{sizes} go round a ring, for the queries of all", frozenset(), *self._place(step, value)
        )

    def of_lookup(self, step: Step) -> Origin:
        """Of ids and rows on their way to and from the columns of a table."""
        table = step.inputs[0]
        reason = f"columns of {self._names(table.parameters)} are looked up where they are stored"
        return Origin("store", reason, table.parameters, *self._place(step, step.outputs[0]))

    def of_operand(self, step: Step, value: Value, axes: tuple[str, ...], old: State, new: State, met: bool) -> Origin:
        """Of the conversion of a split operand to what a step needs; `met` if over these axes it meets what the pair
        rule splits over them."""
        place = self._place(step, value)
        name = self._names(value.parameters) if value.kind == Kind.WEIGHT else "an activation"
        what = f"{name} {[dim.size for dim in value.dims]}"
        operator = "a loop" if step.equation is None else f"`{step.equation.primitive.name}`"
        if new == BROADCAST and all(self.is_stored(value, axis) for axis in axes):
            reason = f"{what} is stored over {', '.join(axes)} and gathered at use"
            return Origin("store", reason, value.parameters, *place)
        activations = all(each.kind == Kind.ACTIVATION for each in step.inputs[:2])
        if axes == ("context",) and isinstance(step.fact, Product) and activations and new == BROADCAST:
            return Origin("context", f"{what} is needed for all tokens by {operator}", value.parameters, *place)
        if met and value.kind == Kind.ACTIVATION:
            reason = f"{what} is {old} over {', '.join(axes)}, and meets what the pair rule splits over it"
            return Origin("pair", reason, value.parameters, *place)
        wanted = "whole" if new == BROADCAST else f"as {new}"
        reason = f"{what} is {old} over {', '.join(axes)}, but {operator} needs it {wanted}"
        return Origin("silent", reason, value.parameters, *place)

    def _place(self, step: Step, value: Value) -> tuple[str, str]:
        """`file:line` of the user's code that a step is of, or else what made `value`; and the scopes around it."""
        for equation in (step.equation, self._makers.get(value)):
            while equation is not None:
                place = source_of(equation)
                if place[0]:
                    return place
                equation = self._around.get(id(equation))
        return "", ""

    def _names(self, parameters: frozenset[int]) -> str:
        names = [self._program.parameters[index].name for index in sorted(parameters)]
        return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _enclosing(jaxpr: Any) -> Iterator[tuple[int, Any]]:
    """The id of every equation in a body, with the equation around it; the last one if several share the body."""
    for equation in jaxpr.eqns:
        for body, _ in bodies_of(equation):
            yield from ((id(inner), equation) for inner in body.eqns)
            yield from _enclosing(body)


def source_of(equation: Any) -> tuple[str, str]:
    """`file:line` in the user's module, and the named scopes there; empty where unknown."""
    frames = source_info_util.summarize(equation.source_info, num_frames=_FRAMES).splitlines()  # the innermost last
    own = next((frame for frame in reversed(frames) if not any(other in frame for other in _NOT_THE_USERS)), "")
    return own.split(" ")[0].rpartition(":")[0], str(equation.source_info.name_stack)

"""What one parameter or one activation costs in movement between devices, for people and as data.

For a parameter: the collectives it causes, and what its split over each axis would cost on the dimension that comes
next. For an activation: how it lies, which operator and which rule made it so, and what it would cost to have it whole.
All from a `Flow`, hence of the forward pass.
"""

import dataclasses
import math
from collections.abc import Iterator

from meshloom.core.errors import ShardingError
from meshloom.core.topology import BATCH_AXES
from meshloom.sharding.algebra import Split, local_bytes, text
from meshloom.sharding.classes import cuts, leaves
from meshloom.sharding.explain import bytes_text, spec_text
from meshloom.sharding.flow import Flow, flow
from meshloom.sharding.layout import Choice, Row
from meshloom.sharding.provenance import Conversion, source_of
from meshloom.sharding.roles import Roles, infer
from meshloom.sharding.submesh import axis_of, factored
from meshloom.sharding.trace import Step
from meshloom.sharding.values import Kind, Lookup, Product


@dataclasses.dataclass(frozen=True)
class RunnerUp:
    """The same parameter with its split over `axis` on dimension `instead`, all other parameters as they are.

    What split that dimension, if anything did, is on `dimension` then.

    Attributes:
        bytes: how many more bytes of results there are on one device in one forward pass; negative if fewer.
        conversions: how many more conversions of one forward pass there are, trips counted.
    """

    axes: tuple[str, ...]
    dimension: int
    instead: int
    bytes: float
    conversions: float

    def __str__(self) -> str:
        change = f"{bytes_text(round(abs(self.bytes)))} {'more' if self.bytes >= 0 else 'less'}"
        count = (
            f"{abs(self.conversions):g} {'more' if self.conversions > 0 else 'fewer'}"
            if self.conversions
            else "as many"
        )
        axes = ", ".join(self.axes)
        return f"{axes} on dimension {self.instead} instead of {self.dimension}: {change}, in {count} collectives"


@dataclasses.dataclass(frozen=True)
class ParameterFlow:
    """What one parameter moves: `str()` of it is for people."""

    row: Row
    conversions: tuple[Conversion, ...]
    runners_up: tuple[RunnerUp, ...]

    @property
    def total_bytes(self) -> float:
        """Bytes of results on one device in one forward pass."""
        return sum((each.total_bytes for each in self.conversions), 0.0)

    def __str__(self) -> str:
        lines = [f"{self.row.name}  {spec_text(self.row)}"]
        lines += [f"  {conversion_text(each)}" for each in self.conversions] or ["  moves nothing"]
        if self.conversions:
            lines.append(f"  {bytes_text(round(self.total_bytes))} on each device in a forward pass")
        lines += [f"  {each}" for each in self.runners_up]
        compared = {each.axes for each in self.runners_up}
        split = [choice.axes for choice in self.row.choices if choice.axes and choice.axes not in compared]
        return "\n".join([*lines, *(f"  {', '.join(axes)}: no other dimension could take it" for axes in split)])


@dataclasses.dataclass(frozen=True)
class Whole:
    """The alternative to one split of an activation: all of it on every device.

    Attributes:
        rule: why it is split, in words.
        bytes: that one device would hold, the result of one all_gather.
    """

    axis: str
    dimension: int
    role: str
    rule: str
    bytes: float

    def __str__(self) -> str:
        instead = f"whole instead: an all_gather of {bytes_text(round(self.bytes))}"
        return f"{self.axis} on dimension {self.dimension} ({self.role}) {self.rule}; {instead}"


@dataclasses.dataclass(frozen=True)
class ActivationFlow:
    """How the result of one operator lies and why: `str()` of it is for people."""

    operator: str
    shape: tuple[int, ...]
    placement: str
    operands: tuple[str, ...]
    conversions: tuple[Conversion, ...]
    alternatives: tuple[Whole, ...]
    source: str
    scope: str

    def __str__(self) -> str:
        of = f" of {' and '.join(self.operands)}" if self.operands else ""
        first = f"{self.source}  {self.operator} {list(self.shape)}: {self.placement}, made by `{self.operator}`{of}"
        moved = [conversion_text(each) for each in self.conversions]
        return "\n".join([first, *(f"  {each}" for each in (*moved, *self.alternatives))])


def conversion_text(conversion: Conversion) -> str:
    """`all_gather over fsdp (S(0) -> B), 4.00 KiB, 2 times: why (file:line)`."""
    times = "" if conversion.trips == 1 else f", {conversion.trips:g} times"
    source = f" ({conversion.origin.source})" if conversion.origin.source else ""
    return (
        f"{conversion.collective} over {', '.join(conversion.axes)} ({conversion.before} -> {conversion.after}), "
        f"{bytes_text(round(conversion.bytes))}{times}: {conversion.origin.reason}{source}"
    )


def explain_flow(known: Flow, name: str) -> str:
    """What a parameter of this name moves; or how the activations lie that a line or a named scope makes.

    Args:
        name: of a parameter, `file.py:line`, or named scopes as in `layers/attention`.
    Raises:
        ShardingError: neither a parameter nor an activation is known by that name.
    """
    if any(row.name == name for row in known.layout.rows):
        return str(parameter_flow(known, name))
    if found := activations(known, name):
        return "\n".join(map(str, found))
    scopes = (source_of(step.equation)[1] for step in known.program.steps if step.equation is not None)
    outermost = sorted({scope.partition("/")[0] for scope in scopes})
    named = [scope for scope in outermost if scope.isidentifier()]  # an einsum's subscripts are a scope too
    try:
        known.layout.row(name)
    except ShardingError as error:
        raise ShardingError(f"{error}; named scopes are {', '.join(named) or 'not in this module'}") from None
    raise ShardingError(f"nothing is known by the name {name!r}")


def parameter_flow(known: Flow, name: str) -> ParameterFlow:
    """The collectives that the parameter `name` causes, and the runner-up for each axis that splits it.

    Raises:
        ShardingError: there is no such parameter; the message lists the nearest names.
    """
    row = known.layout.row(name)
    index = known.layout.rows.index(row)
    own = tuple(each for each in known.conversions if index in each.origin.parameters)
    runners_up = (_runner_up(known, index, dimension) for dimension in range(len(row.shape)))
    return ParameterFlow(row, own, tuple(each for each in runners_up if each is not None))


def activations(known: Flow, place: str) -> tuple[ActivationFlow, ...]:
    """Results of all operators at a line (`layers.py:40`, or more of its path) or within named scopes."""
    found, roles = [], infer(known.program)
    for index, step in enumerate(known.program.steps):
        # What depends on no input, such as a table of angles, is whole everywhere.
        if step.equation is None or step.outputs[0].kind != Kind.ACTIVATION:
            continue
        source, scope = source_of(step.equation)
        if source.endswith(place) or scope == place or scope.startswith(f"{place}/"):
            found.append(_activation(known, roles, index, step, source, scope))
    return tuple(found)


def _activation(known: Flow, roles: Roles, index: int, step: Step, source: str, scope: str) -> ActivationFlow:
    value = step.outputs[0]
    return ActivationFlow(
        step.equation.primitive.name,
        tuple(dim.size for dim in value.dims),
        text(known.placements[value]),
        tuple(text(known.placements[each]) for each in step.inputs),
        tuple(each for each in known.conversions if each.step == index or each.value is value),
        # Most operators only hand a split on.
        tuple(_alternatives(known, roles, step)) if isinstance(step.fact, Product | Lookup) else (),
        source,
        scope,
    )


def _alternatives(known: Flow, roles: Roles, step: Step) -> Iterator[Whole]:
    """For every split of a result, why it is there and what it would cost to have that dimension whole."""
    value, placement = step.outputs[0], known.placements[step.outputs[0]]
    mesh = {**known.layout.mesh.shape, **factored(known.layout.mesh.shape)}
    size = step.equation.outvars[0].aval.dtype.itemsize * math.prod(dim.size for dim in value.dims)
    held = local_bytes(placement, size, mesh)
    for axis, state in placement.items():
        if isinstance(state, Split):
            leaf = next(iter(leaves(value.dims[state.dimension])), None)
            role = "feature" if leaf is None else roles.by_leaf.get(leaf, "feature")
            rule = "by the pair rule" if role == "expert" else _SPLIT_BY.get(axis_of(axis), "by the pair rule")
            yield Whole(axis, state.dimension, role, rule, held * mesh[axis])


_SPLIT_BY = dict.fromkeys(BATCH_AXES, "as the batch is") | {"context": "as the tokens are"}


def _runner_up(known: Flow, index: int, dimension: int) -> RunnerUp | None:
    """The cheapest other dimension that the axes on `dimension` could split, if there is one.

    An axis of the pair rule may change places with the one that stores the weight.
    """
    row, dims = known.layout.rows[index], known.program.parameters[index].dims
    split = row.choices[dimension]

    def fits(place: int, choice: Choice) -> bool:
        ways = math.prod(known.layout.mesh.shape[axis] for axis in choice.axes)
        return row.choices[place].size % ways == 0 and not cuts(dims[place], ways)

    others = [
        place
        for place, choice in enumerate(row.choices)
        if split.axes and place != dimension and choice.role != "stack" and fits(place, split)
        if not choice.axes or (split.rule == "pair" and choice.rule == "store" and fits(dimension, choice))
    ]
    return min((_exchanged(known, index, dimension, place) for place in others), key=lambda it: it.bytes, default=None)


def _exchanged(known: Flow, index: int, dimension: int, instead: int) -> RunnerUp:
    """What it would cost if the axes of the two dimensions changed places."""
    row = known.layout.rows[index]
    split, choices = row.choices[dimension], list(row.choices)
    for place, source in ((dimension, row.choices[instead]), (instead, split)):
        choices[place] = dataclasses.replace(row.choices[place], axes=source.axes, rule=source.rule)
    rows = list(known.layout.rows)
    rows[index] = dataclasses.replace(row, choices=tuple(choices))
    other = flow(known.program, dataclasses.replace(known.layout, rows=tuple(rows)))
    count, before = (sum(each.trips for each in one.conversions) for one in (other, known))
    return RunnerUp(split.axes, dimension, instead, other.total_bytes - known.total_bytes, count - before)

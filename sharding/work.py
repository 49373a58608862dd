"""What a step of a module costs before anyone knows the mesh: FLOPs, bytes, reductions and saved arrays.

Everything is read from traced programs. The program of a training step is the forward pass and its transpose, so that
recomputation under remat, scan trips and what backward needs are those of the module and not of a formula. A product
counts 2 FLOPs per multiply-add. A loop counts as often as it runs: attention that visits only the blocks a causal mask
allows counts those, half and the diagonal; a dense product under a mask counts in full, for that is what runs.

Products read their operands and write their result; elementwise work is taken as fused into them. A loop without
weights (attention in blocks) is taken as one kernel that reads and writes only what enters and leaves it.

Amounts are of the whole program at `rows` rows. Classes of dimensions stay attached, so that a mesh divides them later.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshloom.sharding.classes import Dim, find, leaves, leaves_of
from meshloom.sharding.roles import Role, Roles, infer
from meshloom.sharding.trace import Program, Step, trace
from meshloom.sharding.training_step import TrainingStep
from meshloom.sharding.values import Kind, Lookup, Product, Region, Value

ROWS = 2  # sizes of 1 tell nothing about classes

Leaves = frozenset[Dim]
# A sum stays a sum when it is cast, turned or reshaped, so that its reduction may wait.
_LINEAR = {"convert_element_type", "reshape", "transpose", "squeeze", "copy", "neg"}


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Partial sums: if a class of `over` is split, `bytes` over `kept` are summed over its axis, in all trips."""

    over: Leaves
    kept: Leaves
    bytes: float
    trips: float


@dataclasses.dataclass(frozen=True)
class Needed:
    """Rows, of classes `kept`, that all parts of the classes `over` read: where these are split over devices that have
    different rows, each needs those of all, in all trips."""

    over: Leaves
    kept: Leaves
    bytes: float
    trips: float


@dataclasses.dataclass(frozen=True)
class Saved:
    """An array kept from forward to backward; `layers` of them are stacked.

    Attributes:
        over: classes, as experts are: each part of them keeps it for the rows of all devices that have other parts.
    """

    bytes: float
    dims: Leaves
    layers: int
    over: Leaves = frozenset()


@dataclasses.dataclass(frozen=True)
class Attended:
    """Keys and values of all tokens, which every query may read.

    Attributes:
        bytes: of one layer. dims: what a mesh may split of them beside the tokens. layers: how often there are such.
    """

    bytes: float
    dims: Leaves
    layers: float


@dataclasses.dataclass(frozen=True)
class Work:
    """One program's work at `rows` rows.

    Attributes:
        flops, activation_bytes, weight_bytes: (group, classes) -> amount. Weights' bytes do not grow with the rows.
        attended: of a forward pass.
        leaves: per parameter and dimension, its leaves in this program, outermost first.
    """

    rows: int
    flops: dict[tuple[str, Leaves], float]
    activation_bytes: dict[tuple[str, Leaves], float]
    weight_bytes: dict[tuple[str, Leaves], float]
    reductions: tuple[Reduction, ...]
    needed: tuple[Needed, ...]
    saved: tuple[Saved, ...]
    output: tuple[Saved, ...]
    attended: tuple[Attended, ...]
    leaves: tuple[tuple[tuple[Dim, ...], ...], ...]

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values(), 0.0)


def forward_work(module: nnx.Module, inputs: Sequence[Any]) -> tuple[Work, Program, Roles]:
    """The forward pass alone, with the program and roles that layouts are decided from."""
    program = trace(module, inputs)
    roles = infer(program)
    by_leaf = dict(roles.by_leaf)
    return _work(program, by_leaf, forward=True), program, roles


def training_work(module: nnx.Module, inputs: Sequence[Any], forward: Program, roles: Roles) -> Work:
    """Forward and backward; roles are carried over from the forward program, parameter by parameter."""
    program = trace(TrainingStep(module), inputs)
    by_leaf: dict[Dim, Role] = {}
    for own, other in zip(program.parameters, forward.parameters, strict=True):
        for dim, known in zip(own.dims, other.dims, strict=True):
            by_leaf |= {
                leaf: roles.by_leaf[role_leaf]
                for leaf, role_leaf in zip(leaves(dim), leaves(known), strict=False)
                if role_leaf in roles.by_leaf
            }
    return _work(program, by_leaf, forward=False)


def _work(program: Program, roles: dict[Dim, Role], *, forward: bool) -> Work:
    counter = _Counter(program, roles)
    ends = {region.end - 1: region for region in program.regions}
    inside = {index for region in program.regions for index in range(region.first, region.end)}
    for index, step in enumerate(program.steps):
        counter.count(step, sums=index not in inside)
        if index in ends:
            counter.end(ends[index], program)
    split = len(program.outputs) - len(program.parameters)
    variables = program.jaxpr.outvars
    arrays = [_saved(value, var, program, counter.rooms) for value, var in zip(program.outputs, variables, strict=True)]
    kept = [
        array
        for array, value in zip(arrays, program.outputs, strict=True)
        if value.kind == Kind.ACTIVATION and array is not None
    ]
    saved = (
        ()
        if forward
        else tuple(
            array
            for array, value in zip(arrays[:split], program.outputs[:split], strict=True)
            if value.kind == Kind.ACTIVATION and array is not None
        )
    )
    own = tuple(tuple(leaves(dim) for dim in each.dims) for each in program.parameters)
    return Work(
        ROWS,
        dict(counter.flops),
        dict(counter.activation_bytes),
        dict(counter.weight_bytes),
        counter.reductions(),
        tuple(counter.needed.values()),
        saved,
        tuple(kept) if forward else (),
        counter.attended(program.attended) if forward else (),
        own,
    )


def _saved(value: Value, var: Any, program: Program, rooms: Mapping[Dim, Leaves]) -> Saved | None:
    if not hasattr(var.aval, "dtype") or not jnp.issubdtype(var.aval.dtype, jnp.inexact):
        return None
    stacks = {find(dim) for dim in program.stacks}
    layers = value.dims[0].size if value.dims and find(value.dims[0]) in stacks else 1
    held = frozenset(leaves_of(value.dims))
    return Saved(_bytes(var.aval), held, layers, frozenset().union(*(rooms[leaf] for leaf in held & rooms.keys())))


class _Counter:
    """Walks the steps of a program in order.

    Attributes:
        rooms: classes that count the rows which a region keeps -> the classes whose parts keep them.
    """

    def __init__(self, program: Program, roles: dict[Dim, Role]):
        self.roles = {find(leaf): role for leaf, role in roles.items()}
        self.batch = leaves_of(value.dims[0] for value in program.inputs if value.dims)
        self.weights = leaves_of(dim for each in program.parameters for dim in each.dims) - self.batch
        self.flops: dict[tuple[str, Leaves], float] = collections.defaultdict(float)
        self.activation_bytes: dict[tuple[str, Leaves], float] = collections.defaultdict(float)
        self.weight_bytes: dict[tuple[str, Leaves], float] = collections.defaultdict(float)
        self.needed: dict[Value, Needed] = {}  # once for a forward pass that is recomputed and the backward pass
        self.rooms: dict[Dim, Leaves] = {}
        self._trips = trips_of(program)
        self._kernels: set[int] = set()
        self._partial: dict[Value, int] = {}
        self._sums: list[Reduction | None] = []

    def attended(self, regions: Sequence[Region]) -> tuple[Attended, ...]:
        """The keys and values of each attention."""
        found = []
        for region in regions:
            keys, values = region.equation.invars[1:3]
            held = frozenset(leaves_of((region.inputs[1].dims[0], *region.inputs[1].dims[2:])))
            layers, _ = self._trips.get(id(region.equation), (1.0, None))
            found.append(Attended(_bytes(keys.aval) + _bytes(values.aval), held, layers))
        return tuple(found)

    def reductions(self) -> tuple[Reduction, ...]:
        return tuple(each for each in self._sums if each is not None)

    def end(self, region: Region, program: Program) -> None:
        """What a region needs of rows, and what it sums up at its end: those of its results that have the rows of a
        batch, over all classes that its products pick by or contract. What else has rows is kept as they are inside."""
        over: set[Dim] = set()
        for step in program.steps[region.first : region.end]:
            if isinstance(step.fact, Product) and any(value.kind == Kind.WEIGHT for value in step.inputs[:2]):
                over |= leaves_of((*step.fact.contracted, *step.fact.batch))
        classes = frozenset(over & self.weights)
        trips, _ = self._trips.get(id(region.equation), (1.0, None))
        for value, var in zip(region.outputs, region.equation.outvars, strict=True):
            if self._has_rows(value):
                held = frozenset(leaves_of(value.dims))
                self._sums.append(Reduction(classes, held, _bytes(var.aval), trips))
            elif value.dims:
                self.rooms |= dict.fromkeys(leaves_of(value.dims[:1]) - self.weights, classes)
        for value, var in zip(region.inputs, region.equation.invars, strict=True):
            if self._has_rows(value):
                self.needed[value] = Needed(classes, frozenset(leaves_of(value.dims)), _bytes(var.aval), trips)

    def _has_rows(self, value: Value) -> bool:
        rows = leaves_of(value.dims[:1])
        return bool(rows) and rows <= self.batch

    def count(self, step: Step, *, sums: bool) -> None:
        """A step's work; without its partial sums where a region around it ends them."""
        if step.equation is None:
            return
        trips, kernel = self._trips.get(id(step.equation), (1.0, None))
        match step.fact:
            case Product() as product if any(value.kind == Kind.ACTIVATION for value in step.inputs[:2]):
                self._product(step, product, trips, kernel, sums)
            case Lookup(rows, _) if step.inputs[0].kind == Kind.WEIGHT:
                self._sum(step, leaves_of(rows), trips)
            case _:
                self._forward_sums(step)

    def _product(self, step: Step, product: Product, trips: float, kernel: Any, sums: bool) -> None:
        dims = leaves_of((*product.contracted, *product.batch, *product.lhs_free, *product.rhs_free))
        group = self._group(step, product, dims)
        out = step.equation.outvars[0].aval
        amount = 2.0 * math.prod(out.shape) * math.prod(dim.size for dim in product.contracted)
        if step.equation.primitive.name == "ragged_dot_general" and not product.batch:
            amount /= out.shape[0]  # the gradient of experts: each row goes to one of them
        if step.equation.primitive.name == "conv_general_dilated":
            kernel_shape, spec = step.equation.invars[1].aval.shape, step.equation.params["dimension_numbers"].rhs_spec
            amount *= math.prod(kernel_shape[axis] for axis in spec[2:])
        self.flops[group, frozenset(dims)] += trips * amount
        if kernel is not None:
            if id(kernel) not in self._kernels:
                self._kernels.add(id(kernel))
                outer = trips / kernel.params["length"]
                moved = sum(_bytes(var.aval) for var in (*kernel.invars, *kernel.outvars))
                self.activation_bytes[group, frozenset(leaves_of(product.batch))] += outer * moved
            return
        values = (*step.inputs[:2], step.outputs[0])
        variables = (*step.equation.invars[:2], step.equation.outvars[0])
        for value, var in zip(values, variables, strict=True):
            table = self.weight_bytes if value.kind == Kind.WEIGHT else self.activation_bytes
            table[group, frozenset(leaves_of(value.dims))] += trips * _bytes(var.aval)
        if sums:
            self._sum(step, leaves_of(product.contracted), trips)

    def _group(self, step: Step, product: Product, dims: set[Dim]) -> str:
        roles = {self.roles.get(leaf) for leaf in dims}
        both = all(value.kind == Kind.ACTIVATION for value in step.inputs[:2])
        batched = leaves_of(product.batch)
        if both and (batched & self.batch or any(self.roles.get(leaf) == "heads" for leaf in batched)):
            return "attention"
        for role, group in _GROUPS.items():
            if role in roles:
                return group
        return "other"

    # -- partial sums --

    def _sum(self, step: Step, over: set[Dim], trips: float) -> None:
        """A result whose contracted classes may be split; sums over the batch are gradients and counted elsewhere."""
        if over & self.batch or not (classes := over & self.weights):
            return
        out = step.outputs[0]
        self._partial[out] = len(self._sums)
        amount = _bytes(step.equation.outvars[0].aval)
        self._sums.append(Reduction(frozenset(classes), frozenset(leaves_of(out.dims)), amount, trips))

    def _forward_sums(self, step: Step) -> None:
        """Linear steps hand partial sums on; the addition of two over the same classes needs one reduction."""
        name = step.equation.primitive.name
        if name in _LINEAR and step.inputs and step.inputs[0] in self._partial:
            self._partial[step.outputs[0]] = self._partial[step.inputs[0]]
        elif name in ("add", "add_any") and len(step.inputs) == 2 and all(v in self._partial for v in step.inputs):
            first, second = (self._partial[value] for value in step.inputs)
            a, b = self._sums[first], self._sums[second]
            if first != second and a is not None and b is not None and a.over & b.over:
                # Queries' and keys' heads share a class, not all: where both are split, both sums are over its axis.
                self._sums[first] = dataclasses.replace(a, over=a.over | b.over)
                self._sums[second] = None
                self._partial[step.outputs[0]] = first


# In the order in which a product's roles decide; a router contracts the residual into scores and counts as experts.
_GROUPS: dict[Role, str] = {
    "expert": "experts",
    "vocab": "vocabulary",
    "heads": "projections",
    "kv_heads": "projections",
    "inner": "mlp",
}


def trips_of(program: Program) -> dict[int, tuple[float, Any]]:
    """id of an equation -> how often it runs (on average over its visits), and the loop without weights it is in."""
    weighted = {
        id(step.equation)
        for step in program.steps
        if step.equation is not None and any(value.kind == Kind.WEIGHT for value in step.inputs)
    }
    total: dict[int, float] = collections.defaultdict(float)
    visits: collections.Counter = collections.Counter()
    kernels: dict[int, Any] = {}

    def walk(jaxpr: Any, trips: float, kernel: Any) -> None:
        for equation in jaxpr.eqns:
            total[id(equation)] += trips
            visits[id(equation)] += 1
            kernels[id(equation)] = kernel
            for body, times in bodies_of(equation):
                own = equation if kernel is None and _is_kernel(equation, weighted) else kernel
                walk(body, trips * times, own)

    walk(program.jaxpr, 1.0, None)
    return {key: (total[key] / visits[key], kernels[key]) for key in total}


def _is_kernel(equation: Any, weighted: set[int]) -> bool:
    return equation.primitive.name == "scan" and not any(
        id(inner) in weighted for inner in _inside(equation.params["jaxpr"].jaxpr)
    )


def _inside(jaxpr: Any) -> Iterable[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for body, _ in bodies_of(equation):
            yield from _inside(body)


def bodies_of(equation: Any) -> list[tuple[Any, float]]:
    """Programs inside of an equation and how often each runs; a loop whose trips are data counts once."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        branches = params["branches"]
        return [(branch.jaxpr, 1 / len(branches)) for branch in branches]
    if name == "while":
        return [(params["body_jaxpr"].jaxpr, 1.0)]
    body = params.get("jaxpr", params.get("call_jaxpr"))
    if body is None:
        return []
    return [(getattr(body, "jaxpr", body), float(params["length"]) if name == "scan" else 1.0)]


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize) if hasattr(aval, "dtype") else 0.0

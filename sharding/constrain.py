"""Keeps the residual stream of a module split by rows and tokens, whatever the partitioner would make of the weights'
splits.

A weight that is stored split over `fsdp` tempts XLA to split activations the same way: it then moves whole activations
between layers where it should gather weights. Constraints on the residual stream, wherever the program looks it up from
a table or adds to it, prevent that. Where this is comes from the traced program (`trace`, `roles`): the module stays
free of meshes, and values, gradients and recomputation are those of the module.

Rows that lie over `expert` meet weights whose experts are dealt out over it. Products of the two are held to the
experts, so that rows go to these: XLA left to itself may gather the experts.

Layers inside scan, while, jit and checkpoint are reached. What stands in a custom derivative, a cond or a shard_map
stays as it is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.topology import BATCH_AXES, axes_of
from meshloom.sharding.classes import Dim, find, leaves, leaves_of
from meshloom.sharding.layout import Layout
from meshloom.sharding.lookup import Table, lookup
from meshloom.sharding.module import is_array
from meshloom.sharding.roles import Roles, infer
from meshloom.sharding.trace import Program, Step, trace
from meshloom.sharding.values import Kind, Lookup, Product, Value

# Primitives whose body runs as a part of the program around it, and the parameter that holds it.
_BODIES = {"scan": "jaxpr", "while": "body_jaxpr", "jit": "jaxpr", "remat2": "jaxpr"}


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What is wanted of an equation.

    Attributes:
        result: of its first result. table: of its first operand, where that is a table, whole where batches are split.
        lookup: says that columns of the table stay where they are stored.
    """

    result: NamedSharding
    table: NamedSharding | None = None
    lookup: Table | None = None


def plain(module: nnx.Module) -> Callable[..., Any]:
    """The forward pass of `module` as a function `(state, *inputs) -> module(*inputs)`."""
    graphdef, _ = nnx.split(module)
    return lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)


def constrained(module: nnx.Module, layout: Layout) -> Callable[..., Any]:
    """`plain(module)` with the residual stream split like batches are; the same where nothing splits batches.

    Args:
        module: abstract or not; only its structure is used.
        layout: derived for this module.
    Returns:
        A function of `nnx.state(module)`, in any dtype, and positional inputs: arrays or pytrees, batch first.
    """
    if layout.batch_ways == layout.context_ways == 1:
        return plain(module)
    graphdef, _ = nnx.split(module)

    def forward(state: Any, *inputs: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        program = trace(merged, inputs)
        run = jaxpr_as_fun(_rewritten(program.jaxpr, _wanted(program, layout), {}))
        _, *states = nnx.split(merged, nnx.Param, ...)
        return jax.tree.unflatten(program.result, run(*filter(is_array, jax.tree.leaves((*states, inputs)))))

    return forward


def _wanted(program: Program, layout: Layout) -> dict[int, _Wanted]:
    """By id, the equations that begin or continue the residual stream of whole rows, the batch outermost."""
    roles = infer(program)
    rows, tokens = layout.batch_spec
    lengths = [value.dims[1] for value in program.inputs if len(value.dims) > 1]

    def sharding(value: Value) -> NamedSharding | None:
        outermost = leaves(value.dims[0])[:1]
        is_batch = any(roles.by_leaf.get(leaf) == "batch" for leaf in outermost)
        if not is_batch or value.dims[0].size % layout.batch_ways:
            return None
        if tokens is None:
            return NamedSharding(layout.mesh, PartitionSpec(rows))
        # Where the tokens are no dimension of their own, as in rows of [B * T], a constraint by rows would gather them.
        if len(value.dims) < 2 or value.dims[1].size % layout.context_ways:
            return None
        is_length = any(find(value.dims[1]) is find(length) for length in lengths)
        return NamedSharding(layout.mesh, PartitionSpec(rows, tokens)) if is_length else None

    lookups = [step for step in program.steps if _begins(step, roles)]
    joins = [step for step in roles.joins if step.equation is not None]  # a loop's carry has none
    held = {id(step.equation): _Wanted(split) for step in joins if (split := sharding(step.outputs[0])) is not None}
    for step in lookups:
        if (split := sharding(step.outputs[0])) is not None:
            held[id(step.equation)] = _of_table(step, split, program, layout)
    for step in program.steps:
        if dealt := _dealt(step, program, layout):
            held[id(step.equation)] = _Wanted(_by_experts(step.outputs[0], dealt, roles, layout))
    return held


def _dealt(step: Step, program: Program, layout: Layout) -> dict[Dim, str]:
    """The classes of the result of a product with a weight that the pair rule splits over an axis of batches, with the
    axis."""
    if not isinstance(step.fact, Product):
        return {}
    weights = {index for value in step.inputs[:2] if value.kind == Kind.WEIGHT for index in value.parameters}
    return {
        leaves(dim)[0]: axis
        for index in weights
        for dim, choice in zip(program.parameters[index].dims, layout.rows[index].choices, strict=True)
        for axis in choice.axes
        if choice.rule == "pair" and axis in BATCH_AXES and leaves(dim)[0] in leaves_of(step.outputs[0].dims)
    }


def _by_experts(value: Value, dealt: dict[Dim, str], roles: Roles, layout: Layout) -> NamedSharding:
    """Experts over their axis, rows over the others of the batch, and what else there is as XLA has it."""
    rows = tuple(axis for axis in axes_of(layout.batch_spec[0]) if axis not in dealt.values())
    ways = math.prod(layout.mesh.shape[axis] for axis in rows)

    def entry(dim: Dim) -> Any:
        outermost = leaves(dim)[:1]
        if axis := next((dealt[leaf] for leaf in outermost if leaf in dealt), None):
            return axis
        is_batch = any(roles.by_leaf.get(leaf) == "batch" for leaf in outermost) and dim.size % ways == 0
        return rows if is_batch else PartitionSpec.UNCONSTRAINED

    return NamedSharding(layout.mesh, PartitionSpec(*map(entry, value.dims)))


def _begins(step: Step, roles: Roles) -> bool:
    """Whether a table of weights is looked up into the residual."""
    if not isinstance(step.fact, Lookup) or step.inputs[0].kind != Kind.WEIGHT:
        return False
    return any(roles.by_leaf.get(leaf) == "residual" for leaf in leaves_of(step.fact.columns))


def _of_table(step: Step, result: NamedSharding, program: Program, layout: Layout) -> _Wanted:
    """How a table is looked up: by columns where it is stored by them, else from a table that is whole over batches.

    What is not a parameter as it is stored, in some dtype, is left alone.
    """
    table = step.inputs[0]
    for index in table.parameters:
        if list(map(find, table.dims)) == list(map(find, program.parameters[index].dims)):
            spec = layout.rows[index].spec
            if (columns := _by_columns(step.equation, result, spec)) is not None:
                return _Wanted(result, lookup=columns)
            by_rows = {axis for entry in layout.batch_spec for axis in axes_of(entry)}
            kept = (tuple(axis for axis in axes_of(entry) if axis not in by_rows) for entry in spec)
            return _Wanted(result, NamedSharding(layout.mesh, PartitionSpec(*(axes or None for axes in kept))))
    return _Wanted(result)


def _by_columns(equation: JaxprEqn, result: NamedSharding, spec: PartitionSpec) -> Table | None:
    """The lookup of whole rows of a matrix that is stored by columns; None for any other."""
    if equation.primitive is not jax.lax.gather_p or len(spec) != 2:
        return None
    rows, columns = (axes_of(entry) for entry in spec)
    table, looked_up = _example(equation.invars[0]), _example(equation.outvars[0])
    numbers, ids = equation.params["dimension_numbers"], looked_up.ndim - 1
    whole_rows = jax.lax.GatherDimensionNumbers(offset_dims=(ids,), collapsed_slice_dims=(0,), start_index_map=(0,))
    if (numbers, equation.params["slice_sizes"]) != (whole_rows, (1, table.shape[1])):
        return None
    by_batch = [axis for entry in result.spec for axis in axes_of(entry)]
    if not columns or not set(columns) <= set(by_batch) or set(rows) & set(by_batch):
        return None
    fill = None
    if equation.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = math.nan if equation.params["fill_value"] is None else equation.params["fill_value"]
    return Table(result.mesh, PartitionSpec(*result.spec[:ids]), rows, columns, fill)


def _rewritten(jaxpr: Jaxpr, wanted: dict[int, _Wanted], done: dict[int, Jaxpr]) -> Jaxpr:
    """The same program with constraints around the wanted equations, in bodies too.

    A body that many equations share stays shared: `done` maps the id of each to what it became.
    """
    if id(jaxpr) not in done:
        equations: list[JaxprEqn] = []
        for equation in jaxpr.eqns:
            if body := _BODIES.get(equation.primitive.name):
                inner = _rewritten(equation.params[body], wanted, done)
                equations.append(equation.replace(params=equation.params | {body: inner}))
            elif want := wanted.get(id(equation)):
                equations += _with_constraints(equation, want)
            else:
                equations.append(equation)
        done[id(jaxpr)] = jaxpr.replace(eqns=equations)
    return done[id(jaxpr)]


def _with_constraints(equation: JaxprEqn, want: _Wanted) -> list[JaxprEqn]:
    """`equation`, or what does its work, between constraints; the last one's result takes over the name of its own."""
    before: list[JaxprEqn] = []
    (operand, *operands), (result, *results) = equation.invars, equation.outvars
    if want.table is not None:
        whole = Var(operand.aval)
        before.append(_constraint(operand, whole, want.table, equation))
        operand = whole
    free = Var(result.aval)
    if want.lookup is None:
        within = equation.replace(invars=[operand, *operands], outvars=[free, *results])
    else:
        within = _in_place_of(equation, jax.jit(functools.partial(_looked_up, want.lookup))).replace(outvars=[free])
    return [*before, within, _constraint(free, result, want.result, equation)]


def _looked_up(table: Table, weight: Any, starts: Any) -> Any:
    """`lookup` of what a gather is given: ids have a last dimension of one."""
    return lookup(table, weight, starts[..., 0])


def _constraint(source: Any, target: Var, sharding: NamedSharding, beside: JaxprEqn) -> JaxprEqn:
    """`target = with_sharding_constraint(source, sharding)`, from the same line of the module as `beside`."""
    constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=sharding)
    return _in_place_of(beside.replace(invars=[source], outvars=[target]), constrain)


def _in_place_of(equation: JaxprEqn, function: Callable[..., Any]) -> JaxprEqn:
    """One equation that computes `function` of the same operands, from the same line of the module."""
    (made,) = jax.make_jaxpr(function)(*map(_example, equation.invars)).eqns
    return made.replace(invars=equation.invars, outvars=equation.outvars, source_info=equation.source_info)


def _example(var: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a variable or literal."""
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)

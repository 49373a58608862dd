"""Activations split by rows: what a device computes belongs to its own rows of the batch.

Weights that are split over `fsdp` along a dimension that they contract leave the compiler two ways: gather the weight, or
split the activations along that dimension too, moving them about in every layer. Left alone it mixes both. `by_rows`
pins the batch dimension of every product, sum and loop state of the traced function to the layout of the batch, which
settles it: weights are gathered where they are used, also inside a scan over layers. Other dimensions are left free.

Shape legend: B rows, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_PINNED = frozenset({"add", "dot_general", "gather"})


def by_rows(function: Callable[..., Any], mesh: Mesh, batch: PartitionSpec, rows: tuple[int, int]) -> Callable[..., Any]:
    """The same function, its activations pinned.

    Args:
        batch: the spec of `[B, T]`.
        rows: B and T; floating-point values of shape `[B, T, ...]` are activations.
    """

    def pin(value: Any) -> Any:
        shape = jnp.shape(value)
        if len(shape) < 3 or shape[:2] != rows or not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        free = (PartitionSpec.UNCONSTRAINED,) * (len(shape) - 2)
        return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, PartitionSpec(*batch, *free)))

    def pinned(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = _evaluate(closed, jax.tree.leaves(arguments), pin)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return pinned


def _evaluate(closed: jex.ClosedJaxpr, arguments: Sequence[Any], pin: Callable[[Any], Any]) -> list[Any]:
    """Runs a jaxpr, pinning as it goes; loops are entered, other called functions run as they are."""
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name == "scan":
            outputs = _scan(equation.params, inputs, pin)
        else:
            functions, params = equation.primitive.get_bind_params(equation.params)
            outputs = equation.primitive.bind(*functions, *inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        if equation.primitive.name in _PINNED:
            outputs = [pin(value) for value in outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scan(params: dict[str, Any], inputs: list[Any], pin: Callable[[Any], Any]) -> list[Any]:
    constants, carried = params["num_consts"], params["num_carry"]
    fixed, start, stacked = inputs[:constants], inputs[constants : constants + carried], inputs[constants + carried :]

    def body(carry: list[Any], step: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _evaluate(params["jaxpr"], [*fixed, *map(pin, carry), *step], pin)
        return outputs[:carried], outputs[carried:]

    end, collected = jax.lax.scan(
        body, start, stacked, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*end, *collected]

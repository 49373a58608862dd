"""What one device computes of a mixture of experts: its own rows through those of their experts that it has.

Shape legend: T rows, k experts of each, D model, F inner, e experts on this device. A slot is one of the T k choices;
`room` are the slots that may be this device's: T min(k, e), for a row's experts are all different.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.matmul.experts.rowwise import map_rows
from meshloom.pallas_kernels.matmul.grouped import grouped_matmul, grouped_weight_gradient


@dataclasses.dataclass(frozen=True)
class Route:
    """Slots sorted by expert, those of other devices last.

    Attributes:
        slot: of each sorted row. place: of each slot among the sorted rows, out of bounds where it has none here.
        sizes: rows of each expert. count: of all; sorted rows from there on hold anything.
    """

    slot: Int[Array, "room"]
    place: Int[Array, "slots"]
    sizes: Int[Array, "e"]
    count: Int[Array, ""]

    @classmethod
    def of(cls, chosen: Int[Array, "T k"], first: Any, own: int, experts: int) -> "Route":
        """The route to the `own` of all `experts` that begin at number `first`."""
        rows, k = chosen.shape
        numbers = chosen.reshape(-1)
        if own < experts:
            numbers = numbers - first
        keys = jnp.where((numbers >= 0) & (numbers < own), numbers, own)
        order = jnp.argsort(keys, stable=True)
        # Numbers of no expert here are out of bounds, and not counted.
        sizes = jnp.zeros(own, jnp.int32).at[keys].add(1, mode="drop")
        place, count = jnp.argsort(order), jnp.sum(sizes)
        return cls(order[: rows * min(k, own)], jnp.where(place < count, place, place.size), sizes, count)

    def gathered(self, values: Float[Array, "T N"], k: int) -> Float[Array, "room N"]:
        """The row of each sorted slot."""
        return values[self.slot // k]

    def by_slot(self, values: Float[Array, "room *N"], k: int) -> Float[Array, "T k *N"]:
        """Sorted values back at their slots, zeros where they are another device's."""
        found = values.at[self.place].get(mode="fill", fill_value=0)
        return found.reshape(-1, k, *values.shape[1:])


# What is in the room for rows that are not there is never looked at.
_product = functools.partial(grouped_matmul, transposed=True, zeros=False)


def forward(activation, route_to: Callable[..., Route], x, weights, chosen, gate, up, down):
    """The sum over this device's experts `[T, D]`, and what gate and up made of its rows, `[room, F]` each."""
    k = chosen.shape[1]
    route = route_to(chosen)
    rows = route.gathered(x, k)
    gated, upped = (_product(rows, matrix, route.sizes) for matrix in (gate, up))
    (inner,), _ = map_rows(lambda gated, upped: ((activation(gated) * upped,), ()), route.count, gated, upped)
    y = _product(inner, down, route.sizes)
    return jnp.einsum("tkd,tk->td", route.by_slot(y, k), weights.astype(x.dtype)), gated, upped


def backward(activation, route_to: Callable[..., Route], x, weights, chosen, gate, up, down, gated, upped, d_out):
    """Gradients of x, of the weights and of each matrix, None for a quantized one; the first two are this device's
    summands.

    How much a weight gains is the product of the gradient with what its expert made of the row, which is as much as
    that of the gradient through `down` with the inner row: no product is computed for it.
    """
    k = chosen.shape[1]
    route = route_to(chosen)
    rows = route.gathered(x, k)
    weight = weights.reshape(-1)[route.slot].astype(x.dtype)[:, None]
    by_row = route.gathered(d_out.astype(gated.dtype), k)

    def pulled(gated, upped, d_inner, weight):
        inner, pull = jax.vjp(lambda gated, upped: activation(gated) * upped, gated, upped)
        summand = d_inner.astype(jnp.float32) * inner.astype(jnp.float32)
        return (*pull(d_inner * weight), inner * weight), (summand,)

    d_inner = _product(by_row, down, route.sizes, transposed=False).astype(gated.dtype)
    found = map_rows(pulled, route.count, gated, upped, d_inner, weight, in_place=True)
    (d_gated, d_upped, inner), (d_weight,) = found
    dx_gate, dx_up = (
        _product(d_rows, matrix, route.sizes, transposed=False).astype(x.dtype)
        for d_rows, matrix in ((d_gated, gate), (d_upped, up))
    )
    d_gate, d_up, d_down = (
        grouped_weight_gradient(each, matrix, route.sizes, d_rows, transposed=True)
        for each, matrix, d_rows in ((rows, gate, d_gated), (rows, up, d_upped), (inner, down, by_row))
    )
    dx = jnp.sum(route.by_slot(dx_gate + dx_up, k), axis=1)
    return dx, route.by_slot(d_weight, k).astype(weights.dtype), d_gate, d_up, d_down


def flat(run: Callable[..., Any], x, weights, chosen, *others, first: Any = 0, experts: int | None = None) -> Any:
    """`forward` or `backward` for rows `[*rows, D]`: of all experts, or of a device's own, which begin at `first`."""
    *lead, _ = x.shape
    own = others[0].shape[0]

    def route_to(chosen):
        return Route.of(chosen, first, own, own if experts is None else experts)

    def rows_of(each):
        return each.reshape(-1, each.shape[-1])

    matrices, kept = others[:3], others[3:]
    kept = (*kept[:2], *map(rows_of, kept[2:]))  # the last one of `backward` is the gradient of the rows
    results = run(route_to, *map(rows_of, (x, weights, chosen)), *matrices, *kept)
    shaped = 2 if kept else 1
    return *(each.reshape(*lead, -1) for each in results[:shaped]), *results[shaped:]

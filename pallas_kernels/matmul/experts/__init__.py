"""A mixture of experts for rows that are already routed: one function, on one device or over a mesh.

Here are the gradients and the choice of where it runs; what one device computes is in `local.py`, how a mesh shares it
in `spread.py`, and the exchange of rows for programs that deal out tokens over experts' devices in `exchange.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import as_one
from meshloom.pallas_kernels.matmul.experts import local
from meshloom.pallas_kernels.matmul.experts.exchange import expert_parallel
from meshloom.pallas_kernels.matmul.experts.spread import Spread, by_rows
from meshloom.pallas_kernels.matmul.qarray import QArray

__all__ = ["expert_parallel", "routed_experts", "top_experts"]


@dataclasses.dataclass(frozen=True)
class Static:
    """What shapes the program besides the arrays; `spread` is None on one device."""

    activation: Callable[[Any], Any]
    spread: Spread | None


def top_experts(scores: Float[Array, "*rows E"], k: int) -> tuple[Float[Array, "*rows k"], Int[Array, "*rows k"]]:
    """The k largest scores of each row and their numbers, found where the row is: left to itself XLA gathers all scores
    of a batch for it, on CPUs."""
    return by_rows(lambda scores: tuple(jax.lax.top_k(scores, k)), scores)


@jax.named_scope("experts")
def routed_experts(
    x: Float[Array, "*rows D"],
    weights: Float[Array, "*rows k"],
    chosen: Int[Array, "*rows k"],
    gate: Float[Array, "E F D"] | QArray,
    up: Float[Array, "E F D"] | QArray,
    down: Float[Array, "E D F"] | QArray,
    *,
    activation: Callable[[Any], Any],
) -> Float[Array, "*rows D"]:
    """Per row, the sum over its k experts of weight * down(activation(gate x) * up x).

    Differentiable in x, the weights and the matrices; quantized matrices are frozen. On a mesh in scope every device
    keeps its own experts, of each its part of F over `tensor`, and computes what the rows of all devices along `expert`
    want of those: one sum over both axes ends it. Backward keeps what gate and up made and computes no product again.

    Args:
        chosen: numbers of the experts, all different in a row; outside of [0, E) is an expert that gives zeros.
    Source: Gale et al. 2022, MegaBlocks (no row is dropped, so none depends on its neighbours).
    """
    return apply(Static(activation, Spread.of(x, gate, up, down)), x, weights, chosen, gate, up, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(static: Static, x, weights, chosen, gate, up, down):
    """The sum alone."""
    return _forward(static, x, weights, chosen, gate, up, down)[0]


def _forward(static: Static, *arrays: Any) -> Any:
    def routed_experts(*arrays):
        run = functools.partial(local.forward, static.activation)
        return local.flat(run, *arrays) if static.spread is None else static.spread.forward(run, *arrays)

    return as_one(routed_experts, *arrays)


def _fwd(static: Static, x, weights, chosen, gate, up, down):
    out, *kept = _forward(static, x, weights, chosen, gate, up, down)
    return out, (x, weights, chosen, gate, up, down, *kept)


def _bwd(static: Static, residuals, d_out):
    def routed_experts_backward(*arrays):
        run = functools.partial(local.backward, static.activation)
        return local.flat(run, *arrays) if static.spread is None else static.spread.backward(run, *arrays)

    dx, d_weights, *d_matrices = as_one(routed_experts_backward, *residuals, d_out)
    return dx, d_weights, None, *d_matrices


apply.defvjp(_fwd, _bwd)

"""What every implementation of attention does, whoever calls it: a forward and a backward pass and what passes between.

The contract is (out, lse): rows and the log of the sum of their exponentials. A backward pass needs nothing else of the
forward pass, not even that the same implementation ran it, nor that one call saw all the keys: ring attention, split
keys and caches on several hosts merge the partial results of their parts with `merge_partials`, and run each part's
backward pass on the merged ones.

Shape legend: see spec.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

# Finite, so that a row with no key yet gives exp(0) * 0 and not NaN. The log-sum-exp of a row that may read no key.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The static facts that turn products q k into scores.

    Attributes:
        scale: multiplies q k.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap), before the bias (Gemma 2, section 2).
    """

    scale: float
    soft_cap: float | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The two passes of one implementation.

    Attributes:
        forward: (q, k, v, bias, mask, scoring, dtype) -> (out [B, T, N, Hv] in `dtype`, lse f32 [B, N, T]). Rows that
            may read no key are zeros, their lse is MASKED.
        backward: (q, k, v, bias, mask, scoring, lse, delta, d_out, dtype) -> (dq, dk, dv, dbias), the first three in
            `dtype`; `delta` f32 [B, N, T] is `row_products(out, d_out)`; dbias f32 is None where bias is.
        by_xla: whether XLA can split it over the devices of a mesh.
    Parts that will be added up want `dtype` float32.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    by_xla: bool = True


def row_products(out: Float[Array, "B T N Hv"], d_out: Float[Array, "B T N Hv"]) -> Float[Array, "B N T"]:
    """`delta` of a backward pass: sum of out * d_out over each row, float32 (FlashAttention-2, algorithm 2, line 4)."""
    return jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), d_out.astype(jnp.float32))


def merge_partials(
    out_a: Float[Array, "B T N Hv"],
    lse_a: Float[Array, "B N T"],
    out_b: Float[Array, "B T N Hv"],
    lse_b: Float[Array, "B N T"],
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Attention over two sets of keys from that over each; float32. Either may be empty (lse MASKED).

    Source: Dao et al. 2023, Flash-Decoding; Liu et al. 2023, Ring Attention, section 3.
    """
    lse = jnp.logaddexp(lse_a, lse_b)

    def share(part: Float[Array, "B N T"]) -> Float[Array, "B T N 1"]:
        return jnp.exp(part - lse).transpose(0, 2, 1)[..., None]

    return out_a.astype(jnp.float32) * share(lse_a) + out_b.astype(jnp.float32) * share(lse_b), lse


def with_sinks(
    out: Float[Array, "B T N Hv"], lse: Float[Array, "B N T"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Adds a key of score `sinks` and value zero to every row of its head (gpt-oss; Xiao et al. 2024, section 3)."""
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, :, None])
    kept = jnp.exp(lse - total).transpose(0, 2, 1)[..., None]
    return (out.astype(jnp.float32) * kept).astype(out.dtype), total


def sinks_gradient(
    sinks: Float[Array, "N"], lse: Float[Array, "B N T"], delta: Float[Array, "B N T"]
) -> Float[Array, "N"]:
    """The gradient of `sinks`, from the log-sum-exp that has them in and the row products."""
    weights = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
    return -jnp.sum(weights * delta, axis=(0, 2)).astype(sinks.dtype)

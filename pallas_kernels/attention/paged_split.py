"""Attention over a part of each sequence's pages, so that one long cache may lie on several devices or hosts.

Every holder of a part writes the rows that fall into its pages, attends over what it holds and returns (out, lse);
`merge_partials` makes the whole of them, `merged_over` does so over a mesh axis inside `shard_map`. What travels is
the partials, N (H + 1) floats a row, and never keys.

Source: Lin et al. 2024, Infinite-LLM (DistAttention), section 4; Dao et al. 2023, Flash-Decoding.

Shape legend: see spec.py.
"""

import jax
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import merge_partials, with_sinks


def merged(
    parts: list[tuple[Float[Array, "T N H"], Float[Array, "N T"]]], sinks: Float[Array, "N"] | None = None
) -> tuple[Float[Array, "T N H"], Float[Array, "N T"]]:
    """The whole of partial results, float32; `sinks` are added once, here."""
    (out, lse), *rest = ((out[None], lse[None]) for out, lse in parts)
    for other_out, other_lse in rest:
        out, lse = merge_partials(out, lse, other_out, other_lse)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out[0], lse[0]


def merged_over(
    axis: str, out: Float[Array, "T N H"], lse: Float[Array, "N T"], sinks: Float[Array, "N"] | None = None
) -> tuple[Float[Array, "T N H"], Float[Array, "N T"]]:
    """The whole of the partial results along a mesh axis, on each of its devices; call it inside `shard_map`.

    Gathers the partials and merges them in the order of the axis, so that every device has bitwise the same rows.
    """
    outs, lses = jax.lax.all_gather((out, lse), axis)
    return merged(list(zip(outs, lses, strict=True)), sinks)

"""What attention means: float32 einsums, short enough to check by eye; all else is tested against them.

Shape legend: see spec.py.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import MASKED, Scoring
from meshloom.pallas_kernels.attention.paged import PagedScoring, whole
from meshloom.pallas_kernels.attention.pages import KVPages, PagePart, Ragged
from meshloom.pallas_kernels.attention.spec import Mask, soft_capped


def _weights(q, k, bias, mask: Mask, scoring: Scoring):
    """Masked scores [B, N, T, S], the derivative of the soft cap at each, and which of them the mask allows."""
    q_total, kv_total = q.shape[1], k.shape[1]
    raw = jnp.einsum("btnh,bsnh->bnts", q, k) * scoring.scale
    scores, slope = raw, jnp.ones_like(raw)
    if scoring.soft_cap is not None:
        scores = soft_capped(raw, scoring.soft_cap)
        slope = 1 - (scores / scoring.soft_cap) ** 2
    if bias is not None:
        scores = scores + bias
    allowed = mask.allowed(jnp.arange(q_total), jnp.arange(kv_total), q_total, kv_total)[:, None]
    return jnp.where(allowed, scores, -jnp.inf), slope, allowed


def _repeated(x: Float[Array, "B S K H"], heads: int) -> Float[Array, "B S N H"]:
    return jnp.repeat(x.astype(jnp.float32), heads // x.shape[2], axis=2)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N T S"] | None,
    mask: Mask,
    scoring: Scoring,
    dtype: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """softmax(soft_cap(scale * q k) + bias) v over the keys that `mask` allows, and the log of the norm."""
    heads = q.shape[2]
    scores, _, _ = _weights(q.astype(jnp.float32), _repeated(k, heads), bias, mask, scoring)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=MASKED)
    weights = jnp.exp(scores - top)
    norm = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(norm == 0, 1.0, norm)
    out = jnp.einsum("bnts,bsnh->btnh", weights / safe, _repeated(v, heads))
    return out.astype(dtype), (top + jnp.log(safe))[..., 0]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N T S"] | None,
    mask: Mask,
    scoring: Scoring,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N Hv"],
    dtype: Any,
) -> tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], Float[Array, "#B #N T S"] | None
]:
    """Gradients from the softmax's own derivative: dscores = weights * (d_out v - delta)."""
    q, d_out = q.astype(jnp.float32), d_out.astype(jnp.float32)
    whole_k, whole_v = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
    scores, slope, allowed = _weights(q, whole_k, bias, mask, scoring)
    weights = jnp.where(allowed, jnp.exp(scores - lse[..., None]), 0.0)
    d_scores = weights * (jnp.einsum("btnh,bsnh->bnts", d_out, whole_v) - delta[..., None])
    d_raw = d_scores * slope * scoring.scale
    d_bias = None
    if bias is not None:
        shared = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        d_bias = jnp.sum(d_scores, axis=shared, keepdims=True)

    def grouped(whole, like):
        return whole.reshape(*like.shape[:3], -1, like.shape[3]).sum(3).astype(dtype)

    dq = jnp.einsum("bnts,bsnh->btnh", d_raw, whole_k).astype(dtype)
    dk = grouped(jnp.einsum("bnts,btnh->bsnh", d_raw, q), k)
    dv = grouped(jnp.einsum("bnts,btnh->bsnh", weights, d_out), v)
    return dq, dk, dv, d_bias


def paged_attention_reference(
    q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, scoring: PagedScoring, sinks: Float[Array, "N"] | None
) -> Float[Array, "T N H"]:
    """All pages as one part."""
    return whole(paged_partials_reference, q, pages, ragged, scoring, sinks)


def paged_partials_reference(
    q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, part: PagePart | None, scoring: PagedScoring, dtype: Any
) -> tuple[Float[Array, "T N H"], Float[Array, "N T"]]:
    """Gathers every row's pages, dequantizes them and attends causally in float32."""
    rows, sequence = q.shape[0], ragged.sequence_of(q.shape[0])
    table = ragged.page_table if part is None else part.page_table
    index = jnp.broadcast_to(jnp.arange(table.shape[1]), table.shape) if part is None else part.index
    key_position = (index[sequence][..., None] * pages.page_size + jnp.arange(pages.page_size)).reshape(rows, -1)
    keys, values = (
        jnp.repeat(x, q.shape[1] // x.shape[2], axis=2) for x in pages.gather(table[sequence]).dequantized()
    )
    distance = ragged.positions(rows)[:, None] - key_position
    allowed = (distance >= 0) & (key_position >= 0)
    if scoring.window is not None:
        allowed &= distance < scoring.window
    scores = soft_capped(jnp.einsum("tnh,tsnh->nts", q.astype(jnp.float32), keys) * scoring.scale, scoring.soft_cap)
    if scoring.distance_bias is not None:
        scores += scoring.distance_bias[:, jnp.clip(distance, 0, scoring.distance_bias.shape[1] - 1)]
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=MASKED)
    weights = jnp.exp(scores - top)
    norm = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(norm == 0, 1.0, norm)
    # Keys past a sequence's end may hold anything that was in the page; a weight of exactly zero must not turn it
    # into NaN.
    values = jnp.where(allowed[:, :, None, None], values, 0.0)
    return jnp.einsum("nts,tsnh->tnh", weights / safe, values).astype(dtype), (top + jnp.log(safe))[..., 0]

"""What attention means: float32 einsums, short enough to check by eye; all else is tested against them.

Shape legend: see spec.py.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.spec import KVPages, Mask, Ragged, soft_capped


def attention_reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None,
    bias: Float[Array, "#B #N T S"] | None,
) -> Float[Array, "B T N Hv"]:
    """softmax(soft_cap(scale * q k) + bias) v over the keys that `mask` allows; zeros where it allows none."""
    q_total, kv_total, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), group, axis=2) for x in (k, v))
    scores = soft_capped(jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k) * scale, soft_cap)
    if bias is not None:
        scores += bias
    allowed = mask.allowed(jnp.arange(q_total), jnp.arange(kv_total), q_total, kv_total)[:, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    norm = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(norm == 0, 1.0, norm)
    return jnp.einsum("bnts,bsnh->btnh", weights, v).astype(q.dtype)


def paged_attention_reference(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    ragged: Ragged,
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    distance_bias: Float[Array, "N D"] | None,
) -> tuple[Float[Array, "T N H"], KVPages]:
    """Writes k and v, gathers every row's whole sequence from its pages, and attends causally in float32."""
    rows, group = q.shape[0], q.shape[1] // k.shape[1]
    pages = pages.write(k, v, ragged)
    table = ragged.page_table[ragged.sequence_of(rows)]
    keys, values = (
        jnp.repeat(x[table].reshape(rows, -1, *x.shape[-2:]).astype(jnp.float32), group, axis=2)
        for x in (pages.k, pages.v)
    )
    scores = soft_capped(jnp.einsum("tnh,tsnh->nts", q.astype(jnp.float32), keys) * scale, soft_cap)
    distance = ragged.positions(rows)[:, None] - jnp.arange(keys.shape[1])[None, :]
    if distance_bias is not None:
        scores += distance_bias[:, jnp.clip(distance, 0, distance_bias.shape[1] - 1)]
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    scores = jnp.where(allowed, scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    # Keys past a sequence's end may hold anything that was in the page; a weight of exactly zero must not turn it
    # into NaN.
    values = jnp.where(allowed[:, :, None, None], values, 0.0)
    return jnp.einsum("nts,tsnh->tnh", weights, values).astype(q.dtype), pages

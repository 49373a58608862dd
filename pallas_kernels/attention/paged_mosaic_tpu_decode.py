"""A decode row of the paged TPU kernel: all query heads by all rows of a block.

Shape legend: see paged_mosaic_tpu.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_walk import Walk, elements, lane_sums, products, scaled
from meshloom.pallas_kernels.attention.paged_schedule import LANES, LENGTH, POSITION


def decode(walk: Walk, i: Any, slot: Any) -> Any:
    """The row of item i, whose first block comes into `slot`; returns the slot of the next item's."""
    sizes, item, read, fast, dtype = walk.sizes, walk.item, walk.read, walk.fast, walk.dtype
    q = fast.q[i % 2, 0]
    heads, block = sizes.heads, sizes.block
    if read.sinks is not None:
        top = read.sinks[...][:, :1]
        norm = (jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 1) == 0).astype(jnp.float32)
    else:
        top, norm = jnp.full((heads, 1), MASKED, jnp.float32), jnp.zeros((heads, LANES), jnp.float32)
    at_once = sizes.decode_tokens
    step_rows = at_once * sizes.kv_heads

    def some(j, slot, s, carry):
        top, norm, acc = carry
        rows = pl.ds(pl.multiple_of(s * step_rows, step_rows), step_rows)
        k, *v = (elements(x[slot, rows], sizes).astype(dtype) for x in fast.rows)
        raw = products(q, k)
        if sizes.scaled:
            raw = raw * fast.scales[0][slot, :, rows]
        distance = item[POSITION, i] - j * block - s * at_once - read.token_of[...]
        allowed = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)
        scores, factor = scaled(raw, sizes)
        scores = jnp.where(allowed, scores + read.head_bias[...], MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2((scores - new_top) * factor)
        keep = jnp.exp2((top - new_top) * factor)
        norm = norm * keep + lane_sums(p)
        if sizes.scaled:
            p = p * fast.scales[1][slot, :, rows]
        acc = acc * keep + jnp.dot(p.astype(dtype), *v or [k], preferred_element_type=jnp.float32)
        return new_top, norm, acc

    def visit(j, slot, carry):
        if at_once == block:
            return some(j, slot, 0, carry)
        there = pl.cdiv(jnp.minimum(item[LENGTH, i] - j * block, block), at_once)
        return jax.lax.fori_loop(0, there, lambda s, carry: some(j, slot, s, carry), carry)

    acc = jnp.zeros((heads, sizes.width), jnp.float32)
    slot, (top, norm, acc) = walk.over_blocks(i, slot, visit, (top, norm, acc))
    walk.settle(i)
    fast.out[0] = (acc / jnp.sum(norm, axis=1, keepdims=True)).astype(dtype)
    walk.send(i)
    return slot

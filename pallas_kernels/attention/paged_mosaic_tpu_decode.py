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

# The greatest number of steps of a query: 127 times 128. Queries of no greater element than the least are zeros.
_STEPS, _LEAST = 127 * 128, 1e-12


def decode(walk: Walk, i: Any, slot: Any) -> Any:
    """The row of item i, whose first block comes into `slot`; returns the slot of the next item's."""
    sizes, item, read, fast, dtype = walk.sizes, walk.item, walk.read, walk.fast, walk.dtype
    in_int8 = sizes.element == "int8" and dtype == jnp.bfloat16
    q, unit = _steps(fast.q[i % 2, 0]) if in_int8 else (fast.q[i % 2, 0], 1.0)
    heads, block = sizes.heads, sizes.block
    if read.sinks is not None:
        top = read.sinks[...][:, :1] / scaled(jnp.zeros(()), sizes, unit)[1]
        norm = (jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 1) == 0).astype(jnp.float32)
    else:
        top, norm = jnp.full((heads, 1), MASKED, jnp.float32), jnp.zeros((heads, LANES), jnp.float32)
    at_once = sizes.decode_tokens
    step_rows = at_once * sizes.kv_heads

    def some(j, slot, s, carry):
        top, norm, acc = carry
        rows = pl.ds(pl.multiple_of(s * step_rows, step_rows), step_rows)
        k, *v = (elements(x[slot, rows], sizes) for x in fast.rows)
        raw = _products_of_steps(q, k) if in_int8 else products(q, _factor(k, dtype))
        if sizes.scaled:
            raw = raw * fast.scales[0][slot, :, rows]
        distance = item[POSITION, i] - j * block - s * at_once - read.token_of[...]
        allowed = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)
        scores, factor = scaled(raw, sizes, unit)
        scores = jnp.where(allowed, scores + read.head_bias[...], MASKED)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2((scores - new_top) * factor)
        keep = jnp.exp2((top - new_top) * factor)
        norm = norm * keep + lane_sums(p)
        if sizes.scaled:
            p = p * fast.scales[1][slot, :, rows]
        values = _factor(v[0] if v else k, dtype)
        acc = acc * keep + jnp.dot(p.astype(dtype), values, preferred_element_type=jnp.float32)
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


def _factor(x: Any, dtype: Any) -> Any:
    """Keys or values as the matrix unit takes them beside bfloat16 queries or weights: float8 as it is stored.

    Its products are exact in float32. Of NaN it makes a number, but no NaN is stored whose scale is not NaN too.
    """
    return x if x.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16 else x.astype(dtype)


def _steps(q: Any) -> tuple[Any, Any]:
    """bfloat16 queries [N, H] in steps of 15 bits with a sign, and what a step of each row is worth, [N, 1].

    Steps are int8 [2N, H]: how many times 128 they are, then what is left. The matrix unit takes 2N rows of int8 in the
    time of N rows of bfloat16, and keys as they are stored in half of the time that it takes for them in bfloat16.
    """
    wide = q.astype(jnp.float32)
    unit = jnp.maximum(jnp.max(jnp.abs(wide), axis=1, keepdims=True), _LEAST) / _STEPS
    steps = jnp.round(wide / unit)
    high = jnp.round(steps / 128)
    return jnp.concatenate([high, steps - 128 * high]).astype(jnp.int32).astype(jnp.int8), unit


def _products_of_steps(q: Any, k: Any) -> Any:
    """Steps [2N, H] by keys [C, H], int8: [N, C], float32. Sums of 1,024 products fit 32 bits."""
    sums = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    high, low = jnp.split(sums, 2)
    return (128 * high + low).astype(jnp.float32)

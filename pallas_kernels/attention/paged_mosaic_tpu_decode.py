"""A decode row of the paged TPU kernel: all query heads by all rows of a block; of int4 by those of half the kv heads.

Shape legend: see paged_mosaic_tpu.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_walk import (
    Coding,
    Walk,
    coding,
    keys_of,
    lane_sums,
    products,
    scaled,
    scales_of,
)
from meshloom.pallas_kernels.attention.paged_schedule import LANES, LENGTH, POSITION, Sizes

# The greatest number of steps of a query: 127 times 128. Queries of no greater element than the least are zeros.
_STEPS, _LEAST = 127 * 128, 1e-12


def decode(walk: Walk, i: Any, slot: Any) -> Any:
    """The row of item i, whose first block comes into `slot`; returns the slot of the next item's."""
    sizes, item, read, fast, dtype = walk.sizes, walk.item, walk.read, walk.fast, walk.dtype
    code = coding(sizes)
    queries = [_Queries.of(q, sizes, code) for q in jnp.split(fast.q[i % 2, 0], sizes.parts)]
    heads, block = sizes.part_heads, sizes.block
    at_once = sizes.decode_tokens
    step_rows, piece_rows = at_once * sizes.kv_heads, sizes.piece_tokens * sizes.kv_heads

    def nothing(part):
        """Greatest score; sums of weights, of weighted values, and of the weights that coded values were given."""
        no_sums = jnp.zeros((heads, LANES), jnp.float32)
        sums = jnp.zeros((heads, sizes.width), jnp.float32), no_sums if code else None
        if read.sinks is None:
            return jnp.full((heads, 1), MASKED, jnp.float32), no_sums, *sums
        exponents = read.sinks[part * heads : (part + 1) * heads, :1]
        top = exponents / scaled(jnp.zeros(()), sizes, queries[part].unit)[1]
        return top, (jax.lax.broadcasted_iota(jnp.int32, (heads, LANES), 1) == 0).astype(jnp.float32), *sums

    def some(j, slot, s, carry):
        """Part s of block j, in pieces: the next is multiplied before one is weighed, or the matrix unit waits."""

        def first_row(n):
            return pl.multiple_of(s * step_rows + n * piece_rows, piece_rows)

        def multiplied(n):
            """Queries of each part by its keys of piece n, and the values of each part."""
            k, *v = (keys_of(x, slot, first_row(n), piece_rows, sizes) for x in fast.rows)
            return [_products(part, keys, dtype) for part, keys in zip(queries, k, strict=True)], v[0] if v else k

        def weighed(n, raw, values, carry):
            columns = pl.ds(n * piece_rows // sizes.parts, piece_rows // sizes.parts)
            distance = item[POSITION, i] - j * block - s * at_once - read.token_of[:, columns]
            allowed = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)

            def of_part(part, carry):
                top, norm, acc, weights = carry
                products = raw[part]
                if sizes.scaled:
                    products = products * scales_of(part, False, fast.scales, slot, first_row(n), piece_rows, sizes)
                scores, factor = scaled(products, sizes, queries[part].unit)
                scores = jnp.where(allowed, scores + read.head_bias[:, columns], MASKED)
                new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
                p = jnp.exp2((scores - new_top) * factor)
                keep = jnp.exp2((top - new_top) * factor)
                norm = norm * keep + lane_sums(p)
                if sizes.scaled:
                    p = p * scales_of(part, True, fast.scales, slot, first_row(n), piece_rows, sizes)
                p = p.astype(dtype)
                acc = acc * keep + jnp.dot(p, _factor(values[part], dtype), preferred_element_type=jnp.float32)
                if code:
                    weights = weights * keep + lane_sums(p.astype(jnp.float32))
                return new_top, norm, acc, weights

            return [of_part(part, each) for part, each in enumerate(carry)]

        pieces = step_rows // piece_rows
        ahead = multiplied(0)
        for n in range(pieces):
            raw, values = ahead
            if n + 1 < pieces:
                ahead = multiplied(n + 1)
            carry = weighed(n, raw, values, carry)
        return carry

    def visit(j, slot, carry):
        if at_once == block:
            return some(j, slot, 0, carry)
        there = pl.cdiv(jnp.minimum(item[LENGTH, i] - j * block, block), at_once)
        return jax.lax.fori_loop(0, there, lambda s, carry: some(j, slot, s, carry), carry)

    slot, carry = walk.over_blocks(i, slot, visit, [nothing(part) for part in range(sizes.parts)])
    walk.settle(i)
    for part, (_, norm, acc, weights) in enumerate(carry):
        if code:
            acc = code.plain(acc, jnp.sum(weights, axis=1, keepdims=True))
        fast.out[0, part * heads : (part + 1) * heads] = (acc / jnp.sum(norm, axis=1, keepdims=True)).astype(dtype)
    walk.send(i)
    return slot


class _Queries(NamedTuple):
    """Queries [N, H] of a part of the kv heads as they are multiplied, or their steps; what a unit of their products is
    worth; and where keys are coded the products with one of zeros, [N, 1].
    """

    q: Any
    unit: Any
    zero: Any

    @classmethod
    def of(cls, q: Any, sizes: Sizes, code: Coding | None) -> "_Queries":
        if sizes.element == "int8" and q.dtype == jnp.bfloat16:
            return cls(*_steps(q), None)
        if code is None:
            return cls(q, 1.0, None)
        return cls(q, code.unit, code.zero * jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True))


def _products(queries: _Queries, k: Any, dtype: Any) -> Any:
    """[N, C], float32."""
    if queries.q.dtype == jnp.int8:
        return _products_of_steps(queries.q, k)
    sums = products(queries.q, _factor(k, dtype))
    return sums if queries.zero is None else sums - queries.zero


def _factor(x: Any, dtype: Any) -> Any:
    """Keys or values as the matrix unit takes them beside bfloat16 queries or weights: float8 as it is stored.

    Its products are exact in float32. Of NaN it makes a number, but no NaN is stored whose scale is not NaN too.
    """
    return x if x.dtype in (jnp.float8_e4m3fn, jnp.float8_e4m3b11fnuz) and dtype == jnp.bfloat16 else x.astype(dtype)


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

"""Attention on TPUs: the backward kernel, all three gradients in one pass over the pairs of blocks.

Scores are held transposed, keys by queries: the statistics of the queries are then rows, as they lie in memory, and the
products for dk and dv read them as they are. Visits run by key block, so dk and dv of a block gather in scratch memory;
dq of all queries of a head stays in vector memory until the head is done, which spares the second pass over all scores
that a kernel for dq alone would make: five products for a pair where two kernels need seven.

Shape legend: as in mosaic_tpu.py; g heads of one program, which share a kv head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.mosaic_tpu import (
    LANES,
    LOG2_E,
    VMEM_LIMIT,
    across,
    allowed,
    bias_at,
    bias_rows,
    block_at,
    blocks_of,
    dot,
    exponent_of,
    head_major,
    ids_at,
    prefetched,
    repeated,
    row_at,
    row_of,
    run_visits,
    segment_rows,
    with_bias,
)
from meshloom.pallas_kernels.attention.mosaic_tpu_bias import bias_gradient
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask
from meshloom.pallas_kernels.attention.tuned import tuned_blocks
from meshloom.pallas_kernels.attention.visits import FIRST, LAST, Blocks

BLOCK_Q, BLOCK_KV = 1024, 1024
# Bundles of a pair on the diagonal on v6e: 4,092, with 512 queries 4,613.
STRIP = 256
# Bytes of vector memory for dq of one head, which is float32. With blocks of float32 v5p's 64 MiB hold no more.
HELD_LIMIT = {"bfloat16": 32 * 2**20, "float32": 16 * 2**20}


def why_not(spec: AttentionSpec) -> str | None:
    """The reason this kernel cannot run beside those of the forward one, or None."""
    held = -(-spec.q_shape[1] // LANES) * LANES * -(-spec.q_shape[3] // LANES) * LANES * 4
    limit = HELD_LIMIT[spec.dtype]
    if held <= limit:
        return None
    return f"the gradient of a head's {spec.q_shape[1]} queries takes {held:,} bytes of at most {limit:,}"


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
    """Equal to the reference up to rounding; contract as in kernel.py.

    Source: Dao 2023, FlashAttention-2, algorithm 2.
    """
    own = blocks_of(q.shape[1], k.shape[1], BLOCK_Q, BLOCK_KV)
    blocks = tuned_blocks("attention_backward", q, k, v, mask, scoring, own, biased=bias is not None)
    batch, heads, group = q.shape[0], q.shape[2], q.shape[2] // k.shape[2]
    head_dim, value_dim = q.shape[3], v.shape[3]
    scalars = prefetched(mask, blocks, batch, by=1)
    table = scalars[0]
    segments, biases = segment_rows(mask, blocks), bias_rows(bias, blocks)
    q_padded, kv_padded = blocks.counts[0] * blocks.block_q, blocks.counts[1] * blocks.block_kv

    rows = [jnp.pad(x, ((0, 0), (0, 0), (0, q_padded - blocks.q_total)))[:, :, None] for x in (lse * LOG2_E, delta)]
    by_query = [head_major(x, blocks.block_q) for x in (q, d_out.astype(q.dtype))]
    by_key = [head_major(x, blocks.block_kv) for x in (k, v)]
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, mask, scoring, blocks, bool(segments), bool(biases)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, table.shape[2]),
            in_specs=[
                *(block_at(0, blocks.block_q, dim) for dim in (head_dim, value_dim)),
                *(row_at(blocks.block_q), row_at(blocks.block_q)),
                *(block_at(1, blocks.block_kv, dim, group) for dim in (head_dim, value_dim)),
                *(bias_at(x, blocks) for x in biases),
                *ids_at(blocks, bool(segments)),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, q_padded, head_dim), lambda b, n, p, *_: (b, n, 0, 0)),
                *(block_at(1, blocks.block_kv, dim) for dim in (head_dim, value_dim)),
            ],
            scratch_shapes=[pltpu.VMEM((blocks.block_kv, dim), jnp.float32) for dim in (head_dim, value_dim)]
            + ([pltpu.VMEM((blocks.block_kv, LANES), jnp.int32)] if segments else []),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, q_padded, head_dim), jnp.float32),
            *(jax.ShapeDtypeStruct((batch, heads, kv_padded, dim), jnp.float32) for dim in (head_dim, value_dim)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="attention_backward",
    )(
        *scalars,
        *by_query,
        *rows,
        *by_key,
        *biases,
        *segments,
    )

    def of_kv_heads(x: Float[Array, "B N S_up D"]) -> Float[Array, "B S K D"]:
        summed = jnp.sum(x.reshape(batch, -1, group, *x.shape[2:]), axis=2)
        return summed[:, :, : blocks.kv_total].transpose(0, 2, 1, 3).astype(dtype)

    d_bias = None
    if bias is not None:
        d_bias = bias_gradient(bias, mask, scoring, blocks, scalars[1:], by_query, rows, by_key, segments)
    return dq[:, :, : blocks.q_total].transpose(0, 2, 1, 3).astype(dtype), of_kv_heads(dk), of_kv_heads(dv), d_bias


def _backward_kernel(
    mask: Mask,
    scoring: Scoring,
    blocks: Blocks,
    packed: bool,
    biased: bool,
    table,
    lens,
    first,
    q,
    d_out,
    lse,
    delta,
    k,
    v,
    *refs,
):
    """One visit. Scratch: dk and dv of the key block, float32, and the segments of its keys [c, 128]."""
    bias, refs = (refs[0], refs[1:]) if biased else (None, refs)
    ids, (dq, dk, dv, dk_sum, dv_sum, *kv_ids) = (refs[:2], refs[2:]) if packed else ((), refs)
    b, p = pl.program_id(0), pl.program_id(2)
    row = row_of(table, b)
    i, j, bits = (table[row, column, p] for column in range(3))
    factor = exponent_of(scoring, biased)

    @pl.when(p == 0)
    def _begin_head():
        dq[...] = jnp.zeros(dq.shape, jnp.float32)

    @pl.when(bits & FIRST > 0)
    def _begin():
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)
        if packed:
            kv_ids[0][...] = across(ids[1][0])

    def visit(rows: slice, keys: int, masked_from: int):
        """Queries `rows` of the block and its first `keys` keys, of which those from `masked_from` on are masked."""
        queries, d_rows = q[0, 0, rows], d_out[0, 0, rows]
        scores = dot(k[0, 0, :keys], queries, (1, 1))
        slope = None
        if scoring.soft_cap is not None:
            bent = jnp.tanh(scores * (scoring.scale / scoring.soft_cap))
            scores, slope = scoring.soft_cap * bent, 1 - bent * bent
        if bias is not None:
            scores = with_bias(scores, scoring, bias[0, 0, rows, :keys].astype(jnp.float32).T)
        weights = jnp.exp2(scores * factor - lse[0, 0, :, rows])
        if masked_from < keys:
            shape = (keys - masked_from, scores.shape[1])
            q_position = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (i * blocks.block_q + rows.start + first[0])
            kv_position = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (j * blocks.block_kv + masked_from)
            keep = allowed(mask, q_position, kv_position, lens[b])
            if packed:
                keep &= repeated(kv_ids[0][masked_from:keys], shape[1]) == ids[0][0, :, rows]
            masked = jnp.where(keep, weights[masked_from:], 0.0)
            weights = jnp.concatenate([weights[:masked_from], masked]) if masked_from else masked
        dv_sum[:keys] += dot(weights.astype(d_rows.dtype), d_rows, (1, 0))
        d_scores = weights * (dot(v[0, 0, :keys], d_rows, (1, 1)) - delta[0, 0, :, rows])
        if slope is not None:
            d_scores = d_scores * slope
        d_scores = d_scores.astype(queries.dtype)
        dk_sum[:keys] += dot(d_scores, queries, (1, 0))
        here = pl.ds(pl.multiple_of(i * blocks.block_q + rows.start, LANES), rows.stop - rows.start)
        dq[0, 0, here] += dot(d_scores, k[0, 0, :keys], (0, 0)) * scoring.scale

    run_visits(mask, blocks, packed, STRIP, i, j, bits, first[0], visit)

    @pl.when(bits & LAST > 0)
    def _end():
        dk[0, 0] = dk_sum[...] * scoring.scale
        dv[0, 0] = dv_sum[...]

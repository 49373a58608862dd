"""Attention on TPUs: the forward kernel, one visit of a (query block, key block) pair per grid step.

The table of visits (see visits.py) is prefetched into scalar memory, so steps that the mask rules out do not exist, or,
where the data rules them out, move nothing and compute nothing. A pair that the mask leaves whole skips the mask. The
weights are bfloat16 where the values are: a product of float32 would keep the matrix unit busy twice as long. Row
statistics are held repeated over the 128 lanes, which saves a broadcast across lanes for every register of scores, and
sums are taken over lanes once per run.

Shape legend: B batch, T queries, S keys, N heads, K kv heads, H head dim, V visits, q and c queries and keys of a
    block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention import spread
from meshloom.pallas_kernels.attention.kernel import MASKED, Scoring
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask
from meshloom.pallas_kernels.attention.tuned import tuned_blocks
from meshloom.pallas_kernels.attention.visits import ACTIVE, FIRST, LAST, MASKED_IN_PART, Blocks
from meshloom.pallas_kernels.dispatch import Target, may_be_spread, tpu_why_not

LANES = 128
LOG2_E = math.log2(math.e)
# Of 4,096 x 4,096 causal scores of one head, bundles per 128 x 128 x 128 products of the inner region, v6e and v5e:
# 2048 x 1024 has 19.1, 1024 x 1024 20.5 and 33.4, 512 x 1024 25.5; a larger block wastes more of the diagonal.
BLOCK_Q, BLOCK_KV = 1024, 1024
# Queries that a pair on the diagonal handles at a time; bundles of such a pair on v6e: 2,397, with 256 queries 2,599.
STRIP = 512
VMEM_LIMIT = 100 * 2**20


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The reason this kernel cannot run, or None."""
    if reason := tpu_why_not(target):
        return reason
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it multiplies bfloat16 and float32, not {spec.dtype}"
    return spread.why_not(spec) if may_be_spread() else None


def blocks_of(q_total: int, kv_total: int, block_q: int, block_kv: int) -> Blocks:
    """Blocks of at most these lengths, multiples of 128 tokens, no longer than the sequences need."""
    return Blocks(
        q_total,
        kv_total,
        min(block_q, -(-q_total // LANES) * LANES),
        min(block_kv, -(-kv_total // LANES) * LANES),
    )


def head_major(x: Float[Array, "B L N H"], block: int) -> Float[Array, "B N L_up H"]:
    """Padded to whole blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def prefetched(mask: Mask, blocks: Blocks, batch: int, by: int) -> tuple[Any, Any, Any]:
    """What every step reads from scalar memory: the visits [1 or B, 3, V], the keys of each row, the first position."""
    table = blocks.visits(mask, by).transpose(0, 2, 1)
    lens = jnp.full(batch, blocks.kv_total, jnp.int32)
    if mask.kv_lens is not None:
        lens = jnp.minimum(mask.kv_lens.astype(jnp.int32), lens)
    first = jnp.asarray(mask.first_position(blocks.q_total, blocks.kv_total), jnp.int32).reshape(1)
    return table, lens, first


def row_of(table: Any, batch: Any) -> Any:
    """The row of the table of visits for a row of the batch: all share one where the data has no say."""
    return batch if table.shape[0] > 1 else 0


def block_at(column: int, size: int, dim: int, group: int = 1) -> pl.BlockSpec:
    """The block [size, dim] of a head-major array that a visit names in `column`; `group` heads share one."""

    def place(b: Any, n: Any, p: Any, table: Any, *_: Any) -> tuple[Any, ...]:
        return b, jax.lax.div(n, group), table[row_of(table, b), column, p], 0

    return pl.BlockSpec((1, 1, size, dim), place)


def row_at(size: int) -> pl.BlockSpec:
    """The part [1, size] for a visit's queries of an array [B, N, 1, T_up]."""
    return pl.BlockSpec((1, 1, 1, size), lambda b, n, p, table, *_: (b, n, 0, table[row_of(table, b), 0, p]))


def ids_at(blocks: Blocks, packed: bool) -> list[pl.BlockSpec]:
    """The parts for a visit of what `segment_rows` gives."""

    def part(column: int, size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, size), lambda b, n, p, table, *_: (b, 0, table[row_of(table, b), column, p]))

    return [part(0, blocks.block_q), part(1, blocks.block_kv)] if packed else []


def bias_at(bias: Float[Array, "#B #N T_up S_up"], blocks: Blocks) -> pl.BlockSpec:
    """The part [q, c] for a visit of a padded bias, which rows of the batch and heads may share."""

    def place(b: Any, n: Any, p: Any, table: Any, *_: Any) -> tuple[Any, ...]:
        row = row_of(table, b)
        return b if bias.shape[0] > 1 else 0, n if bias.shape[1] > 1 else 0, table[row, 0, p], table[row, 1, p]

    return pl.BlockSpec((1, 1, blocks.block_q, blocks.block_kv), place)


def bias_rows(bias: Float[Array, "#B #N T S"] | None, blocks: Blocks) -> list[Any]:
    """The bias in whole blocks, without a copy where they divide it, or none; bfloat16 stays, half the bytes."""
    if bias is None:
        return []
    pads = ((0, -blocks.q_total % blocks.block_q), (0, -blocks.kv_total % blocks.block_kv))
    return [jnp.pad(bias if bias.dtype == jnp.bfloat16 else bias.astype(jnp.float32), ((0, 0), (0, 0), *pads))]


def with_bias(scores: Any, scoring: Scoring, bias: Any) -> Any:
    """Products q k, or capped scores, as scores with a bias."""
    return (scores * scoring.scale if scoring.soft_cap is None else scores) + bias.astype(jnp.float32)


def exponent_of(scoring: Scoring, biased: bool) -> float:
    """What turns scores as the kernels hold them into exponents of 2; a bias or a soft cap took the scale in before."""
    return LOG2_E * (scoring.scale if scoring.soft_cap is None and not biased else 1.0)


def segment_rows(mask: Mask, blocks: Blocks) -> list[Any]:
    """Segment ids of queries and keys, int32 [B, 1, L_up], or none; padding is of segment -1."""
    if mask.q_segments is None:
        return []
    ids = ((mask.q_segments, blocks.block_q), (mask.kv_segments, blocks.block_kv))
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % n)), constant_values=-1)[:, None] for x, n in ids]


def dot(a: Any, b: Any, dims: tuple[int, int]) -> Any:
    """Product of two blocks over one dimension of each, summed in float32; exact products where both are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None
    numbers = (((dims[0],), (dims[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def across(row: Any) -> Any:
    """A row [1, n] turned into a column that is repeated over the lanes, [n, 128]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def repeated(column: Any, width: int) -> Any:
    """A column [n, 128] that is the same in all lanes, as [n, width]."""
    if width % LANES:
        return jnp.broadcast_to(column[:, :1], (column.shape[0], width))
    return jnp.concatenate([column] * (width // LANES), axis=1)


def allowed(mask: Mask, q_position: Any, kv_position: Any, length: Any) -> Any:
    """Which scores of a block the lengths, causality and the window allow; positions broadcast against each other."""
    keep = kv_position < length
    if mask.causal:
        keep &= kv_position <= q_position
    if mask.window is not None:
        keep &= kv_position > q_position - mask.window
    return keep


def run_visits(
    mask: Mask, blocks: Blocks, packed: bool, strip: int, i: Any, j: Any, bits: Any, first: Any, visit: Any
) -> None:
    """Calls `visit(rows, keys, masked_from)` for what a visit has to do.

    A pair on the diagonal goes in strips of `strip` queries, each over the keys up to its own end: of a block of four
    strips, 10 of 16 parts are left. Only the end of each is masked, if causality alone rules keys out.
    """
    active, partly = bits & ACTIVE > 0, bits & MASKED_IN_PART > 0
    everything = slice(0, blocks.block_q)
    diagonal = jnp.bool_(False)
    if mask.causal and blocks.block_q == blocks.block_kv > strip:
        diagonal = partly & (i * blocks.block_q + first == j * blocks.block_kv)
        exact = not packed and mask.window is None and mask.kv_lens is None and not blocks.kv_total % blocks.block_kv

        @pl.when(active & diagonal)
        def _strips():
            for start in range(0, blocks.block_q, strip):
                stop = min(start + strip, blocks.block_q)
                visit(slice(start, stop), stop, start if exact else 0)

    pl.when(active & partly & ~diagonal)(lambda: visit(everything, blocks.block_kv, 0))
    pl.when(active & ~partly)(lambda: visit(everything, blocks.block_kv, blocks.block_kv))


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N T S"] | None,
    mask: Mask,
    scoring: Scoring,
    dtype: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Equal to the reference up to rounding; contract and errors as in kernel.py.

    Source: Dao 2023, FlashAttention-2, algorithm 1.
    """
    own = blocks_of(q.shape[1], k.shape[1], BLOCK_Q, BLOCK_KV)
    blocks = tuned_blocks("attention_forward", q, k, v, mask, scoring, own, biased=bias is not None)
    batch, heads, group = q.shape[0], q.shape[2], q.shape[2] // k.shape[2]
    head_dim, value_dim = q.shape[3], v.shape[3]
    scalars = prefetched(mask, blocks, batch, by=0)
    table = scalars[0]
    segments, biases = segment_rows(mask, blocks), bias_rows(bias, blocks)

    padded = blocks.counts[0] * blocks.block_q
    statistics = pltpu.VMEM((blocks.block_q, LANES), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, mask, scoring, blocks, bool(segments), bool(biases)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, table.shape[2]),
            in_specs=[
                block_at(0, blocks.block_q, head_dim),
                *(block_at(1, blocks.block_kv, dim, group) for dim in (head_dim, value_dim)),
                *(bias_at(x, blocks) for x in biases),
                *ids_at(blocks, bool(segments)),
            ],
            out_specs=[block_at(0, blocks.block_q, value_dim), row_at(blocks.block_q)],
            scratch_shapes=[statistics, statistics, pltpu.VMEM((blocks.block_q, value_dim), jnp.float32)]
            + ([pltpu.VMEM((blocks.block_q, LANES), jnp.int32)] if segments else []),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, padded, value_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="attention_forward",
    )(*scalars, head_major(q, blocks.block_q), *(head_major(x, blocks.block_kv) for x in (k, v)), *biases, *segments)
    return out[:, :, : blocks.q_total].transpose(0, 2, 1, 3), lse[:, :, 0, : blocks.q_total]


def _forward_kernel(
    mask: Mask, scoring: Scoring, blocks: Blocks, packed: bool, biased: bool, table, lens, first, q, k, v, *refs
):
    """One visit. Scratch: the greatest score and the sum of weights so far [q, 128], of which the sum is per lane, the
    weighted values [q, Hv], and the segments of the queries [q, 128].
    """
    bias, refs = (refs[0], refs[1:]) if biased else (None, refs)
    ids, (out, lse, top, norm, total, *q_ids) = (refs[:2], refs[2:]) if packed else ((), refs)
    b, p = pl.program_id(0), pl.program_id(2)
    row = row_of(table, b)
    i, j, bits = (table[row, column, p] for column in range(3))
    factor = exponent_of(scoring, biased)

    @pl.when(bits & FIRST > 0)
    def _begin():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        norm[...] = jnp.zeros(norm.shape, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        if packed:
            q_ids[0][...] = across(ids[0][0])

    def visit(rows: slice, keys: int, masked_from: int):
        """Queries `rows` of the block and its first `keys` keys, of which those from `masked_from` on are masked."""
        scores = dot(q[0, 0, rows], k[0, 0, :keys], (1, 1))
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores * (scoring.scale / scoring.soft_cap))
        if bias is not None:
            scores = with_bias(scores, scoring, bias[0, 0, rows, :keys])
        if masked_from < keys:
            shape = (scores.shape[0], keys - masked_from)
            q_position = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (i * blocks.block_q + rows.start + first[0])
            kv_position = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (j * blocks.block_kv + masked_from)
            keep = allowed(mask, q_position, kv_position, lens[b])
            if packed:
                keep &= repeated(q_ids[0][rows], shape[1]) == ids[1][0, :, masked_from:keys]
            # Below what a row starts with, so that the weight is zero in a row that has no key yet.
            masked = jnp.where(keep, scores[:, masked_from:], 2 * MASKED)
            scores = jnp.concatenate([scores[:, :masked_from], masked], axis=1) if masked_from else masked
        old_top = top[rows]
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2((scores - repeated(new_top, keys)) * factor)
        kept = jnp.exp2((old_top - new_top) * factor)
        norm[rows] = norm[rows] * kept + sum(weights[:, lane : lane + LANES] for lane in range(0, keys, LANES))
        values = dot(weights.astype(v.dtype), v[0, 0, :keys], (1, 0))
        total[rows] = total[rows] * repeated(kept, total.shape[1]) + values
        top[rows] = new_top

    run_visits(mask, blocks, packed, STRIP, i, j, bits, first[0], visit)

    @pl.when(bits & LAST > 0)
    def _end():
        whole = jnp.broadcast_to(jnp.sum(norm[...], axis=1, keepdims=True), norm.shape)
        safe = jnp.where(whole == 0, 1.0, whole)
        out[0, 0] = (total[...] / repeated(safe, total.shape[1])).astype(out.dtype)
        # The greatest score lacks the scale, unless a soft cap or a bias brought it in.
        scaled = jnp.where(whole == 0, MASKED, top[...] * (factor / LOG2_E) + jnp.log(safe))
        lse[0, 0] = scaled.T[:1]

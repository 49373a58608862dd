"""Attention on TPUs: the gradient of an additive bias.

It is a kernel of its own, because its sums run the other way: a bias is shared by rows of the batch or by heads, which
are the innermost steps here, so that a block of its gradient stays in vector memory until all of them are in, always in
the same order. The backward kernel would have to read and write the whole sum in main memory once for each of them,
8 MiB for a pair of blocks; two products more, of seven, take less time. Where nobody asks for the gradient, as with
ALiBi's, XLA drops the kernel.

Only pairs of blocks that the mask allows are steps; all others keep the zeros that the result begins with.

Shape legend: as in mosaic_tpu.py; b and n rows of the batch and heads that the bias has, r and m those that share each.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.mosaic_tpu import (
    VMEM_LIMIT,
    across,
    allowed,
    bias_at,
    bias_rows,
    block_at,
    dot,
    exponent_of,
    ids_at,
    repeated,
    row_at,
    row_of,
    run_visits,
    with_bias,
)
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.attention.visits import Blocks

STRIP = 512


def bias_gradient(
    bias: Float[Array, "#B #N T S"],
    mask: Mask,
    scoring: Scoring,
    blocks: Blocks,
    scalars: tuple[Int[Array, "B"], Int[Array, "1"]],
    by_query: list[Float[Array, "B N T_up _"]],
    rows: list[Float[Array, "B N 1 T_up"]],
    by_key: list[Float[Array, "B K S_up _"]],
    segments: list[Int[Array, "B 1 _"]],
) -> Float[Array, "#B #N T S"]:
    """The gradient in float32, summed over rows of the batch and heads that share the bias.

    Args:
        scalars: the keys of each row, and the first position, as `prefetched` has them.
        by_query, rows, by_key, segments: the operands of the backward kernel: q and the gradient of the result; lse in
            powers of 2 and the row products; k and v; the ids, or none.
    """
    (batch, heads, _, head_dim), value_dim = by_query[0].shape, by_query[1].shape[3]
    group = heads // by_key[0].shape[1]
    (whole,) = bias_rows(bias, blocks)
    table = blocks.allowed_pairs(mask)
    inputs = [
        *(block_at(0, blocks.block_q, dim) for dim in (head_dim, value_dim)),
        *(row_at(blocks.block_q), row_at(blocks.block_q)),
        *(block_at(1, blocks.block_kv, dim, group) for dim in (head_dim, value_dim)),
        bias_at(whole, blocks),
        *ids_at(blocks, bool(segments)),
    ]
    zeros = jnp.zeros(whole.shape, jnp.float32)
    operands = (table, *scalars, *by_query, *rows, *by_key, whole, *segments, zeros)
    gradient = pl.pallas_call(
        functools.partial(_kernel, mask, scoring, blocks, bool(segments)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(*whole.shape[:2], table.shape[2], batch // whole.shape[0], heads // whole.shape[1]),
            in_specs=[*map(_by_pair, inputs), pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)],
            out_specs=_by_pair(bias_at(whole, blocks)),
        ),
        out_shape=jax.ShapeDtypeStruct(zeros.shape, zeros.dtype),
        input_output_aliases={len(operands) - 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        name="attention_bias_gradient",
    )(*operands)
    return gradient[:, :, : blocks.q_total, : blocks.kv_total]


def _by_pair(spec: pl.BlockSpec) -> pl.BlockSpec:
    """A part that is placed by row, head and pair, in the order of this kernel's steps."""
    placed = spec.index_map
    assert placed is not None  # as all of mosaic_tpu.py's are

    def place(b: Any, n: Any, p: Any, r: Any, m: Any, *scalars: Any) -> tuple[Any, ...]:
        # Of b and r, and of n and m, one has a single value, which is 0.
        return placed(b + r, n + m, p, *scalars)

    return pl.BlockSpec(spec.block_shape, place)


def _kernel(
    mask: Mask,
    scoring: Scoring,
    blocks: Blocks,
    packed: bool,
    table,
    lens,
    first,
    q,
    d_out,
    lse,
    delta,
    k,
    v,
    bias,
    *refs,
):
    """One visit of one row and head; `refs` are the ids, the zeros, which are the result already, and the result."""
    ids, d_bias = refs[:-2], refs[-1]
    b, p, r, m = pl.program_id(0) + pl.program_id(3), pl.program_id(2), pl.program_id(3), pl.program_id(4)
    i, j, bits = (table[row_of(table, b), column, p] for column in range(3))
    factor = exponent_of(scoring, biased=True)

    @pl.when((r == 0) & (m == 0))
    def _begin():
        d_bias[...] = jnp.zeros(d_bias.shape, jnp.float32)

    def visit(rows: slice, keys: int, masked_from: int):
        """Queries `rows` of the block and its first `keys` keys, of which those from `masked_from` on are masked."""
        scores = dot(q[0, 0, rows], k[0, 0, :keys], (1, 1))
        if scoring.soft_cap is not None:
            scores = scoring.soft_cap * jnp.tanh(scores * (scoring.scale / scoring.soft_cap))
        scores = with_bias(scores, scoring, bias[0, 0, rows, :keys])
        weights = jnp.exp2(scores * factor - repeated(across(lse[0, 0, :, rows]), keys))
        if masked_from < keys:
            shape = (scores.shape[0], keys - masked_from)
            q_position = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + (i * blocks.block_q + rows.start + first[0])
            kv_position = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (j * blocks.block_kv + masked_from)
            keep = allowed(mask, q_position, kv_position, lens[b])
            if packed:
                keep &= repeated(across(ids[0][0, :, rows]), shape[1]) == ids[1][0, :, masked_from:keys]
            masked = jnp.where(keep, weights[:, masked_from:], 0.0)
            weights = jnp.concatenate([weights[:, :masked_from], masked], axis=1) if masked_from else masked
        products = dot(d_out[0, 0, rows], v[0, 0, :keys], (1, 1))
        d_bias[0, 0, rows, :keys] += weights * (products - repeated(across(delta[0, 0, :, rows]), keys))

    run_visits(mask, blocks, packed, STRIP, i, j, bits, first[0], visit)

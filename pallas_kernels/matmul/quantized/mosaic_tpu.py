"""Quantized products as TPU kernels: rows of x stay in fast memory while all of the weight passes, as it is stored.

W8A8: rows are rounded when they arrive, once for all columns. W8A16 and W4A16: values become bfloat16 numbers on their
way to the matrix unit. Scales of rows of the weight are applied to the sums; scales of groups of 32, 64 or 128 numbers
to the values, rounded to bfloat16, or, with few rows, to the sums of each group.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.dispatch import Target, tpu_why_not
from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized.blocks import (
    LANES,
    LIMIT,
    ROUNDED,
    ROWS,
    Blocks,
    blocks_of,
    largest_blocks,
)
from meshloom.pallas_kernels.matmul.quantized.formats import INT8
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec

_MADE = (("int8", "int8"), ("int8", "float"), ("int4", "float"))


def mosaic_why_not(spec: MatmulSpec, target: Target) -> str | None:
    """A TPU, one device's arrays, a pair of formats that it has, and blocks that fit."""
    if reason := tpu_why_not(target):
        return reason
    if spec.spread:
        return "XLA cannot spread a kernel over devices; call it inside shard_map"
    if (spec.values, spec.activations) not in _MADE:
        return f"it has no product of weights in {spec.values} and rows in {spec.activations}"
    if spec.dtype != "bfloat16":
        return f"x is bfloat16; got {spec.dtype}"
    if 0 in (*spec.x, *spec.w):
        return "there is nothing to multiply"
    if spec.groups > 1 and spec.w[1] % LANES:
        return f"rows of {spec.w[1]} numbers in groups are no multiple of {LANES}"
    if largest_blocks(spec) is None:
        return f"rows of {spec.w[1]} numbers do not fit fast memory, or no multiple of {LANES} divides them"
    return None


def quantized_matmul_mosaic(
    x: Float[Array, "*rows I"], w: QArray, *, activations: str, interpret: Any = False
) -> Float[Array, "*rows O"]:
    """As the reference, but for scales of groups that are rounded to bfloat16; `interpret` runs it without a TPU."""
    values = str(w.values.dtype)
    spec = MatmulSpec(x.shape, w.shape, str(x.dtype), values, w.block, activations)
    blocks = blocks_of(spec)
    assert blocks is not None
    rows = x.reshape(-1, x.shape[-1])
    (count, size), columns, groups = rows.shape, w.shape[0], w.scales.shape[1]
    # One number per column of the result lies along its lanes; groups are read as they are stored.
    by_column = groups == 1
    scales = w.scales.reshape(1, columns) if by_column else w.scales
    of_scales = (1, blocks.columns) if by_column else (blocks.columns, groups)
    scratch = []
    if activations == "int8":
        scratch = [pltpu.VMEM((blocks.rows, size), jnp.int8), pltpu.VMEM((blocks.rows, LANES), jnp.float32)]
    elif not by_column:
        lanes = -(-groups // LANES) * LANES
        scratch = [pltpu.VMEM((blocks.columns, lanes), jnp.float32)]
        if _few_rows(blocks, w.block[1]):
            scratch.append(pltpu.VMEM((lanes, blocks.columns), jnp.float32))
    if blocks.chunk < size:
        sums = jnp.int32 if activations == "int8" else jnp.float32
        scratch.append(pltpu.VMEM((blocks.rows, blocks.columns), sums))
    body = _rounded_body if activations == "int8" else functools.partial(_unrounded_body, group=w.block[1])
    out = pl.pallas_call(
        functools.partial(body, blocks=blocks),
        out_shape=jax.ShapeDtypeStruct((count, columns), x.dtype),
        grid=(pl.cdiv(count, blocks.rows), pl.cdiv(columns, blocks.columns)),
        in_specs=[
            pl.BlockSpec((blocks.rows, size), lambda m, n: (m, 0)),
            pl.BlockSpec((blocks.columns, size), lambda m, n: (n, 0)),
            pl.BlockSpec(of_scales, lambda m, n: (0, n) if by_column else (n, 0)),
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.columns), lambda m, n: (m, n)),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=LIMIT),
        interpret=interpret,
        name="quantized_matmul",
    )(rows, w.values, scales)
    return out.reshape(*x.shape[:-1], columns)


def _rounded_body(x_ref, w_ref, scale_ref, out_ref, rounded_ref, row_scale_ref, *sums, blocks: Blocks):
    """The first block of columns rounds the rows: strip by strip, so that the matrix unit multiplies one beside it."""
    size = w_ref.shape[1]

    def multiply(rows, k):
        return _dot(rounded_ref[rows, k], w_ref[:, k], jnp.int32)

    def store(rows, total):
        scale = jnp.concatenate([row_scale_ref[rows, :]] * pl.cdiv(blocks.columns, LANES), axis=1)
        total = total.astype(jnp.float32) * scale[:, : blocks.columns] * scale_ref[...]
        out_ref[rows, :] = total.astype(out_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        def strip(i, _):
            own = pl.ds(pl.multiple_of(jnp.minimum(i * blocks.strip, blocks.rows - blocks.strip), ROWS), blocks.strip)
            largest = _largest(x_ref, own)
            row_scale_ref[own, :] = jnp.broadcast_to(largest / INT8, (blocks.strip, LANES))
            by = INT8 / jnp.where(largest > 0, largest, 1.0)

            def round_and_multiply(k):
                total = jnp.zeros((blocks.strip, blocks.columns), jnp.int32)
                for at in range(0, k.size, ROUNDED):
                    part = pl.ds(pl.multiple_of(k.start + at, LANES), min(ROUNDED, k.size - at))
                    rounded_ref[own, part] = _rounded(x_ref[own, part].astype(jnp.float32) * by)
                    total += multiply(own, part)
                return total

            store(own, _over_chunks(round_and_multiply, blocks.chunk, size, [ref.at[own] for ref in sums]))

        jax.lax.fori_loop(0, pl.cdiv(blocks.rows, blocks.strip), strip, None)

    @pl.when(pl.program_id(1) > 0)
    def _():
        store(slice(None), _over_chunks(lambda k: multiply(slice(None), k), blocks.chunk, size, sums))


def _largest(x_ref, rows):
    """The largest number of each row by size, two registers of bfloat16 numbers at a time for as long as there are."""
    size = x_ref.shape[1]
    wide = 2 * LANES
    most = [jnp.abs(x_ref[rows, at : at + wide]) for at in range(0, size - size % wide, wide)]
    parts = [functools.reduce(jnp.maximum, most)] if most else []
    if size % wide:
        parts.append(jnp.abs(x_ref[rows, size - size % wide :]))
    return functools.reduce(jnp.maximum, (jnp.max(part.astype(jnp.float32), axis=1, keepdims=True) for part in parts))


def _rounded(x):
    """The nearest integers, the even one of two: what is left of float32 numbers at 1.5 * 2**23, in int8."""
    return jax.lax.bitcast_convert_type(x + 1.5 * 2**23, jnp.int32).astype(jnp.int8)


def _unrounded_body(x_ref, w_ref, scale_ref, out_ref, *scratch, blocks: Blocks, group: int):
    size = w_ref.shape[1]
    if group == size:
        total = _over_chunks(
            lambda k: _dot(x_ref[:, k], w_ref[:, k].astype(x_ref.dtype), jnp.float32), blocks.chunk, size, scratch
        )
        out_ref[...] = (total * scale_ref[...]).astype(out_ref.dtype)
        return
    lanes_ref, *rest = scratch
    lanes_ref[:, : size // group] = scale_ref[...]  # so that 128 of them can be read whatever their number is
    if _few_rows(blocks, group):
        by_column_ref, *sums = rest
        for tile in range(0, lanes_ref.shape[1], LANES):
            by_column_ref[tile : tile + LANES, :] = lanes_ref[:, tile : tile + LANES].T
        multiply = functools.partial(_scaled_sums, x_ref, w_ref, by_column_ref, group)
    else:
        sums = rest
        multiply = functools.partial(_scaled_values, x_ref, w_ref, lanes_ref, group)
    out_ref[...] = _over_chunks(multiply, blocks.chunk, size, sums).astype(out_ref.dtype)


def _few_rows(blocks: Blocks, group: int) -> bool:
    """Whether it takes less to scale the sums of each group than the values.

    16 rows, 512 columns and 4,096 numbers in groups of 128 take 2,982 bundles by values on v6e, where HBM takes 1,330
    cycles to bring them.
    """
    return blocks.rows * (LANES // group) <= LANES


def _scaled_values(x_ref, w_ref, lanes_ref, group: int, k):
    """Rows times the numbers that w stands for, over the slice k of a row."""
    of_lanes = lanes_ref[:, pl.ds(pl.multiple_of(k.start // group // LANES * LANES, LANES), LANES)]
    lane = jax.lax.broadcasted_iota(jnp.int32, of_lanes.shape, 1)
    parts = []
    for at in range(0, k.size, LANES):
        which = (k.start + at + lane) // group % LANES
        scale = jnp.take_along_axis(of_lanes, which, axis=1).astype(x_ref.dtype)
        parts.append(w_ref[:, pl.ds(k.start + at, LANES)].astype(x_ref.dtype) * scale)
    return _dot(x_ref[:, k], jnp.concatenate(parts, axis=1), jnp.float32)


def _scaled_sums(x_ref, w_ref, by_column_ref, group: int, k):
    """The same, each group's sums scaled; rows stand as often as 128 numbers have groups, with the others' at zero."""
    rows, groups = x_ref.shape[0], LANES // group
    lane = jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
    total = jnp.zeros((rows, w_ref.shape[0]), jnp.float32)
    for at in range(0, k.size, LANES):
        own = pl.ds(pl.multiple_of(k.start + at, LANES), LANES)
        x = x_ref[:, own]
        apart = [jnp.where(lane // group == i, x, jnp.zeros_like(x)) for i in range(groups)]
        sums = _dot(jnp.concatenate(apart) if groups > 1 else x, w_ref[:, own].astype(x.dtype), jnp.float32)
        for i in range(groups):
            scale = by_column_ref[pl.ds((k.start + at) // group + i, 1), :]
            total += sums[i * rows : (i + 1) * rows] * scale
    return total


def _over_chunks(multiply, chunk: int, size: int, sums):
    """The sum of `multiply` over all chunks of a row, each a slice of it."""
    if chunk == size:
        return multiply(pl.ds(0, size))
    (sum_ref,) = sums

    def add(i, _):
        part = multiply(pl.ds(pl.multiple_of(i * chunk, LANES), chunk))
        sum_ref[...] = part + jnp.where(i == 0, jnp.zeros_like(part), sum_ref[...])

    jax.lax.fori_loop(0, size // chunk, add, None)
    return sum_ref[...]


def _dot(x, w, dtype):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

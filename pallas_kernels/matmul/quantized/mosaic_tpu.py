"""Quantized products as TPU kernels: rows of x stay in fast memory while all of the weight passes, as it is stored.

Rows in int8 or float8 are rounded when they arrive, once for all columns; int4 becomes int8 on its way to the matrix
unit. Beside rows that stay floats, values become bfloat16 numbers. Scales of rows of the weight are applied to sums;
scales of groups of 32, 64 or 128 numbers to the sums of each group, or, where many rows stay floats, to the values,
rounded to bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.dispatch import Target, tpu_why_not
from meshloom.pallas_kernels.matmul.qarray import QArray, expand
from meshloom.pallas_kernels.matmul.quantized.blocks import (
    LANES,
    LIMIT,
    PART,
    ROWS,
    Blocks,
    blocks_of,
    largest_blocks,
)
from meshloom.pallas_kernels.matmul.quantized.spec import ROUNDED, MatmulSpec

# Of values and rows. Mosaic has no product of int8 and int4 (before TPU v7x), nor casts from float4.
_MADE = (
    ("int8", "int8"),
    ("int8", "float"),
    ("int4", "int8"),
    ("int4", "float"),
    ("float8_e4m3fn", "fp8"),
    ("float8_e4m3fn", "float"),
)


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
    # One number per column of the result lies along its lanes; those of groups stand row by row of the weight.
    by_column, group, rounded = groups == 1, w.block[1], activations != "float"
    scales = jnp.broadcast_to(expand(w.scales, (columns, groups)), (columns, groups))
    scales = scales.reshape(1, columns) if by_column else scales
    of_scales = (1, blocks.columns) if by_column else (blocks.columns, groups)
    scratch = []
    if rounded:
        dtype, apart = ROUNDED[activations].values, groups if activations == "fp8" else 1
        scratch += [pltpu.VMEM((blocks.rows, size), dtype), pltpu.VMEM((apart, blocks.rows, LANES), jnp.float32)]
    if not by_column:
        lanes = -(-groups // LANES) * LANES
        scratch.append(pltpu.VMEM((blocks.columns, lanes), jnp.float32))
        if rounded or _few_rows(blocks, group):
            scratch.append(pltpu.VMEM((lanes, blocks.columns), jnp.float32))
    if blocks.chunk < size:
        sums = jnp.int32 if activations == "int8" and by_column else jnp.float32
        scratch.append(pltpu.VMEM((blocks.rows, blocks.columns), sums))
    body = functools.partial(_rounded_body, activations=activations) if rounded else _unrounded_body
    out = pl.pallas_call(
        functools.partial(body, blocks=blocks, group=group),
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


def _rounded_body(
    x_ref, w_ref, scale_ref, out_ref, rounded_ref, row_scale_ref, *scratch, blocks: Blocks, group: int, activations: str
):
    """The first block of columns rounds the rows: strip by strip, so that the matrix unit multiplies one beside it."""
    size, most, sums = w_ref.shape[1], ROUNDED[activations].largest, list(scratch)
    by_group = row_scale_ref.shape[0] > 1
    if group < size:
        lanes_ref, by_column_ref, *sums = scratch
        _turn(scale_ref, lanes_ref, by_column_ref)

    def multiply(rows, k):
        if group == size:
            return _dot(rounded_ref[rows, k], w_ref[:, k].astype(rounded_ref.dtype))
        row_scale = (lambda i: widened(row_scale_ref[i, rows, :])) if by_group else None
        return _scaled_sums(lambda own: rounded_ref[rows, own], w_ref, by_column_ref, group, k, row_scale)

    def widened(scale):
        return jnp.concatenate([scale] * pl.cdiv(blocks.columns, LANES), axis=1)[:, : blocks.columns]

    def store(rows, total):
        total = total.astype(jnp.float32)
        total = total if by_group else total * widened(row_scale_ref[0, rows, :])
        out_ref[rows, :] = (total * scale_ref[...] if group == size else total).astype(out_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        def strip(i, _):
            own = pl.ds(pl.multiple_of(jnp.minimum(i * blocks.strip, blocks.rows - blocks.strip), ROWS), blocks.strip)

            def factor(largest, at):
                """What numbers are multiplied with, so that the largest becomes the format's."""
                row_scale_ref[at, own, :] = jnp.broadcast_to(largest / most, (blocks.strip, LANES))
                return most / jnp.where(largest > 0, largest, 1.0)

            by = None if by_group else factor(_largest(x_ref, own), 0)

            def round_and_multiply(k):
                total = None
                part = LANES if by_group else PART
                for at in range(0, k.size, part):
                    now = pl.ds(pl.multiple_of(k.start + at, LANES), min(part, k.size - at))
                    x = x_ref[own, now].astype(jnp.float32)
                    times = by
                    if by_group:
                        times = factor(jnp.max(jnp.abs(x), axis=1, keepdims=True), (k.start + at) // group)
                    rounded_ref[own, now] = _rounded(x * times, rounded_ref.dtype)
                    products = multiply(own, now)
                    total = products if total is None else total + products
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


def _rounded(x, dtype):
    """The nearest numbers of `dtype`; int8 is what is left of float32 numbers at 1.5 * 2**23, the even one of two."""
    if dtype != jnp.int8:
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x + 1.5 * 2**23, jnp.int32).astype(jnp.int8)


def _unrounded_body(x_ref, w_ref, scale_ref, out_ref, *scratch, blocks: Blocks, group: int):
    size = w_ref.shape[1]
    if group == size:
        total = _over_chunks(lambda k: _dot(x_ref[:, k], w_ref[:, k].astype(x_ref.dtype)), blocks.chunk, size, scratch)
        out_ref[...] = (total * scale_ref[...]).astype(out_ref.dtype)
        return
    if _few_rows(blocks, group):
        lanes_ref, by_column_ref, *sums = scratch
        _turn(scale_ref, lanes_ref, by_column_ref)
        multiply = functools.partial(_scaled_sums, lambda own: x_ref[:, own], w_ref, by_column_ref, group)
    else:
        lanes_ref, *sums = scratch
        lanes_ref[:, : size // group] = scale_ref[...]  # so that 128 of them can be read whatever their number is
        multiply = functools.partial(_scaled_values, x_ref, w_ref, lanes_ref, group)
    out_ref[...] = _over_chunks(multiply, blocks.chunk, size, sums).astype(out_ref.dtype)


def _turn(scale_ref, lanes_ref, by_column_ref):
    """Scales of groups, a row for each row of the weight, to a row for each group."""
    lanes_ref[:, : scale_ref.shape[1]] = scale_ref[...]  # so that 128 of them can be read whatever their number is
    for tile in range(0, lanes_ref.shape[1], LANES):
        by_column_ref[tile : tile + LANES, :] = lanes_ref[:, tile : tile + LANES].T


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
    return _dot(x_ref[:, k], jnp.concatenate(parts, axis=1))


def _scaled_sums(x_of, w_ref, by_column_ref, group: int, k, row_scale=None):
    """The same, each group's sums scaled; rows stand as often as 128 numbers have groups, with the others' at zero.

    Args:
        x_of: slice of a row's numbers -> those of all rows. row_scale: group -> numbers to multiply its sums with too.
    """
    total = None
    for at in range(0, k.size, LANES):
        own = pl.ds(pl.multiple_of(k.start + at, LANES), LANES)
        x = x_of(own)
        rows, first = x.shape[0], (k.start + at) // group
        sums = _dot(_apart(x, group), w_ref[:, own].astype(x.dtype)).astype(jnp.float32)
        for i in range(LANES // group):
            part = sums[i * rows : (i + 1) * rows] * by_column_ref[pl.ds(first + i, 1), :]
            part = part if row_scale is None else part * row_scale(first + i)
            total = part if total is None else total + part
    return total


def _apart(x, group: int):
    """Rows of 128 numbers as often as those have groups, each time one group's and zeros."""
    if group == LANES:
        return x
    # Four bytes at a time: registers of bytes have masks of another shape.
    wide = pltpu.bitcast(x, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, wide.shape, 1)
    parts = [jnp.where(lane // group == i, wide, jnp.zeros_like(wide)) for i in range(LANES // group)]
    return jnp.concatenate([pltpu.bitcast(part, x.dtype) for part in parts])


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


def _dot(x, w):
    dtype = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)

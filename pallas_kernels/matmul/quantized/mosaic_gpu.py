"""Quantized products on Hopper GPUs: 128 rows of the weight by up to 256 rows of x in a thread block.

The product is computed transposed, columns of the result down the 64 rows of a warpgroup: the weight is the operand
that wgmma takes from registers, where int8 and int4 become numbers of x's dtype, and x may have as few rows as there
are. Rows of both run along the contracted side, the one order that wgmma has for int8 and float8, which it multiplies
as they are. One warpgroup asks for copies (TMA) into a ring of buffers, and both multiply: while one turns small
numbers into larger ones, the other holds the tensor cores.

Scales of rows are applied to the sums; those of groups of 32, 64 or 128 numbers to the weight's numbers, rounded to x's
dtype; those of float8 blocks to the sums of each 128 numbers. The sums that Hopper keeps of float8 products have 14
bits, so that they are added in float32 after 128 numbers in any format (DeepSeek-V3 report 2024, section 3.3.2).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.hopper import (
    BY_COLUMN,
    BY_ROW,
    ROWS,
    WORKERS,
    Ring,
    bits_of,
    column,
    hopper_why_not,
    loaded,
    nothing,
    over,
    tiled,
)
from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized.hopper_blocks import LEAVING, STEP, Blocks, blocks_of
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec, round_rows

# Blocks of x up to which all of them pass before the weight goes on. Of more, memory could not bring all each time.
FEW_BLOCKS = 8
_MADE = (("int8", "int8"), ("int8", "float"), ("int4", "float"), ("float8_e4m3fn", "fp8"))


def hopper_product_why_not(spec: MatmulSpec, target: Target) -> str | None:
    """A Hopper GPU, one device's arrays, a pair of formats that it has, and sizes that copies and products take."""
    if reason := hopper_why_not(target):
        return reason
    if spec.spread:
        return "XLA cannot spread a kernel over devices; call it inside shard_map"
    if (spec.values, spec.activations) not in _MADE:
        return f"it has no product of weights in {spec.values} and rows in {spec.activations}"
    if spec.dtype not in ("bfloat16", "float16"):
        return f"x is bfloat16 or float16; got {spec.dtype}"
    if 0 in (*spec.x, *spec.w):
        return "there is nothing to multiply"
    if spec.w[1] % STEP:
        return f"rows of {spec.w[1]} numbers are no multiple of {STEP}"
    if spec.w[0] % 8:
        return f"{spec.w[0]} columns are no multiple of 8"
    return None


def quantized_matmul_hopper(x: Float[Array, "*rows I"], w: QArray, *, activations: str) -> Float[Array, "*rows O"]:
    """As the reference, but for scales of groups and the numbers they make, which are rounded to x's dtype."""
    spec = MatmulSpec(x.shape, w.shape, str(x.dtype), str(w.values.dtype), w.block, activations)
    blocks = blocks_of(spec)
    rows, columns = x.reshape(-1, x.shape[-1]), w.shape[0]
    given, scales = [rows, w.values], w.scales
    if activations != "float":
        rounded = round_rows(rows, activations, w.block[1])
        given, row_scales = [rounded.values, w.values], rounded.scales.T
    given[0] = jnp.pad(given[0], ((0, -len(rows) % blocks.rows), (0, 0)))
    if not blocks.scaled_by_step:  # one number for each column of the result
        scales = jnp.broadcast_to(scales, (columns, 1))
    if scales.shape[0] == columns:  # else 128 x 128 share one
        scales = jnp.pad(scales, ((0, -columns % (WORKERS * ROWS)), (0, 0))).T
    given.append(scales)
    if activations != "float":
        given.append(jnp.pad(row_scales, ((0, 0), (0, given[0].shape[0] - len(rows)))))
    out_dtype = x.dtype if blocks.splits == 1 else jnp.float32
    grid = {
        "split": blocks.splits,
        "rows": given[0].shape[0] // blocks.rows,
        "columns": -(-columns // (WORKERS * ROWS)),
    }
    if grid["rows"] <= FEW_BLOCKS:  # that run at once and read a block of the weight together; the last axis is first
        grid["rows"] = grid.pop("rows")
    out = plgpu.kernel(
        functools.partial(_kernel, blocks),
        out_type=jax.ShapeDtypeStruct((blocks.splits, given[0].shape[0], columns), out_dtype),
        scratch_types={
            "x_mem": tiled((blocks.stages, blocks.rows, blocks.depth), given[0].dtype, blocks.across(given[0].dtype)),
            "w_mem": tiled((blocks.stages, WORKERS, ROWS, blocks.depth), w.values.dtype, blocks.across(w.values.dtype)),
            "out_mem": tiled((WORKERS, min(blocks.rows, LEAVING), ROWS), out_dtype),
            "full": plgpu.Barrier(num_arrivals=1 + WORKERS, num_barriers=blocks.stages),
            "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=blocks.stages),
        },
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WORKERS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="quantized_matmul",
    )(*given)
    out = out[0] if blocks.splits == 1 else jnp.sum(out, axis=0)
    return out[: len(rows)].reshape(*x.shape[:-1], columns)


def _kernel(blocks: Blocks, x, w, scales, *refs, x_mem, w_mem, out_mem, full, free):
    """The result of 128 columns and a block of rows over one split of the contracted numbers."""
    *row_scales, out = refs
    n, split, m, worker = (jax.lax.axis_index(name) for name in ("columns", "split", "rows", "warpgroup"))
    first, mine = n * WORKERS * ROWS, pl.ds(n * WORKERS * ROWS + worker * ROWS, ROWS)
    rows = pl.ds(m * blocks.rows, blocks.rows)

    def copies(step, slot, barrier):
        numbers = pl.ds((split * blocks.steps + step) * blocks.depth, blocks.depth)
        plgpu.copy_gmem_to_smem(x.at[rows, numbers], x_mem.at[slot], barrier)
        for each in range(WORKERS):
            plgpu.copy_gmem_to_smem(w.at[pl.ds(first + each * ROWS, ROWS), numbers], w_mem.at[slot, each], barrier)

    def scales_of(step):
        """What a step multiplies with, asked for a step ahead."""
        if not blocks.scaled_by_step:
            return ()
        at = (split * blocks.steps + jnp.minimum(step, blocks.steps - 1)) * blocks.depth
        if blocks.kind == "fp8":
            own = scales[jax.lax.div(first + worker * ROWS, 128), jax.lax.div(at, 128)]
            return column(own), loaded(row_scales[0].at[jax.lax.div(at, 128), rows], BY_COLUMN)
        groups = (jax.lax.div(at, blocks.group) + i for i in range(-(-blocks.depth // blocks.group)))
        return tuple(loaded(scales.at[group, mine], BY_ROW) for group in groups)

    def step(at, carry):
        total, held = carry
        slot, ahead = ring.take(at), scales_of(at + 1)
        operands = w_mem.at[slot, worker], x_mem.at[slot]
        if blocks.kind == "fp8":
            total += _float8(blocks, *operands, held)
        else:
            body = _integers if blocks.kind == "int8" else functools.partial(_numbers, blocks, held)
            total = pl.run_state(functools.partial(body, *operands))(plgpu.ACC.init(total))
        if blocks.kind == "float":
            plgpu.commit_smem()  # the weight was read as products are not, so a copy over it needs a fence
        ring.give_back(slot)
        return total, ahead

    ring = Ring(copies, full, free, blocks.stages, blocks.steps, worker, lag=min(2, blocks.stages - 1))
    ring.begin()
    begin = nothing(blocks.rows, jnp.int32 if blocks.kind == "int8" else jnp.float32), scales_of(0)
    total, _ = jax.lax.fori_loop(0, blocks.steps, step, begin)
    ring.end()
    total = total.astype(jnp.float32)
    if not blocks.scaled_by_step:
        total *= over(loaded(scales.at[0, mine], BY_ROW), 0, blocks.rows)
        if row_scales:
            total *= over(loaded(row_scales[0].at[0, rows], BY_COLUMN), 1, blocks.rows)
    for start in range(0, blocks.rows, LEAVING):
        stop = min(start + LEAVING, blocks.rows)
        part = jax.lax.slice(total, (0, start), (ROWS, stop)).astype(out.dtype)
        leaving = out_mem.at[worker, pl.ds(0, stop - start)]
        leaving.transpose((1, 0))[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(leaving, out.at[split, pl.ds(m * blocks.rows + start, stop - start), mine])
        plgpu.wait_smem_to_gmem(0)


def _numbers(blocks: Blocks, scales, w, x, total):
    """Adds the product of the numbers that w stands for, but for scales of rows."""
    packed = plgpu.Layout.WGMMA_UPCAST_4X if bits_of(w.dtype) == 4 else plgpu.Layout.WGMMA_UPCAST_2X
    values = plgpu.layout_cast(plgpu.load(w, layout=packed), plgpu.Layout.WGMMA)
    for at in range(0, blocks.depth, STEP):
        part = jax.lax.slice(values, (0, at), (ROWS, at + STEP)).astype(x.dtype)
        if scales:
            width = min(blocks.group, STEP)
            of_groups = [
                over(scales[start // blocks.group].astype(x.dtype), 0, width) for start in range(at, at + STEP, width)
            ]
            part *= of_groups[0] if len(of_groups) == 1 else jnp.concatenate(of_groups, axis=1)
        plgpu.wgmma(total, part, x.at[:, pl.ds(at, STEP)].transpose((1, 0)))


def _integers(w, x, total):
    plgpu.wgmma(total, w, x.transpose((1, 0)))


def _float8(blocks: Blocks, w, x, scales):
    """The product of one step, scaled where scales change between steps."""

    def product(total):
        plgpu.wgmma(total, w, x.transpose((1, 0)))
        return plgpu.wgmma_accumulator_load(total)

    total = pl.run_scoped(product, plgpu.ACC((ROWS, blocks.rows), jnp.float32))
    return total * over(scales[0], 0, blocks.rows) * over(scales[1], 1, blocks.rows) if scales else total

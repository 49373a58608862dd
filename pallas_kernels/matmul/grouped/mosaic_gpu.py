"""Grouped products on Hopper GPUs: each visits the tiles that groups have rows in, and no others.

A thread block of the product takes a tile of 128 rows for one of its groups and 256 columns; tiles that groups share
are computed whole for each, and each stores its own rows: all in one copy, or some by copies of 32, 16, ... 1 rows.
A thread block of the outer product takes 128 x 256 of one group's result, over that group's rows; where its first and
last block of them hold rows of other groups, those are cleared in shared memory. One warpgroup asks for copies (TMA)
into a ring of buffers, two multiply (wgmma), each for 64 rows of the result.

The source of both schemes is Gale et al. 2022, MegaBlocks. Shape legend: see spec.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.hopper import ROWS, WORKERS, Ring, hopper_why_not, nothing, over, row_positions, tiled
from meshloom.pallas_kernels.matmul.grouped.schedule import visits
from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec, Kernel, bounds

# Rows of a tile, columns of one, those that a warpgroup adds up or clears at a time, and numbers contracted in a step.
TILE, COLUMNS, PART, STEP = WORKERS * ROWS, 256, 128, 64
STAGES = 4


def hopper_grouped_why_not(spec: GroupedSpec, target: Target) -> str | None:
    """A Hopper GPU, one device's arrays, 16-bit floats and sides that are whole steps."""
    if reason := hopper_why_not(target):
        return reason
    if spec.spread:
        return "XLA cannot spread a kernel over devices; call it inside shard_map"
    if spec.x not in ("bfloat16", "float16") or spec.weight != spec.x:
        return f"x and w are both bfloat16 or both float16; got {spec.x} and {spec.weight}"
    if not (spec.rows and spec.groups and spec.contracted and spec.columns):
        return "there is nothing to multiply"
    if spec.contracted % STEP or spec.columns % STEP:
        return f"sides of {spec.contracted} and {spec.columns} are no multiples of {STEP}"
    return None


def _whole_tiles(x: Any) -> Any:
    """Rows filled up to the tiles of 8 that copies are made of."""
    return jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0)))


def _memory(left: tuple[int, ...], right: tuple[int, ...], dtype: Any, out_dtype: Any, arrivals: int) -> dict[str, Any]:
    """Buffers for the two sides of a step, and for what leaves.

    Args:
        arrivals: copies of a step.
    """
    return {
        "left_mem": tiled((STAGES, *left), dtype),
        "right_mem": tiled((STAGES, *right), dtype),
        "out_mem": tiled((WORKERS, ROWS, STEP), out_dtype, STEP),
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
    }


def product(
    x: Float[Array, "M K"], w: Float[Array, "E A B"], group_sizes: Int[Array, "E"], transposed: bool, target: Target
) -> Float[Array, "M N"]:
    """Rows times the weight of their group."""
    spec = GroupedSpec.of(x, w, group_sizes, transposed)
    plan, count = visits(group_sizes, spec.rows, TILE)
    most = len(plan.group)
    facts = jnp.stack([plan.group, plan.tile, plan.first[plan.group], plan.end[plan.group]], axis=1)
    # A visit past the last stores no row.
    facts = jnp.where(jnp.arange(most)[:, None] < count, facts, jnp.asarray([spec.groups, 0, 0, 0]))
    x = _whole_tiles(x)
    parts = -(-spec.columns // PART) if spec.columns < COLUMNS else COLUMNS // PART
    side = (PART, STEP) if transposed else (STEP, PART)
    out = plgpu.kernel(
        functools.partial(_product_body, spec, parts),
        out_type=jax.ShapeDtypeStruct((x.shape[0], spec.columns), x.dtype),
        scratch_types={
            **_memory((WORKERS, ROWS, STEP), (parts, *side), x.dtype, x.dtype, WORKERS + parts),
            "rows_mem": plgpu.SMEM((WORKERS, ROWS, STEP), x.dtype),
        },
        # Tiles of a group change first, so that they read the same part of its weight together.
        grid=(-(-spec.columns // (parts * PART)), most),
        grid_names=("columns", "visit"),
        num_threads=WORKERS,
        thread_name="warpgroup",
        kernel_name="grouped_matmul",
    )(facts.astype(jnp.int32), x, w)
    return out[: spec.rows]


def _product_body(
    spec: GroupedSpec, parts: int, facts, x, w, out, *, left_mem, right_mem, out_mem, rows_mem, full, free
):
    """One visit, and a part of the columns."""
    n, visit, worker = (jax.lax.axis_index(name) for name in ("columns", "visit", "warpgroup"))
    group, tile, first, end = (facts[visit, field] for field in range(4))
    steps = jnp.where(group < spec.groups, -(-spec.contracted // STEP), 0)

    def columns(part):
        return pl.ds((n * parts + part) * PART, PART)

    def copies(step, slot, barrier):
        numbers = pl.ds(step * STEP, STEP)
        for each in range(WORKERS):
            rows = pl.ds(tile * TILE + each * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x.at[rows, numbers], left_mem.at[slot, each], barrier)
        for part in range(parts):
            at = (columns(part), numbers) if spec.transposed else (numbers, columns(part))
            plgpu.copy_gmem_to_smem(w.at[(group, *at)], right_mem.at[slot, part], barrier)

    def operands(slot, part):
        right = right_mem.at[slot, part]
        return left_mem.at[slot, worker], right.transpose((1, 0)) if spec.transposed else right

    totals = _summed(copies, operands, parts, steps, worker, full, free)
    top = tile * TILE + worker * ROWS
    begin, stop = jnp.clip(first - top, 0, ROWS), jnp.clip(end - top, 0, ROWS)

    def leave(values, at):
        """Some columns of the result, by way of shared memory."""

        @pl.when((begin == 0) & (stop == ROWS))
        def _whole():
            _leave(values, out_mem.at[worker], out.at[pl.ds(top, ROWS), at])

        @pl.when((begin < stop) & ((begin > 0) | (stop < ROWS)))
        def _some():
            plgpu.store(rows_mem.at[worker], values, optimized=False)
            plgpu.commit_smem()
            row = begin
            for count in (32, 16, 8, 4, 2, 1):
                more = (stop - begin) & count

                @pl.when(more > 0)
                def _rows(row=row, count=count):
                    own = pl.ds(row, count)
                    plgpu.copy_smem_to_gmem(rows_mem.at[worker, own], out.at[pl.ds(top + row, count), at])

                row += more
            plgpu.wait_smem_to_gmem(0)

    for part, total in enumerate(totals):
        for start in range(0, PART, STEP):
            at = pl.ds((n * parts + part) * PART + start, STEP)
            values = jax.lax.slice(total, (0, start), (ROWS, start + STEP)).astype(out.dtype)
            # Columns past the last are none of a copy of tiles, and would be of one of rows.
            pl.when(at.start < spec.columns)(functools.partial(leave, values, at))


def outer(
    a: Float[Array, "M A"], b: Float[Array, "M B"], group_sizes: Int[Array, "E"], dtype: Any, target: Target
) -> Float[Array, "E A B"]:
    """a^T b over the rows of each group."""
    common = jnp.result_type(a, b)
    rows, groups = a.shape[0], group_sizes.shape[0]
    first, end = bounds(group_sizes, rows)
    a, b = (_whole_tiles(each.astype(common)) for each in (a, b))
    parts = -(-b.shape[1] // PART) if b.shape[1] < COLUMNS else COLUMNS // PART
    return plgpu.kernel(
        functools.partial(_outer_body, parts),
        out_type=jax.ShapeDtypeStruct((groups, a.shape[1], b.shape[1]), dtype),
        scratch_types={
            **_memory((WORKERS, STEP, ROWS), (parts, STEP, PART), common, dtype, WORKERS + parts),
            "cleared": plgpu.Barrier(num_arrivals=WORKERS),
        },
        # Both sides of one group change before it: its rows are read from device memory once.
        grid=(groups, -(-a.shape[1] // TILE), -(-b.shape[1] // (parts * PART))),
        grid_names=("group", "a", "b"),
        num_threads=WORKERS,
        thread_name="warpgroup",
        kernel_name="grouped_outer",
    )(jnp.stack([first, end], axis=1), a, b)


def _outer_body(parts: int, facts, a, b, out, *, left_mem, right_mem, out_mem, full, free, cleared):
    """A block of the result of one group."""
    group, i, j, worker = (jax.lax.axis_index(name) for name in ("group", "a", "b", "warpgroup"))
    first, end = facts[group, 0], facts[group, 1]
    top = jax.lax.div(first, 8) * 8
    steps = jnp.where(end > first, jax.lax.div(end - top + STEP - 1, STEP), 0)

    def copies(step, slot, barrier):
        rows = pl.ds(pl.multiple_of(top + step * STEP, 8), STEP)
        for each in range(WORKERS):
            side = pl.ds(i * TILE + each * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(a.at[rows, side], left_mem.at[slot, each], barrier)
        for part in range(parts):
            side = pl.ds((j * parts + part) * PART, PART)
            plgpu.copy_gmem_to_smem(b.at[rows, side], right_mem.at[slot, part], barrier)

    def clear(mem, row):
        """Zeros for rows of others: what they hold may be NaN."""
        keep = row_positions(row)
        keep = over((keep >= first) & (keep < end), 0, mem.shape[1])
        values = plgpu.load(mem, layout=plgpu.Layout.WGMMA)
        mem[...] = jnp.where(keep, values, jnp.zeros_like(values))

    def prepare(step, slot):
        row = top + step * STEP

        @pl.when((row < first) | (row + STEP > end))
        def _clear():
            clear(left_mem.at[slot, worker], row)
            for part in range(parts):
                pl.when(worker == part % WORKERS)(functools.partial(clear, right_mem.at[slot, part], row))
            plgpu.commit_smem()
            plgpu.barrier_arrive(cleared)
            plgpu.barrier_wait(cleared)

    def operands(slot, part):
        return left_mem.at[slot, worker].transpose((1, 0)), right_mem.at[slot, part]

    totals = _summed(copies, operands, parts, steps, worker, full, free, prepare)
    own = pl.ds(i * TILE + worker * ROWS, ROWS)
    for part, total in enumerate(totals):
        for start in range(0, PART, STEP):
            at = pl.ds((j * parts + part) * PART + start, STEP)
            values = jax.lax.slice(total, (0, start), (ROWS, start + STEP)).astype(out.dtype)
            _leave(values, out_mem.at[worker], out.at[group, own, at])


def _summed(copies, operands, parts: int, steps, worker, full, free, prepare=None) -> tuple[Any, ...]:
    """Sums of the products of all steps, [r, PART] each.

    Args:
        copies: as of a Ring. operands: (slot, part) -> both of a product. prepare: (step, slot), before they are read.
    """
    ring = Ring(copies, full, free, STAGES, steps, worker, lag=2)

    def step(at, totals):
        slot = ring.take(at)
        if prepare is not None:
            prepare(at, slot)

        def products(totals):
            for part, total in enumerate(totals):
                plgpu.wgmma(total, *operands(slot, part))

        totals = pl.run_state(products)(tuple(plgpu.ACC.init(total) for total in totals))
        ring.give_back(slot)
        return totals

    ring.begin()
    totals = jax.lax.fori_loop(0, steps, step, (nothing(PART),) * parts)
    ring.end()
    return totals


def _leave(values, through, out) -> None:
    through[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(through, out)
    plgpu.wait_smem_to_gmem(0)


MOSAIC_GPU = Kernel(product, outer)

"""Grouped products as TPU kernels: each visits the tiles that groups have rows in, and no others.

The product keeps all of K in fast memory where it fits, so that a weight's tile is read from HBM once for its whole
group, however many tiles of rows that has, and float32 sums are written once. Tiles that a group shares with others are
computed whole and stored in part. int8 weights become numbers of x's dtype on their way to the multiplier; their scales
are applied to the float32 sums, or, where they run along K, to x.

The source of both schemes is Gale et al. 2022, MegaBlocks; JAX's own megablox is the anchor they are measured against.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Target, tpu_why_not
from meshloom.pallas_kernels.matmul.grouped.schedule import Visits, visits
from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec, Kernel
from meshloom.pallas_kernels.matmul.grouped.tiles import (
    LIMIT,
    OuterTiles,
    Tiles,
    least_tiles,
    outer_tiles,
    product_tiles,
)
from meshloom.pallas_kernels.matmul.qarray import QArray

_FLOATS = ("bfloat16", "float32")
_PREFETCHED = 6  # arrays of Visits


def mosaic_why_not(spec: GroupedSpec, target: Target) -> str | None:
    """A TPU, one device's arrays, dtypes the multiplier has, and tiles that fit."""
    if reason := tpu_why_not(target):
        return reason
    if spec.spread:
        return "XLA cannot spread a kernel over devices; call it inside shard_map"
    if spec.x not in _FLOATS or spec.weight not in (spec.x, "int8"):
        return f"x is bfloat16 or float32 and w of the same dtype or int8; got {spec.x} and {spec.weight}"
    if not (spec.rows and spec.groups and spec.contracted and spec.columns):
        return "there is nothing to multiply"
    backward = dataclasses.replace(spec, contracted=spec.columns, columns=spec.contracted)
    if least_tiles(spec) is None or least_tiles(backward) is None:
        return f"no tile of {spec.contracted} x {spec.columns} fits; multiples of 128 would be cut"
    return None


def product(
    x: Float[Array, "M K"],
    w: Any,
    group_sizes: Int[Array, "E"],
    transposed: bool,
    target: Target,
    interpret: Any = False,
    *,
    rest: bool = True,
) -> Float[Array, "M N"]:
    """Rows times the weight of their group; `interpret` runs it without a TPU.

    Without `rest` tiles past the last group's are not written.
    """
    spec = GroupedSpec.of(x, w, group_sizes, transposed)
    tiles = product_tiles(spec)
    assert tiles is not None
    plan, count = visits(group_sizes, spec.rows, tiles.rows, rest=rest)
    steps = spec.contracted // tiles.contracted

    def depth(visit, step, plan):
        """The part of K that a step reads; a visit to no group stays where the last one ended."""
        return jnp.where(plan.group[visit] < spec.groups, step, steps - 1)

    def of_x(n, visit, step, *refs):
        plan = Visits(*refs)
        return plan.read_tile[visit], depth(visit, step, plan)

    def of_w(n, visit, step, *refs):
        plan = Visits(*refs)
        k = depth(visit, step, plan)
        return (plan.read_group[visit], n, k) if transposed else (plan.read_group[visit], k, n)

    def of_scales(n, visit, step, *refs):
        plan = Visits(*refs)
        return plan.read_group[visit], 0, n if transposed else depth(visit, step, plan)

    def of_out(n, visit, step, *refs):
        return Visits(*refs).tile[visit], n

    values, scales, scale_specs = w, [], []
    if isinstance(w, QArray):
        # One number per row of a matrix that is stored by rows: along the lanes of the result or of x.
        values, scales = w.values, [jnp.swapaxes(w.scales, 1, 2)]
        scale_specs = [pl.BlockSpec((None, 1, tiles.columns if transposed else tiles.contracted), of_scales)]
    block = (tiles.columns, tiles.contracted) if transposed else (tiles.contracted, tiles.columns)
    straight = steps == 1 and tiles.chunk == tiles.contracted
    return pl.pallas_call(
        functools.partial(_product_body, groups=spec.groups, tiles=tiles, steps=steps, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((spec.rows, spec.columns), jnp.result_type(x, w.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=_PREFETCHED,
            grid=(pl.cdiv(spec.columns, tiles.columns), count, steps),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.contracted), of_x),
                pl.BlockSpec((None, *block), of_w),
                *scale_specs,
            ],
            out_specs=pl.BlockSpec((tiles.rows, tiles.columns), of_out),
            scratch_shapes=[] if straight else [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)],
        ),
        compiler_params=_parameters(("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(spec.rows, spec.contracted, spec.columns, (x, values)),
        interpret=interpret,
        name="grouped_matmul",
    )(*_prefetched(plan), x, values, *scales)


def _product_body(*refs, groups: int, tiles: Tiles, steps: int, transposed: bool):
    plan, (x_ref, w_ref, *rest) = Visits(*refs[:_PREFETCHED]), refs[_PREFETCHED:]
    scale_ref = rest.pop(0) if w_ref.dtype == jnp.int8 else None
    out_ref, sums = rest[0], rest[1:]
    visit, step = pl.program_id(1), pl.program_id(2)
    group = plan.group[visit]

    def store(result):
        # Rows of the tile that are not this group's were stored by an earlier visit or will be by a later one.
        row = plan.tile[visit] * tiles.rows + jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
        own = (row >= plan.first[group]) & (row < plan.end[group])
        out_ref[...] = jnp.where(own, result, out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)

    def multiply(i):
        k = (
            slice(None)
            if tiles.chunk == tiles.contracted
            else pl.ds(pl.multiple_of(i * tiles.chunk, tiles.chunk), tiles.chunk)
        )
        x, w = x_ref[:, k], w_ref[:, k] if transposed else w_ref[k, :]
        if scale_ref is not None:
            w = w.astype(jnp.float32).astype(x.dtype)
            if not transposed:
                x = (x.astype(jnp.float32) * scale_ref[:, k]).astype(x.dtype)
        return _dot(x, w, (1,), (1 if transposed else 0,))

    def scaled(result):
        return result * scale_ref[...] if scale_ref is not None and transposed else result

    if not sums:

        @pl.when(group < groups)
        def _():
            store(scaled(multiply(0)))

        @pl.when(group == groups)
        def _():
            store(jnp.zeros(out_ref.shape, jnp.float32))

        return
    (sum_ref,) = sums

    def add(i, _):
        # Chosen, not cleared before: storing zeros would take 6 % of the time that 4,096 numbers take on v6e.
        before = jnp.where((step == 0) & (i == 0), 0.0, sum_ref[...])
        sum_ref[...] = before + multiply(i)

    jax.lax.fori_loop(0, jnp.where(group < groups, tiles.contracted // tiles.chunk, 0), add, None)

    @pl.when(step == steps - 1)
    def _():
        # One way to store for rows of a group and of none: a branch of its own takes 4 % of the instructions.
        store(jnp.where(group < groups, scaled(sum_ref[...]), 0.0))


def outer(
    a: Float[Array, "M A"],
    b: Float[Array, "M B"],
    group_sizes: Int[Array, "E"],
    dtype: Any,
    target: Target,
    interpret: Any = False,
) -> Float[Array, "E A B"]:
    """a^T b over the rows of each group; `interpret` runs it without a TPU."""
    dtype_in = jnp.result_type(a, b)
    rows, groups = a.shape[0], group_sizes.shape[0]
    tiles = outer_tiles(rows, groups, a.shape[1], b.shape[1], dtype_in)
    plan, count = visits(group_sizes, rows, tiles.rows, groups_all=True)

    def of_a(i, j, visit, *refs):
        return Visits(*refs).tile[visit], i

    def of_b(i, j, visit, *refs):
        return Visits(*refs).tile[visit], j

    def of_out(i, j, visit, *refs):
        return Visits(*refs).group[visit], i, j

    return pl.pallas_call(
        functools.partial(_outer_body, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((groups, a.shape[1], b.shape[1]), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=_PREFETCHED,
            grid=(pl.cdiv(a.shape[1], tiles.left), pl.cdiv(b.shape[1], tiles.right), count),
            in_specs=[pl.BlockSpec((tiles.rows, tiles.left), of_a), pl.BlockSpec((tiles.rows, tiles.right), of_b)],
            out_specs=pl.BlockSpec((None, tiles.left, tiles.right), of_out),
            scratch_shapes=[pltpu.VMEM((tiles.left, tiles.right), jnp.float32)],
        ),
        compiler_params=_parameters(("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, a.shape[1], b.shape[1], (a, b)),
        interpret=interpret,
        name="grouped_outer",
    )(*_prefetched(plan), a.astype(dtype_in), b.astype(dtype_in))


def _outer_body(*refs, tiles: OuterTiles):
    plan, (a_ref, b_ref, out_ref, sum_ref) = Visits(*refs[:_PREFETCHED]), refs[_PREFETCHED:]
    visit, last = pl.program_id(2), pl.num_programs(2) - 1
    group = plan.group[visit]
    top = plan.tile[visit] * tiles.rows
    first, end = plan.first[group], plan.end[group]
    whole = (first <= top) & (end >= top + tiles.rows)
    begins = (visit == 0) | (plan.group[jnp.maximum(visit - 1, 0)] != group)

    def add(own):
        def some(i, _):
            side = pl.ds(pl.multiple_of(i * tiles.chunk, tiles.chunk), tiles.chunk)
            # Chosen, not cleared before: storing zeros would take a tenth of the time of two visits of 512 rows on v6e.
            before = jnp.where(begins, 0.0, sum_ref[side, :])
            sum_ref[side, :] = before + _dot(own(a_ref[:, side]), own(b_ref[...]), (0,), (0,))

        jax.lax.fori_loop(0, tiles.left // tiles.chunk, some, None)

    @pl.when(end == first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(whole)
    def _():
        add(lambda rows: rows)

    @pl.when(~whole & (end > first))
    def _():
        def own(rows):
            # Both: what other rows hold may be NaN, and past the last row of all it may be anything.
            row = top + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
            return jnp.where((row >= first) & (row < end), rows, jnp.zeros_like(rows))

        add(own)

    @pl.when((visit == last) | (plan.group[jnp.minimum(visit + 1, last)] != group))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _dot(a, b, of_a: tuple[int], of_b: tuple[int]):
    """Float32 sums of products; of float32 numbers as they are, for which the multiplier takes several passes."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = ((of_a, of_b), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _prefetched(plan: Visits) -> tuple[Any, ...]:
    return plan.first, plan.end, plan.group, plan.tile, plan.read_group, plan.read_tile


def _cost(rows: int, k: int, n: int, read: tuple[Any, ...]) -> Any:
    """What XLA's scheduler takes a kernel for, with rows in every group: how much may travel beside it."""
    moved = sum(each.size * each.dtype.itemsize for each in read)
    return pl.CostEstimate(flops=2 * rows * k * n, bytes_accessed=moved, transcendentals=0)


def _parameters(semantics: tuple[str, ...]) -> Any:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=LIMIT)


MOSAIC_TPU = Kernel(product, outer, functools.partial(product, rest=False))

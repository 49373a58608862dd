"""Products with paged adapters as one TPU kernel: pages come straight from the pool, and both products stay inside.

Rows are sorted by adapter, and a tile of rows is visited once for each adapter that has rows in it (as in
grouped/schedule.py). While a visit multiplies, the pages of the next adapter are copied, as many as its rank says and
no more; no matrix of an adapter is ever put together in main memory, nor the narrow rows between the products.

A page is one row of the pool, and copies move words of 32 bits of it: a bfloat16 page comes with the one that it shares
words with, which is ruled out by a weight of zero for its narrow column, and by zeros in its place before the second
product, since it may hold anything.

Shape legend: M rows, K contracted, N columns, P pages, R the largest rank, G groups of rows with one adapter, C = R
    times the numbers in a word, rounded up to whole registers, V visits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Target, tpu_why_not
from meshloom.pallas_kernels.matmul.grouped.schedule import Visits, visits
from meshloom.pallas_kernels.matmul.lora.by_adapter import lora_matmul_by_adapter
from meshloom.pallas_kernels.matmul.lora.grouping import RowsByAdapter
from meshloom.pallas_kernels.matmul.lora.spec import LoraPages, LoraSpec

LANES, SUBLANES = 128, 8
# Fast memory that tiles and pages may take, and that the compiler may use: the smallest core has 64 MiB (TPU v7x).
BUDGET, LIMIT = 40 * 2**20, 56 * 2**20
MOST_ROWS = 256


def why_not(spec: LoraSpec, target: Target) -> str | None:
    """The reason this kernel cannot run, or None."""
    if reason := tpu_why_not(target):
        return reason
    if spec.spread:
        return "XLA cannot spread a kernel over devices; call it inside shard_map"
    if spec.dtype not in ("bfloat16", "float32") or spec.pages_dtype != spec.dtype:
        return f"x is bfloat16 or float32 and the pages of the same dtype; got {spec.dtype} and {spec.pages_dtype}"
    if not (spec.rows and spec.adapters and spec.most_rank):
        return "there is nothing to multiply"
    if spec.contracted % LANES or spec.columns % LANES:
        return f"it takes features in {LANES}s, not {spec.contracted} to {spec.columns}"
    if spec.pages % numbers_of_word(spec.dtype):
        return f"pages in {spec.dtype} are copied in pairs; here are {spec.pages}"
    if tile_of(spec) is None:
        return f"{SUBLANES} rows and the pages of two adapters take more than {BUDGET / 2**20:.0f} MiB of fast memory"
    return None


def numbers_of_word(dtype: Any) -> int:
    """Numbers in a word of 32 bits."""
    return 4 // jnp.dtype(dtype).itemsize


def padded_rank(most_rank: int) -> int:
    """Words of a column that pages of one adapter take."""
    return -(-most_rank // SUBLANES) * SUBLANES


def tile_of(spec: LoraSpec) -> int | None:
    """Rows of a visit: about those of one adapter, at least 16 and at most 256, as fast memory allows."""
    item, wide = jnp.dtype(spec.dtype).itemsize, spec.contracted + spec.columns
    pages = 2 * 4 * padded_rank(spec.most_rank) * wide
    wanted = max(2 * SUBLANES, min(MOST_ROWS, 1 << (spec.rows // spec.adapters).bit_length()))
    while wanted >= SUBLANES:
        tile = min(wanted, spec.rows)
        if pages + 2 * tile * wide * item + 4 * tile * chunk_of(spec.columns) <= BUDGET:
            return tile
        wanted //= 2
    return None


def chunk_of(columns: int) -> int:
    """Columns that are multiplied by one run of instructions."""
    return next(width for width in (2048, 1024, 512, 256, LANES) if columns % width == 0)


@jax.custom_vjp
def lora_matmul_mosaic_tpu(x: Float[Array, "M K"], lora: LoraPages, adapters: Int[Array, "M"]) -> Float[Array, "M N"]:
    """As the reference; the narrow rows between the products are rounded to the dtype of the result. Differentiable."""
    rows = RowsByAdapter.of(adapters, lora.table.shape[0])
    return _product(x[rows.order], lora, rows)[jnp.argsort(rows.order)]


def _forward(x, lora: LoraPages, adapters):
    return lora_matmul_mosaic_tpu(x, lora, adapters), (x, lora, adapters)


def _backward(residuals, d_out):
    x, lora, adapters = residuals

    def product(x, a, b, scales):
        return lora_matmul_by_adapter(x, LoraPages(a, b, lora.table, lora.ranks, scales), adapters)

    dx, da, db, d_scales = jax.vjp(product, x, lora.a, lora.b, lora.scales)[1](d_out)
    return dx, LoraPages(da, db, None, None, d_scales), None


lora_matmul_mosaic_tpu.defvjp(_forward, _backward)


def _product(x: Float[Array, "M K"], lora: LoraPages, rows: RowsByAdapter) -> Float[Array, "M N"]:
    """Rows that are sorted by adapter, times its matrices."""
    spec = LoraSpec.of(x, lora, rows.ordered)
    tile = tile_of(spec)
    assert tile is not None  # or why_not has a reason
    groups, columns = rows.asked.shape[0], spec.columns
    plan, count = visits(rows.sizes, spec.rows, tile)
    changes = jnp.concatenate([jnp.ones(1, bool), plan.group[1:] != plan.group[:-1]])
    place = jnp.where(changes, 2, 0) + (jnp.cumsum(changes) - 1) % 2
    asked = jnp.minimum(rows.asked, lora.table.shape[0] - 1)
    table, ranks = lora.table[asked], jnp.append(jnp.where(rows.sizes > 0, lora.ranks[asked], 0), 0)
    weights = _column_weights(table, ranks[:-1], lora.scales[asked], numbers_of_word(spec.dtype))
    words = x.dtype if numbers_of_word(spec.dtype) == 1 else jnp.uint32
    pages = [pltpu.VMEM((2, padded_rank(spec.most_rank), dim), words) for dim in (spec.contracted, columns)]
    in_main_memory = pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)
    return pl.pallas_call(
        functools.partial(_kernel, groups, chunk_of(columns)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=_PREFETCHED,
            grid=(count,),
            in_specs=[
                pl.BlockSpec((tile, spec.contracted), lambda v, *scalars: (Visits(*scalars[:6]).read_tile[v], 0)),
                pl.BlockSpec(
                    (None, 1, weights.shape[2]), lambda v, *scalars: (Visits(*scalars[:6]).read_group[v], 0, 0)
                ),
                in_main_memory,
                in_main_memory,
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda v, *scalars: (Visits(*scalars[:6]).tile[v], 0)),
            scratch_shapes=[*pages, pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=jax.ShapeDtypeStruct((spec.rows, columns), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=LIMIT),
        name="lora_matmul",
    )(
        *(plan.first, plan.end, plan.group, plan.tile, plan.read_group, plan.read_tile),
        *(place.astype(jnp.int32), table, ranks, x, weights, *_pools(lora)),
    )


def _pools(lora: LoraPages) -> tuple[Any, Any]:
    """The pools as the kernel gets them: as they are, or, for a simulator that has no other view of a reference, in
    words of 32 bits.
    """
    return lora.a, lora.b


# Arrays of Visits, the place of each visit's pages, the pages and the rank of each group.
_PREFETCHED = 9


def _column_weights(
    table: Int[Array, "G R"], ranks: Int[Array, "G"], scales: Float[Array, "G"], per_word: int
) -> Float[Array, "G 1 C"]:
    """What each narrow column is multiplied with: the scale, or 0 where it is none of its group."""
    owned = jnp.arange(table.shape[1]) < ranks[:, None]
    wanted = owned[..., None] & (table[..., None] % per_word == jnp.arange(per_word))
    weights = jnp.where(wanted, scales[:, None, None], 0.0).reshape(table.shape[0], 1, -1)
    return jnp.pad(weights, ((0, 0), (0, 0), (0, padded_rank(table.shape[1]) * per_word - weights.shape[2])))


def _kernel(groups: int, chunk: int, *refs):
    """One visit. Scratch: the pages of two adapters, a and b, in words [2, R, K] and [2, R, N], and who has come."""
    plan, (place, table, ranks) = Visits(*refs[:6]), refs[6:_PREFETCHED]
    x, weights, a, b, out, a_pages, b_pages, arrived = refs[_PREFETCHED:]
    visit = pl.program_id(0)
    group = plan.group[visit]
    dtype = x.dtype
    per_word = numbers_of_word(dtype)

    def for_pages(visit: Any, act: str) -> None:
        """Starts, or waits for, the copies of all pages of a visit's adapter."""
        group, slot = plan.group[visit], place[visit] & 1

        def of_page(r, _):
            page = table[group, r] // per_word
            for pool, pages in ((a, a_pages), (b, b_pages)):
                source = pool if pool.dtype.itemsize == 4 else pool.bitcast(jnp.uint32)
                copy = pltpu.make_async_copy(source.at[pl.ds(page, 1)], pages.at[slot, pl.ds(r, 1)], arrived.at[slot])
                getattr(copy, act)()
            return 0

        jax.lax.fori_loop(0, ranks[group], of_page, 0)

    pl.when(visit == 0)(lambda: for_pages(visit, "start"))
    following = jnp.minimum(visit + 1, pl.num_programs(0) - 1)
    pl.when((following > visit) & (place[following] >= 2))(lambda: for_pages(following, "start"))
    pl.when(place[visit] >= 2)(lambda: for_pages(visit, "wait"))

    row = plan.tile[visit] * out.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (out.shape[0], chunk), 0)
    own = (row >= plan.first[group]) & (row < plan.end[group])

    def store(at: Any, result: Any) -> None:
        # Rows of the tile that are not this adapter's were stored by an earlier visit or will be by a later one.
        out[:, at] = jnp.where(own, result, out[:, at].astype(jnp.float32)).astype(dtype)

    def over_columns(visit_columns: Any) -> None:
        def step(n, _):
            visit_columns(pl.ds(pl.multiple_of(n * chunk, chunk), chunk))
            return 0

        jax.lax.fori_loop(0, out.shape[1] // chunk, step, 0)

    def numbers(pages: Any) -> Any:
        return pages if per_word == 1 else pltpu.bitcast(pages, dtype)

    @pl.when(group < groups)
    def _multiply():
        slot = place[visit] & 1
        weight = weights[...]
        narrow = _dot(x[...], numbers(a_pages[slot]), 1)
        narrow = jnp.where(weight == 0, 0.0, narrow * weight).astype(dtype)
        wanted = jnp.broadcast_to(weight, (LANES, weight.shape[1])).T != 0

        def widen(at):
            mine = jnp.concatenate([wanted] * (chunk // LANES), axis=1)
            store(at, _dot(narrow, jnp.where(mine, numbers(b_pages[slot, :, at]), jnp.zeros((), dtype)), 0))

        over_columns(widen)

    @pl.when(group == groups)
    def _no_adapter():
        over_columns(lambda at: store(at, jnp.zeros((out.shape[0], chunk), jnp.float32)))


def _dot(x: Any, y: Any, of_y: int) -> Any:
    """Float32 sums of products over the last dimension of x; of float32 numbers as they are."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    numbers = (((1,), (of_y,)), ((), ()))
    return jax.lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=jnp.float32)

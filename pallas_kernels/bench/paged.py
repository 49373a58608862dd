"""Paged attention by the TPU compiler's schedules, beside JAX's ragged_paged_attention.

Trip counts of these kernels are data: regions are weighted by how often the loops around them run for the lengths of a
step. Branches that a step does not take count as if it did, but for those with products.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_regions
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.attention import KVPages, Ragged, paged_attention
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_schedule import Sizes
from meshloom.pallas_kernels.bench.figures import Cost, KernelFigures, compile_for, cycles_of

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Cycles of a core for a product of 128 x 128 x 128 where 128 is what is summed over or the width, as in attention.
_TILE_CYCLES = {"v5e": 32, "v5p": 32, "v6e": 16}
_BITS = {"bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Step:
    """`sequences` of `length` tokens, the last `rows` of each in this step.

    Attributes:
        page: tokens of one.
        peers: (queries, pages) at a time in which JAX's kernel was fastest of those tried.
    """

    op: str
    sequences: int
    rows: int
    length: int
    element: str = "bfloat16"
    page: int = 16
    peers: tuple[tuple[int, int], ...] = ()

    @property
    def scaled(self) -> bool:
        return self.element != "bfloat16"

    @property
    def least_bytes(self) -> int:
        """Of queries, results, keys and values, each once."""
        each = HEAD_DIM * _BITS[self.element] // 8 + 4 * self.scaled
        return self.sequences * (2 * 2 * HEADS * HEAD_DIM * self.rows + 2 * KV_HEADS * each * self.length)

    @property
    def least_tiles(self) -> float:
        """Products of 128 x 128 x 128 of the pairs of a query and a key that causality allows."""
        pairs = self.sequences * sum(range(self.length - self.rows + 1, self.length + 1))
        return 2 * HEADS * pairs * HEAD_DIM / 128**3


STEPS = (
    Step("decode, 32 of 2,040", 32, 1, 2040, peers=((8, 16), (8, 32))),
    Step("decode, int8, pages of 16", 32, 1, 2040, "int8"),
    # As plans choose them for a cache with scales.
    Step("decode, int8, pages of 128", 32, 1, 2040, "int8", 128),
    Step("decode, float8, pages of 128", 32, 1, 2040, "float8_e4m3fn", 128),
    Step("decode, int4, pages of 128", 32, 1, 2040, "int4", 128),
    Step("prefill of 2,048", 1, 2048, 2048, peers=((64, 32), (128, 32))),
    Step("512 rows after 7,680", 1, 512, 8192, peers=((128, 32),)),
)
# Rows that the comparison makes.
PAGED_ROWS = sum(1 + len(step.peers) for step in STEPS)


def paged_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """32 query heads, 8 kv heads of 128, pages of 16 tokens: ours, then JAX's, which has no scale per token.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])

    def placed(make: Callable[..., Any], step: Step) -> Any:
        whole = jax.NamedSharding(mesh, jax.P())
        shapes = jax.eval_shape(functools.partial(make, step))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)

    for step in STEPS:
        args = placed(arguments, step)
        compile_for(mesh, functools.partial(paged_attention, implementation="mosaic_tpu"), *args)
        sizes = sizes_of(mesh, args)
        regions = kernel_regions(folder, "paged_attention")
        queries = 1 if step.rows == 1 else sizes.tile
        label = f"meshloom {queries} by {sizes.block}"
        yield _figures(step, label, devices.platform, queries, our_cycles(regions, sizes, step), regions)
        for queries, pages in step.peers:
            theirs = functools.partial(
                ragged_paged_attention,
                num_kv_pages_per_block=pages,
                num_queries_per_block=queries,
                vmem_limit_bytes=100 * 2**20,
            )
            compile_for(mesh, theirs, *placed(_their_arguments, step))
            regions = kernel_regions(folder, "ragged_paged_attention_kernel")
            cycles = their_cycles(regions, queries, pages * step.page, step)
            yield _figures(step, f"jax {queries} by {pages * step.page}", devices.platform, queries, cycles, regions)


def sizes_of(mesh: Any, args: tuple[Any, ...]) -> Sizes:
    """Of our kernel, as the call in `paged_on_tpu` has them."""
    with jax.set_mesh(mesh):
        return Sizes.of(args[0], args[3], args[4], PagedScoring(HEAD_DIM**-0.5))


def arguments(step: Step) -> tuple[Any, ...]:
    rows, width = step.sequences * step.rows, -(-step.length // step.page)
    q, kv = (jnp.zeros((rows, heads, HEAD_DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS))
    pages = KVPages.zeros(step.sequences * width, step.page, KV_HEADS, HEAD_DIM, step.element)
    table = jnp.zeros((step.sequences, width), jnp.int32)
    ragged = Ragged(jnp.zeros(step.sequences, jnp.int32), table, jnp.zeros(step.sequences + 1, jnp.int32), jnp.int32(0))
    return q, kv, kv, pages, ragged


def _their_arguments(step: Step) -> tuple[Any, ...]:
    q, _, _, _, ragged = arguments(step)
    pages = jnp.zeros((step.sequences * ragged.capacity, step.page, 2 * KV_HEADS, HEAD_DIM), jnp.bfloat16)
    return q, pages, ragged.kv_lens, ragged.page_table, ragged.cu_q_lens, jnp.zeros(1, jnp.int32)


def _walks(regions: list[Region]) -> list[list[Region]]:
    """The runs of regions with products in a loop over items: over blocks of a decode row, over those of a tile."""
    runs: list[list[Region]] = [[]]
    for region in regions:
        if region.depth > 1:
            runs[-1].append(region)
        else:
            runs.append([])
    return [run for run in runs if any(region.matmuls for region in run)]


def our_cycles(regions: list[Region], sizes: Sizes, step: Step) -> float:
    """Cycles of a call. Depth 0 runs once, 1 for an item, 2 for a block; deeper are the loops over parts of a decode
    row's block, over heads, over groups of pages whose copies start (none where they are one), and over the pages of a
    block that is not whole.
    """
    walks = _walks(regions)
    walk = walks[0] if step.rows == 1 else walks[1]
    begin, end = regions.index(walks[0][0]), regions.index(walk[-1]) + 1
    beside = [region for region in walk if not region.matmuls]
    starts = max(beside, key=lambda region: region.copies)
    beside.remove(starts)
    groups = sizes.per_block * (2 + sizes.scaled) / starts.copies
    block = sum(region.bundles for region in beside if region.depth == 2) + groups * starts.bundles
    tail_pages = -(-step.length // step.page) % sizes.per_block
    tail = tail_pages * sum(region.bundles for region in beside if region.depth > 2)
    multiplied, *widths = [cycles_of(region) for region in walk if region.matmuls]
    cycles = float(sum(region.bundles for region in regions if region.depth == 0))
    if step.rows == 1:
        item = sum(region.bundles for region in regions[:begin] if region.depth == 1)
        for region in regions[end:]:  # until its results leave
            item += region.bundles
            if region.copies:
                break
        parts, blocks = (-(-step.length // size) for size in (sizes.decode_tokens, sizes.block))
        return cycles + step.sequences * (item + tail + blocks * block + parts * multiplied)
    item = sum(region.bundles for region in regions if region.depth == 1)
    between = regions[regions.index(walks[0][-1]) + 1 : regions.index(walk[0])]
    item += sizes.kv_heads * sum(region.bundles for region in between if region.depth == 2)
    for first in range(step.length - step.rows, step.length, sizes.tile):
        blocks, plain = -(-(first + sizes.tile) // sizes.block), (first + 1) // sizes.block
        cycles += item + tail + blocks * block + plain * sizes.kv_heads * multiplied
        for j in range(plain, blocks):
            keys = first + sizes.tile - j * sizes.block
            number = next(n for n, width in enumerate(sizes.widths) if width >= min(keys, sizes.block))
            cycles += sizes.kv_heads * widths[number]
    return cycles


def their_cycles(regions: list[Region], queries: int, block: int, step: Step) -> float:
    """Cycles of a call: a grid over blocks of queries, in it a loop over their sequences, in that over all keys."""
    grid = -(-step.sequences * step.rows // queries)
    visits = max(grid, step.sequences)
    times = (1, grid, visits, visits * -(-step.length // block))
    return float(sum(cycles_of(region) * times[min(region.depth, 3)] for region in regions))


def kernel_cost(regions: list[Region], sizes: Sizes, step: Step) -> Cost:
    """Of a call of ours."""
    return Cost(our_cycles(regions, sizes, step), moved_bytes(step, 1 if step.rows == 1 else sizes.tile))


def moved_bytes(step: Step, queries: int) -> float:
    """Of whole pages, for each tile of so many queries, and of queries and results."""
    rows = 2 * 2 * HEADS * HEAD_DIM * step.rows * step.sequences
    whole_pages = -(-step.length // step.page) * step.page / step.length
    return rows + (step.least_bytes - rows) * whole_pages * -(-step.rows // queries)


def _figures(step: Step, kernel: str, chip: str, queries: int, cycles: float, regions: list[Region]) -> KernelFigures:
    """Against the products that are needed: what is masked counts as none. Decode rows are held against bytes alone."""
    moved = moved_bytes(step, queries)
    peak = _TILE_CYCLES.get(chip)
    least_seconds = step.least_bytes / CHIPS[chip].hbm_bandwidth
    return KernelFigures(
        op=step.op,
        kernel=kernel,
        tile_cycles=cycles / step.least_tiles if step.rows > 1 else None,
        peak_share=peak * step.least_tiles / cycles if peak and step.rows > 1 else None,
        cycles=cycles,
        spills=sum(region.spills for region in regions if region.matmuls),
        hbm=moved / step.least_bytes,
        times_bytes=Cost(cycles, moved).seconds(chip) / least_seconds if step.rows == 1 else None,
        page_cycles=cycles / (step.sequences * -(-step.length // step.page)) if step.rows == 1 else None,
    )

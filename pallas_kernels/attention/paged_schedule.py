"""What a paged kernel on a TPU does, in order, and the copies that bring it pages and their numbers.

A list of items is made by XLA from the lengths: a decode row, or a tile of a sequence's rows. The kernel walks it.

Shape legend: see paged_mosaic_tpu.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.pages import KVPages, Ragged

LANES = 128
# Rows of a tile of prefill, over the heads of one kv head.
_TILE_ROWS = 256
# Rows of a block: 2 x 2 buffers of bfloat16 [2048, 128] are 2 MiB of VMEM.
_BLOCK_ROWS = 2048
_BLOCK_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one call."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    per_block: int
    tile: int
    window: int | None
    soft_cap: float | None
    scale: float
    element: str

    @classmethod
    def of(cls, q_shape: tuple[int, ...], pages: KVPages, ragged: Ragged, scoring: PagedScoring) -> "Sizes":
        """Of a call with queries of this shape, on one device."""
        rows, heads, head_dim = q_shape
        # Whole vectors of lanes in a block, which needs no more pages than a sequence may have, rounded up.
        least = LANES // math.gcd(pages.page_size, LANES)
        most = _BLOCK_ROWS * LANES // max(head_dim, LANES) // pages.kv_heads
        most = min(most, _BLOCK_TOKENS) // pages.page_size // least
        per_block = max(1, min(most, -(-ragged.capacity // least))) * least
        tile = max(1, min(_TILE_ROWS * pages.kv_heads // heads, rows))
        cap = None if scoring.soft_cap is None else float(scoring.soft_cap)
        lengths = (heads, pages.kv_heads, head_dim, pages.page_size, per_block, tile)
        return cls(*lengths, scoring.window, cap, float(scoring.scale), pages.element)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def block(self) -> int:
        return self.per_block * self.page_size

    @property
    def page_rows(self) -> int:
        return self.page_size * self.kv_heads

    @property
    def block_rows(self) -> int:
        return self.block * self.kv_heads

    @property
    def scaled(self) -> bool:
        return self.element not in ("float32", "bfloat16")


# Fields of an item, the rows of an int32 [7, I] in SMEM.
SEQUENCE, ROW, USED, POSITION, FIRST, LAST, LENGTH = range(7)


def items_of(ragged: Ragged, rows: int, sizes: Sizes) -> tuple[Int[Array, "7 I"], Int[Array, "1"]]:
    """What the kernel does, in order: at most one item per sequence and one per whole tile of rows."""
    tile, block = sizes.tile, sizes.block
    most = min(rows, ragged.kv_lens.size + rows // tile)
    counts = ragged.cu_q_lens[1:] - ragged.cu_q_lens[:-1]
    counts = jnp.where(jnp.arange(counts.size) < ragged.num_seqs, counts, 0)
    ends = jnp.cumsum(-(-counts // tile))
    item = jnp.arange(most, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.searchsorted(ends, item, side="right"), counts.size - 1)
    done = tile * (item - (ends - (-(-counts // tile)))[sequence])
    used = jnp.clip(counts[sequence] - done, 1, tile)
    length = ragged.kv_lens[sequence]
    position = length - counts[sequence] + done
    first = 0 * position if sizes.window is None else jnp.maximum(position + 1 - sizes.window, 0) // block
    last = (position + used - 1) // block + 1
    fields = (sequence, ragged.cu_q_lens[sequence] + done, used, position, first, last, length)
    return jnp.stack(fields).astype(jnp.int32), ends[-1:].astype(jnp.int32)


class TableRows:
    """DMAs of one item's row of the page table into one of three buffers in SMEM, which has no room for all rows."""

    def __init__(self, sizes: Sizes, item, table, rows, sems):
        self.sizes, self.item, self.table, self.rows, self.sems = sizes, item, table, rows, sems

    def _each(self, i, act):
        """Does `act` to the copies of the pages from the item's first block to the end of its sequence."""
        first = self.item[FIRST, i] * self.sizes.per_block // LANES
        pages = pl.cdiv(self.item[LENGTH, i], self.sizes.page_size)

        def copy(piece, _):
            where = pl.ds(pl.multiple_of(piece * LANES, LANES), LANES)
            source, target = self.table.at[self.item[SEQUENCE, i], :, where], self.rows.at[i % 3, :, where]
            act(pltpu.make_async_copy(source, target, self.sems.at[i % 3]))

        jax.lax.fori_loop(first, pl.cdiv(pages, LANES), copy, None)

    def start(self, i):
        self._each(i, lambda copy: copy.start())

    def wait(self, i):
        self._each(i, lambda copy: copy.wait())

    def page(self, i, at):
        """Number of page `at` of the sequence of item i."""
        return self.rows[i % 3, 0, at]


class BlockCopies:
    """DMAs of one block of pages into one of two buffers."""

    def __init__(self, sizes: Sizes, item, table: TableRows, copies, sems):
        self.sizes, self.item, self.table, self.copies, self.sems = sizes, item, table, copies, sems

    def _each(self, i, j, slot, act, every):
        """Does `act` to the copy of each page of block j of item i that is there, or `every` when all are."""
        sizes = self.sizes
        first = j * sizes.per_block
        pages = pl.cdiv(self.item[LENGTH, i], sizes.page_size) - first

        def page(b):
            number = self.table.page(i, first + b)
            for source, buffer, axis in self.copies:
                size = sizes.page_rows
                where = pl.ds(pl.multiple_of(b * size, size), size)
                target = buffer.at[slot, where] if axis == 0 else buffer.at[slot, :, where]
                act(pltpu.make_async_copy(source.at[number], target, self.sems.at[slot]))

        whole = pages >= sizes.per_block
        pl.when(whole)(lambda: every(page))
        pl.when(~whole)(lambda: jax.lax.fori_loop(0, pages, lambda b, _: page(b), None))

    def start(self, i, j, slot):
        """Copies fly; a whole block's without a loop around each page."""

        def every(page):
            for b in range(self.sizes.per_block):
                page(b)

        self._each(i, j, slot, lambda copy: copy.start(), every)

    def wait(self, i, j, slot):
        """Until all have landed; a whole block's bytes are waited for at once."""

        def every(page):
            for _, buffer, _ in self.copies:
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], self.sems.at[slot]).wait()

        self._each(i, j, slot, lambda copy: copy.wait(), every)

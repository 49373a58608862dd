"""What a paged kernel on a TPU does, in order, and the copies that bring it pages and their numbers.

A list of items is made by XLA from the lengths: a decode row, or a tile of a sequence's rows. The kernel walks it.

Shape legend: see paged_mosaic_tpu.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from meshloom.pallas_kernels import tuning
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.pages import KVPages, Ragged

LANES = 128
_SUBLANES = 16  # rows of a tile of bfloat16, a multiple of those of float32
# Queries of a strip, those of one kv head, and strips of a tile: items are one row, a strip of rows or a tile.
_STRIP_ROWS = 256
_STRIPS = 4
_TILE_BYTES = 2 * 2**20  # of the queries of a tile at most
# Bytes of a block of keys: two buffers of it and of the values are in fast memory.
_BLOCK_BYTES = 2 * 2**20
_BLOCK_TOKENS = 512
# Rows of a block that a decode row multiplies at a time: short sequences fill no block.
_DECODE_ROWS = 2048
_PIECE_ROWS = 2048  # of those, that are weighed at a time; 4,096 find too few registers on v6e, 1,024 wait
_PAGES_AT_ONCE = 16  # copies of so many pages start without a loop around each


def own_limits() -> tuning.Sizes:
    """What a search may choose (tuning.py): tokens of a block, rows of a tile by kv head, and rows of a block that a
    decode row multiplies at a time; each at most, where a call has as many.
    """
    return {"tokens": _BLOCK_TOKENS, "rows": _STRIPS * _STRIP_ROWS, "decode_rows": _DECODE_ROWS}


def paged_key(q: Any, pages: KVPages, scoring: PagedScoring) -> str:
    """A call by what decides its schedule, on one device."""
    return tuning.key_of(
        heads=q.shape[1],
        kv_heads=pages.kv_heads,
        head=pages.head_dim,
        page=pages.page_size,
        dtype=str(q.dtype),
        element=pages.element,
        rows=tuning.bucket(q.shape[0]),
        window=None if scoring.window is None else tuning.bucket(scoring.window),
        capped=scoring.soft_cap is not None,
    )


def parts_of(element: str) -> int:
    """Kv heads in a byte of a cache, which are read apart."""
    return 2 if element == "int4" else 1


def _refuse(sizes: tuning.Sizes) -> str | None:
    if sizes["tokens"] % LANES or sizes["decode_rows"] % LANES:
        return f"tokens and rows of a block are multiples of {LANES}"
    return f"rows of a tile are a multiple of {_STRIP_ROWS}" if sizes["rows"] % _STRIP_ROWS else None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one call.

    Attributes:
        heads: of the queries, part by part (`parts`), each with those that fill up whole tiles of a TPU's memory.
        group: query heads of a kv head. width: elements of a stored row; joined: which is a key and its value.
        per_block: pages of a block. strip, tile: rows. decode_rows: of a block and part, see `decode_tokens`.
    """

    heads: int
    group: int
    kv_heads: int
    head_dim: int
    width: int
    joined: bool
    page_size: int
    per_block: int
    strip: int
    tile: int
    window: int | None
    soft_cap: float | None
    scale: float
    element: str
    decode_rows: int

    @classmethod
    def of(cls, q: Any, pages: KVPages, ragged: Ragged, scoring: PagedScoring) -> "Sizes":
        """Of a call with queries of this shape and dtype, on one device."""
        (rows, heads, _), dtype = q.shape, q.dtype
        most_of = tuning.tuned("paged_attention", paged_key(q, pages, scoring), _refuse) or own_limits()
        width, group = pages.k.shape[-1], heads // pages.kv_heads
        # Whole vectors of lanes in a block, which needs no more pages than a sequence may have, rounded up.
        least = LANES // math.gcd(pages.page_size, LANES)
        most = _BLOCK_BYTES // (width * pages.k.dtype.itemsize * pages.kv_heads)
        most = min(most, most_of["tokens"]) // pages.page_size // least
        per_block = max(1, min(most, -(-ragged.capacity // least))) * least
        strip = max(16, _STRIP_ROWS // group // 16 * 16)
        parts = parts_of(pages.element)
        whole_heads = parts * (-(-heads // parts // _SUBLANES) * _SUBLANES)
        strips = max(1, _TILE_BYTES // (strip * whole_heads * width * dtype.itemsize))
        tile = 1 if rows == 1 else strip * min(most_of["rows"] // _STRIP_ROWS, strips, -(-rows // strip))
        cap = None if scoring.soft_cap is None else float(scoring.soft_cap)
        heads_and_rows = whole_heads, group, pages.kv_heads, pages.head_dim, width, pages.joined
        return cls(
            *heads_and_rows,
            pages.page_size,
            per_block,
            strip,
            tile,
            scoring.window,
            cap,
            float(scoring.scale),
            pages.element,
            most_of["decode_rows"],
        )

    @property
    def block(self) -> int:
        return self.per_block * self.page_size

    @property
    def parts(self) -> int:
        """Parts of the kv heads, each with the queries that read it: the even and the odd ones of int4, or all."""
        return parts_of(self.element)

    @property
    def part_heads(self) -> int:
        """Of the queries of a part, as `heads`."""
        return self.heads // self.parts

    @property
    def part_kv_heads(self) -> int:
        return self.kv_heads // self.parts

    def first_query(self, h: Any) -> Any:
        """Where among `heads` the queries of kv head h begin, kv heads counted part by part."""
        if self.parts == 1:
            return h * self.group
        return h // self.part_kv_heads * self.part_heads + h % self.part_kv_heads * self.group

    @property
    def page_rows(self) -> int:
        """Keys of all kv heads in a page. A stored row holds one of each part."""
        return self.page_size * self.kv_heads

    @property
    def block_rows(self) -> int:
        return self.block * self.kv_heads

    @property
    def decode_tokens(self) -> int:
        """Tokens of a block that a decode row multiplies at a time: all, or a part of whole vectors of lanes."""
        return self._divided(self.block, self.decode_rows)

    @property
    def piece_tokens(self) -> int:
        """Those of them that it weighs at a time."""
        return self._divided(self.decode_tokens, _PIECE_ROWS)

    def _divided(self, tokens: int, most: int) -> int:
        """The most of `tokens` by which they divide, in whole vectors of lanes, that have at most so many rows; else
        the least.
        """
        parts = [n for n in range(1, tokens // LANES + 1) if tokens % (n * LANES) == 0]
        return tokens // next((n for n in parts if tokens // n * self.part_kv_heads <= most), parts[-1])

    @property
    def widths(self) -> list[int]:
        """Keys of a block, from its first, that a tile on the diagonal multiplies: half of them or all."""
        return [self.block // 2, self.block] if self.block % (2 * LANES) == 0 else [self.block]

    @property
    def strips(self) -> int:
        """Strips of a tile."""
        return max(self.tile // self.strip, 1)

    @property
    def whole_rows(self) -> int:
        """The least rows of whole pages that are whole tiles of memory too."""
        return math.lcm(self.page_rows, _SUBLANES * 2)

    @property
    def scaled(self) -> bool:
        return self.element not in ("float32", "bfloat16")

    @property
    def of_integers(self) -> bool:
        """Whether no element can be NaN."""
        return self.element in ("int8", "int4")


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
    """DMAs of one item's row of the page table into one of three buffers in SMEM, which has no room for all rows.

    The buffers are one after the other in one dimension: of more dimensions each number takes five scalar operations.
    """

    def __init__(self, sizes: Sizes, item, table, rows, sems):
        self.sizes, self.item, self.table, self.rows, self.sems = sizes, item, table, rows, sems

    def _each(self, i, act):
        """Does `act` to the copies of the pages from the item's first block to the end of its sequence."""
        first = self.item[FIRST, i] * self.sizes.per_block // LANES
        pages = pl.cdiv(self.item[LENGTH, i], self.sizes.page_size)

        def copy(piece, _):
            at = pl.multiple_of(piece * LANES, LANES)
            target = pl.multiple_of(self.begin(i) + at, LANES)
            source = self.table.at[self.item[SEQUENCE, i], 0, pl.ds(at, LANES)]
            act(pltpu.make_async_copy(source, self.rows.at[pl.ds(target, LANES)], self.sems.at[i % 3]))

        jax.lax.fori_loop(first, pl.cdiv(pages, LANES), copy, None)

    def start(self, i):
        self._each(i, lambda copy: copy.start())

    def wait(self, i):
        self._each(i, lambda copy: copy.wait())

    def begin(self, i):
        """Where in `rows` the row of item i is."""
        return i % 3 * self.table.shape[2]


class BlockCopies:
    """DMAs of one block of pages into one of two buffers."""

    def __init__(self, sizes: Sizes, item, table: TableRows, copies, sems):
        self.sizes, self.item, self.table, self.copies, self.sems = sizes, item, table, copies, sems

    def _pages(self, i, j):
        """Where in SMEM the numbers of the pages of block j of item i begin, and how many there are from there on."""
        first = j * self.sizes.per_block
        return self.table.begin(i) + first, pl.cdiv(self.item[LENGTH, i], self.sizes.page_size) - first

    def _copy(self, begin, slot, first, count, act):
        """Does `act` to the copies of `count` pages of a block from its page `first` on, a multiple of `count`."""
        numbers, targets = begin + first, []
        for source, buffer, axis in self.copies:
            size = source.shape[1 + axis]
            where = pl.ds(pl.multiple_of(first * size, count * size), count * size)
            targets.append(buffer.at[slot, where] if axis == 0 else buffer.at[slot, :, where])
        for b in range(count):
            number = self.table.rows[numbers + b]
            for (source, _, axis), target in zip(self.copies, targets, strict=True):
                rows = pl.ds(b * source.shape[1 + axis], source.shape[1 + axis])
                part = target.at[rows] if axis == 0 else target.at[:, rows]
                act(pltpu.make_async_copy(source.at[number], part, self.sems.at[slot]))

    def _each(self, i, j, slot, act, every):
        """Does `act` to the copy of each page of block j of item i that is there, or `every` when all are."""
        begin, pages = self._pages(i, j)
        whole = pages >= self.sizes.per_block
        pl.when(whole)(lambda: every(begin))
        pl.when(~whole)(lambda: jax.lax.fori_loop(0, pages, lambda b, _: self._copy(begin, slot, b, 1, act), None))

    def start(self, i, j, slot):
        """Copies fly; a whole block's without a loop around each page."""
        at_once = math.gcd(self.sizes.per_block, _PAGES_AT_ONCE)

        def start(copy):
            copy.start()

        def every(begin):
            def some(group, _):
                self._copy(begin, slot, group * at_once, at_once, start)

            jax.lax.fori_loop(0, self.sizes.per_block // at_once, some, None)

        self._each(i, j, slot, start, every)

    def wait(self, i, j, slot):
        """Until all have landed; a whole block's bytes are waited for at once."""

        def every(_):
            for _, buffer, _ in self.copies:
                pltpu.make_async_copy(buffer.at[slot], buffer.at[slot], self.sems.at[slot]).wait()

        self._each(i, j, slot, lambda copy: copy.wait(), every)

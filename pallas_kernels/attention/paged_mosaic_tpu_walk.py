"""What decode rows and tiles of the TPU kernel share: its memory, and the walk over the key blocks of an item.

Shape legend: see paged_mosaic_tpu.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from meshloom.pallas_kernels.attention.paged_rows import HeadRows
from meshloom.pallas_kernels.attention.paged_schedule import (
    FIRST,
    LANES,
    LAST,
    LENGTH,
    ROW,
    USED,
    BlockCopies,
    Sizes,
    TableRows,
)
from meshloom.pallas_kernels.dispatch import Target

LOG2E = math.log2(math.e)


class Operands(NamedTuple):
    """What the kernel reads.

    Attributes:
        table: int32 [S, 1, W]. q: [T + t, N, H]. rows: of keys and of values, or joined, [P, page * K, H].
        scales: of keys and values, float32 [P8, 1, 2 * page * K], or None.
        head_bias: float32 [N, C] of a part, zero where a row of the block is of the query's kv head. token_of: int32
            [1, C], of its rows.
        row_less_lane: int32 [R, 128], the token of a row less the number of a lane.
        sinks, sink_rows: float32 [N, 1], exponents of base 2, and [K, R, 1], in units of a tile's scores; or None.
    """

    table: Any
    q: Any
    rows: list[Any]
    scales: Any
    head_bias: Any
    token_of: Any
    row_less_lane: Any
    sinks: Any = None
    sink_rows: Any = None

    @property
    def spaces(self) -> "Operands":
        """Where each lies: those of a call's length in HBM, of which parts are copied, the others in fast memory."""
        in_hbm, fast = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
        spaces = jax.tree.map(lambda _: fast, self)
        scales = None if self.scales is None else in_hbm
        return spaces._replace(table=in_hbm, q=in_hbm, rows=[in_hbm] * len(self.rows), scales=scales)


class Scratch(NamedTuple):
    """Fast memory of the kernel; two buffers of what is copied, by slot.

    Attributes:
        rows, scales: of a block, as stored. q: of an item. out: of an item.
        q_rows: queries of a tile by kv head. top, norm, acc: of their online softmax.
        q_spread, spread: scratch of `HeadRows`, the latter for each part. table: rows of the page table, three of them.
    """

    rows: list[Any]
    scales: Any
    q: Any
    out: Any
    q_rows: Any
    top: Any
    norm: Any
    acc: Any
    q_spread: Any
    spread: list[Any]
    table: Any
    page_sems: Any
    q_sems: Any
    out_sem: Any
    table_sems: Any

    @classmethod
    def of(cls, sizes: Sizes, stored: Any, dtype: Any, capacity: int) -> "Scratch":
        """For a cache of elements stored as one dtype, queries of another, and rows of a page table."""
        tall, arrays = sizes.tile * sizes.group, 1 if sizes.joined else 2
        row_sums = pltpu.VMEM((sizes.kv_heads, tall, LANES), jnp.float32)
        return cls(
            rows=[pltpu.VMEM((2, sizes.block_rows // sizes.parts, sizes.width), stored)] * arrays,
            scales=pltpu.VMEM((2, 1, 2 * sizes.block_rows), jnp.float32) if sizes.scaled else None,
            q=pltpu.VMEM((2, sizes.tile, sizes.heads, sizes.width), dtype),
            out=pltpu.VMEM((sizes.tile, sizes.heads, sizes.width), dtype),
            q_rows=pltpu.VMEM((sizes.kv_heads, tall, sizes.width), dtype),
            top=row_sums,
            norm=row_sums,
            acc=pltpu.VMEM((sizes.kv_heads, tall, sizes.width), jnp.float32),
            q_spread=HeadRows.shape(sizes.tile, sizes.heads, sizes.width, dtype, dtype),
            spread=[
                HeadRows.shape(sizes.block, sizes.part_kv_heads, sizes.width, stored, dtype, several=(sizes.parts,))
            ]
            * arrays,
            table=pltpu.SMEM((3 * capacity,), jnp.int32),
            page_sems=pltpu.SemaphoreType.DMA((2,)),
            q_sems=pltpu.SemaphoreType.DMA((2,)),
            out_sem=pltpu.SemaphoreType.DMA,
            table_sems=pltpu.SemaphoreType.DMA((3,)),
        )


def scaled(raw: Any, sizes: Sizes, unit: Any = 1.0) -> tuple[Any, Any]:
    """(scores, factor) of products in units of `unit`: exponentials of base 2 want scores times factor."""
    if sizes.soft_cap is None and sizes.scale > 0:
        return raw, unit * (sizes.scale * LOG2E)
    if sizes.soft_cap is None:
        return raw * (unit * (sizes.scale * LOG2E)), 1.0
    return jnp.tanh(raw * (unit * (sizes.scale / sizes.soft_cap))) * (sizes.soft_cap * LOG2E), 1.0


def lane_sums(p: Any) -> Any:
    """[R, C] -> [R, 128]: what is left of a sum over columns for the end of the item."""
    return functools.reduce(jnp.add, [p[:, at : at + LANES] for at in range(0, p.shape[1], LANES)])


_LOWER = 0x0F0F0F0F  # halves of the four bytes of a word


class Coding(NamedTuple):
    """How the kernel reads int4: as float8 that are 0 to 15 times their least number, which stand for -8 to 7.

    The first 16 codes of float8 are equally far apart: half of a byte is one of them, and the matrix unit takes it. An
    int4 is `unit` times what is read less `zero`.
    """

    dtype: Any
    unit: float
    zero: float

    @classmethod
    def of(cls, target: Target) -> "Coding":
        """In the float8 that a chip's matrix unit takes as it is: the older ones' has NaN in place of -0.0."""
        newer = str(target.device_kind).startswith("TPU7x")
        dtype = jnp.float8_e4m3fn if newer else jnp.float8_e4m3b11fnuz
        least = float(jnp.finfo(dtype).smallest_subnormal)
        return cls(dtype, 1 / least, 8 * least)

    def plain(self, sums: Any, weights: Any = 1.0) -> Any:
        """Sums of what was read, by weights of which these are the sums, as sums of int4."""
        return self.unit * (sums - self.zero * weights)


def coding(sizes: Sizes) -> Coding | None:
    """Of a cache whose keys are not read as what they are."""
    return Coding.of(Target.of_mesh()) if sizes.element == "int4" else None


def keys_of(buffer: Any, slot: Any, start: Any, count: int, sizes: Sizes) -> list[Any]:
    """Of each part the keys among `count` of all heads from `start` on, [count / parts, H]: as they are, or coded."""
    start, count = start // sizes.parts, count // sizes.parts
    rows = buffer[slot, pl.ds(start if isinstance(start, int) else pl.multiple_of(start, count), count)]
    if code := coding(sizes):
        words = pltpu.bitcast(rows, jnp.int32)
        return [pltpu.bitcast(halves & _LOWER, code.dtype) for halves in (words, words >> 4)]
    return [pltpu.bitcast(rows, jnp.float8_e4m3fn) if sizes.element == "float8_e4m3fn" else rows]


def scales_of(part: int, values: bool, buffer: Any, slot: Any, start: Any, count: int, sizes: Sizes) -> Any:
    """[1, count / parts], of the keys that `keys_of` gives, or of their values.

    `KVPages` keeps those of a page's keys before those of its values, and those of a part in runs of 128.
    """
    page = sizes.page_rows
    run = LANES if sizes.parts > 1 else math.gcd(count, page)

    def first(at):
        """Where the run of keys is that begins `at` after `start`, a multiple of `count`."""
        if isinstance(start, int):
            whole = (start + at) // page * page
        else:  # no division where a piece has whole pages
            whole = jax.lax.div(start + at, page) * page if count % page else start + at // page * page
        return pl.multiple_of(start + at + whole + values * page + part * LANES, LANES)

    runs = [buffer[slot, :, pl.ds(first(at), run)] for at in range(0, count, sizes.parts * run)]
    return jnp.concatenate(runs, axis=1)


def products(q: Any, k: Any) -> Any:
    """[R, H] by [C, H] -> [R, C], float32."""
    return jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


class Walk:
    """Copies in and out of what items need, one item ahead, and the walk of each over its key blocks.

    Args:
        item, total: from `items_of`. read, out: the call's arrays. fast: scratch.
    """

    def __init__(self, sizes: Sizes, item: Any, total: Any, read: Operands, out: Any, fast: Scratch):
        self.sizes, self.item, self.total, self.read, self.out, self.fast = sizes, item, total, read, out, fast
        self.dtype = fast.q.dtype
        copies = [(source, buffer, 0) for source, buffer in zip(read.rows, fast.rows, strict=True)]
        if sizes.scaled:
            copies.append((read.scales, fast.scales, 1))
        self.table = TableRows(sizes, item, read.table, fast.table, fast.table_sems)
        self.blocks = BlockCopies(sizes, item, self.table, copies, fast.page_sems)

    def run(self, one_row: Callable[["Walk", Any, Any], Any], rows: Callable[["Walk", Any, Any], Any]) -> None:
        """All items in order, each by what has one row or what has more; both take and return the slot of a block."""
        total = self.total[0]

        def step(i, slot):
            pl.when(i + 2 < total)(lambda: self.table.start(i + 2))
            pl.when(i + 1 < total)(lambda: self._rows_of(i + 1, lambda rows: self._q_copy(i + 1, rows).start()))
            self._rows_of(i, lambda rows: self._q_copy(i, rows).wait())
            if self.sizes.tile == 1:
                return one_row(self, i, slot)
            return jax.lax.cond(
                self.item[USED, i] == 1,
                lambda i, slot: one_row(self, i, slot),
                lambda i, slot: rows(self, i, slot),
                i,
                slot,
            )

        @pl.when(total > 0)
        def _():
            self.table.start(0)
            pl.when(total > 1)(lambda: self.table.start(1))
            self._rows_of(0, lambda rows: self._q_copy(0, rows).start())
            self._clear()
            self.table.wait(0)
            self.blocks.start(0, self.item[FIRST, 0], 0)
            jax.lax.fori_loop(0, total, step, 0)
            self.settle(total)

    def over_blocks(self, i: Any, slot: Any, visit: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """Folds `visit(j, slot, carry)` over the key blocks of item i; prefetches across items."""
        item = self.item
        last = item[LAST, i]

        def step(j, state):
            slot, carry = state
            more = j + 1 < last
            next_i = jnp.where(more, i, i + 1)

            @pl.when(next_i < self.total[0])
            def _():
                pl.when(~more)(lambda: self.table.wait(next_i))
                self.blocks.start(next_i, jnp.where(more, j + 1, item[FIRST, next_i]), 1 - slot)

            self.blocks.wait(i, j, slot)
            self._silence_tail(i, j, slot)
            return 1 - slot, visit(j, slot, carry)

        return jax.lax.fori_loop(item[FIRST, i], last, step, (slot, carry))

    def settle(self, i: Any) -> None:
        """Waits until the rows of the item before i have left the output buffer, which items write in order."""
        pl.when(i > 0)(lambda: self._rows_of(i - 1, lambda rows: self._out_copy(i - 1, rows).wait()))

    def send(self, i: Any) -> None:
        """The rows of item i leave the output buffer."""
        self._rows_of(i, lambda rows: self._out_copy(i, rows).start())

    def _rows_of(self, i: Any, act: Callable[[int], None]) -> None:
        """Does `act(rows)` with the static number of rows that item i moves: one, a strip or a tile."""
        tile, strip, used = self.sizes.tile, self.sizes.strip, self.item[USED, i]
        if tile == 1:
            return act(1)
        pl.when(used == 1)(lambda: act(1))
        if tile > strip:
            pl.when((used > 1) & (used <= strip))(lambda: act(strip))
            pl.when(used > strip)(lambda: act(tile))
        else:
            pl.when(used > 1)(lambda: act(tile))
        return None

    def _q_copy(self, i: Any, rows: int) -> Any:
        source, target = self.read.q.at[pl.ds(self.item[ROW, i], rows)], self.fast.q.at[i % 2, pl.ds(0, rows)]
        return pltpu.make_async_copy(source, target, self.fast.q_sems.at[i % 2])

    def _out_copy(self, i: Any, rows: int) -> Any:
        source, target = self.fast.out.at[pl.ds(0, rows)], self.out.at[pl.ds(self.item[ROW, i], rows)]
        return pltpu.make_async_copy(source, target, self.fast.out_sem)

    def _silence_tail(self, i: Any, j: Any, slot: Any) -> None:
        """Zeros for the values past the end, or for their scales: of what a freed page held NaN would survive a weight
        of zero. Scores of its keys are masked, whatever they are.

        Of the last page alone: those behind it are zeros from the start, or what was silenced before.
        """
        sizes, v_buf = self.sizes, self.fast.rows[-1]
        length = self.item[LENGTH, i] - j * sizes.block

        @pl.when(length < sizes.block)
        def _():
            if not sizes.of_integers:
                at = (length - 1) // sizes.page_size * sizes.page_rows // sizes.whole_rows * sizes.whole_rows
                where = pl.ds(pl.multiple_of(at, sizes.whole_rows), sizes.whole_rows)
                values = v_buf[slot, where]
                rows = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + at
                wide = values.astype(jnp.int32 if values.dtype == jnp.uint8 else jnp.float32)
                v_buf[slot, where] = jnp.where(rows < length * sizes.kv_heads, wide, 0).astype(v_buf.dtype)
            if sizes.scaled:
                page = jax.lax.div(length - 1, sizes.page_size)
                # Of a part, as `scales_of` finds them.
                keys = (length - page * sizes.page_size) * sizes.part_kv_heads
                column = jax.lax.broadcasted_iota(jnp.int32, (1, sizes.page_rows), 1)
                key = column if sizes.parts == 1 else column // (sizes.parts * LANES) * LANES + column % LANES
                columns = pl.ds(pl.multiple_of((2 * page + 1) * sizes.page_rows, LANES), sizes.page_rows)
                scales = self.fast.scales[slot, :, columns]
                self.fast.scales[slot, :, columns] = jnp.where(key < keys, scales, 0.0)

    def _clear(self) -> None:
        """No weight of zero meets what memory held before."""
        sizes, v_buf = self.sizes, self.fast.rows[-1]
        for slot in range(2):
            if sizes.scaled:
                self.fast.scales[slot] = jnp.zeros((1, 2 * sizes.block_rows), jnp.float32)
            if not sizes.of_integers:
                for at in range(0, sizes.block_rows, sizes.whole_rows):
                    v_buf[slot, at : at + sizes.whole_rows] = jnp.zeros((sizes.whole_rows, sizes.width), v_buf.dtype)

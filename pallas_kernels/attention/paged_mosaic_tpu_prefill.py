"""Several rows of a sequence in the paged TPU kernel: a tile of them, or a strip, head by head, part after part.

Shape legend: see paged_mosaic_tpu.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_walk import (
    Walk,
    coding,
    keys_of,
    lane_sums,
    products,
    scaled,
    scales_of,
)
from meshloom.pallas_kernels.attention.paged_rows import HeadRows
from meshloom.pallas_kernels.attention.paged_schedule import LANES, POSITION, USED


def prefill(walk: Walk, i: Any, slot: Any) -> Any:
    """The rows of item i, whose first block comes into `slot`; returns the slot of the next item's."""
    tile = _Tile(walk, i)
    tile.by_size(tile.begin)
    slot, _ = walk.over_blocks(i, slot, tile.visit, 0)
    walk.settle(i)
    tile.by_size(tile.end)
    walk.send(i)
    return slot


class _Tile:
    """The rows of item i. They are kept head by head: strip by strip, and in a strip query head by query head."""

    def __init__(self, walk: Walk, i: Any):
        self.sizes, self.read, self.fast, self.dtype = walk.sizes, walk.read, walk.fast, walk.dtype
        self.i, self.position = i, walk.item[POSITION, i]
        sizes, dtype = walk.sizes, walk.dtype
        self.tall, self.few = sizes.tile * sizes.group, sizes.strip * sizes.group
        self.queries = HeadRows(walk.fast.q_spread, sizes.heads, dtype)
        self.whole = walk.item[USED, i] > sizes.strip if sizes.tile > sizes.strip else jnp.bool_(False)

    def by_size(self, act: Callable[[int], None]) -> None:
        """Does `act(strips)` for a tile or for a strip."""
        if self.sizes.tile > self.sizes.strip:
            pl.when(self.whole)(lambda: act(self.sizes.strips))
        pl.when(~self.whole)(lambda: act(1))

    def _keys_by_head(self, part: Any) -> list[HeadRows]:
        """Of the block's keys and values, or of both joined."""
        return [HeadRows(scratch.at[part], self.sizes.part_kv_heads, self.dtype) for scratch in self.fast.spread]

    def begin(self, strips: int) -> None:
        """Queries head by head, and nothing summed."""
        sizes, fast, strip = self.sizes, self.fast, self.sizes.strip
        for at in range(0, strips * strip, strip):
            rows = fast.q[self.i % 2, at : at + strip].reshape(strip * sizes.heads, sizes.width)
            self.queries.put_all(rows, at * sizes.heads)

        def head(h, _):
            for at in range(0, strips * strip, strip):
                for g in range(sizes.group):
                    row = at * sizes.group + g * strip
                    fast.q_rows[h, row : row + strip] = self.queries.head(sizes.first_query(h) + g, strip, at)
            rows, lanes = slice(0, strips * self.few), (strips * self.few, LANES)
            fast.acc[h, rows] = jnp.zeros((strips * self.few, sizes.width), jnp.float32)
            if self.read.sink_rows is not None:
                fast.top[h, rows] = jnp.broadcast_to(self.read.sink_rows[h, rows], lanes)
                first = jax.lax.broadcasted_iota(jnp.int32, lanes, 1) == 0
                fast.norm[h, rows] = first.astype(jnp.float32)
            else:
                fast.top[h, rows] = jnp.full(lanes, MASKED, jnp.float32)
                fast.norm[h, rows] = jnp.zeros(lanes, jnp.float32)

        jax.lax.fori_loop(0, sizes.kv_heads, head, None)

    def visit(self, j: Any, slot: Any, carry: Any) -> Any:
        """All kv heads over block j."""
        sizes = self.sizes
        tile, strip, block = sizes.tile, sizes.strip, sizes.block
        offset = self.position - j * block
        self._spread_heads(slot)

        def heads(*how):
            jax.lax.fori_loop(0, sizes.kv_heads, lambda h, _: self._attend(h, *how), None)

        def tile_over(keys, before):
            """All rows over the first keys of the block, of which more than `before` are read."""
            masked_from = max(0, before - tile) // LANES * LANES if sizes.window is None else 0
            return lambda: heads(self.tall, keys, masked_from, offset)

        if tile > strip:
            plain = offset + 1 >= block
            if sizes.window is not None:
                plain &= offset + tile <= sizes.window
            pl.when(self.whole & plain)(lambda: heads(self.tall, block, block, offset))
            before = 0
            for keys in sizes.widths:
                here = offset + tile > before
                if keys < block:
                    here &= offset + tile <= keys
                pl.when(self.whole & ~plain & here)(tile_over(keys, before))
                before = keys

        @pl.when(~self.whole)
        def _():
            at_once = sizes.widths[0]
            there = pl.cdiv(jnp.minimum(offset + strip, block), at_once)

            def part(s, _):
                heads(self.few, at_once, 0, offset, pl.multiple_of(s * at_once, at_once))

            jax.lax.fori_loop(0, there, part, None)

        return carry

    def _spread_heads(self, slot: Any) -> None:
        """The block in a form of which rows of one head can be loaded, dequantized."""
        sizes, code = self.sizes, coding(self.sizes)
        by_head = [self._keys_by_head(part) for part in range(sizes.parts)]
        for number, buffer in enumerate(self.fast.rows):
            for start in range(0, sizes.block_rows, sizes.parts * LANES):
                for part, rows in enumerate(keys_of(buffer, slot, start, sizes.parts * LANES, sizes)):
                    if sizes.scaled:
                        columns = [
                            jnp.broadcast_to(
                                scales_of(part, values, self.fast.scales, slot, start, sizes.parts * LANES, sizes),
                                (8, LANES),
                            ).T[:, :1]
                            for values in ((False, True) if sizes.joined else (number == 1,))
                        ]
                        if sizes.joined:
                            lane = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
                            columns = [jnp.where(lane < sizes.head_dim, *columns)]
                        rows = rows.astype(jnp.float32)
                        rows = (code.plain(rows) if code else rows) * columns[0]
                    by_head[part][number].put_all(rows, start // sizes.parts)

    def _attend(self, h: Any, rows: int, keys: int, masked_from: int, offset: Any, start: Any = 0) -> None:
        """Rows of kv head h, up to `rows`, over `keys` keys of the block from `start` on, some of them masked. The
        first row's own key is `offset` keys after the block's first.
        """
        sizes, fast = self.sizes, self.fast
        part, head = (0, h) if sizes.parts == 1 else jnp.divmod(h, sizes.part_kv_heads)
        k, *v = (x.head(head, keys, start) for x in self._keys_by_head(part))
        scores, factor = scaled(products(fast.q_rows[h, :rows], k), sizes)
        if masked_from < keys:
            masked = [scores[:, :masked_from]] if masked_from else []
            for at in range(masked_from, keys, LANES):
                distance = self.read.row_less_lane[:rows] + (offset - start - at)
                allowed = distance >= 0
                if sizes.window is not None:
                    allowed &= distance < sizes.window
                masked.append(jnp.where(allowed, scores[:, at : at + LANES], MASKED))
            scores = jnp.concatenate(masked, axis=1)
        top = fast.top[h, :rows]
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        # Weights of a row that meets no key here are wiped by its first key, which every row meets in the end.
        p = jnp.exp2((scores - jnp.concatenate([new_top] * (keys // LANES), axis=1)) * factor)
        keep = jnp.exp2((top - new_top) * factor)
        fast.norm[h, :rows] = fast.norm[h, :rows] * keep + lane_sums(p)
        sums = jnp.dot(p.astype(self.dtype), *v or [k], preferred_element_type=jnp.float32)
        kept = fast.acc[h, :rows] * (keep if sizes.width == LANES else keep[:, :1])
        fast.acc[h, :rows] = kept + sums
        fast.top[h, :rows] = new_top

    def end(self, strips: int) -> None:
        """Results of all heads token by token."""
        sizes, fast, strip = self.sizes, self.fast, self.sizes.strip
        used = sizes.part_kv_heads * sizes.group
        for at in range(0, strips * strip, strip):

            def rows_of_head(n, at=at):
                h, row = n // sizes.group, at * sizes.group + n % sizes.group * strip
                norm = jnp.sum(fast.norm[h, row : row + strip], axis=1, keepdims=True)
                inverse = pltpu.reciprocal(norm, approx=True)
                # One step of Newton's doubles the bits that are right.
                return fast.acc[h, row : row + strip] * (inverse * (2.0 - norm * inverse))

            for part in range(sizes.parts):
                for n in range(0, used, 2):
                    first = rows_of_head(part * used + n)
                    second = rows_of_head(part * used + n + 1) if n + 1 < used else first
                    self.queries.put_two(part * sizes.part_heads + n, first, second, at)
            rows = self.queries.all(strip, at)
            fast.out[at : at + strip] = rows.reshape(strip, sizes.heads, sizes.width).astype(self.dtype)

"""Ragged paged attention as one TPU kernel: mixed prefill and decode rows over pages in HBM.

A list of items (paged_schedule.py) is the kernel's program: a decode row, or a tile of a sequence's rows. Each item
walks its key blocks with an online softmax; the pages of the next block, of this item or of the next, fly
in while one is computed. Keys are never gathered, copied or transposed in HBM: a page is page * K rows as it lies.

Decode multiplies all query heads with all rows of a block, heads interleaved as they lie, and masks what belongs to
another kv head. That wastes K - 1 of K scores and nothing that counts: a key row enters the MXU once either way, and no
head has to be picked out of packed rows. With 32 query heads, 8 kv heads of 128 and bfloat16, a step over 256 tokens is
about 750 bundles on v5e, whose memory takes 1,900 cycles for the bytes.

Prefill takes a tile of rows, head by head: the rows of all query heads of a kv head are one operand. Queries and the
keys of a block are written as 32-bit words once, of which loads with a stride give the rows of one head
(paged_rows.py). A block on the diagonal is multiplied by half or whole and masked, blocks before it are not. Few rows
are a strip, a quarter of a tile or less.

On a mesh every device runs it on its own heads, query heads beside the kv heads that they read, and on all rows.
Nothing is summed over devices.

The cache is written by XLA's scatter before the kernel: it is in place on a donated cache, it quantizes, and every
implementation then reads the same bytes; fused here it would need DMAs of single rows, which int8 tiles do not allow.

Exponentials are base 2, as in the hardware. Shape legend: T rows, S sequences, W pages per sequence, N heads, K kv
    heads, G = N / K, H head dim, I items, t rows per tile, R = t * G, m pages, c = m * page keys and C = c * K rows of
    a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_rows import HeadRows
from meshloom.pallas_kernels.attention.paged_schedule import (
    FIRST,
    LANES,
    LAST,
    LENGTH,
    POSITION,
    ROW,
    USED,
    BlockCopies,
    Sizes,
    TableRows,
    items_of,
)
from meshloom.pallas_kernels.attention.paged_spread import on_own_heads, spread_why_not
from meshloom.pallas_kernels.attention.pages import KVPages, Ragged
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import Target, tpu_why_not

_VMEM_LIMIT = 56 * 2**20
_LOG2E = math.log2(math.e)


def _scaled(raw, sizes: Sizes):
    """(scores, factor) of products: exponentials of base 2 want scores times factor."""
    if sizes.soft_cap is None and sizes.scale > 0:
        return raw, sizes.scale * _LOG2E
    if sizes.soft_cap is None:
        return raw * (sizes.scale * _LOG2E), 1.0
    return jnp.tanh(raw * (sizes.scale / sizes.soft_cap)) * (sizes.soft_cap * _LOG2E), 1.0


def _lane_sums(p):
    """[R, C] -> [R, 128]: what is left of a sum over columns for the end of the item."""
    return functools.reduce(jnp.add, [p[:, at : at + LANES] for at in range(0, p.shape[1], LANES)])


def _elements(x, sizes: Sizes):
    return pltpu.bitcast(x, jnp.float8_e4m3fn) if sizes.element == "float8_e4m3fn" else x


def _products(q, k):
    return jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _kernel(sizes: Sizes, has_sinks: bool, item, total, *arrays):
    refs = list(arrays)

    def take(count):
        taken = refs[:count]
        del refs[:count]
        return taken

    stored = 1 if sizes.joined else 2
    table_hbm, q_hbm = take(2)
    rows_hbm, scales = take(stored), take(2 * sizes.scaled)
    head_bias, token_of, row_less_lane = take(3)
    sinks, sink_rows = take(2) if has_sinks else (None, None)
    (out_hbm,) = take(1)
    row_bufs, scale_bufs = take(stored), take(2 * sizes.scaled)
    q_buf, out_buf, q_rows, top_ref, norm_ref, acc_ref, q_spread = take(7)
    spread = take(stored)
    table_rows, page_sems, q_sems, out_sem, table_sems = refs

    tile, strip, group, lanes, block = sizes.tile, sizes.strip, sizes.group, LANES, sizes.block
    dtype = q_buf.dtype
    v_buf = row_bufs[-1]
    copies = [(source, buffer, 0) for source, buffer in zip(rows_hbm, row_bufs, strict=True)]
    copies += [(source, buffer, 1) for source, buffer in zip(scales, scale_bufs, strict=True)]
    table = TableRows(sizes, item, table_hbm, table_rows, table_sems)
    blocks = BlockCopies(sizes, item, table, copies, page_sems)

    def rows_of(i, act):
        """Does `act(rows)` with the static number of rows that item i moves: one, a strip or a tile."""
        if tile == 1:
            return act(1)
        used = item[USED, i]
        pl.when(used == 1)(lambda: act(1))
        if tile > strip:
            pl.when((used > 1) & (used <= strip))(lambda: act(strip))
            pl.when(used > strip)(lambda: act(tile))
        else:
            pl.when(used > 1)(lambda: act(tile))
        return None

    def q_copy(i, rows):
        source = q_hbm.at[pl.ds(item[ROW, i], rows)]
        return pltpu.make_async_copy(source, q_buf.at[i % 2, pl.ds(0, rows)], q_sems.at[i % 2])

    def out_copy(i, rows):
        return pltpu.make_async_copy(out_buf.at[pl.ds(0, rows)], out_hbm.at[pl.ds(item[ROW, i], rows)], out_sem)

    def silence_tail(i, j, slot):
        """Zeros for the values past the end: what a freed page held, even NaN, would survive a weight of zero.

        Of the last page alone: those behind it are zeros from the start, or what was silenced before.
        """
        length = item[LENGTH, i] - j * block

        @pl.when(length < block)
        def _():
            if sizes.element != "int8":
                at = (length - 1) // sizes.page_size * sizes.page_rows // sizes.whole_rows * sizes.whole_rows
                where = pl.ds(pl.multiple_of(at, sizes.whole_rows), sizes.whole_rows)
                values = v_buf[slot, where]
                rows = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + at
                wide = values.astype(jnp.int32 if values.dtype == jnp.uint8 else jnp.float32)
                v_buf[slot, where] = jnp.where(rows < length * sizes.kv_heads, wide, 0).astype(v_buf.dtype)
            for buffer in scale_bufs:
                for at in range(0, sizes.block_rows, token_of.shape[1]):
                    columns = slice(at, at + token_of.shape[1])
                    kept = token_of[...] < length - at // sizes.kv_heads
                    buffer[slot, :, columns] = jnp.where(kept, buffer[slot, :, columns], 0.0)

    def walk(i, slot, visit, carry):
        """Folds `visit(j, slot, carry)` over the key blocks of item i; prefetches across items."""
        last = item[LAST, i]

        def step(j, state):
            slot, carry = state
            more = j + 1 < last
            next_i = jnp.where(more, i, i + 1)

            @pl.when(next_i < total[0])
            def _():
                pl.when(~more)(lambda: table.wait(next_i))
                blocks.start(next_i, jnp.where(more, j + 1, item[FIRST, next_i]), 1 - slot)

            blocks.wait(i, j, slot)
            silence_tail(i, j, slot)
            return 1 - slot, visit(j, slot, carry)

        return jax.lax.fori_loop(item[FIRST, i], last, step, (slot, carry))

    def settle(i):
        """Waits until the rows of the item before i have left the output buffer, which items write in order."""
        pl.when(i > 0)(lambda: rows_of(i - 1, lambda rows: out_copy(i - 1, rows).wait()))

    def decode(i, slot):
        q = q_buf[i % 2, 0]
        heads = sizes.heads
        if sinks is not None:
            top = sinks[...][:, :1]
            norm = (jax.lax.broadcasted_iota(jnp.int32, (heads, lanes), 1) == 0).astype(jnp.float32)
        else:
            top, norm = jnp.full((heads, 1), MASKED, jnp.float32), jnp.zeros((heads, lanes), jnp.float32)
        at_once = sizes.decode_tokens
        step_rows = at_once * sizes.kv_heads

        def some(j, slot, s, carry):
            top, norm, acc = carry
            rows = pl.ds(pl.multiple_of(s * step_rows, step_rows), step_rows)
            k, *v = (_elements(x[slot, rows], sizes).astype(dtype) for x in row_bufs)
            raw = _products(q, k)
            if scale_bufs:
                raw = raw * scale_bufs[0][slot, :, rows]
            distance = item[POSITION, i] - j * block - s * at_once - token_of[...]
            allowed = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)
            scores, factor = _scaled(raw, sizes)
            scores = jnp.where(allowed, scores + head_bias[...], MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            p = jnp.exp2((scores - new_top) * factor)
            keep = jnp.exp2((top - new_top) * factor)
            norm = norm * keep + _lane_sums(p)
            if scale_bufs:
                p = p * scale_bufs[1][slot, :, rows]
            acc = acc * keep + jnp.dot(p.astype(dtype), *v or [k], preferred_element_type=jnp.float32)
            return new_top, norm, acc

        def visit(j, slot, carry):
            if at_once == block:
                return some(j, slot, 0, carry)
            there = pl.cdiv(jnp.minimum(item[LENGTH, i] - j * block, block), at_once)
            return jax.lax.fori_loop(0, there, lambda s, carry: some(j, slot, s, carry), carry)

        acc = jnp.zeros((heads, sizes.width), jnp.float32)
        slot, (top, norm, acc) = walk(i, slot, visit, (top, norm, acc))
        settle(i)
        out_buf[0] = (acc / jnp.sum(norm, axis=1, keepdims=True)).astype(dtype)
        out_copy(i, 1).start()
        return slot

    def prefill(i, slot):
        tall, few = tile * group, strip * group
        queries = HeadRows(q_spread, sizes.heads, dtype)
        by_head = [HeadRows(scratch, sizes.kv_heads, dtype) for scratch in spread]
        whole_tile = item[USED, i] > strip if tile > strip else jnp.bool_(False)
        position = item[POSITION, i]

        def begin(strips):
            """Rows of a tile head by head: strip by strip, and in a strip query head by query head."""
            for at in range(0, strips * strip, strip):
                rows = q_buf[i % 2, at : at + strip].reshape(strip * sizes.heads, sizes.width)
                queries.put_all(rows, at * sizes.heads)

            def head(h, _):
                for at in range(0, strips * strip, strip):
                    for g in range(group):
                        row = at * group + g * strip
                        q_rows[h, row : row + strip] = queries.head(h * group + g, strip, at)
                rows = slice(0, strips * few)
                acc_ref[h, rows] = jnp.zeros((strips * few, sizes.width), jnp.float32)
                if sink_rows is not None:
                    top_ref[h, rows] = jnp.broadcast_to(sink_rows[h, rows], (strips * few, lanes))
                    first = jax.lax.broadcasted_iota(jnp.int32, (strips * few, lanes), 1) == 0
                    norm_ref[h, rows] = first.astype(jnp.float32)
                else:
                    top_ref[h, rows] = jnp.full((strips * few, lanes), MASKED, jnp.float32)
                    norm_ref[h, rows] = jnp.zeros((strips * few, lanes), jnp.float32)

            jax.lax.fori_loop(0, sizes.kv_heads, head, None)

        def spread_heads(slot):
            """The block in a form of which rows of one head can be loaded, dequantized."""
            for number, (buffer, rows_of_heads) in enumerate(zip(row_bufs, by_head, strict=True)):
                for at in range(0, sizes.block_rows, lanes):
                    rows = _elements(buffer[slot, at : at + lanes], sizes)
                    if scale_bufs:
                        columns = [
                            jnp.broadcast_to(scale[slot, :, at : at + lanes], (8, lanes)).T[:, :1]
                            for scale in (scale_bufs if sizes.joined else [scale_bufs[number]])
                        ]
                        if sizes.joined:
                            lane = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
                            columns = [jnp.where(lane < sizes.head_dim, *columns)]
                        rows = rows.astype(jnp.float32) * columns[0]
                    rows_of_heads.put_all(rows, at)

        def attend(h, rows, keys, masked_from, offset, start=0):
            """Rows of kv head h, up to `rows`, over `keys` keys of the block from `start` on, some of them masked. The
            first row's own key is `offset` keys after the block's first.
            """
            k, *v = (x.head(h, keys, start) for x in by_head)
            scores, factor = _scaled(_products(q_rows[h, :rows], k), sizes)
            if masked_from < keys:
                masked = [scores[:, :masked_from]] if masked_from else []
                for at in range(masked_from, keys, lanes):
                    distance = row_less_lane[:rows] + (offset - start - at)
                    allowed = distance >= 0
                    if sizes.window is not None:
                        allowed &= distance < sizes.window
                    masked.append(jnp.where(allowed, scores[:, at : at + lanes], MASKED))
                scores = jnp.concatenate(masked, axis=1)
            top = top_ref[h, :rows]
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            # Weights of a row that meets no key here are wiped by its first key, which every row meets in the end.
            p = jnp.exp2((scores - jnp.concatenate([new_top] * (keys // lanes), axis=1)) * factor)
            keep = jnp.exp2((top - new_top) * factor)
            norm_ref[h, :rows] = norm_ref[h, :rows] * keep + _lane_sums(p)
            sums = jnp.dot(p.astype(dtype), *v or [k], preferred_element_type=jnp.float32)
            kept = acc_ref[h, :rows] * (keep if sizes.width == lanes else keep[:, :1])
            acc_ref[h, :rows] = kept + sums
            top_ref[h, :rows] = new_top

        def visit(j, slot, carry):
            offset = position - j * block
            spread_heads(slot)

            def heads(*how):
                jax.lax.fori_loop(0, sizes.kv_heads, lambda h, _: attend(h, *how), None)

            def tile_over(keys, before):
                """All rows over the first keys of the block, of which more than `before` are read."""
                masked_from = max(0, before - tile) // lanes * lanes if sizes.window is None else 0
                return lambda: heads(tall, keys, masked_from, offset)

            if tile > strip:
                plain = offset + 1 >= block
                if sizes.window is not None:
                    plain &= offset + tile <= sizes.window
                pl.when(whole_tile & plain)(lambda: heads(tall, block, block, offset))
                before = 0
                for keys in sizes.widths:
                    here = (
                        (offset + tile > before)
                        if keys == block
                        else (offset + tile > before) & (offset + tile <= keys)
                    )
                    pl.when(whole_tile & ~plain & here)(tile_over(keys, before))
                    before = keys

            @pl.when(~whole_tile)
            def _():
                at_once = sizes.widths[0]
                there = pl.cdiv(jnp.minimum(offset + strip, block), at_once)

                def part(s, _):
                    heads(few, at_once, 0, offset, pl.multiple_of(s * at_once, at_once))

                jax.lax.fori_loop(0, there, part, None)

            return carry

        def end(strips):
            used = sizes.kv_heads * group
            for at in range(0, strips * strip, strip):

                def rows_of_head(n, at=at):
                    h, row = n // group, at * group + n % group * strip
                    norm = jnp.sum(norm_ref[h, row : row + strip], axis=1, keepdims=True)
                    inverse = pltpu.reciprocal(norm, approx=True)
                    # One step of Newton's doubles the bits that are right.
                    return acc_ref[h, row : row + strip] * (inverse * (2.0 - norm * inverse))

                for n in range(0, used, 2):
                    first = rows_of_head(n)
                    queries.put_two(n, first, rows_of_head(n + 1) if n + 1 < used else first, at)
                rows = queries.all(strip, at)
                out_buf[at : at + strip] = rows.reshape(strip, sizes.heads, sizes.width).astype(dtype)

        def by_size(act):
            if tile > strip:
                pl.when(whole_tile)(lambda: act(tile // strip))
            pl.when(~whole_tile)(lambda: act(1))

        by_size(begin)
        slot, _ = walk(i, slot, visit, 0)
        settle(i)
        by_size(end)
        rows_of(i, lambda rows: out_copy(i, rows).start())
        return slot

    def run(i, slot):
        pl.when(i + 2 < total[0])(lambda: table.start(i + 2))
        pl.when(i + 1 < total[0])(lambda: rows_of(i + 1, lambda rows: q_copy(i + 1, rows).start()))
        rows_of(i, lambda rows: q_copy(i, rows).wait())
        if tile == 1:
            return decode(i, slot)
        return jax.lax.cond(item[USED, i] == 1, decode, prefill, i, slot)

    def clear():
        """No weight of zero meets what memory held before."""
        for at in range(0, sizes.block_rows, sizes.whole_rows):
            for slot in range(2):
                v_buf[slot, at : at + sizes.whole_rows] = jnp.zeros((sizes.whole_rows, sizes.width), v_buf.dtype)

    @pl.when(total[0] > 0)
    def _():
        table.start(0)
        pl.when(total[0] > 1)(lambda: table.start(1))
        rows_of(0, lambda rows: q_copy(0, rows).start())
        clear()
        table.wait(0)
        blocks.start(0, item[FIRST, 0], 0)
        jax.lax.fori_loop(0, total[0], run, 0)
        settle(total[0])


def paged_attention_mosaic_tpu(
    q: Float[Array, "T N H"],
    pages: KVPages,
    ragged: Ragged,
    scoring: PagedScoring,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "T N H"]:
    """Equal to the reference up to rounding; rows that are padding are zeros. Reads only pages that sequences have."""

    def attend(q, pages, ragged, sinks):
        return _attend(q, pages, ragged, scoring, sinks)

    return on_own_heads(attend, q, pages, ragged, sinks)


def _attend(
    q: Float[Array, "T N H"],
    pages: KVPages,
    ragged: Ragged,
    scoring: PagedScoring,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "T N H"]:
    """On one device: all that it has of the heads."""
    rows, heads, head_dim = q.shape
    sizes = Sizes.of(q, pages, ragged, scoring)
    items, total = items_of(ragged, rows, sizes)
    tall, block_rows, width = sizes.tile * sizes.group, sizes.block_rows, sizes.width
    column = jnp.arange(sizes.decode_tokens * sizes.kv_heads, dtype=jnp.int32)
    same_head = jnp.arange(sizes.heads)[:, None] // sizes.group == column % sizes.kv_heads
    strip_row = jnp.arange(tall, dtype=jnp.int32)
    row_token = strip_row // (sizes.strip * sizes.group) * sizes.strip + strip_row % sizes.strip
    table = jnp.pad(ragged.page_table, ((0, 0), (0, -ragged.capacity % LANES)))[:, None]
    inputs = [table, jnp.pad(q, ((0, sizes.tile), (0, sizes.heads - heads), (0, width - head_dim)))]
    stored = [pages.k] if sizes.joined else [pages.k, pages.v]
    held = [*stored, *([pages.k_scale, pages.v_scale] if sizes.scaled else [])]
    inputs += [x.reshape(x.shape[0], *x.shape[2:]) for x in held]
    spaces: list[Any] = [pl.ANY] * len(inputs)
    inputs += [jnp.where(same_head, 0.0, MASKED), (column // sizes.kv_heads)[None]]
    inputs += [row_token[:, None] - jnp.arange(LANES, dtype=jnp.int32)]
    if sinks is not None:
        # In units of the scores that the kernel compares.
        scores = sinks.astype(jnp.float32) * (_LOG2E / _scaled(jnp.zeros(()), sizes)[1])
        by_row = jnp.tile(jnp.repeat(scores.reshape(sizes.kv_heads, sizes.group), sizes.strip, 1), (1, sizes.strips))
        inputs += [jnp.pad(scores, (0, sizes.heads - heads))[:, None], by_row[:, :, None]]
    spaces += [pltpu.VMEM] * (len(inputs) - len(spaces))
    row_sums = pltpu.VMEM((sizes.kv_heads, tall, LANES), jnp.float32)
    scratch = [
        *[pltpu.VMEM((2, block_rows, width), pages.k.dtype)] * len(stored),
        *[pltpu.VMEM((2, 1, block_rows), jnp.float32)] * (2 * sizes.scaled),
        pltpu.VMEM((2, sizes.tile, sizes.heads, width), q.dtype),
        pltpu.VMEM((sizes.tile, sizes.heads, width), q.dtype),
        pltpu.VMEM((sizes.kv_heads, tall, width), q.dtype),
        row_sums,
        row_sums,
        pltpu.VMEM((sizes.kv_heads, tall, width), jnp.float32),
        HeadRows.shape(sizes.tile, sizes.heads, width, q.dtype, q.dtype),
        *[HeadRows.shape(sizes.block, sizes.kv_heads, width, pages.k.dtype, q.dtype)] * len(stored),
        pltpu.SMEM((3, 1, table.shape[2]), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.DMA((3,)),
    ]
    varying = jax.typeof(pages.k).manual_axis_type
    out = pl.pallas_call(
        functools.partial(_kernel, sizes, sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=space) for space in spaces],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((rows + sizes.tile, sizes.heads, width), q.dtype, manual_axis_type=varying),
        # Page numbers are the caller's word, here as in `chunked`; checking each copy takes 20 of 40 bundles.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=_VMEM_LIMIT),
        name="paged_attention",
    )(items, total, *inputs)
    out = out[:rows, :heads, head_dim : 2 * head_dim] if sizes.joined else out[:rows, :heads, :head_dim]
    # Nothing has written the rows of no sequence.
    return jnp.where((jnp.arange(rows) < ragged.total)[:, None, None], out, 0)


def why_not(spec: PagedSpec, target: Target) -> str | None:
    """Why this kernel cannot run a call, or None."""
    if reason := tpu_why_not(target):
        return reason
    if reason := spread_why_not(spec):
        return reason
    if spec.distance_bias:
        return "a bias by distance needs a gather per score"
    if spec.element == "int4":
        return "int4 halves of a byte are unpacked by chunked only"
    if spec.element not in ("float32", "bfloat16") and spec.pages_shape[2] % LANES:
        return f"a page's {spec.pages_shape[2]} scales are no whole rows of {LANES} lanes: take larger pages"
    return None

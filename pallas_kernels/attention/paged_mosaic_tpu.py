"""Ragged paged attention as one TPU kernel: mixed prefill and decode rows over pages in HBM.

A list of items (paged_schedule.py) is the kernel's program: a decode row, or a tile of a sequence's rows. Each item
walks its key blocks with an online softmax; the pages of the next block, of this item or of the next, fly
in while one is computed. Keys are never gathered, copied or transposed in HBM: a page is page * K rows as it lies.

Decode multiplies all query heads with all rows of a block, heads interleaved as they lie, and masks what belongs to
another kv head. That wastes K - 1 of K scores and nothing that counts: a key row enters the MXU once either way, and no
head has to be picked out of packed rows. With 32 query heads, 8 kv heads of 128 and bfloat16, a step over 256 tokens is
about 700 bundles on v5e, whose memory takes 1,900 cycles for the bytes. Prefill picks heads by strided loads from a
float32 copy of the block in VMEM, once per block.

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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged import PagedScoring
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
from meshloom.pallas_kernels.attention.pages import KVPages, Ragged
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import Target, may_be_spread, tpu_why_not

_HEADS = "tensor"
_LOG2E = math.log2(math.e)


def _capped(raw, sizes: Sizes):
    """Scores times log2(e), from products."""
    if sizes.soft_cap is None:
        return raw * (sizes.scale * _LOG2E)
    return jnp.tanh(raw * (sizes.scale / sizes.soft_cap)) * (sizes.soft_cap * _LOG2E)


def _lane_sums(p):
    """[R, C] -> [R, 128]: what is left of a sum over columns for the end of the item."""
    return functools.reduce(jnp.add, [p[:, at : at + LANES] for at in range(0, p.shape[1], LANES)])


def _elements(x, sizes: Sizes):
    return pltpu.bitcast(x, jnp.float8_e4m3fn) if sizes.element == "float8_e4m3fn" else x


def _kernel(sizes: Sizes, has_sinks: bool, item, total, *arrays):
    refs: list[Any] = list(arrays)
    table_hbm, q_hbm, k_hbm, v_hbm = refs[:4]
    del refs[:4]
    scales = [refs.pop(0) for _ in range(2 * sizes.scaled)]
    head_bias, token_of = refs.pop(0), refs.pop(0)
    sinks, sink_rows = (refs.pop(0), refs.pop(0)) if has_sinks else (None, None)
    out_hbm = refs.pop(0)
    k_buf, v_buf = refs.pop(0), refs.pop(0)
    scale_bufs = [refs.pop(0) for _ in range(2 * sizes.scaled)]
    q_buf, out_buf, q_rows, top_ref, norm_ref, acc_ref, k_wide, v_wide, table_rows = refs[:9]
    page_sems, q_sems, out_sem, table_sems = refs[9:]

    tile, group, lanes = sizes.tile, sizes.group, LANES
    dtype = q_buf.dtype
    copies = [(k_hbm, k_buf, 0), (v_hbm, v_buf, 0)]
    copies += [(source, buffer, 1) for source, buffer in zip(scales, scale_bufs, strict=True)]
    table = TableRows(sizes, item, table_hbm, table_rows, table_sems)
    blocks = BlockCopies(sizes, item, table, copies, page_sems)

    def rows_of(i, act):
        """Does `act(rows)` with the static number of rows that item i moves: one, or a tile."""
        if tile == 1:
            return act(1)
        pl.when(item[USED, i] == 1)(lambda: act(1))
        pl.when(item[USED, i] > 1)(lambda: act(tile))
        return None

    def q_copy(i, rows):
        source = q_hbm.at[pl.ds(item[ROW, i], rows)]
        return pltpu.make_async_copy(source, q_buf.at[i % 2, pl.ds(0, rows)], q_sems.at[i % 2])

    def out_copy(i, rows):
        return pltpu.make_async_copy(out_buf.at[pl.ds(0, rows)], out_hbm.at[pl.ds(item[ROW, i], rows)], out_sem)

    def silence_tail(i, j, slot):
        """Zeros for the values past the end: what a freed page held, even NaN, would survive a weight of zero."""

        @pl.when((j + 1) * sizes.block > item[LENGTH, i])
        def _():
            rows = jax.lax.broadcasted_iota(jnp.int32, v_buf.shape[1:], 0)
            kept = rows < (item[LENGTH, i] - j * sizes.block) * sizes.kv_heads
            values = v_buf[slot]
            if values.dtype.itemsize < 4:
                values = values.astype(jnp.float32 if values.dtype == jnp.bfloat16 else jnp.int32)
            v_buf[slot] = jnp.where(kept, values, 0).astype(v_buf.dtype)
            for buffer in scale_bufs:
                kept_tokens = token_of[...] < item[LENGTH, i] - j * sizes.block
                buffer[slot] = jnp.where(kept_tokens, buffer[slot], 0.0)

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
            top = sinks[...][:, :1] * _LOG2E
            norm = (jax.lax.broadcasted_iota(jnp.int32, (heads, lanes), 1) == 0).astype(jnp.float32)
        else:
            top, norm = jnp.full((heads, 1), MASKED, jnp.float32), jnp.zeros((heads, lanes), jnp.float32)

        def visit(j, slot, carry):
            top, norm, acc = carry
            k, v = (_elements(x[slot], sizes).astype(dtype) for x in (k_buf, v_buf))
            raw = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            if scale_bufs:
                raw = raw * scale_bufs[0][slot]
            distance = item[POSITION, i] - j * sizes.block - token_of[...]
            allowed = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)
            scores = jnp.where(allowed, _capped(raw, sizes) + head_bias[...], MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
            p = jnp.exp2(scores - new_top)
            keep = jnp.exp2(top - new_top)
            norm = norm * keep + _lane_sums(p)
            if scale_bufs:
                p = p * scale_bufs[1][slot]
            acc = acc * keep + jnp.dot(p.astype(dtype), v, preferred_element_type=jnp.float32)
            return new_top, norm, acc

        acc = jnp.zeros((heads, sizes.head_dim), jnp.float32)
        slot, (top, norm, acc) = walk(i, slot, visit, (top, norm, acc))
        settle(i)
        out_buf[0] = (acc / jnp.sum(norm, axis=1, keepdims=True)).astype(dtype)
        out_copy(i, 1).start()
        return slot

    def prefill(i, slot):
        tall = tile * group
        for h in range(sizes.kv_heads):
            rows = q_buf[i % 2, :, h * group : (h + 1) * group, :]
            if dtype == jnp.bfloat16 and group % 2:
                rows = rows.astype(jnp.float32)
            q_rows[h] = rows.reshape(tall, sizes.head_dim).astype(dtype)
            if sink_rows is not None:
                top_ref[h] = jnp.broadcast_to(sink_rows[h] * _LOG2E, (tall, lanes))
                norm_ref[h] = (jax.lax.broadcasted_iota(jnp.int32, (tall, lanes), 1) == 0).astype(jnp.float32)
            else:
                top_ref[h] = jnp.full((tall, lanes), MASKED, jnp.float32)
                norm_ref[h] = jnp.zeros((tall, lanes), jnp.float32)
            acc_ref[h] = jnp.zeros((tall, sizes.head_dim), jnp.float32)

        def widen(slot):
            """The block in float32, dequantized."""
            for buffer, wide, scale in zip((k_buf, v_buf), (k_wide, v_wide), scale_bufs or (None, None), strict=True):
                for at in range(0, sizes.block_rows, lanes):
                    rows = _elements(buffer[slot, at : at + lanes], sizes).astype(jnp.float32)
                    if scale is not None:
                        row = jnp.broadcast_to(scale[slot, :, at : at + lanes], (8, lanes))
                        rows = rows * row.T[:, :1]
                    for piece in range(wide.shape[0]):
                        wide[piece, at : at + lanes] = rows[:, piece * lanes : piece * lanes + wide.shape[2]]

        def pick(wide, h):
            """Rows of one kv head; strided loads take 128 lanes at a time."""
            rows = pl.ds(h, sizes.block, stride=sizes.kv_heads)
            return jnp.concatenate([wide.at[piece][rows, :] for piece in range(wide.shape[0])], axis=1).astype(dtype)

        def visit(j, slot, carry):
            widen(slot)
            token = jax.lax.broadcasted_iota(jnp.int32, (tall, sizes.block), 0) // group
            key = jax.lax.broadcasted_iota(jnp.int32, (tall, sizes.block), 1)
            distance = token - key + (item[POSITION, i] - j * sizes.block)
            allowed = distance >= 0 if sizes.window is None else (distance >= 0) & (distance < sizes.window)

            def head(h, _):
                k, v = pick(k_wide, h), pick(v_wide, h)
                q = q_rows[h]
                raw = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
                scores = jnp.where(allowed, _capped(raw, sizes), MASKED)
                top = top_ref[h][:, :1]
                new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
                # A row before the window of the tile's later rows may have met no key yet: exp2(0) would count.
                p = jnp.where(allowed, jnp.exp2(scores - new_top), 0.0)
                keep = jnp.exp2(top - new_top)
                norm_ref[h] = norm_ref[h] * keep + _lane_sums(p)
                acc_ref[h] = acc_ref[h] * keep + jnp.dot(p.astype(dtype), v, preferred_element_type=jnp.float32)
                top_ref[h] = jnp.broadcast_to(new_top, (tall, lanes))

            jax.lax.fori_loop(0, sizes.kv_heads, head, None)
            return carry

        slot, _ = walk(i, slot, visit, 0)
        settle(i)
        for h in range(sizes.kv_heads):
            norm = jnp.sum(norm_ref[h], axis=1, keepdims=True)
            rows = acc_ref[h] / jnp.where(norm == 0, 1.0, norm)
            out_buf[:, h * group : (h + 1) * group, :] = rows.reshape(tile, group, sizes.head_dim).astype(dtype)
        out_copy(i, tile).start()
        return slot

    def run(i, slot):
        pl.when(i + 2 < total[0])(lambda: table.start(i + 2))
        pl.when(i + 1 < total[0])(lambda: rows_of(i + 1, lambda rows: q_copy(i + 1, rows).start()))
        rows_of(i, lambda rows: q_copy(i, rows).wait())
        if tile == 1:
            return decode(i, slot)
        return jax.lax.cond(item[USED, i] == 1, decode, prefill, i, slot)

    @pl.when(total[0] > 0)
    def _():
        table.start(0)
        pl.when(total[0] > 1)(lambda: table.start(1))
        rows_of(0, lambda rows: q_copy(0, rows).start())
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
    if not may_be_spread():
        return _attend(q, pages, ragged, scoring, sinks)
    mesh = jax.sharding.get_abstract_mesh()
    heads = _HEADS if mesh.shape.get(_HEADS, 1) > 1 else None
    of_heads, everywhere = PartitionSpec(None, heads), PartitionSpec()
    # The body holds a Pallas call, which does not say over which axes its results vary.
    return jax.shard_map(
        lambda q, pages, ragged, sinks: _attend(q, pages, ragged, scoring, sinks),
        mesh=mesh,
        in_specs=(of_heads, of_heads, everywhere, PartitionSpec(heads)),
        out_specs=of_heads,
        check_vma=False,
    )(q, pages, ragged, sinks)


def _attend(
    q: Float[Array, "T N H"],
    pages: KVPages,
    ragged: Ragged,
    scoring: PagedScoring,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "T N H"]:
    """On one device: all that it has of the heads."""
    rows, heads, head_dim = q.shape
    sizes = Sizes.of(q.shape, pages, ragged, scoring)
    items, total = items_of(ragged, rows, sizes)
    tall, block_rows = sizes.tile * sizes.group, sizes.block_rows
    column = jnp.arange(block_rows, dtype=jnp.int32)
    same_head = jnp.arange(heads)[:, None] // sizes.group == column % sizes.kv_heads
    table = jnp.pad(ragged.page_table, ((0, 0), (0, -ragged.capacity % LANES)))[:, None]
    inputs = [table, jnp.pad(q, ((0, sizes.tile), (0, 0), (0, 0)))]
    held = [pages.k, pages.v, *([pages.k_scale, pages.v_scale] if sizes.scaled else [])]
    inputs += [x.reshape(x.shape[0], *x.shape[2:]) for x in held]
    spaces: list[Any] = [pl.ANY] * len(inputs)
    inputs += [jnp.where(same_head, 0.0, MASKED), (column // sizes.kv_heads)[None]]
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)
        by_row = jnp.tile(sinks.reshape(sizes.kv_heads, 1, sizes.group), (1, sizes.tile, 1))
        inputs += [sinks[:, None], by_row.reshape(sizes.kv_heads, tall, 1)]
    spaces += [pltpu.VMEM] * (len(inputs) - len(spaces))
    kv_buffer = pltpu.VMEM((2, block_rows, head_dim), pages.k.dtype)
    row_sums = pltpu.VMEM((sizes.kv_heads, tall, LANES), jnp.float32)
    wide = pltpu.VMEM((max(head_dim // LANES, 1), block_rows, min(head_dim, LANES)), jnp.float32)
    scratch = [
        kv_buffer,
        kv_buffer,
        *[pltpu.VMEM((2, 1, block_rows), jnp.float32)] * (2 * sizes.scaled),
        pltpu.VMEM((2, sizes.tile, heads, head_dim), q.dtype),
        pltpu.VMEM((sizes.tile, heads, head_dim), q.dtype),
        pltpu.VMEM((sizes.kv_heads, tall, head_dim), q.dtype),
        row_sums,
        row_sums,
        pltpu.VMEM((sizes.kv_heads, tall, head_dim), jnp.float32),
        wide,
        wide,
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
        out_shape=jax.ShapeDtypeStruct((rows + sizes.tile, heads, head_dim), q.dtype, manual_axis_type=varying),
        # Page numbers are the caller's word, here as in `chunked`; checking each copy takes 20 of 40 bundles.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="paged_attention",
    )(items, total, *inputs)
    # Nothing has written the rows of no sequence.
    return jnp.where((jnp.arange(rows) < ragged.total)[:, None, None], out[:rows], 0)


def why_not(spec: PagedSpec, target: Target) -> str | None:
    """Why this kernel cannot run a call, or None."""
    if reason := tpu_why_not(target, small=True):
        return reason
    mesh = jax.sharding.get_abstract_mesh()
    if may_be_spread() and mesh.manual_axes:
        return "XLA does not split kernels, and only some axes of the mesh are inside shard_map"
    shards, devices = spec.pages_shape[1], mesh.shape.get(_HEADS, 1) if may_be_spread() else 1
    if shards != devices:
        return f"the cache's kv heads are in {shards} shard(s), for {devices} device(s) of the {_HEADS} axis"
    head_dim = spec.q_shape[-1]
    if head_dim > LANES and head_dim % LANES:
        return f"rows of head dim {head_dim} are no whole vectors of {LANES} lanes"
    if spec.distance_bias:
        return "a bias by distance needs a gather per score"
    if spec.element == "int4":
        return "int4 halves of a byte are unpacked by chunked only"
    if spec.element not in ("float32", "bfloat16") and spec.pages_shape[2] % LANES:
        return f"a page's {spec.pages_shape[2]} scales are no whole rows of {LANES} lanes: take larger pages"
    return None

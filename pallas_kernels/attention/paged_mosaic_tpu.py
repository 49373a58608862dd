"""Ragged paged attention as one TPU kernel: mixed prefill and decode rows over pages in HBM.

A list of items (paged_schedule.py) is the kernel's program: a decode row, or a tile of a sequence's rows. Each item
walks its key blocks with an online softmax; the pages of the next block, of this item or of the next, fly
in while one is computed. Keys are never gathered, copied or transposed in HBM: a page is page * K rows as it lies.

Decode multiplies all query heads with all rows of a block, heads interleaved as they lie, and masks what belongs to
another kv head. That wastes K - 1 of K scores and nothing that counts: a key row enters the MXU once either way, and no
head has to be picked out of packed rows. With 32 query heads, 8 kv heads of 128 and bfloat16, a step over 256 tokens is
about 650 bundles on v5e, whose memory takes 1,900 cycles for the bytes, and 990 for those of an int8 cache (v6e: 580).
Its keys are multiplied as they are stored, by queries in steps of 15 bits; so are both keys and values in float8. Of
int4 each half of a byte is read as a float8 (`Coding`), even kv heads apart from odd ones: queries lie in that order.

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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_decode import decode
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_prefill import prefill
from meshloom.pallas_kernels.attention.paged_mosaic_tpu_walk import LOG2E, Operands, Scratch, Walk, scaled
from meshloom.pallas_kernels.attention.paged_schedule import LANES, Sizes, items_of, parts_of
from meshloom.pallas_kernels.attention.paged_spread import on_own_heads, spread_why_not
from meshloom.pallas_kernels.attention.pages import KVPages, Ragged
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import Target, tpu_why_not

_VMEM_LIMIT = 56 * 2**20


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
    read = _operands(q, pages, ragged, sinks, sizes)
    varying = jax.typeof(pages.k).manual_axis_type
    out = pl.pallas_call(
        functools.partial(_kernel, sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[read.spaces],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[Scratch.of(sizes, pages.k.dtype, q.dtype, read.table.shape[2])],
        ),
        out_shape=jax.ShapeDtypeStruct((rows + sizes.tile, *read.q.shape[1:]), q.dtype, manual_axis_type=varying),
        # Page numbers are the caller's word, here as in `chunked`; checking each copy takes 20 of 40 bundles.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=_VMEM_LIMIT),
        name="paged_attention",
    )(items, total, read)
    out = out[:rows, :, head_dim : 2 * head_dim] if sizes.joined else out[:rows, :, :head_dim]
    out = _in_order(out, heads, sizes)
    # Nothing has written the rows of no sequence.
    return jnp.where((jnp.arange(rows) < ragged.total)[:, None, None], out, 0)


def _kernel(sizes: Sizes, item, total, read: Operands, out, fast: Scratch) -> None:
    Walk(sizes, item, total, read, out, fast).run(decode, prefill)


def _operands(
    q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, sinks: Float[Array, "N"] | None, sizes: Sizes
) -> Operands:
    """A call's arrays as the kernel reads them."""
    column = jnp.arange(sizes.decode_tokens * sizes.part_kv_heads, dtype=jnp.int32)
    same_head = jnp.arange(sizes.part_heads)[:, None] // sizes.group == column % sizes.part_kv_heads
    strip_row = jnp.arange(sizes.tile * sizes.group, dtype=jnp.int32)
    row_token = strip_row // (sizes.strip * sizes.group) * sizes.strip + strip_row % sizes.strip

    def of_one_device(x):
        # Or XLA moves a small cache into fast memory, whole, where a page is copied vector by vector.
        return pltpu.with_memory_space_constraint(x.reshape(x.shape[0], *x.shape[2:]), pltpu.MemorySpace.HBM)

    read = Operands(
        table=jnp.pad(ragged.page_table, ((0, 0), (0, -ragged.capacity % LANES)))[:, None],
        q=_by_part(jnp.pad(q, ((0, sizes.tile), (0, 0), (0, sizes.width - q.shape[2]))), sizes),
        rows=[of_one_device(x) for x in ([pages.k] if sizes.joined else [pages.k, pages.v])],
        scales=of_one_device(pages.scales) if sizes.scaled else None,
        head_bias=jnp.where(same_head, 0.0, MASKED),
        token_of=(column // sizes.part_kv_heads)[None],
        row_less_lane=row_token[:, None] - jnp.arange(LANES, dtype=jnp.int32),
    )
    if sinks is None:
        return read
    exponents = _by_part((sinks.astype(jnp.float32) * LOG2E)[None, :, None], sizes)[0]
    used = exponents.reshape(sizes.parts, sizes.part_heads)[:, : sizes.part_kv_heads * sizes.group]
    scores = used.reshape(sizes.kv_heads, sizes.group) / scaled(jnp.zeros(()), sizes)[1]
    by_row = jnp.tile(jnp.repeat(scores, sizes.strip, 1), (1, sizes.strips))
    return read._replace(sinks=exponents, sink_rows=by_row[:, :, None])


def _by_part(x: Float[Array, "T N H"], sizes: Sizes) -> Float[Array, "T whole H"]:
    """Query heads part by part, each filled up with zeros."""
    rows, heads, width = x.shape
    x = x.reshape(rows, sizes.part_kv_heads, sizes.parts, sizes.group, width).swapaxes(1, 2)
    x = x.reshape(rows, sizes.parts, heads // sizes.parts, width)
    more = sizes.part_heads - heads // sizes.parts
    return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))).reshape(rows, sizes.heads, width)


def _in_order(x: Float[Array, "T whole H"], heads: int, sizes: Sizes) -> Float[Array, "T N H"]:
    """The inverse of `_by_part`."""
    rows, _, width = x.shape
    x = x.reshape(rows, sizes.parts, sizes.part_heads, width)[:, :, : heads // sizes.parts]
    x = x.reshape(rows, sizes.parts, sizes.part_kv_heads, sizes.group, width).swapaxes(1, 2)
    return x.reshape(rows, heads, width)


def why_not(spec: PagedSpec, target: Target) -> str | None:
    """Why this kernel cannot run a call, or None."""
    if reason := tpu_why_not(target):
        return reason
    if reason := spread_why_not(spec):
        return reason
    if spec.distance_bias:
        return "a bias by distance needs a gather per score"
    if spec.element not in ("float32", "bfloat16"):
        parts = parts_of(spec.element)
        scales, run = spec.pages_shape[2] * parts, LANES * parts
        if scales % run:
            return f"a page's {scales} scales are no whole rows of {run} lanes: take larger pages"
    return None

"""Ragged paged attention as plain XLA: work follows the actual lengths, not the padded ones.

Two kinds of rows, two loops, one online softmax. Sequences with a single row (decode) go together, all of them over
one block of keys at a time, until the longest is done. Sequences with several rows (prefill) go one after the other
in tiles of query rows, each over the key blocks that its causal range and window reach. Trip counts are data, so one
program serves every mix of lengths in its bucket.

Shape legend: T rows, S sequences, N heads, K kv heads, G = N / K, H head dim, P pages, W pages per sequence, X
    sequences at a time, m pages and c = m * page keys per block, t rows per tile.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.attention.kernel import MASKED, with_sinks
from meshloom.pallas_kernels.attention.pages import KVBlock, KVPages, PagePart, Ragged
from meshloom.pallas_kernels.attention.spec import soft_capped

# Keys per step of the online softmax in prefill, and query rows per tile.
PREFILL_KEYS = 128
ROW_TILE = 128
# Keys per step of decode, over all sequences together. With many sequences a step costs its gather of pages, so keys
# past the end must be few; with one it costs its fixed part. A model step on two CPU cores, 30 layers, 160 keys each,
# takes in ms of CPU: with 32 sequences 216 at 32 keys each, 239 at 64, 259 at 128; with one 39 at 256, 41 at 128.
DECODE_KEYS = 1024


@dataclasses.dataclass(frozen=True)
class PagedScoring:
    """What turns products q k into scores, and which keys a query reads besides causality.

    Attributes:
        window: the last `window` keys, itself included. scale, soft_cap: as in Scoring.
        distance_bias: added to the score of the key `d` tokens back, d clipped to D - 1.
    """

    scale: float | int
    window: int | None = None
    soft_cap: float | int | None = None
    distance_bias: Float[Array, "N D"] | None = None

    def scores(
        self, products: Float[Array, "X K G t c"], distance: Int[Array, "X t c"]
    ) -> tuple[Float[Array, "X K G t c"], Any]:
        """Masked scores at distances (query minus key position), and the mask [X, 1, 1, t, c]."""
        kv_heads = products.shape[1]
        scores = soft_capped(products * self.scale, self.soft_cap)
        if self.distance_bias is not None:
            heads, span = self.distance_bias.shape
            table = self.distance_bias.reshape(kv_heads, heads // kv_heads, span)
            scores += jnp.moveaxis(table[:, :, jnp.clip(distance, 0, span - 1)], 2, 0)
        allowed = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        allowed = allowed[:, None, None]
        return jnp.where(allowed, scores, MASKED), allowed

    def first_key(self, position: Int[Array, "*X"]) -> Int[Array, "*X"]:
        """First key that a query at `position` can read."""
        return jnp.zeros_like(position) if self.window is None else jnp.maximum(position + 1 - self.window, 0)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The page table in whole blocks of `per_block` pages: of all pages in order, or of those of one part."""

    table: Int[Array, "X W_up"]
    index: Int[Array, "X W_up"] | None
    per_block: int
    page_size: int

    @classmethod
    def of(cls, ragged: Ragged, part: PagePart | None, pages: KVPages, keys: int) -> "_Blocks":
        """Blocks of about `keys` keys."""
        per_block = max(1, keys // pages.page_size)
        table = ragged.page_table if part is None else part.page_table
        pads = ((0, 0), (0, -table.shape[1] % per_block))
        index = None if part is None else jnp.pad(part.index, pads, constant_values=-1)
        return cls(jnp.pad(table, pads), index, per_block, pages.page_size)

    def rows(self, start, count: int) -> "_Blocks":
        """Of `count` sequences."""
        table = jax.lax.dynamic_slice_in_dim(self.table, start, count)
        index = None if self.index is None else jax.lax.dynamic_slice_in_dim(self.index, start, count)
        return dataclasses.replace(self, table=table, index=index)

    def between(self, low: Int[Array, "X"], high: Int[Array, "X"]) -> tuple[Int[Array, "X"], Int[Array, "X"]]:
        """First block with a key at or after `low`, and the one after the last with a key at or before `high`."""
        if self.index is None:
            block = self.per_block * self.page_size
            return low // block, high // block + 1
        start = self.index * self.page_size
        before = jnp.sum((start >= 0) & (start + self.page_size <= low[:, None]), axis=1)
        until = jnp.sum((start >= 0) & (start <= high[:, None]), axis=1)
        return before // self.per_block, -(-until // self.per_block)

    def take(self, j, pages: KVPages) -> tuple[KVBlock, Int[Array, "X c"]]:
        """Keys and values of block j of each sequence, and their positions, negative where there is no page."""
        first = j * self.per_block
        ids = jax.lax.dynamic_slice_in_dim(self.table, first, self.per_block, axis=1)
        if self.index is None:
            index = jnp.broadcast_to(first + jnp.arange(self.per_block), ids.shape)
        else:
            index = jax.lax.dynamic_slice_in_dim(self.index, first, self.per_block, axis=1)
        position = index[..., None] * self.page_size + jnp.arange(self.page_size)
        return pages.gather(ids), position.reshape(ids.shape[0], -1)


def paged_attention_chunked(
    q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, scoring: PagedScoring, sinks: Float[Array, "N"] | None
) -> Float[Array, "T N H"]:
    """Equal to the reference up to rounding, on every row that is not padding."""
    return whole(paged_partials_chunked, q, pages, ragged, scoring, sinks)


def whole(
    partials: Callable,
    q: Float[Array, "T N H"],
    pages: KVPages,
    ragged: Ragged,
    scoring: PagedScoring,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "T N H"]:
    """All pages as one part, in q's dtype."""
    if sinks is None:
        return partials(q, pages, ragged, None, scoring, q.dtype)[0]
    out, lse = partials(q, pages, ragged, None, scoring, jnp.float32)
    return with_sinks(out[None], lse[None], sinks)[0][0].astype(q.dtype)


def paged_partials_chunked(
    q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, part: PagePart | None, scoring: PagedScoring, dtype: Any
) -> tuple[Float[Array, "T N H"], Float[Array, "N T"]]:
    """Equal to the reference up to rounding, on every row that is not padding. Products run in q's dtype."""
    rows = q.shape[0]
    q_TKGH = q.reshape(rows, pages.kv_heads, -1, q.shape[-1])
    out, lse = _decode_rows(q_TKGH, pages, ragged, part, scoring, dtype)
    if rows > 1:
        out, lse = _prefill_rows(out, lse, q_TKGH, pages, ragged, part, scoring)
    return out.reshape(q.shape), lse.reshape(rows, -1).T


def _online_step(carry, q, block: KVBlock, position, length, q_position, scoring: PagedScoring):
    """One block of the online softmax. q [X, K, G, t, H]; q_position [X, t]; length [X]; carry float32."""
    top, norm, out = carry
    products = jnp.einsum("xkgth,xckh->xkgtc", q, block.k.astype(q.dtype), preferred_element_type=jnp.float32)
    if block.k_scale is not None:
        products *= block.k_scale.transpose(0, 2, 1)[:, :, None, None]
    distance = jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max // 2)[:, None, :]
    scores, allowed = scoring.scores(products, q_position[:, :, None] - distance)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
    norm_update = jnp.sum(weights, axis=-1)
    keep = jnp.exp(top - new_top)
    # Slots past the end keep what a freed page held, even NaN, which a weight of zero would not silence.
    written = (position >= 0) & (position < length[:, None])
    values = jnp.where(written[..., None, None], block.v.astype(q.dtype), 0)
    if block.v_scale is not None:
        weights *= jnp.where(written[..., None], block.v_scale, 0.0).transpose(0, 2, 1)[:, :, None, None]
    update = jnp.einsum("xkgtc,xckh->xkgth", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
    return new_top, norm * keep + norm_update, out * keep[..., None] + update


def _empty(shape: tuple[int, ...], *like):
    """The carry before the first block; inside `shard_map` it differs between devices as its data, `like`, will."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(like)))
    start = jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape)
    return jax.lax.pcast(start, tuple(axes), to="varying") if axes else start


def _finish(carry, dtype):
    top, norm, out = carry
    safe = jnp.where(norm == 0, 1.0, norm)
    return (out / safe[..., None]).astype(dtype), top + jnp.log(safe)


def _decode_rows(q, pages: KVPages, ragged: Ragged, part: PagePart | None, scoring: PagedScoring, dtype):
    """Attention and log-sum-exp of every sequence that has exactly one row; zeros elsewhere. q [T, K, G, H]."""
    sequences = min(q.shape[0], ragged.kv_lens.size)
    blocks = _Blocks.of(ragged, part, pages, min(max(DECODE_KEYS // sequences, 32), 256)).rows(0, sequences)
    first_row = ragged.cu_q_lens[:sequences]
    single = ragged.cu_q_lens[1 : sequences + 1] - first_row == 1
    lengths = jnp.where(single, ragged.kv_lens[:sequences], 0)
    row = jnp.where(single, first_row, q.shape[0])
    q_SKGtH = q[jnp.minimum(row, q.shape[0] - 1)][:, :, :, None]
    low, high = blocks.between(scoring.first_key(lengths - 1), lengths - 1)
    first = jnp.min(jnp.where(single, low, blocks.table.shape[1]))

    def step(j, carry):
        block, position = blocks.take(j, pages)
        return _online_step(carry, q_SKGtH, block, position, lengths, (lengths - 1)[:, None], scoring)

    carry = jax.lax.fori_loop(first, jnp.max(high), step, _empty(q_SKGtH.shape, q, pages, blocks.table))
    out, lse = _finish(carry, dtype)
    start = jnp.zeros(q.shape, dtype), jnp.full(q.shape[:-1], MASKED)
    return tuple(x.at[row].set(y[:, :, :, 0], mode="drop") for x, y in zip(start, (out, lse), strict=True))


def _prefill_rows(out, lse, q, pages: KVPages, ragged: Ragged, part: PagePart | None, scoring: PagedScoring):
    """Fills the rows of sequences with several rows into `out` and `lse`, tile by tile. q, out [T, K, G, H]."""
    blocks = _Blocks.of(ragged, part, pages, PREFILL_KEYS)
    rows = q.shape[0]
    tile = min(ROW_TILE, rows)
    q, out, lse = (jnp.pad(x, ((0, tile), *((0, 0),) * (x.ndim - 1))) for x in (q, out, lse))

    def attend_tile(i, done, sequence, start, count):
        row = start + i * tile
        length = ragged.kv_lens[sequence][None]
        position = (length - count + i * tile)[:, None] + jnp.arange(tile)[None]
        q_KGtH = jax.lax.dynamic_slice_in_dim(q, row, tile).transpose(1, 2, 0, 3)
        used = jnp.minimum(tile, count - i * tile)
        mine = blocks.rows(sequence, 1)

        def step(j, carry):
            block, key_position = mine.take(j, pages)
            return _online_step(carry, q_KGtH[None], block, key_position, length, position, scoring)

        first, last = mine.between(scoring.first_key(position[:, 0]), position[:, 0] + used - 1)
        carry = jax.lax.fori_loop(first[0], last[0], step, _empty((1, *q_KGtH.shape), q, pages, blocks.table))

        def put(old, new):
            # A tile may reach into the rows of the next sequence, which has its own.
            new = jnp.moveaxis(new[0], 2, 0)
            kept = jax.lax.dynamic_slice_in_dim(old, row, tile)
            used_rows = (jnp.arange(tile) < used).reshape(-1, *(1,) * (new.ndim - 1))
            return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(used_rows, new, kept), row, axis=0)

        return tuple(map(put, done, _finish(carry, out.dtype)))

    def attend_sequence(sequence, done):
        start = ragged.cu_q_lens[sequence]
        count = ragged.cu_q_lens[sequence + 1] - start
        tiles = jnp.where(count > 1, -(-count // tile), 0)
        return jax.lax.fori_loop(0, tiles, lambda i, done: attend_tile(i, done, sequence, start, count), done)

    out, lse = jax.lax.fori_loop(0, ragged.num_seqs, attend_sequence, (out, lse))
    return out[:rows], lse[:rows]

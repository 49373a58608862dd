"""Ragged paged attention as plain XLA: work follows the actual lengths, not the padded ones.

Two kinds of rows, two loops, one online softmax. Sequences with a single row (decode) go together, all of them over
one block of keys at a time, until the longest is done. Sequences with several rows (prefill) go one after the other
in tiles of query rows, each over the key blocks that its causal range and window reach. Trip counts are data, so one
program serves every mix of lengths in its bucket.

Shape legend: T rows, S sequences, N heads, K kv heads, G = N / K, H head dim, P pages, W pages per sequence, c keys
    per block, t rows per tile.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.spec import KVPages, Ragged, soft_capped

# Keys per step of the online softmax in prefill, and query rows per tile.
PREFILL_KEYS = 128
ROW_TILE = 128
# Keys per step of decode, over all sequences together. With many sequences a step costs its gather of pages, so keys
# past the end must be few; with one it costs its fixed part. A model step on two CPU cores, 30 layers, 160 keys each,
# takes in ms of CPU: with 32 sequences 216 at 32 keys each, 239 at 64, 259 at 128; with one 39 at 256, 41 at 128.
DECODE_KEYS = 1024


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """The options that turn q and k into scores."""

    window: int | None
    scale: float
    soft_cap: float | None
    distance_bias: Float[Array, "N D"] | None

    def scores(self, products, distance, kv_heads: int):
        """Masked scores of products [X, K, G, t, c] at distances [X, t, c] (query minus key position), and the mask."""
        scores = soft_capped(products * self.scale, self.soft_cap)
        if self.distance_bias is not None:
            heads, span = self.distance_bias.shape
            table = self.distance_bias.reshape(kv_heads, heads // kv_heads, span)
            scores += jnp.moveaxis(table[:, :, jnp.clip(distance, 0, span - 1)], 2, 0)
        allowed = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        allowed = allowed[:, None, None]
        return jnp.where(allowed, scores, MASKED), allowed

    def first_block(self, position, block: int):
        """First key block that a query at `position` can read."""
        return jnp.zeros_like(position) if self.window is None else jnp.maximum(position + 1 - self.window, 0) // block


def paged_attention_chunked(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    ragged: Ragged,
    *,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    distance_bias: Float[Array, "N D"] | None,
) -> tuple[Float[Array, "T N H"], KVPages]:
    """Equal to the reference up to rounding, on every row that is not padding."""
    pages = pages.write(k, v, ragged)
    softmax = _Softmax(window, scale, soft_cap, distance_bias)
    rows, kv_heads = q.shape[0], k.shape[1]
    q_TKGH = q.reshape(rows, kv_heads, -1, q.shape[-1])
    out = _decode_rows(q_TKGH, pages, ragged, softmax)
    if rows > 1:
        out = _prefill_rows(out, q_TKGH, pages, ragged, softmax)
    return out.reshape(q.shape), pages


def _online_step(carry, q, keys, values, distance, softmax: _Softmax):
    """One block of the online softmax. q [X, K, G, t, H]; keys, values [X, c, K, H]; carry float32."""
    top, norm, out = carry
    products = jnp.einsum("xkgth,xckh->xkgtc", q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    scores, allowed = softmax.scores(products, distance, q.shape[1])
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
    weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
    keep = jnp.exp(top - new_top)
    update = jnp.einsum(
        "xkgtc,xckh->xkgth", weights.astype(q.dtype), values.astype(q.dtype), preferred_element_type=jnp.float32
    )
    return new_top, norm * keep + jnp.sum(weights, axis=-1), out * keep[..., None] + update


def _empty(shape: tuple[int, ...]):
    return jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]), jnp.zeros(shape)


def _finish(carry, dtype):
    _, norm, out = carry
    return (out / jnp.where(norm == 0, 1.0, norm)[..., None]).astype(dtype)


def _blocked_table(ragged: Ragged, pages: KVPages, keys: int):
    """The page table, padded to whole blocks of about `keys` keys, and the pages in a block."""
    pages_per_block = max(1, keys // pages.k.shape[1])
    return jnp.pad(ragged.page_table, ((0, 0), (0, -ragged.capacity % pages_per_block))), pages_per_block


def _gather(pages: Float[Array, "P page K H"], ids) -> Float[Array, "X c K H"]:
    return pages[ids].reshape(ids.shape[0], -1, *pages.shape[2:])


def _decode_rows(q, pages: KVPages, ragged: Ragged, softmax: _Softmax):
    """Attention of every sequence that has exactly one row; zeros elsewhere. q [T, K, G, H]."""
    sequences = min(q.shape[0], ragged.kv_lens.size)
    table, pages_per_block = _blocked_table(ragged, pages, min(max(DECODE_KEYS // sequences, 32), 256))
    block = pages_per_block * pages.k.shape[1]
    first_row = ragged.cu_q_lens[:sequences]
    single = ragged.cu_q_lens[1 : sequences + 1] - first_row == 1
    lengths = jnp.where(single, ragged.kv_lens[:sequences], 0)
    row = jnp.where(single, first_row, q.shape[0])
    q_SKGtH = q[jnp.minimum(row, q.shape[0] - 1)][:, :, :, None]
    first = jnp.min(jnp.where(single, softmax.first_block(lengths - 1, block), table.shape[1]))

    def step(j, carry):
        ids = jax.lax.dynamic_slice_in_dim(table[:sequences], j * pages_per_block, pages_per_block, axis=1)
        distance = (lengths - 1)[:, None, None] - (j * block + jnp.arange(block))[None, None, :]
        return _online_step(carry, q_SKGtH, _gather(pages.k, ids), _gather(pages.v, ids), distance, softmax)

    carry = jax.lax.fori_loop(first, -(-jnp.max(lengths) // block), step, _empty(q_SKGtH.shape))
    return jnp.zeros_like(q).at[row].set(_finish(carry, q.dtype)[:, :, :, 0], mode="drop")


def _prefill_rows(out, q, pages: KVPages, ragged: Ragged, softmax: _Softmax):
    """Fills the rows of sequences with several rows into `out`, tile by tile. q, out [T, K, G, H]."""
    table, pages_per_block = _blocked_table(ragged, pages, PREFILL_KEYS)
    block = pages_per_block * pages.k.shape[1]
    rows = q.shape[0]
    tile = min(ROW_TILE, rows)
    pad = ((0, tile), (0, 0), (0, 0), (0, 0))
    q, out = jnp.pad(q, pad), jnp.pad(out, pad)

    def attend_tile(i, out, sequence, start, count):
        row = start + i * tile
        position = ragged.kv_lens[sequence] - count + i * tile + jnp.arange(tile)
        q_KGtH = jax.lax.dynamic_slice_in_dim(q, row, tile).transpose(1, 2, 0, 3)
        used = jnp.minimum(tile, count - i * tile)

        def step(j, carry):
            ids = jax.lax.dynamic_slice(table, (sequence, j * pages_per_block), (1, pages_per_block))
            distance = (position[:, None] - (j * block + jnp.arange(block))[None, :])[None]
            return _online_step(carry, q_KGtH[None], _gather(pages.k, ids), _gather(pages.v, ids), distance, softmax)

        last = position[0] + used - 1
        carry = jax.lax.fori_loop(
            softmax.first_block(position[0], block), last // block + 1, step, _empty((1, *q_KGtH.shape))
        )
        new = _finish(carry, q.dtype)[0].transpose(2, 0, 1, 3)
        old = jax.lax.dynamic_slice_in_dim(out, row, tile)
        # A tile may reach into the rows of the next sequence, which has its own.
        mine = (jnp.arange(tile) < used)[:, None, None, None]
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine, new, old), row, axis=0)

    def attend_sequence(sequence, out):
        start = ragged.cu_q_lens[sequence]
        count = ragged.cu_q_lens[sequence + 1] - start
        tiles = jnp.where(count > 1, -(-count // tile), 0)
        return jax.lax.fori_loop(0, tiles, lambda i, out: attend_tile(i, out, sequence, start, count), out)

    return jax.lax.fori_loop(0, ragged.num_seqs, attend_sequence, out)[:rows]

"""The words of attention: masks, ragged steps and paged caches, as data.

Shape legend: B batch, T query length (or token rows of a ragged step), S kv length (or sequences of a ragged step), N
    heads, K kv heads, G = N / K, H head dim, P pages, W pages per sequence.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from meshloom.core.errors import MeshloomError

# JAX also builds pytree nodes around placeholders (specs, shardings, sentinels), so their fields admit anything.
Leaf = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q_segments", "kv_segments", "kv_lens", "offset"],
    meta_fields=["causal", "window"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query may read. All conditions hold together; a query that may read none yields zeros.

    Attributes:
        causal: key position <= query position.
        window: key position > query position - window (with `causal`: the last `window` keys, itself included).
        q_segments, kv_segments: only equal ids see each other (packed documents).
        kv_lens: keys at positions >= kv_lens are padding.
        offset: position of the first query, where the first key's is 0; may be negative. None is S - T: aligned at the
            bottom right, the last query sees the last key.
    """

    causal: bool = True
    window: int | None = None
    q_segments: Int[Array, "B T"] | Leaf | None = None
    kv_segments: Int[Array, "B S"] | Leaf | None = None
    kv_lens: Int[Array, "B"] | Leaf | None = None
    offset: Int[Array, ""] | Leaf | None = None

    @property
    def is_static(self) -> bool:
        """Whether the truth table follows from lengths alone."""
        return self.q_segments is None and self.kv_lens is None and self.offset is None

    def first_position(self, q_total: int, kv_total: int) -> int | Int[Array, ""]:
        """Position of the first query."""
        return kv_total - q_total if self.offset is None else self.offset

    def allowed(
        self, q_index: Int[Array, "T"], kv_index: Int[Array, "S"], q_total: int, kv_total: int
    ) -> Bool[Array, "#B T S"]:
        """Truth table for a block of queries and keys, given by their indices in sequences of the total lengths."""
        q_position = (q_index + self.first_position(q_total, kv_total))[:, None]
        kv_position = kv_index[None, :]
        table = jnp.broadcast_to(kv_position < kv_total, (q_index.size, kv_index.size))
        if self.causal:
            table &= kv_position <= q_position
        if self.window is not None:
            table &= kv_position > q_position - self.window
        table = table[None]
        if self.q_segments is not None:
            q_segment = jnp.take(self.q_segments, q_index, axis=1, mode="clip")
            kv_segment = jnp.take(self.kv_segments, kv_index, axis=1, mode="clip")
            table &= q_segment[:, :, None] == kv_segment[:, None, :]
        if self.kv_lens is not None:
            table &= kv_position[None] < self.kv_lens[:, None, None]
        return table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """One step over a paged cache: rows of several sequences, one after the other, some of many rows and some of one.

    Attributes:
        kv_lens: length of each sequence after this step's rows are written; 0 for padding sequences.
        page_table: pages of each sequence, in order.
        cu_q_lens: rows of sequence s are cu_q_lens[s] : cu_q_lens[s + 1]; padding entries repeat the total.
        num_seqs: sequences in this step. Each has at least one row, so T rows hold at most T sequences.
    Rows from cu_q_lens[num_seqs] on are padding: they are written nowhere and their output is finite and meaningless.
    """

    kv_lens: Int[Array, "S"] | Leaf
    page_table: Int[Array, "S W"] | Leaf
    cu_q_lens: Int[Array, "S_plus_1"] | Leaf
    num_seqs: Int[Array, ""] | Leaf

    def sequence_of(self, rows: int) -> Int[Array, "T"]:
        """The sequence that each of the first `rows` rows belongs to (clipped for padding rows)."""
        sequence = jnp.searchsorted(self.cu_q_lens, jnp.arange(rows, dtype=jnp.int32), side="right") - 1
        return jnp.clip(sequence, 0, self.kv_lens.size - 1).astype(jnp.int32)

    def positions(self, rows: int) -> Int[Array, "T"]:
        """Position of each row in its sequence, in tokens; 0 for padding rows."""
        sequence = self.sequence_of(rows)
        row = jnp.arange(rows, dtype=jnp.int32)
        position = self.kv_lens[sequence] - (self.cu_q_lens[sequence + 1] - row)
        return jnp.where(row < self.total, position, 0)

    @property
    def total(self) -> Int[Array, ""]:
        """Rows that are not padding."""
        return self.cu_q_lens[self.num_seqs]

    @property
    def capacity(self) -> int:
        """Pages that one sequence's row of the page table can hold."""
        return self.page_table.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
    """One layer's share of the paged cache: keys and values in pages of `page_size` tokens."""

    k: Float[Array, "*L P page K H"] | Leaf
    v: Float[Array, "*L P page K H"] | Leaf

    @classmethod
    def zeros(cls, num_pages: int, page_size: int, n_kv_heads: int, head_dim: int, dtype) -> "KVPages":
        """A fresh cache of `num_pages` pages of `page_size` tokens."""
        shape = (num_pages, page_size, n_kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, k: Float[Array, "T K H"], v: Float[Array, "T K H"], ragged: Ragged) -> "KVPages":
        """Stores this step's rows at their positions; padding rows are dropped. In place when the cache is donated."""
        num_pages, page_size, n_kv_heads, head_dim = self.k.shape
        rows = k.shape[0]
        position, sequence = ragged.positions(rows), ragged.sequence_of(rows)
        slot = ragged.page_table[sequence, position // page_size] * page_size + position % page_size
        slot = jnp.where(jnp.arange(rows) < ragged.total, slot, num_pages * page_size)

        def put(pages, values):
            flat = pages.reshape(num_pages * page_size, n_kv_heads, head_dim)
            return flat.at[slot].set(values.astype(pages.dtype), mode="drop").reshape(pages.shape)

        return KVPages(put(self.k, k), put(self.v, v))


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static facts of one `attention` call, for choosing an implementation.

    Attributes:
        bias_shape: of the additive bias, or None.
    """

    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    value_dim: int
    dtype: str
    bias_shape: tuple[int, ...] | None
    mask: Mask


@dataclasses.dataclass(frozen=True)
class PagedSpec:
    """The static facts of one `paged_attention` call, for choosing an implementation."""

    q_shape: tuple[int, ...]
    pages_shape: tuple[int, ...]
    sequences: int
    dtype: str
    window: int | None


def check_heads(n_heads: int, n_kv_heads: int) -> int:
    """Query heads per kv head. Raises MeshloomError when they do not divide."""
    if n_heads % n_kv_heads:
        raise MeshloomError(f"attention: {n_heads} query heads are not a multiple of {n_kv_heads} kv heads")
    return n_heads // n_kv_heads


def soft_capped(scores: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(scores / cap) (Gemma 2, section 2), or the scores when there is no cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)

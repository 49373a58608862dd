"""The words of attention as data: masks, and the facts that choose an implementation. Caches are in pages.py.

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
    """The static facts of one `paged_attention` call, for choosing an implementation.

    Attributes:
        pages_shape: of the keys, [P, shards, rows, H]. element: of the cache, see KVPages.
        sequences, table_width: rows and columns of the page table.
        distance_bias: whether scores get one.
    """

    q_shape: tuple[int, ...]
    kv_heads: int
    pages_shape: tuple[int, ...]
    element: str
    sequences: int
    table_width: int
    dtype: str
    window: int | None
    distance_bias: bool


def check_heads(n_heads: int, n_kv_heads: int) -> int:
    """Query heads per kv head. Raises MeshloomError when they do not divide."""
    if n_heads % n_kv_heads:
        raise MeshloomError(f"attention: {n_heads} query heads are not a multiple of {n_kv_heads} kv heads")
    return n_heads // n_kv_heads


def soft_capped(scores: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap * tanh(scores / cap) (Gemma 2, section 2), or the scores when there is no cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)

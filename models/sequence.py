"""How the tokens of one call lie, and what that means for positions and attention.

Three layouts, one `attend`: rows of whole sequences `[B, T]` (layout None), packed documents in rows (`Packed`), and
a ragged step over a paged cache with rows `[T]` of many sequences (`Ragged`). Layers call `attend` and never ask
which one it is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels import KVPages, Mask, Ragged, attention, paged_attention
from meshloom.pallas_kernels.attention.spec import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Several documents in one row: `segment_ids` numbers them (0 is padding), `positions` restart in each.

    Attributes:
        order: in which the tokens come over the mesh's `context` axis, see `Decoder.token_order`.
    """

    segment_ids: Int[Array, "B T"] | Leaf
    positions: Int[Array, "B T"] | Leaf
    order: str = dataclasses.field(default="contiguous", metadata={"static": True})


Layout = Packed | Ragged | None


def positions_of(rows: tuple[int, ...], layout: Layout) -> Int[Array, "*rows"]:
    """Position of every token in its own sequence, int32, of shape `rows`: (B, T), or (T,) for a ragged step."""
    match layout:
        case None:
            return jnp.broadcast_to(jnp.arange(rows[-1], dtype=jnp.int32), rows)
        case Packed():
            return layout.positions
        case Ragged():
            return layout.positions(rows[0])


def capacity_of(rows: tuple[int, ...], layout: Layout, page_size: int) -> int:
    """Longest sequence this program could meet, in tokens; static, so that no result depends on the batch."""
    return layout.capacity * page_size if isinstance(layout, Ragged) else rows[-1]


def attend(
    q: Float[Array, "*rows N H"],
    k: Float[Array, "*rows K H"],
    v: Float[Array, "*rows K H"],
    layout: Layout,
    pages: KVPages | None,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    distance_bias: Float[Array, "N D"] | None = None,
) -> tuple[Float[Array, "*rows N H"], KVPages | None]:
    """Causal self-attention under any layout; returns the output and the updated pages (None without a cache).

    Args:
        distance_bias: added to the score of the key `d` tokens back, d clipped to D - 1.
    """
    if isinstance(layout, Ragged):
        options = {"window": window, "scale": scale, "soft_cap": soft_cap, "distance_bias": distance_bias}
        return paged_attention(q, k, v, pages, layout, **options)
    segments, order = (layout.segment_ids, layout.order) if isinstance(layout, Packed) else (None, "contiguous")
    mask = Mask(causal=True, window=window, q_segments=segments, kv_segments=segments)
    bias = None
    if distance_bias is not None:
        length = jnp.arange(q.shape[1])
        distance = jnp.clip(length[:, None] - length[None, :], 0, distance_bias.shape[1] - 1)
        bias = distance_bias[:, distance][None]
    return attention(q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, bias=bias, layout=order), None

"""What attention's kernels for Hopper share: static facts, and masks of a tile [r, c] of queries and keys."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.reach import Reach
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.hopper import BY_COLUMN, ROWS, column, loaded, over, row_positions

LOG2_E = math.log2(math.e)
# A copy wants whole tiles of so many tokens in the array, though it may begin or end outside of it.
TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of a kernel; `mask` holds no arrays of the caller's."""

    mask: Mask
    scoring: Scoring
    q_total: int
    kv_total: int
    group: int
    head_dim: int
    value_dim: int
    dtype: Any
    out_dtype: Any

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, mask: Mask, scoring: Scoring, out_dtype: Any) -> Any:
        """The facts of one call, of the class that is asked."""
        bare, group, dims = Mask(mask.causal, mask.window), q.shape[2] // k.shape[2], (q.shape[3], v.shape[3])
        return cls(bare, scoring, q.shape[1], k.shape[1], group, *dims, q.dtype, jnp.dtype(out_dtype))

    def of_queries(self, block: Any, block_q: int, block_kv: int) -> Reach:
        """What a block of queries reaches when the mask holds no data."""
        first = block * block_q + self.kv_total - self.q_total
        return Reach.of(self.mask, first, block_q, self.kv_total, block_kv)


def padded_tokens(x: Any) -> Any:
    """[B, L, heads, H] with L a multiple of what a copy wants."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TOKENS), (0, 0), (0, 0)))


def padded_ids(ids: Any, block: int) -> Any:
    """Segments [B, L] with L a multiple of `block`; what is added is in none."""
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), constant_values=-1)


def column_positions(first: Any, width: int) -> Any:
    """Positions of a tile's columns, int32 [r, c].

    `first` is what changes in a loop: differences of columns and rows would not, and be kept in registers through it,
    of which 236 bytes spilled in the forward kernel.
    """
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 1, layout=plgpu.Layout.WGMMA) + first


def kept(mask: Mask, reach: Reach, first_key: Any, width: int, first_query: Any, ids: tuple[Any, Any] | None) -> Any:
    """Which keys the queries of a worker may see, bool [r, c].

    Args:
        first_key: position of the first of `width` keys. first_query: position of the worker's first query.
        ids: segments of its queries [r], loaded, and those of the keys [c] in global memory.
    """
    at_kv, limit = column_positions(first_key, width), column(reach.length, jnp.int32)
    if mask.causal:
        limit = jnp.minimum(row_positions(first_query + 1), limit)
    keep = at_kv < over(limit, 0, width)
    if mask.window is not None:
        keep &= at_kv > over(row_positions(first_query - mask.window), 0, width)
    if ids is not None:
        keep &= over(ids[0], 0, width) == over(loaded(ids[1], BY_COLUMN), 1, width)
    return keep


def soft_capped(scores: Any, scoring: Scoring) -> Any:
    """Scaled and capped scores. The GPU's own tanh is good to 11 bits only: its exponential is to 22."""
    growth = jnp.exp2(scores * (2 * LOG2_E * scoring.scale / scoring.soft_cap))
    return scoring.soft_cap - 2 * scoring.soft_cap / (growth + 1)

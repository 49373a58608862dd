"""What attention's kernels for Hopper share: static facts, tiles in the layout of `wgmma`, and rings of buffers.

A tile is [r, c], the rows of one warpgroup and the columns that it multiplies at a time. Numbers for its rows [r] and
for its columns [c] have layouts of their own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.reach import Reach
from meshloom.pallas_kernels.attention.spec import Mask

LOG2_E = math.log2(math.e)
# Warpgroups that multiply, and the rows of one: the height of a product.
WORKERS, ROWS = 2, 64
# A copy wants whole tiles of so many tokens in the array, though it may begin or end outside of it.
TOKENS = 8
BY_ROW, BY_COLUMN = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))


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


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the order that products read: tiles of 8 rows of 128 bytes, swizzled."""
    # JAX leaves a method of their protocol without a body, which mypy takes for one that is still to be written.
    tiles = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    transforms = (tiles, plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def column(value: Any, dtype: Any = jnp.float32) -> Any:
    """The same number for each row of a product, [r]."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), plgpu.Layout.WGMMA.reduce(1))


def nothing(width: int) -> Any:
    """A sum that begins, float32 [r, width]."""
    return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)


def over(x: Any, axis: int, width: int) -> Any:
    """What each row (`axis` 0) or column (1) of a tile has, over the tile."""
    return jax.lax.broadcast_in_dim(x, (ROWS, width), [axis])


def row_positions(first: Any) -> Any:
    """Positions of a tile's rows, int32 [r]."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW) + first


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


def loaded(array: Any, layout: Any) -> Any:
    """Numbers for rows or columns, straight from global memory."""
    return plgpu.load(array, layout=layout, optimized=False)


def soft_capped(scores: Any, scoring: Scoring) -> Any:
    """Scaled and capped scores. The GPU's own tanh is good to 11 bits only: its exponential is to 22."""
    growth = jnp.exp2(scores * (2 * LOG2_E * scoring.scale / scoring.soft_cap))
    return scoring.soft_cap - 2 * scoring.soft_cap / (growth + 1)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that the first worker fills ahead of both.

    Attributes:
        copies: (step, slot, barrier) -> starts the copies of a step.
        full: of a slot, arrives once for every copy. free: of a slot, arrives once for every worker.
    """

    copies: Callable[[Any, Any, Any], None]
    full: Any
    free: Any
    stages: int
    steps: Any
    worker: Any

    def begin(self) -> None:
        for step in range(self.stages - 1):
            self._fetch(step)

    def take(self, step: Any) -> Any:
        """The slot of a step, filled; before that the copies of a later one are asked for."""
        ahead = step + self.stages - 1
        used_before = (self.worker == 0) & (ahead < self.steps) & (step > 0)
        pl.when(used_before)(lambda: plgpu.barrier_wait(self.free.at[jax.lax.rem(ahead, self.stages)]))
        self._fetch(ahead)
        slot = jax.lax.rem(step, self.stages)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def give_back(self, slot: Any) -> None:
        plgpu.barrier_arrive(self.free.at[slot])

    def end(self) -> None:
        """Sees what was given back and not filled again."""

        @pl.when(self.worker == 0)
        def _see():
            @pl.loop(jnp.maximum(self.steps - self.stages, 0), self.steps)
            def _each(step):
                plgpu.barrier_wait(self.free.at[jax.lax.rem(step, self.stages)])

    def _fetch(self, step: Any) -> None:
        slot = jax.lax.rem(step, self.stages)

        @pl.when((self.worker == 0) & (step < self.steps))
        def _start():
            self.copies(step, slot, self.full.at[slot])

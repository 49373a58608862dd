"""What kernels for Hopper GPUs share: where they run, tiles in the layout of `wgmma`, memory and rings of buffers.

A tile is [r, c]: 64 rows of one warpgroup and the columns that it multiplies at a time. Numbers for its rows [r] and
for its columns [c] have layouts of their own.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from meshloom.pallas_kernels.dispatch import Target

HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")
# Warpgroups that multiply, and the rows of one: the height of a product.
WORKERS, ROWS = 2, 64
# Bytes that a thread block may have, less barriers and what reductions across lanes ask for.
SHARED_LIMIT = 232_448 - 4_096
CORES = 132
BY_ROW, BY_COLUMN = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))


def hopper_why_not(target: Target) -> str | None:
    """Why a kernel that multiplies with `wgmma` cannot run there, or None."""
    if target.platform not in ("gpu", "cuda"):
        return f"it runs on Hopper GPUs, not on {target.platform or 'a device that no mesh in scope names'}"
    if not HOPPER.search(str(target.device_kind)):
        return f"it multiplies with wgmma, which Hopper has and {target.device_kind} has not"
    return None


def bits_of(dtype: Any) -> int:
    """Of one number in memory."""
    dtype = jnp.dtype(dtype)
    return 4 if dtype == jnp.int4 else 8 * dtype.itemsize


def tiled(shape: tuple[int, ...], dtype: Any, across: int | None = None) -> Any:
    """Shared memory in the order that products read: tiles of 8 rows of 128 bytes, or `across` numbers, swizzled."""
    bits = bits_of(dtype)
    across = across or 128 * 8 // bits
    # JAX leaves a method of their protocol without a body, which mypy takes for one that is still to be written.
    tiles = plgpu.TilingTransform((8, across))  # type: ignore[abstract]
    transforms = (tiles, plgpu.SwizzleTransform(across * bits // 8))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def column(value: Any, dtype: Any = jnp.float32) -> Any:
    """The same number for each row of a product, [r]."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), plgpu.Layout.WGMMA.reduce(1))


def nothing(width: int, dtype: Any = jnp.float32) -> Any:
    """A sum that begins, [r, width]."""
    return plgpu.layout_cast(jnp.zeros((ROWS, width), dtype), plgpu.Layout.WGMMA)


def over(x: Any, axis: int, width: int) -> Any:
    """What each row (`axis` 0) or column (1) of a tile has, over the tile."""
    return jax.lax.broadcast_in_dim(x, (ROWS, width), [axis])


def row_positions(first: Any) -> Any:
    """Positions of a tile's rows, int32 [r]."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW) + first


def loaded(array: Any, layout: Any) -> Any:
    """Numbers for rows or columns, straight from global memory."""
    return plgpu.load(array, layout=layout, optimized=False)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Buffers that the first worker fills ahead of both.

    Attributes:
        copies: (step, slot, barrier) -> starts the copies of a step.
        full: of a slot, arrives once for every copy. free: of a slot, arrives once for every worker.
        lag: steps between giving a buffer back and filling it again. With one, workers go in step.
    """

    copies: Callable[[Any, Any, Any], None]
    full: Any
    free: Any
    stages: int
    steps: Any
    worker: Any
    lag: int = 1

    def begin(self) -> None:
        # A loop, since a step that is known while tracing may not lie past an array's end, not even if it is not taken.
        pl.loop(0, self.stages - self.lag, unroll=True)(self._fetch)

    def take(self, step: Any) -> Any:
        """The slot of a step, filled; before that the copies of a later one are asked for."""
        ahead = step + self.stages - self.lag
        used_before = (self.worker == 0) & (ahead < self.steps) & (step >= self.lag)
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

"""A device's part of the vocabulary, a block of rows at a time, where devices along some axes each store a share of it.

Shape legend: V vocabulary that one device multiplies with, S rows of it that it stores, n = V / S devices that store
its rows, D model, c rows of a block, of which it stores c / n.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.cross_entropy.spec import Split


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a weight is taken in blocks.

    Attributes:
        block: rows of a block on one device, at most; the last one may be shorter.
        by_rows, by_columns: axes over which rows and columns are stored. ways: devices along `by_rows`.
    """

    block: int
    by_rows: tuple[str, ...] = ()
    by_columns: tuple[str, ...] = ()
    ways: int = 1

    @classmethod
    def of(cls, split: Split | None, block: int) -> "Blocks":
        """`block` rows at a time, of a weight that lies as `split` says."""
        if split is None:
            return cls(block)
        by_rows, by_columns = split.storing
        return cls(block, by_rows, by_columns, split.ways(by_rows))

    def over(self, weight: Float[Array, "S _"], visit: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
        """`carry = visit(carry, a block's rows [c, D], first of them that is stored here)` for all blocks.

        Where blocks are gathered, the next one is under way while one is visited: the loop holds two, and the first is
        gathered once more at its end.
        """
        count = math.ceil(self.block / self.ways)
        whole, rest = divmod(weight.shape[0], count)
        if self.by_rows or self.by_columns:

            def step(i, state):
                carry, rows = state
                following = self._rows(weight, jnp.where(i + 1 < whole, i + 1, 0) * count, count)
                return visit(carry, rows, i * count), following

            if whole:
                carry, _ = jax.lax.fori_loop(0, whole, step, (carry, self._rows(weight, 0, count)))
        else:
            carry = jax.lax.fori_loop(
                0, whole, lambda i, carry: visit(carry, self._rows(weight, i * count, count), i * count), carry
            )
        return visit(carry, self._rows(weight, whole * count, rest), whole * count) if rest else carry

    def _rows(self, weight, first, count: int):
        rows = jax.lax.dynamic_slice_in_dim(weight, first, count)
        for dimension, axes in enumerate((self.by_rows, self.by_columns)):
            if axes:
                rows = jax.lax.all_gather(rows, axes, axis=dimension, tiled=True)
        return rows

    def scattered(self, rows: Float[Array, "c D"]) -> Float[Array, "_ _"]:
        """The sum over devices of a block's rows, of which each keeps what it stores."""
        for dimension, axes in enumerate((self.by_rows, self.by_columns)):
            if axes:
                rows = jax.lax.psum_scatter(rows, axes, scatter_dimension=dimension, tiled=True)
        return rows

    def ids(self, stored: int, first: Int[Array, ""] | int, rows: int) -> Int[Array, " c"]:
        """Which of its device's vocabulary the `rows` rows of a block are; `stored` is S."""
        shape = self.ways, rows // self.ways
        each = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * stored + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return each.reshape(-1) + first

    def part(self, vector: Float[Array, " V"], first: Int[Array, ""] | int, rows: int) -> Float[Array, " c"]:
        """A block's entries of a vector that every device has all of."""
        by_device = vector.reshape(self.ways, -1)
        return jax.lax.dynamic_slice_in_dim(by_device, first, rows // self.ways, axis=1).reshape(-1)

    def with_part(
        self, vector: Float[Array, " V"], part: Float[Array, " c"], first: Int[Array, ""] | int
    ) -> Float[Array, " V"]:
        """The vector with a block's entries in their place."""
        by_device, part = vector.reshape(self.ways, -1), part.reshape(self.ways, -1)
        return jax.lax.dynamic_update_slice_in_dim(by_device, part, first, axis=1).reshape(-1)

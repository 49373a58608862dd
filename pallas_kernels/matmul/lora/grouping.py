"""Rows sorted by adapter, and which adapters they ask for.

Shape legend: M rows, L adapters, G = min(L, M) adapters that rows can ask for.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class RowsByAdapter:
    """How rows are put in the order of their adapters. Rows with no adapter come last, past all groups.

    Attributes:
        order: `[M]`, rows as they are sorted.
        ordered: `[M]`, the adapter of each sorted row; L is none.
        asked: `[G]`, the adapter of each group; a group with L in it is empty.
        sizes: `[G]`, rows of each group.
    """

    order: Int[Array, "M"]
    ordered: Int[Array, "M"]
    asked: Int[Array, "G"]
    sizes: Int[Array, "G"]

    @classmethod
    def of(cls, adapters: Int[Array, "M"], count: int) -> "RowsByAdapter":
        """Groups of rows with one of `count` adapters each; all other numbers are none."""
        rows = adapters.shape[0]
        keys = jnp.where((adapters >= 0) & (adapters < count), adapters, count).astype(jnp.int32)
        order = jnp.argsort(keys, stable=True)
        ordered = keys[order]
        asked = jnp.arange(count) if count <= rows else jnp.unique(keys, size=rows, fill_value=count)
        ends = jnp.searchsorted(ordered, asked, side="right")
        sizes = jnp.where(asked < count, ends - jnp.searchsorted(ordered, asked, side="left"), 0).astype(jnp.int32)
        return cls(order, ordered, asked.astype(jnp.int32), sizes)

"""Low-rank adapters in pages: what is stored where, and what a product with them is told.

A page holds one rank of one adapter: a row of its A and a column of its B. An adapter of rank r owns any r pages, so
adapters of all ranks share one pool without gaps, and one is loaded or dropped without moving another.

Shape legend: M rows, K contracted, N columns, P pages, L adapters, R the largest rank.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import may_be_spread


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPages:
    """The adapters of one weight. Gradients go to `a` and `b`, as to any arrays.

    Attributes:
        a: `[P, K]`, rows of the matrices that narrow.
        b: `[P, N]`, columns of the matrices that widen.
        table: int32 `[L, R]`, the pages of each adapter; those past its rank may be any number.
        ranks: int32 `[L]`; 0 is an adapter that adds nothing.
        scales: float32 `[L]`, alpha / r (Hu et al. 2022, section 4.1).
    Source: Sheng et al. 2024, S-LoRA, section 5.1 (unified paging).
    """

    a: Any  # arrays, or what a pytree may hold in their place
    b: Any
    table: Any
    ranks: Any
    scales: Any

    @classmethod
    def empty(
        cls, pages: int, contracted: int, columns: int, *, adapters: int, most_rank: int, dtype: Any = jnp.float32
    ) -> "LoraPages":
        """Room for `adapters` adapters of up to `most_rank` each and of `pages` in all; none is there yet."""
        a, b = jnp.zeros((pages, contracted), dtype), jnp.zeros((pages, columns), dtype)
        table = jnp.zeros((adapters, most_rank), jnp.int32)
        return cls(a, b, table, jnp.zeros(adapters, jnp.int32), jnp.zeros(adapters))

    def load(
        self,
        adapter: int,
        pages: Int[Array, "r"],
        a: Float[Array, "r K"],
        b: Float[Array, "N r"],
        *,
        alpha: float | int,
    ) -> "LoraPages":
        """With an adapter written to `pages`, which no other adapter may own: x gains (alpha / r) x a^T b^T.

        Raises:
            MeshloomError: the rank, or a dimension of a or b, is not what there is room for.
        """
        rank = pages.shape[0]
        if not 1 <= rank <= self.table.shape[1]:
            raise MeshloomError(f"adapter {adapter}: rank {rank}; there is room for 1 to {self.table.shape[1]}")
        if not 0 <= adapter < self.table.shape[0]:
            raise MeshloomError(f"adapter {adapter}: there is room for adapters 0 to {self.table.shape[0] - 1}")
        if a.shape != (rank, self.a.shape[1]) or b.shape != (self.b.shape[1], rank):
            expected = f"{(rank, self.a.shape[1])} and {(self.b.shape[1], rank)}"
            raise MeshloomError(
                f"adapter {adapter} of rank {rank}: a and b are {a.shape} and {b.shape}, not {expected}"
            )
        return LoraPages(
            self.a.at[pages].set(a.astype(self.a.dtype)),
            self.b.at[pages].set(b.T.astype(self.b.dtype)),
            self.table.at[adapter, :rank].set(pages),
            self.ranks.at[adapter].set(rank),
            self.scales.at[adapter].set(alpha / rank),
        )

    def of(self, adapters: Int[Array, "n"]) -> tuple[Float[Array, "n R K"], Float[Array, "n R N"]]:
        """Copies of the matrices of these adapters, padded with zeros to the largest rank."""
        valid = (jnp.arange(self.table.shape[1]) < self.ranks[adapters][:, None])[..., None]
        ids = self.table[adapters]
        a, b = (jnp.where(valid, each.at[ids].get(mode="clip"), 0) for each in (self.a, self.b))
        return a, b


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What the choice of an implementation may look at.

    Attributes:
        dtype: of x. pages_dtype: that a and b share, or both of theirs.
        spread: XLA may spread the arrays over devices.
    """

    rows: int
    contracted: int
    columns: int
    adapters: int
    most_rank: int
    pages: int
    dtype: str
    pages_dtype: str
    spread: bool

    @classmethod
    def of(cls, x: Any, lora: LoraPages, adapters: Any) -> "LoraSpec":
        """The spec of a call, from its arrays.

        Raises:
            MeshloomError: sizes differ.
        """
        if x.shape[1] != lora.a.shape[1]:
            raise MeshloomError(f"lora_matmul: rows of x have {x.shape[1]} numbers, pages of a {lora.a.shape[1]}")
        if lora.a.shape[0] != lora.b.shape[0]:
            raise MeshloomError(f"lora_matmul: {lora.a.shape[0]} pages of a, {lora.b.shape[0]} of b")
        if adapters.shape[0] != x.shape[0]:
            raise MeshloomError(f"lora_matmul: {adapters.shape[0]} adapters for {x.shape[0]} rows; give one for each")
        pages_dtype = " and ".join(sorted({str(lora.a.dtype), str(lora.b.dtype)}))
        adapters_there, most_rank = lora.table.shape
        sizes = (x.shape[0], x.shape[1], lora.b.shape[1], adapters_there, most_rank, lora.a.shape[0])
        return cls(*sizes, str(x.dtype), pages_dtype, may_be_spread())

"""Ragged steps over a cache that was filled before: the one list of paged cases, for tests, benches and tuning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from meshloom.pallas_kernels.attention.pages import KVPages, Ragged


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """One ragged step.

    Attributes:
        lengths: of each sequence after the step. counts: rows of each in this step.
        padding: rows after the last, and padding sequences.
        unwritten: what is in the slots that no token was written to.
        shards: devices that kv heads are split over. lanes: of the cache, see KVPages.zeros.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 4
    element: str = "float32"
    dtype: str = "float32"
    padding: int = 2
    unwritten: float = 7.0
    seed: int = 0
    shards: int = 1
    lanes: int = 1

    def step(self) -> tuple[jax.Array, jax.Array, jax.Array, KVPages, Ragged]:
        """q, k, v of the step's rows, the cache with all earlier tokens, and the step."""
        rng = np.random.default_rng(self.seed)
        slots = len(self.lengths) + self.padding
        width = -(-max(*self.lengths, 1) // self.page_size) + 1
        table = rng.permutation(slots * width + 3)[: slots * width].reshape(slots, width).astype(np.int32)
        before = tuple(n - c for n, c in zip(self.lengths, self.counts, strict=True))
        sizes = (self.page_size, self.kv_heads, self.head_dim)
        pages = KVPages.zeros(slots * width + 3, *sizes, self.element, self.shards, self.lanes)
        if self.element in ("float32", "bfloat16"):
            pages = jax.tree.map(lambda x: x + self.unwritten, pages)
        if sum(before):
            old = [self._normal(rng, sum(before), self.kv_heads) for _ in range(2)]
            pages = jax.jit(KVPages.write)(pages, *old, self._ragged(before, before, table))
        rows = sum(self.counts) + self.padding
        q, k, v = (self._normal(rng, rows, n) for n in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v, pages, self._ragged(self.lengths, self.counts, table)

    def _normal(self, rng, rows: int, heads: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(rows, heads, self.head_dim)), self.dtype)

    def _ragged(self, lengths, counts, table) -> Ragged:
        slots, used = len(table), [i for i, n in enumerate(counts) if n]
        kv_lens, cu, mine = np.zeros(slots, np.int32), np.zeros(slots + 1, np.int32), np.zeros_like(table)
        for slot, i in enumerate(used):
            kv_lens[slot], cu[slot + 1 :], mine[slot] = lengths[i], cu[slot] + counts[i], table[i]
        return Ragged(*map(jnp.asarray, (kv_lens, mine, cu, np.int32(len(used)))))

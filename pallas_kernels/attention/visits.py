"""Which pairs of a query block and a key block have anything to do: from lengths when tracing, from the data later.

Every blockwise implementation visits these pairs and no other.

Shape legend: B batch, T queries, S keys, I query blocks, J key blocks, P pairs, V visits.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from meshloom.pallas_kernels.attention.spec import Mask

# What a visit has to do, as bits: it is the first or the last of its run, the mask rules out some of it, it is one.
FIRST, LAST, MASKED_IN_PART, ACTIVE = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How queries and keys are cut; the last block of each may be partly padding.

    Attributes:
        q_total, kv_total: lengths in tokens. block_q, block_kv: of a block.
    """

    q_total: int
    kv_total: int
    block_q: int
    block_kv: int

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.q_total // self.block_q), -(-self.kv_total // self.block_kv)

    def pairs(self, mask: Mask) -> Int[np.ndarray, "P 2"]:
        """The (query block, key block) pairs in which lengths, causality and the window leave anything.

        At least one; where the offset is data, all.
        """
        q_blocks, kv_blocks = self.counts
        pairs = np.asarray([(i, j) for i in range(q_blocks) for j in range(kv_blocks)], np.int32)
        if mask.offset is None:
            i, j = pairs.T
            pairs = pairs[self._in_reach(i, j, mask, self.kv_total - self.q_total)]
        return pairs if len(pairs) else np.zeros((1, 2), np.int32)

    def _in_reach(self, i: Any, j: Any, mask: Mask, offset: Any) -> Any:
        """Whether causality and the window leave anything of pairs, the first query being at `offset`."""
        first, last = i * self.block_q + offset, (i + 1) * self.block_q - 1 + offset
        reached = j * self.block_kv <= last if mask.causal else j >= 0
        return reached if mask.window is None else reached & ((j + 1) * self.block_kv - 1 > first - mask.window)

    def _whole(self, i: Any, j: Any, mask: Mask, offset: Any) -> Any:
        """Whether lengths, causality and the window leave all of pairs."""
        first, last = i * self.block_q + offset, (i + 1) * self.block_q - 1 + offset
        whole = (j + 1) * self.block_kv <= self.kv_total
        if mask.causal:
            whole = whole & ((j + 1) * self.block_kv - 1 <= first)
        return whole if mask.window is None else whole & (j * self.block_kv > last - mask.window)

    def seen(self, mask: Mask, pairs: Int[np.ndarray, "P 2"]) -> Bool[Array, "#B P"] | Bool[np.ndarray, "1 P"]:
        """Pairs of which the data leaves anything, for each row of the batch."""
        i, j = pairs.T
        seen = _numpy_for(mask).ones((1, len(pairs)), bool)
        if mask.offset is not None:
            seen &= self._in_reach(i, j, mask, mask.offset)
        if mask.kv_lens is not None:
            seen &= j * self.block_kv < mask.kv_lens[:, None]
        if mask.q_segments is not None:
            q_least, q_most = _range(mask.q_segments, self.block_q)
            kv_least, kv_most = _range(mask.kv_segments, self.block_kv)
            seen &= (q_least[:, i] <= kv_most[:, j]) & (kv_least[:, j] <= q_most[:, i])
        return seen

    def whole(self, mask: Mask, pairs: Int[np.ndarray, "P 2"]) -> Bool[Array, "#B P"] | Bool[np.ndarray, "1 P"]:
        """Pairs that the mask leaves whole: no position in them need be tested."""
        i, j = pairs.T
        whole = _numpy_for(mask).asarray(self._whole(i, j, mask, mask.first_position(self.q_total, self.kv_total)))[
            None
        ]
        if mask.kv_lens is not None:
            whole &= (j + 1) * self.block_kv <= mask.kv_lens[:, None]
        if mask.q_segments is not None:
            q_least, q_most = _range(mask.q_segments, self.block_q)
            kv_least, kv_most = _range(mask.kv_segments, self.block_kv)
            whole &= (q_least == q_most)[:, i] & (kv_least == kv_most)[:, j] & (q_least[:, i] == kv_least[:, j])
        return whole

    def visits(self, mask: Mask, by: int) -> Int[Array, "#B V 3"]:
        """The pairs to visit, in runs of one query block (`by` 0) or one key block (1): query block, key block, bits.

        Every block in question has a run, of a pair that is masked whole if there is no other, so that its result is
        written. Visits that the data makes superfluous come last, without the bit ACTIVE, at the place of the last
        active one.
        """
        pairs = self.pairs(mask)
        missing = np.setdiff1d(np.arange(self.counts[by]), pairs[:, by])
        needless = np.zeros((len(missing), 2), np.int32)
        needless[:, by] = missing
        pairs = np.concatenate([pairs, needless])
        pairs = pairs[np.lexsort((pairs[:, 1 - by], pairs[:, by]))]
        begins = np.concatenate([[True], pairs[1:, by] != pairs[:-1, by]])
        # A run keeps its first pair, whatever the data says.
        seen = self.seen(mask, pairs) | begins
        xp = _numpy_for(mask)
        steps = xp.arange(len(pairs))
        count = xp.sum(seen, axis=1, keepdims=True)
        order = xp.argsort(~seen, axis=1, stable=True)
        order = xp.take_along_axis(order, xp.minimum(steps, count - 1), axis=1)
        table = xp.asarray(pairs)[order]
        run = table[:, :, by]
        edge = xp.ones((len(run), 1), bool)
        changed = run[:, 1:] != run[:, :-1]
        first = xp.concatenate([edge, changed], axis=1)
        last = xp.concatenate([changed, edge], axis=1) | (steps == count - 1)
        whole = xp.take_along_axis(xp.broadcast_to(self.whole(mask, pairs), seen.shape), order, axis=1)
        bits = FIRST * first + LAST * last + MASKED_IN_PART * ~whole + ACTIVE
        bits = xp.where(steps < count, bits, 0)[..., None]
        return jnp.asarray(xp.concatenate([table, bits], axis=2), jnp.int32)

    def allowed_pairs(self, mask: Mask) -> Int[Array, "#B 3 P"]:
        """Query block, key block and bits of `pairs`, in the same order for all rows of the batch.

        Of the bits only ACTIVE, where the data leaves anything, and MASKED_IN_PART.
        """
        pairs = self.pairs(mask)
        bits = ACTIVE * self.seen(mask, pairs) + MASKED_IN_PART * ~self.whole(mask, pairs)
        places = jnp.broadcast_to(jnp.asarray(pairs.T), (bits.shape[0], 2, len(pairs)))
        return jnp.concatenate([places, jnp.asarray(bits, jnp.int32)[:, None]], axis=1)


def _numpy_for(mask: Mask) -> Any:
    """NumPy where the table is known when tracing, so that no program computes it; JAX's where the data decides."""
    return np if mask.is_static else jnp


def _range(segments: Int[Array, "B L"], block: int) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
    """Least and greatest id of each block."""
    blocks = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), mode="edge")
    blocks = blocks.reshape(segments.shape[0], -1, block)
    return blocks.min(2), blocks.max(2)

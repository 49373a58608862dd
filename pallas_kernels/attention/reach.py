"""Which key blocks a block of queries reads: one range, and within it one that the mask leaves whole.

For kernels in which a block of queries is one program that runs over its keys; those whose grid is a list of pairs take
it from visits.py. Segments may be scattered, then a range holds blocks that are masked whole.

Shape legend: B batch, I query blocks, J key blocks.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.attention.visits import Blocks


@dataclasses.dataclass(frozen=True)
class Reach:
    """Key blocks [start, stop), never none, of which [whole_start, whole_stop) need no mask.

    Attributes:
        first: position of the first query. length: keys that are not padding.
    Fields are numbers, traced or not, or arrays of one shape.
    """

    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any
    first: Any
    length: Any

    @classmethod
    def of(cls, mask: Mask, first: Any, block_q: int, length: Any, block_kv: int) -> "Reach":
        """From causality, the window and lengths. Segments are not looked at."""

        def below(tokens: Any) -> Any:
            return jnp.maximum(tokens, 0) // block_kv

        last = first + block_q - 1
        start: Any = 0
        whole_start: Any = 0
        whole_stop, stop = length, length
        if mask.causal:
            whole_stop, stop = jnp.minimum(length, first + 1), jnp.minimum(length, last + 1)
        if mask.window is not None:
            start, whole_start = first - mask.window + 1, last - mask.window + 1
        stop = jnp.maximum(below(stop + block_kv - 1), 1)
        start = jnp.minimum(below(start), stop - 1)
        return cls(start, below(whole_start + block_kv - 1), below(whole_stop), stop, first, length)

    @classmethod
    def of_keys(
        cls, mask: Mask, first_key: Any, block_kv: int, first: Any, q_total: int, length: Any, block_q: int
    ) -> "Reach":
        """The query blocks that read a block of keys; `first` is the position of the first query of all."""

        def below(tokens: Any) -> Any:
            return jnp.maximum(tokens, 0) // block_q

        last_key = first_key + block_kv - 1
        start: Any = 0
        whole_start: Any = 0
        whole_stop: Any = q_total + block_q
        stop: Any = q_total
        if mask.causal:
            start, whole_start = first_key - first, last_key - first
        if mask.window is not None:
            whole_stop = jnp.minimum(whole_stop, first_key + mask.window - first)
            stop = jnp.minimum(stop, last_key + mask.window - first)
        whole_stop = jnp.where(last_key < length, whole_stop, 0)
        stop = jnp.maximum(below(jnp.where(first_key < length, stop, 0) + block_q - 1), 1)
        start = jnp.minimum(below(start), stop - 1)
        return cls(start, below(whole_start + block_q - 1), below(whole_stop), stop, first, length)

    @classmethod
    def table(
        cls, mask: Mask, q_total: int, kv_total: int, block_q: int, block_kv: int, batch: int, by: int = 0
    ) -> Int[Array, "B I 6"]:
        """The fields of every block of queries (`by` 0) or keys (1), for masks in which the data has a say."""
        blocks = Blocks(q_total, kv_total, block_q, block_kv)
        count = blocks.counts[by]
        lens = jnp.full(batch, kv_total, jnp.int32)
        if mask.kv_lens is not None:
            lens = jnp.clip(mask.kv_lens.astype(jnp.int32), 0, kv_total)
        first, lens, each = mask.first_position(q_total, kv_total), lens[:, None], jnp.arange(count)[None]
        if by == 0:
            reach = cls.of(mask, each * block_q + first, block_q, lens, block_kv)
        else:
            reach = cls.of_keys(mask, each * block_kv, block_kv, first, q_total, lens, block_q)
        if mask.q_segments is not None:
            reach = reach._within_segments(mask, blocks, by)
        fields = [jnp.broadcast_to(getattr(reach, field.name), (batch, count)) for field in FIELDS]
        return jnp.stack(fields, axis=2).astype(jnp.int32)

    @classmethod
    def read(cls, table: Any, row: Any, block: Any) -> "Reach":
        """What the table says of one block, as a kernel reads it."""
        return cls(*(table[row, block, column] for column in range(len(FIELDS))))

    def _within_segments(self, mask: Mask, blocks: Blocks, by: int) -> "Reach":
        """Narrowed to blocks that may hold a segment of the block's own; whole ones are so in every respect."""
        pairs = np.indices(blocks.counts).reshape(2, -1).T.astype(np.int32)
        seen, whole = (
            jnp.moveaxis(of(mask, pairs).reshape(-1, *blocks.counts), 1 + by, 1) for of in (blocks.seen, blocks.whole)
        )
        start, stop = _ends(seen)
        whole_start, whole_stop = _ends(whole)
        in_one_run = jnp.sum(whole, axis=2) == whole_stop - whole_start
        stop = jnp.maximum(jnp.minimum(self.stop, stop), 1)
        return dataclasses.replace(
            self,
            start=jnp.minimum(jnp.maximum(self.start, start), stop - 1),
            stop=stop,
            whole_start=whole_start,
            whole_stop=jnp.where(in_one_run, whole_stop, whole_start),
        )


FIELDS = dataclasses.fields(Reach)


def _ends(chosen: Any) -> tuple[Any, Any]:
    """The first of the chosen along the last axis, and the one after the last; both zero where none is."""
    some = jnp.any(chosen, axis=2)
    first = jnp.argmax(chosen, axis=2)
    after = chosen.shape[2] - jnp.argmax(chosen[:, :, ::-1], axis=2)
    return jnp.where(some, first, 0), jnp.where(some, after, 0)

"""Attention over a sequence that is spread over devices: keys and values, or queries, travel round a ring.

A ring is a kernel like the one it is made of, for the inside of `jax.shard_map(..., check_vma=False)`: given one
device's tokens it returns their rows over the keys of all devices. Each step attends to one device's keys and merges
(out, lse); two chunks between which the mask leaves nothing are not computed. What the next step needs is sent before
this one computes, and nothing that this one computes is needed to send it, so XLA does both at once.

* "keys": keys and values go one way round.
* "halves": two halves of them go opposite ways, so that both directions of every link carry half of the bytes.
* "queries": queries go one way round, and partial results straight back to their device, the other way (TokenRing).
  Less travels where there are as many kv heads as heads. The backward pass is that of "keys".

The backward pass sends keys and values round again, and float32 sums of their gradients one step behind them. An
additive bias stays where its queries are, with a column for every key of the ring, and so does its gradient; queries
that travel would leave it behind, so that "queries" has none.

Shape legend: n devices, B batch, T and S this device's queries and keys, s all keys, C chunks of a device, N heads, K
    kv heads, H head dim.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.context.layouts import chunk_of, chunks_per_device
from meshloom.pallas_kernels.attention.kernel import MASKED, Kernel, Scoring, merge_partials
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.attention.visits import Blocks

FORMS = ("keys", "halves", "queries")


@dataclasses.dataclass(frozen=True)
class Ring:
    """The two passes of attention around a ring.

    Attributes:
        axis: of the mesh. layout: one of layouts.py. form: what travels.
        kernel: attends to one chunk of keys.
    """

    axis: str
    layout: str
    form: str
    kernel: Kernel

    @jax.named_scope("ring")
    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        bias: Float[Array, "#B #N T s"] | None,
        mask: Mask,
        scoring: Scoring,
        dtype: Any,
    ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
        """Equal to the kernel on one device up to rounding.

        Args:
            bias: of this device's queries; its columns are the keys of all devices, one device after the other.
            mask: of the whole sequence, but with the segments of this device's tokens.
        Source: Liu et al. 2023, Ring Attention with Blockwise Transformers, section 3; Wang et al. 2024, TokenRing.
        """
        if self.form == "queries":
            out, lse = self._send_queries(q, k, v, mask, scoring)
        else:
            out, lse = self._send_keys(q, k, v, bias, mask, scoring)
        return out.astype(dtype), lse

    @jax.named_scope("ring")
    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        bias: Float[Array, "#B #N T s"] | None,
        mask: Mask,
        scoring: Scoring,
        lse: Float[Array, "B N T"],
        delta: Float[Array, "B N T"],
        d_out: Float[Array, "B T N Hv"],
        dtype: Any,
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], Float[Array, "#B #N T s"] | None
    ]:
        """Gradients; sums over devices in float32. Of the n + 1 sums that travel for a key, the first are zeros."""
        streams, lengths, rank = self._streams(k.shape[1]), (q.shape[1], k.shape[1]), jax.lax.axis_index(self.axis)

        def visit(carry, moving, step):
            (dq, d_bias), behind = carry
            sums = _passed_on(self.axis, streams, behind)
            following = []
            for stream, (pairs, ids), d_pairs in zip(streams, moving, sums, strict=True):

                def attend(sums, at, own, pairs=pairs):
                    dq, d_bias, d_pairs = sums
                    rows = at.queries.of(q), *_unpaired(at.keys.of(pairs), q), at.of_bias(bias)
                    of_rows = at.queries.of(lse, 2), at.queries.of(delta, 2), at.queries.of(d_out)
                    more, *of_keys, of_bias = self.kernel.backward(*rows, own, scoring, *of_rows, jnp.float32)
                    dq = at.queries.put(dq, at.queries.of(dq) + more)
                    d_pairs = at.keys.put(d_pairs, at.keys.of(d_pairs) + _paired(*of_keys))
                    return dq, at.put_bias(d_bias, of_bias), d_pairs

                at_hand = dataclasses.replace(mask, kv_segments=ids)
                ranks, start = (rank, rank - stream.way * step), (dq, d_bias, jnp.zeros_like(d_pairs))
                dq, d_bias, new = self._over_pairs(ranks, lengths, stream.part, at_hand, attend, start)
                # What arrived is added last, so that no product waits for it.
                following.append(d_pairs + new)
            return (dq, d_bias), following

        moving = self._parted(streams, k, v, mask)
        # Each place of the bias is met once; where the mask leaves nothing its gradient stays zero.
        own = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, bias))
        start = own, [jnp.zeros(pairs.shape, jnp.float32) for pairs, _ in moving]
        (dq, d_bias), sums = _round(self.axis, streams, moving, start, visit)
        dk, dv = _unpaired(self._joined(_passed_on(self.axis, streams, sums)), q)
        return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), d_bias

    # -- forms --

    def _send_keys(self, q, k, v, bias, mask: Mask, scoring: Scoring):
        """(out, lse), float32."""
        streams, lengths, rank = self._streams(k.shape[1]), (q.shape[1], k.shape[1]), jax.lax.axis_index(self.axis)

        def visit(carry, moving, step):
            for stream, (pairs, ids) in zip(streams, moving, strict=True):
                at_hand = dataclasses.replace(mask, kv_segments=ids)
                attend, ranks = self._merging(q, pairs, bias, scoring), (rank, rank - stream.way * step)
                carry = self._over_pairs(ranks, lengths, stream.part, at_hand, attend, carry)
            return carry

        return _round(self.axis, streams, self._parted(streams, k, v, mask), _of_no_key(q, v), visit)

    def _send_queries(self, q, k, v, mask: Mask, scoring: Scoring):
        """(out, lse), float32. Unrolled: how far a partial result has to go back differs from step to step."""
        size, rank, lengths = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis), (q.shape[1], k.shape[1])
        whole = slice(0, k.shape[1] // chunks_per_device(self.layout))
        pairs, moving = _paired(k, v), (q, mask.q_segments)
        total = part = _of_no_key(q, v)
        for step in range(size):
            following = _passed(self.axis, moving, 1) if step < size - 1 else moving
            home = _passed(self.axis, part, 1 - step) if step > 1 else part
            at_hand = dataclasses.replace(mask, q_segments=moving[1])
            attend = self._merging(moving[0], pairs, None, scoring)
            part = self._over_pairs((rank - step, rank), lengths, whole, at_hand, attend, _of_no_key(q, v))
            # XLA would send all queries before the first step, and all partial results after the last one.
            moving, home, part = jax.lax.optimization_barrier((following, home, part))
            total = merge_partials(*total, *home)
        return merge_partials(*total, *_passed(self.axis, part, 1 - size))

    def _merging(self, q, pairs, bias, scoring: Scoring):
        """What adds the keys of one pair of chunks to (out, lse) of the queries at hand."""

        def attend(carry, at, own):
            out, lse = carry
            k, v = _unpaired(at.keys.of(pairs), q)
            part = self.kernel.forward(at.queries.of(q), k, v, at.of_bias(bias), own, scoring, jnp.float32)
            new, new_lse = merge_partials(at.queries.of(out), at.queries.of(lse, 2), *part)
            return at.queries.put(out, new), at.queries.put(lse, new_lse, 2)

        return attend

    # -- what there is to do between the tokens of two devices --

    def _over_pairs(
        self, ranks: tuple[Any, Any], lengths: tuple[int, int], part: slice, mask: Mask, attend: Any, carry: Any
    ):
        """`carry = attend(carry, place, mask)` for each pair of chunks between which the mask leaves anything.

        Args:
            ranks: modulo n, whose queries and whose keys are at hand. part: which keys of each chunk.
            lengths: T and S.
            mask: as of `forward`, with the segments of what is at hand.
        """
        size, count = jax.lax.axis_size(self.axis), chunks_per_device(self.layout)
        q_length, kv_length, kv_size = lengths[0] // count, lengths[1] // count, part.stop - part.start
        first = mask.first_position(lengths[0] * size, lengths[1] * size)
        blocks = Blocks(q_length, kv_size, q_length, kv_size)

        def pair(carry, slots):
            column = ranks[1] % size * lengths[1] + slots[1] * kv_length + part.start
            at = _Place(
                _Rows(slots[0] * q_length, q_length), _Rows(slots[1] * kv_size, kv_size), _Rows(column, kv_size)
            )
            q_chunk, kv_chunk = (chunk_of(rank % size, slot, size) for rank, slot in zip(ranks, slots, strict=True))
            begin = kv_chunk * kv_length + part.start
            own = dataclasses.replace(
                mask,
                q_segments=None if mask.q_segments is None else at.queries.of(mask.q_segments),
                kv_segments=None if mask.kv_segments is None else at.keys.of(mask.kv_segments),
                kv_lens=None if mask.kv_lens is None else jnp.clip(mask.kv_lens - begin, 0, kv_size),
                offset=first + q_chunk * q_length - begin if mask.causal or mask.window is not None else None,
            )
            wanted = jnp.any(blocks.seen(own, np.zeros((1, 2), np.int32)))
            return jax.lax.cond(wanted, lambda x: attend(x, at, own), lambda x: x, carry), None

        if count == 1:
            return pair(carry, (0, 0))[0]
        # A loop, so that the program holds one kernel and not four.
        every = np.indices((count, count), np.int32).reshape(2, -1).T
        return jax.lax.scan(pair, carry, jnp.asarray(every))[0]

    # -- what travels --

    def _streams(self, length: int) -> list["_Stream"]:
        """How the keys of a device travel."""
        chunk = length // chunks_per_device(self.layout)
        if self.form != "halves" or chunk == 1:
            return [_Stream(slice(0, chunk), 1)]
        return [_Stream(slice(0, chunk // 2), 1), _Stream(slice(chunk // 2, chunk), -1)]

    def _parted(self, streams, k, v, mask: Mask) -> list[tuple[Any, Any]]:
        """Keys with their values, and segments, of each stream."""

        def of(part: slice, x):
            if x is None:
                return None
            chunks = x.reshape(x.shape[0], chunks_per_device(self.layout), -1, *x.shape[2:])[:, :, part]
            return chunks.reshape(x.shape[0], -1, *x.shape[2:])

        return [(of(each.part, _paired(k, v)), of(each.part, mask.kv_segments)) for each in streams]

    def _joined(self, parts: Sequence[Any]) -> Any:
        """An array of all keys from the parts of its streams."""
        chunks = [x.reshape(x.shape[0], chunks_per_device(self.layout), -1, *x.shape[2:]) for x in parts]
        whole = jnp.concatenate(chunks, axis=2)
        return whole.reshape(whole.shape[0], -1, *whole.shape[3:])


@dataclasses.dataclass(frozen=True)
class _Stream:
    """Keys that travel together: a part of each chunk, and to which neighbour, 1 or -1."""

    part: slice
    way: int


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A chunk's place in an array, which may be data."""

    first: Any
    count: int

    def of(self, x: Any, axis: int = 1) -> Any:
        """What stands there."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.count, axis)

    def put(self, x: Any, new: Any, axis: int = 1) -> Any:
        """x with `new` there."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.first, axis)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a pair of chunks lies: among the queries and the keys at hand, and among the columns of a bias."""

    queries: _Rows
    keys: _Rows
    columns: _Rows

    def of_bias(self, bias: Any) -> Any:
        """The bias between the two chunks."""
        return None if bias is None else self.columns.of(self.queries.of(bias, 2), 3)

    def put_bias(self, bias: Any, new: Any) -> Any:
        """The bias with `new` between the two chunks."""
        if bias is None:
            return None
        return self.queries.put(bias, self.columns.put(self.queries.of(bias, 2), new, 3), 2)


def _paired(k: Any, v: Any) -> Any:
    """Keys and values as one array [B, S, K, H + Hv]. A TPU has 5 permutations under way at most, and finishes others
    before it computes: with halves and their sums there would be 8.
    """
    return jnp.concatenate([k, v], axis=-1)


def _unpaired(pairs: Any, q: Any) -> tuple[Any, Any]:
    """Keys for these queries, and their values."""
    return pairs[..., : q.shape[-1]], pairs[..., q.shape[-1] :]


def _of_no_key(q: Any, v: Any) -> tuple[Any, Any]:
    """(out, lse) before any key, float32."""
    batch, length, heads, _ = q.shape
    return jnp.zeros((batch, length, heads, v.shape[-1])), jnp.full((batch, heads, length), MASKED)


def _passed(axis: str, x: Any, shift: int) -> Any:
    """The arrays of the device `shift` places before this one."""
    size = jax.lax.axis_size(axis)
    pairs = [(i, (i + shift) % size) for i in range(size)]
    return jax.tree.map(lambda each: jax.lax.ppermute(each, axis, pairs), x)


def _passed_on(axis: str, streams: Sequence[_Stream], arrays: Any) -> list[Any]:
    """The arrays of each stream from the neighbour that they come from."""
    return [_passed(axis, each, stream.way) for each, stream in zip(arrays, streams, strict=True)]


def _round(axis: str, streams: Sequence[_Stream], moving: Any, carry: Any, visit: Callable[..., Any]) -> Any:
    """`carry = visit(carry, moving, step)` for all steps, while the streams of `moving` go round."""

    def step(state, number):
        moving, carry = state
        following = _passed_on(axis, streams, moving)
        return (following, visit(carry, moving, number)), None

    last = jax.lax.axis_size(axis) - 1
    (moving, carry), _ = jax.lax.scan(step, (moving, carry), jnp.arange(last))
    return visit(carry, moving, last)

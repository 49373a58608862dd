"""Attention over a sequence that is spread over devices: tokens are exchanged for heads.

Every device sends each other one its share of the heads and receives all tokens of its own, attends to them with any
kernel, and sends the rows back. All devices then have the same work under any mask, at the price of two exchanges that
nothing overlaps; there are at most as many devices as heads. For the inside of `jax.shard_map(..., check_vma=False)`.

Shape legend: n devices, B batch, T and S this device's queries and keys, N heads, K kv heads, H head dim; t and s all
    queries and keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import Kernel, Scoring
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.attention.spread import kv_copies, sum_of_copies


@dataclasses.dataclass(frozen=True)
class Ulysses:
    """The two passes of attention with heads in place of tokens.

    Where the kv heads do not divide over the devices, each is repeated until they do: a device gets those that its
    heads read, which is what has to travel.

    Attributes:
        axis: of the mesh.
        kernel: attends to all tokens with a device's heads.
    """

    axis: str
    kernel: Kernel

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        bias: Float[Array, "#B #N t s"] | None,
        mask: Mask,
        scoring: Scoring,
        dtype: Any,
    ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
        """Equal to the kernel on one device.

        Args:
            bias: of the whole sequence.
            mask: of the whole sequence, but with the segments of this device's tokens.
        Source: Jacobs et al. 2023, DeepSpeed Ulysses, section 3.
        """
        q, k, v = self._exchanged(q, k, v)
        out, lse = self.kernel.forward(q, k, v, self._own(bias, q), self._whole(mask), scoring, dtype)
        return self._swapped(out, 1, 2), self._swapped(lse, 2, 1)

    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        bias: Float[Array, "#B #N t s"] | None,
        mask: Mask,
        scoring: Scoring,
        lse: Float[Array, "B N T"],
        delta: Float[Array, "B N T"],
        d_out: Float[Array, "B T N Hv"],
        dtype: Any,
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], Float[Array, "#B #N t s"] | None
    ]:
        """Gradients. That of the bias is this device's share, to be summed over devices."""
        kv_heads = k.shape[2]
        q, k, v = self._exchanged(q, k, v)
        # Copies of a kv head are summed up in float32.
        own = jnp.float32 if kv_copies(kv_heads, jax.lax.axis_size(self.axis)) > 1 else dtype
        statistics = self._swapped(lse, 1, 2), self._swapped(delta, 1, 2)
        rows = q, k, v, self._own(bias, q), self._whole(mask)
        dq, dk, dv, d_bias = self.kernel.backward(*rows, scoring, *statistics, self._swapped(d_out, 2, 1), own)
        dk, dv = (sum_of_copies(self._swapped(x, 1, 2), kv_heads) for x in (dk, dv))
        if bias is not None and bias.shape[1] > 1:
            start = (0, jax.lax.axis_index(self.axis) * q.shape[2], 0, 0)
            d_bias = jax.lax.dynamic_update_slice(jnp.zeros(bias.shape, jnp.float32), d_bias, start)
        return self._swapped(dq, 1, 2).astype(dtype), dk.astype(dtype), dv.astype(dtype), d_bias

    def _exchanged(self, q, k, v):
        """This device's heads for all tokens."""
        copies = kv_copies(k.shape[2], jax.lax.axis_size(self.axis))
        return tuple(self._swapped(x, 2, 1) for x in (q, *(jnp.repeat(x, copies, axis=2) for x in (k, v))))

    def _swapped(self, x: Any, split: int, joined: int) -> Any:
        """With this device's share of one axis, and all of the other."""
        return jax.lax.all_to_all(x, self.axis, split, joined, tiled=True)

    def _own(self, bias: Any, q: Any) -> Any:
        """The bias of this device's heads."""
        if bias is None or bias.shape[1] == 1:
            return bias
        return jax.lax.dynamic_slice_in_dim(bias, jax.lax.axis_index(self.axis) * q.shape[2], q.shape[2], 1)

    def _whole(self, mask: Mask) -> Mask:
        """With the segments of all tokens."""
        if mask.q_segments is None:
            return mask
        ids = (jax.lax.all_gather(x, self.axis, axis=1, tiled=True) for x in (mask.q_segments, mask.kv_segments))
        return dataclasses.replace(mask, q_segments=next(ids), kv_segments=next(ids))

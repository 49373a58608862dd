"""Rows of all devices along an axis of the mesh, and sums of theirs brought home: how they travel.

XLA for TPUs begins a gather and waits for its end, as it does for a scatter; nothing else runs between. A permutation
it begins and ends apart, and runs what needs neither operand nor result in the meantime. So there rows go from device
to device around the axis, half of them one way and half the other, every device's as a whole: no more than a gather
sends over the same links. A sum begins at the device farthest from where it is wanted and collects on its way.

Both are called inside `jax.shard_map`; arrays are those of one device, split on their first dimension.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from meshloom.pallas_kernels.dispatch import Implementation, Target
from meshloom.pallas_kernels.matmul.collective.ring import passed

# Devices along an axis that rows may go around: every hop is an operation of the program, and compiled as such.
LONGEST = 16


@dataclasses.dataclass(frozen=True)
class RowsSpec:
    """Over how many devices rows lie."""

    devices: int


def ring_gathered(x: Shaped[Array, "R *N"], axis: str) -> Shaped[Array, "nR *N"]:
    """x of all devices, in their order."""
    size, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    every = jax.lax.empty((size * x.shape[0], *x.shape[1:]), x.dtype)

    def put(every: Any, piece: Any, device: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(every, piece, device % size * x.shape[0], 0)

    every = put(every, x, own)
    for direction, hops in _ways(size):
        piece = x
        for hop in range(1, hops + 1):
            piece = passed(piece, axis, direction)
            every = put(every, piece, own - direction * hop)
    return every


def ring_scattered(summands: Float[Array, "nR *N"], axis: str) -> Float[Array, "R *N"]:
    """The sum over all devices, of this device's rows; what travels is rounded to the dtype of the summands."""
    size, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    rows = summands.shape[0] // size

    def of(device: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(summands, device % size * rows, rows).astype(jnp.float32)

    total = of(own)
    for direction, hops in _ways(size):
        collected: Any = 0.0
        for hop in range(hops, 0, -1):
            leaving = (of(own + direction * hop) + collected).astype(summands.dtype)
            collected = passed(leaving, axis, direction).astype(jnp.float32)
        total += collected
    return total.astype(summands.dtype)


def _ways(size: int) -> Iterator[tuple[int, int]]:
    """(direction, hops): to the next device and on, and to the one before."""
    yield 1, size // 2
    yield -1, (size - 1) // 2


def _whole_gathered(x: Any, axis: str) -> Any:
    return jax.lax.all_gather(x, axis, axis=0, tiled=True)


def _whole_scattered(summands: Any, axis: str) -> Any:
    return jax.lax.psum_scatter(summands, axis, scatter_dimension=0, tiled=True)


def _ring_why_not(spec: RowsSpec, target: Target) -> str | None:
    if target.platform != "tpu":
        return f"it is for TPUs, not for {target.platform or 'a device that no mesh in scope names'}"
    return None if spec.devices <= LONGEST else f"it is written out for up to {LONGEST} devices, not {spec.devices}"


EXCHANGES = (
    Implementation("ring", (ring_gathered, ring_scattered), _ring_why_not),
    Implementation("whole", (_whole_gathered, _whole_scattered), lambda spec, target: None),
)

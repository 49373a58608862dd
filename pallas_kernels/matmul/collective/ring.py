"""Rings of devices that compute while they pass arrays on: each step multiplies one shard as the next one travels.

Arrays go around in two halves, one each way, so that both directions of every link carry half of the bytes. Each piece
is permuted by an operation of its own whose result the products of the same step do not need: XLA runs them at the same
time. Every function is called inside `jax.shard_map`.

Shape legend: n devices on the axis, r rows of one device, I contracted, O own outputs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def halves(rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, direction) of the part that travels to the next device and of that to the one before."""
    for first, count, direction in ((0, rows - rows // 2, 1), (rows - rows // 2, rows // 2, -1)):
        if count:
            yield first, count, direction


def passed(x: Any, axis: str, direction: int) -> Any:
    """x of the device before this one on the ring; of the one after it for direction -1."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + direction) % size) for i in range(size)])


def gathered(x: Any, axis: str, visit: Callable[[Any, Any, Any], Any], carry: Any) -> Any:
    """`carry = visit(carry, piece, its first row in all)` for every piece of every device's x `[..., r, I]`."""
    size, rows, own = jax.lax.axis_size(axis), x.shape[-2], jax.lax.axis_index(axis)
    pieces = [(x[..., first : first + count, :], first, direction) for first, count, direction in halves(rows)]
    for step in range(size):
        following = [(passed(piece, axis, to), first, to) for piece, first, to in pieces] if step < size - 1 else []
        for piece, first, direction in pieces:
            carry = visit(carry, piece, (own - direction * step) % size * rows + first)
        pieces = following
    return carry


def scattered(rows: int, axis: str, make: Callable[[Any, int], Any], dtype: Any) -> Any:
    """The sum over all devices of `make(first row, rows)`, float32 `[..., rows, O]`, for this device's rows `[r]`.

    What travels is rounded to `dtype`, as what a reduce-scatter of that dtype sums up is.
    """
    size, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    sums: list[Any] = []
    for first, count, direction in halves(rows):
        total = None
        # A sum begins at the device farthest from where it is wanted, and collects on its way.
        for distance in reversed(range(size)):
            mine = make((own - direction * distance) % size * rows + first, count)
            mine = mine if total is None else passed(total, axis, -direction).astype(jnp.float32) + mine
            total = mine.astype(dtype)
        sums.append(total)
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=-2)


def rows_of(x: Any, first: Any, count: int) -> Any:
    """Rows `[first, first + count)` of `[..., R, I]`."""
    return jax.lax.dynamic_slice_in_dim(x, first, count, x.ndim - 2)


def product(x: Any, w: Any) -> Any:
    """x W^T in float32 for w `[O, I]`."""
    return jnp.einsum("...ri,oi->...ro", x, w, preferred_element_type=jnp.float32)


def outer(y: Any, x: Any) -> Any:
    """Y^T X in float32 over all rows: the gradient of w `[O, I]` in y = x W^T."""
    return jnp.einsum("...ro,...ri->oi", y, x, preferred_element_type=jnp.float32)

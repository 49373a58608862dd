"""How the tokens of a sequence lie over the devices of a ring, and how much work that leaves each of them.

Contiguous: device r holds chunk r of n. Zigzag: it holds chunks r and 2n - 1 - r of 2n, an early and a late one, so
that a causal mask leaves every device the same work in every step. Over one device both are the order of the sequence.

Shape legend: n devices, L tokens in all, C chunks of one device.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.attention.visits import Blocks

LAYOUTS = {"contiguous": 1, "zigzag": 2}


def chunks_per_device(layout: str) -> int:
    """C. Raises MeshloomError when there is no such layout."""
    if layout not in LAYOUTS:
        raise MeshloomError(f"attention over context: no layout {layout!r}; it has {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def chunk_of(rank: int | Int[Array, ""], slot: int | Int[Array, ""], devices: int) -> int | Int[Array, ""]:
    """Which chunk of the sequence is number `slot` of a device: the first is from the front, the second from behind."""
    return rank + slot * (2 * devices - 1 - 2 * rank)


def zigzag_order(length: int, devices: int) -> Int[np.ndarray, "L"]:
    """Tokens in the order in which they lie over the ring.

    Raises MeshloomError when the tokens do not divide into two chunks a device.
    """
    if length % (2 * devices):
        raise MeshloomError(f"zigzag: {length} tokens do not divide into {2 * devices} chunks")
    chunks = np.arange(length).reshape(2 * devices, -1)
    order = [chunk_of(rank, slot, devices) for rank in range(devices) for slot in range(2)]
    return chunks[np.asarray(order)].reshape(-1)


def to_zigzag(x: Shaped[Array, "..."], devices: int, axis: int = 1) -> Shaped[Array, "..."]:
    """A whole array of tokens, positions or segments along `axis`, in the order of the ring; raises like the order."""
    return jnp.take(x, zigzag_order(x.shape[axis], devices), axis=axis)


def from_zigzag(x: Shaped[Array, "..."], devices: int, axis: int = 1) -> Shaped[Array, "..."]:
    """What `to_zigzag` was given; raises as it does."""
    return jnp.take(x, np.argsort(zigzag_order(x.shape[axis], devices)), axis=axis)


def visited_blocks(layout: str, devices: int, length: int, block: int, mask: Mask) -> Int[np.ndarray, "n n"]:
    """Pairs of a query block and a key block that device r (row) visits in step t (column) of the K/V ring.

    Args:
        length: tokens in all. block: tokens of a square block; divides a chunk.
        mask: of the whole sequence; segments and lengths are not looked at.
    Raises MeshloomError when the tokens do not divide into chunks of blocks.
    """
    count = chunks_per_device(layout)
    chunk = length // (devices * count)
    if chunk * devices * count != length or chunk % block:
        raise MeshloomError(f"{length} tokens do not divide into {devices * count} chunks of blocks of {block} tokens")
    blocks = Blocks(chunk, chunk, block, block)
    pairs = np.indices(blocks.counts).reshape(2, -1).T
    visited = np.zeros((devices, devices), np.int64)
    for rank, step in np.ndindex(devices, devices):
        for q_slot, kv_slot in np.ndindex(count, count):
            apart = chunk_of(rank, q_slot, devices) - chunk_of((rank - step) % devices, kv_slot, devices)
            shifted = Mask(mask.causal, mask.window, offset=np.int32(apart * chunk))
            visited[rank, step] += np.asarray(blocks.seen(shifted, pairs)).sum()
    return visited


def critical_path(visited: Int[np.ndarray, "n n"]) -> int:
    """Blocks that the ring waits for: in every step, for the device that has most to do."""
    return int(visited.max(axis=0).sum())

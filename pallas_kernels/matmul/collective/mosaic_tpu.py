"""all_gather(x) W^T on TPUs as one kernel: remote DMAs carry shards around the ring while the matrix unit multiplies.

A device holds two shards in fast memory: the one it multiplies and passes on, and the one that arrives. Each is two
halves that travel opposite ways. A neighbour may write into a place only after this device has multiplied and sent what
is there, which it says by a semaphore. Weights and results are streamed from and to main memory block by block, the
weights once per shard: with fewer than 240 rows in a shard on v5e, 560 on v6e, reading them takes longer than the
products.

The compiler's schedule of the products of 512 x 4096 by 1792 x 4096 in bfloat16 takes 8.9 bundles per product of
128 x 128 x 128 on v6e, whose arrays take 8 cycles for it, and 28.9 on v5e, whose arrays take 32 and make the core wait.

Shape legend: n devices, r rows of one, h = r / 2, I contracted, O outputs, c outputs of a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from meshloom.pallas_kernels.dispatch import Target, tpu_why_not
from meshloom.pallas_kernels.matmul.collective.spec import CollectiveSpec

# What shards and blocks may take of fast memory.
VMEM_LIMIT = 48 * 2**20
LANES = 128
# Kernels that run at the same time need numbers of their own; this one is like no other kernel's of Meshloom.
COLLECTIVE_ID = 11
TO_NEXT, TO_PREVIOUS = 0, 1


def why_not(spec: CollectiveSpec, target: Target) -> str | None:
    """The reason this kernel cannot run, or None."""
    rows = spec.x[-2]
    if reason := common_why_not(spec, rows, target):
        return reason
    if block_of(rows, spec.x[-1], spec.w[0], spec.dtype) is None:
        least = vmem_bytes(rows, spec.x[-1], LANES, spec.dtype) / 2**20
        return f"its shards and blocks take {least:.0f} MiB of fast memory or more, of {VMEM_LIMIT / 2**20:.0f}"
    return None


def common_why_not(spec: CollectiveSpec, rows: int, target: Target) -> str | None:
    """The reason no kernel of this kind can run whose shards have so many rows, or None."""
    if reason := tpu_why_not(target):
        return reason
    if spec.devices == 1:
        return "one device has no ring"
    if spec.checked:
        return "kernels that address other devices need shard_map(..., check_vma=False)"
    if spec.dtype not in ("bfloat16", "float32"):
        return f"it multiplies bfloat16 and float32, not {spec.dtype}"
    batch, contracted = math.prod(spec.x[:-2]), spec.x[-1]
    outputs, tile = spec.w[0], 2 * 32 // jnp.dtype(spec.dtype).itemsize
    if batch != 1:
        return f"it takes the rows of one batch, not of {batch}"
    if rows % tile or contracted % LANES or outputs % LANES:
        return f"it takes rows in {tile}s, and features in {LANES}s; here are {rows} rows, {contracted} to {outputs}"
    return None


def neighbours(axis: str) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """The devices to which this one sends, and from which it receives, each way."""
    size, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    next_, previous = jax.lax.rem(own + 1, size), jax.lax.rem(own + size - 1, size)
    receivers = {TO_NEXT: {axis: next_}, TO_PREVIOUS: {axis: previous}}
    return receivers, {TO_NEXT: receivers[TO_PREVIOUS], TO_PREVIOUS: receivers[TO_NEXT]}


def vmem_bytes(rows: int, contracted: int, block: int, dtype: str) -> int:
    """Two shards, two blocks of the weight, two of both halves' results, and the sums of one block."""
    item = jnp.dtype(dtype).itemsize
    return item * (2 * rows * contracted + 2 * block * contracted + 2 * rows * block) + 4 * rows * block


def block_of(rows: int, contracted: int, outputs: int, dtype: str) -> int | None:
    """The largest number of outputs in a block, of at most 512, that divides them and fits; None if none does."""
    fitting = (
        block
        for block in (512, 256, LANES)
        if outputs % block == 0 and vmem_bytes(rows, contracted, block, dtype) <= VMEM_LIMIT
    )
    return next(fitting, None)


def all_gather_matmul(x, w, axis: str):
    """all_gather(x) W^T for x `[..., r, I]` and w `[O, I]` of one device, inside `shard_map`; in x's dtype."""
    rows, contracted = x.shape[-2:]
    devices = jax.lax.axis_size(axis)
    block = block_of(rows, contracted, w.shape[0], str(x.dtype))
    assert block is not None  # or why_not has a reason
    half = (2, rows // 2, contracted)
    out = pl.pallas_call(
        functools.partial(_kernel, axis, block),
        out_shape=jax.ShapeDtypeStruct((devices, 2, rows // 2, w.shape[0]), x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)] * 2,
        out_specs=pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM),
        scratch_shapes=[
            pltpu.VMEM((2, *half), x.dtype),  # [place, half]: where a shard is multiplied, and where the next arrives
            pltpu.SemaphoreType.DMA,  # of the copy of x
            pltpu.SemaphoreType.DMA((2,)),  # sent, each way
            pltpu.SemaphoreType.DMA((2,)),  # received, each way
            pltpu.SemaphoreType.REGULAR((2,)),  # places that the neighbour has free, each way
        ],
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE_ID, vmem_limit_bytes=VMEM_LIMIT + 2**22),
        name="all_gather_matmul",
    )(x.reshape(half), w)
    return out.reshape(*x.shape[:-2], devices * rows, w.shape[0])


def _kernel(axis: str, block: int, x, w, out, shards, copied, sent, received, free):
    """x [2, h, I], w [O, I] and out [n, 2, h, O] in main memory; `shards` [2, 2, h, I]."""
    size, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    receivers, senders = neighbours(axis)
    first = pltpu.make_async_copy(x, shards.at[0], copied)
    first.start()
    # No neighbour may write before this device has begun the kernel, when its fast memory is still another's.
    begun = pltpu.get_barrier_semaphore()
    for neighbour in receivers.values():
        pl.semaphore_signal(begun, 1, device_id=neighbour)
    pl.semaphore_wait(begun, 2)
    first.wait()

    @pl.loop(0, size)
    def _step(step):
        here, there = jax.lax.rem(step, 2), jax.lax.rem(step + 1, 2)

        def copy(way):
            return pltpu.make_async_remote_copy(
                shards.at[here, way], shards.at[there, way], sent.at[way], received.at[way], device_id=receivers[way]
            )

        @pl.when(step < size - 1)
        def _pass_on():
            for way in receivers:
                # The first send finds the other place free.
                @pl.when(step > 0)
                def _wait(way=way):
                    pl.semaphore_wait(free.at[way], 1)

                copy(way).start()

        whose = jax.lax.rem(own + size - step, size), jax.lax.rem(own + step, size)
        _multiply(block, shards.at[here], w, [out.at[device, way] for way, device in enumerate(whose)])

        @pl.when(step < size - 1)
        def _receive():
            for way in receivers:
                copy(way).wait()

                @pl.when(step < size - 2)  # nobody sends after that
                def _say_free(way=way):
                    pl.semaphore_signal(free.at[way], 1, device_id=senders[way])


def _multiply(block: int, shard, w, outs) -> None:
    """outs[half] = shard[half] W^T, over blocks of outputs."""
    rows, contracted = shard.shape[1:]

    def multiply(w_block, *out_blocks):
        for way, out in enumerate(out_blocks):
            product = jax.lax.dot_general(
                shard[way], w_block[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            out[...] = product.astype(out.dtype)

    pltpu.emit_pipeline(
        multiply,
        grid=(w.shape[0] // block,),
        in_specs=[pl.BlockSpec((block, contracted), lambda j: (j, 0))],
        out_specs=[pl.BlockSpec((rows, block), lambda j: (0, j))] * 2,
    )(w, *outs)

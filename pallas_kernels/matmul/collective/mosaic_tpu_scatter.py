"""The sums of x W^T over devices on TPUs as one kernel: sums travel block by block while the matrix unit adds to them.

Each device makes its part of a shard of results, adds it to the sum that came, and sends that on; a sum begins at the
device after the one that wants it and ends there. The two halves of a shard's rows travel opposite ways. A block of
outputs is sent as soon as it is summed, and is wanted by the next device when that has gone through all other blocks:
its way takes as long as a step does. A neighbour may write into a block only after this device has sent what was there,
which it says by a semaphore. Weights and rows are streamed from main memory, the weights once per step.

Shape legend: n devices, r rows of one's results, h = r / 2, I contracted, O outputs, c outputs of a block, J blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.collective.mosaic_tpu import (
    LANES,
    TO_NEXT,
    VMEM_LIMIT,
    common_why_not,
    neighbours,
)
from meshloom.pallas_kernels.matmul.collective.spec import CollectiveSpec

# As in mosaic_tpu.py: like no other kernel's.
COLLECTIVE_ID = 12


def why_not(spec: CollectiveSpec, target: Target) -> str | None:
    """The reason this kernel cannot run, or None."""
    if reason := common_why_not(spec, spec.x[-2] // spec.devices, target):
        return reason
    sizes = spec.x[-2] // spec.devices, spec.x[-1], spec.w[0]
    if block_of(*sizes, spec.dtype) is None:
        least = vmem_bytes(*sizes, LANES, spec.dtype) / 2**20
        return f"its sums and blocks take {least:.0f} MiB of fast memory or more, of {VMEM_LIMIT / 2**20:.0f}"
    return None


def vmem_bytes(rows: int, contracted: int, outputs: int, block: int, dtype: str) -> int:
    """Two shards of sums, two of rows, two blocks of the weight, and the float32 sums of one block."""
    item = jnp.dtype(dtype).itemsize
    return 2 * item * (rows * outputs + rows * contracted + block * contracted) + 4 * rows * block


def block_of(rows: int, contracted: int, outputs: int, dtype: str) -> int | None:
    """The largest number of outputs in a block, of at most 512, that divides them and fits; None if none does."""
    fitting = (
        block
        for block in (512, 256, LANES)
        if outputs % block == 0 and vmem_bytes(rows, contracted, outputs, block, dtype) <= VMEM_LIMIT
    )
    return next(fitting, None)


def matmul_reduce_scatter(x: Any, w: Any, axis: str) -> Any:
    """This device's rows of the sum of x W^T, for x `[..., R, I]` and w `[O, I]`, inside `shard_map`; in x's dtype."""
    devices, (outputs, contracted) = jax.lax.axis_size(axis), w.shape
    rows = x.shape[-2] // devices
    block = block_of(rows, contracted, outputs, str(x.dtype))
    assert block is not None  # or why_not has a reason
    blocks = outputs // block
    out = pl.pallas_call(
        functools.partial(_kernel, axis),
        out_shape=jax.ShapeDtypeStruct((2, rows // 2, outputs), x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)] * 2,
        out_specs=pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM),
        scratch_shapes=[
            # [place, half, block]: where a sum is added to and sent from, and where the next arrives.
            pltpu.VMEM((2, 2, blocks, rows // 2, block), x.dtype),
            pltpu.VMEM((2, 2, rows // 2, contracted), x.dtype),  # [place, half]: rows of this step and of the next
            pltpu.VMEM((2, block, contracted), w.dtype),
            pltpu.SemaphoreType.DMA((2, 2)),  # of the copies of rows
            pltpu.SemaphoreType.DMA((2,)),  # of the copies of weights
            pltpu.SemaphoreType.DMA((2, blocks)),  # sent, each way
            pltpu.SemaphoreType.DMA((2, blocks)),  # received, each way
            pltpu.SemaphoreType.REGULAR((2, blocks)),  # blocks that the receiver has free, each way
            pltpu.SemaphoreType.DMA,  # of the copies of results
        ],
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE_ID, vmem_limit_bytes=VMEM_LIMIT + 2**22),
        name="matmul_reduce_scatter",
    )(x.reshape(devices, 2, rows // 2, contracted), w)
    return out.reshape(*x.shape[:-2], rows, outputs)


def _kernel(axis, x, w, out, sums, rows, weights, rows_in, weights_in, sent, received, free, written):
    """x [n, 2, h, I], w [O, I] and out [2, h, O] in main memory; `sums` [2, 2, J, h, c]."""
    size, own = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    receivers, senders = neighbours(axis)
    blocks, block = sums.shape[2], sums.shape[4]
    last = size - 1

    def row_copy(step, way):
        """What a step adds to is on its way to the device as many steps ahead as steps are left."""
        ahead = last - step
        whose = jax.lax.rem(own + (ahead if way == TO_NEXT else size - ahead), size)
        place = jax.lax.rem(step, 2)
        return pltpu.make_async_copy(x.at[whose, way], rows.at[place, way], rows_in.at[place, way])

    def weight_copy(visit):
        place, first = jax.lax.rem(visit, 2), pl.multiple_of(jax.lax.rem(visit, blocks) * block, LANES)
        return pltpu.make_async_copy(w.at[pl.ds(first, block)], weights.at[place], weights_in.at[place])

    def result_copy(way, j):
        at = pl.ds(pl.multiple_of(j * block, LANES), block)
        return pltpu.make_async_copy(sums.at[last % 2, way, j], out.at[way, :, at], written)

    weight_copy(0).start()
    for way in receivers:
        row_copy(0, way).start()
    # No neighbour may write before this device has begun the kernel, when its fast memory is still another's.
    begun = pltpu.get_barrier_semaphore()
    for neighbour in receivers.values():
        pl.semaphore_signal(begun, 1, device_id=neighbour)
    pl.semaphore_wait(begun, 2)

    @pl.loop(0, size)
    def _step(step):
        here, there = jax.lax.rem(step, 2), jax.lax.rem(step + 1, 2)
        for way in receivers:
            row_copy(step, way).wait()

            @pl.when(step < last)
            def _rows_of_the_next(way=way):
                row_copy(step + 1, way).start()

        def add(j, way, place):
            def hop(source, target):
                return pltpu.make_async_remote_copy(
                    sums.at[source, way, j],
                    sums.at[target, way, j],
                    sent.at[way, j],
                    received.at[way, j],
                    device_id=receivers[way],
                )

            product = jax.lax.dot_general(
                rows[here, way], weights[place], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )

            @pl.when(step == 0)
            def _begin():
                sums[here, way, j] = product.astype(sums.dtype)

            @pl.when(step > 0)
            def _add_to_what_came():
                hop(there, here).wait()  # sent from `there`, and what was sent to `here` has come
                sums[here, way, j] = (sums[here, way, j].astype(jnp.float32) + product).astype(sums.dtype)

                @pl.when(step < last)  # nobody sends after that
                def _say_free():
                    pl.semaphore_signal(free.at[way, j], 1, device_id=senders[way])

            @pl.when(step < last)
            def _send():
                # The first send finds the other place free.
                pl.when(step > 0)(lambda: pl.semaphore_wait(free.at[way, j], 1))
                hop(here, there).start()

            pl.when(step == last)(lambda: result_copy(way, j).start())

        @pl.loop(0, blocks)
        def _block(j):
            visit = step * blocks + j
            weight_copy(visit).wait()
            pl.when(visit + 1 < size * blocks)(lambda: weight_copy(visit + 1).start())
            for way in receivers:
                add(j, way, jax.lax.rem(visit, 2))

    @pl.loop(0, blocks)
    def _finish(j):
        for way in receivers:
            result_copy(way, j).wait()

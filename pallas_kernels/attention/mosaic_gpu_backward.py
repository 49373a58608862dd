"""Attention on Hopper GPUs: the backward kernels, one for the gradients of keys and values and one for that of queries.

Both have two warpgroups and no third that only copies, so that a thread has 255 registers: gradients of 64 keys of
128 take 128 of them. The first of the two asks for the next copies. Gradients of keys: scores are held transposed, keys
by queries, so weights go into the products as they come, and a thread block runs over the queries of all heads that
share its keys, so nothing is summed afterwards and the sums have one order. Gradients of queries: as the forward pass.

Shape legend: as in mosaic_gpu.py; G query heads of a kv head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.mosaic_gpu_tiles import (
    LOG2_E,
    Call,
    column_positions,
    kept,
    padded_ids,
    padded_tokens,
    soft_capped,
)
from meshloom.pallas_kernels.attention.reach import Reach
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.hopper import (
    BY_COLUMN,
    BY_ROW,
    ROWS,
    WORKERS,
    Ring,
    column,
    loaded,
    nothing,
    over,
    row_positions,
    tiled,
)

# Rows of a thread block, and of the other side that it reads at a time.
BLOCK, READ = WORKERS * ROWS, 64
# Columns that leave at a time through memory of their own.
STAGED = 64
# A position that no token has.
NEVER = 2**30


@dataclasses.dataclass(frozen=True)
class _Call(Call):
    @property
    def staged(self) -> bool:
        """Whether gradients leave through memory of their own; else through that of the block's own rows."""
        return jnp.dtype(self.out_dtype) != jnp.dtype(self.dtype)

    @property
    def stages(self) -> int:
        """Buffers of a ring: with three and a head size of 192 there is no room for staging."""
        return 2 if self.staged else 3


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: None,
    mask: Mask,
    scoring: Scoring,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N Hv"],
    dtype: Any,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], None]:
    """Equal to the reference up to rounding; contract as in kernel.py.

    Source: Dao 2023, FlashAttention-2, algorithm 2, its loops apart.
    """
    call: _Call = _Call.of(q, k, v, mask, scoring, dtype)
    rows = [jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK))) for x in (lse * LOG2_E, delta)]
    arrays = [padded_tokens(x) for x in (q, d_out.astype(q.dtype), k, v)]
    ids: list[Any] = []
    if mask.q_segments is not None:
        ids = [padded_ids(x, BLOCK) for x in (mask.q_segments, mask.kv_segments)]

    def facts(by: int) -> list[Any]:
        sizes = (BLOCK, READ) if by == 0 else (READ, BLOCK)
        if mask.is_static:
            return []
        return [Reach.table(mask, call.q_total, call.kv_total, *sizes, q.shape[0], by=by), *ids]

    dq = _of_queries(call, (*arrays, *rows), facts(0))
    dk, dv = _of_keys(call, (*arrays, *rows), facts(1))
    return dq[:, : call.q_total], dk[:, : call.kv_total], dv[:, : call.kv_total], None


def _launch(body: Any, call: _Call, outputs: list[Any], own: dict[str, int], read: dict[str, Any], grid: Any) -> Any:
    """The kernel `body` with memory for the block's own rows, for those it reads and for what leaves.

    Args:
        own: widths of the own arrays, by the names that `body` has for their memory.
        read: shapes of one row of the arrays that it reads.
    """
    copied = {name: (call.stages, READ, *shape) for name, shape in read.items()}
    return plgpu.kernel(
        functools.partial(body, call),
        out_type=outputs,
        scratch_types={
            **{name: tiled((WORKERS, ROWS, width), call.dtype) for name, width in own.items()},
            **{
                name: tiled(shape, call.dtype) if len(shape) == 3 else plgpu.SMEM(shape, jnp.float32)
                for name, shape in copied.items()
            },
            **({"staging": tiled((WORKERS, ROWS, STAGED), call.out_dtype)} if call.staged else {}),
            "own_full": plgpu.Barrier(num_arrivals=len(own), num_barriers=WORKERS),
            "full": plgpu.Barrier(num_arrivals=len(read), num_barriers=call.stages),
            "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=call.stages),
        },
        grid=grid,
        grid_names=("head", "block", "batch"),
        num_threads=WORKERS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"attention{body.__name__}",
    )


def _of_queries(call: _Call, given: tuple[Any, ...], facts: list[Any]) -> Any:
    q = given[0]
    run = _launch(
        _backward_of_queries,
        call,
        [jax.ShapeDtypeStruct(q.shape, call.out_dtype)],
        {"q_mem": call.head_dim, "d_out_mem": call.value_dim},
        {"k_mem": (call.head_dim,), "v_mem": (call.value_dim,)},
        (q.shape[2], -(-call.q_total // BLOCK), q.shape[0]),
    )
    return run(*given, *facts)[0]


def _of_keys(call: _Call, given: tuple[Any, ...], facts: list[Any]) -> Any:
    _, _, k, v, *_ = given
    run = _launch(
        _backward_of_keys,
        call,
        [jax.ShapeDtypeStruct(x.shape, call.out_dtype) for x in (k, v)],
        {"k_mem": call.head_dim, "v_mem": call.value_dim},
        {"q_mem": (call.head_dim,), "d_out_mem": (call.value_dim,), "lse_mem": (), "delta_mem": ()},
        (k.shape[2], -(-call.kv_total // BLOCK), k.shape[0]),
    )
    return run(*given, *facts)


def _place(facts: Any, alone: Callable[[Any], Reach]) -> Any:
    """Row of the batch, head, block and worker of this program, and what it reaches."""
    b, n, i, worker = (jax.lax.axis_index(name) for name in ("batch", "head", "block", "warpgroup"))
    reach = Reach.read(facts[0], b, i) if facts else alone(i)
    return b, n, i, worker, reach


def _backward_of_queries(
    call: _Call, q, d_out, k, v, lse, delta, *refs, q_mem, d_out_mem, k_mem, v_mem, own_full, full, free, staging=None
):
    """dq of a block of queries of one head, over the keys in reach."""
    *facts, dq = refs

    b, n, i, worker, reach = _place(facts, lambda i: call.of_queries(i, BLOCK, READ))
    first = i * BLOCK + worker * ROWS
    rows = pl.ds(first, ROWS)
    for array, mem in ((q, q_mem), (d_out, d_out_mem)):
        plgpu.copy_gmem_to_smem(array.at[b, rows, n], mem.at[worker], own_full.at[worker])

    def copies(step, slot, barrier):
        keys = pl.ds((reach.start + step) * READ, READ)
        for array, mem in ((k, k_mem), (v, v_mem)):
            plgpu.copy_gmem_to_smem(array.at[b, keys, jax.lax.div(n, call.group)], mem.at[slot], barrier)

    ring = Ring(copies, full, free, call.stages, reach.stop - reach.start, worker)
    ring.begin()
    lse_rows, delta_rows = (over(loaded(x.at[b, n, rows], BY_ROW), 0, READ) for x in (lse, delta))
    q_ids = loaded(facts[1].at[b, rows], BY_ROW) if facts[1:] else None
    plgpu.barrier_wait(own_full.at[worker])

    def masked(j, weights):
        segments = None if q_ids is None else (q_ids, facts[2].at[b, pl.ds(j * READ, READ)])
        keep = kept(call.mask, reach, j * READ, READ, reach.first + worker * ROWS, segments)
        return jnp.where(keep, weights, 0.0)

    def step(at, total):
        slot, j = ring.take(at), reach.start + at

        def products(scores, d_weights):
            plgpu.wgmma(scores, q_mem.at[worker], k_mem.at[slot].transpose((1, 0)))
            plgpu.wgmma(d_weights, d_out_mem.at[worker], v_mem.at[slot].transpose((1, 0)))
            weights, slope = _weights(call, plgpu.wgmma_accumulator_load(scores, wait_n=1), lse_rows)
            weights = _where_needed(reach, j, masked, weights)
            return _d_scores(call, weights, plgpu.wgmma_accumulator_load(d_weights), delta_rows, slope)[1]

        tile = plgpu.ACC((ROWS, READ), jnp.float32)
        d_scores = pl.run_scoped(products, tile, tile)
        total = pl.run_state(lambda total: plgpu.wgmma(total, d_scores, k_mem.at[slot]))(plgpu.ACC.init(total))
        ring.give_back(slot)
        return total

    total = jax.lax.fori_loop(0, ring.steps, step, nothing(q.shape[3]))
    ring.end()
    _leave(call, total * call.scoring.scale, (q_mem if staging is None else staging).at[worker], dq.at[b, rows, n])


def _backward_of_keys(
    call: _Call,
    q,
    d_out,
    k,
    v,
    lse,
    delta,
    *refs,
    q_mem,
    d_out_mem,
    lse_mem,
    delta_mem,
    k_mem,
    v_mem,
    own_full,
    full,
    free,
    staging=None,
):
    """dk and dv of a block of keys, over the queries in reach of all heads that read it."""
    *facts, dk, dv = refs

    def alone(j):
        return Reach.of_keys(
            call.mask, j * BLOCK, BLOCK, call.kv_total - call.q_total, call.q_total, call.kv_total, READ
        )

    b, n, j, worker, reach = _place(facts, alone)
    first = j * BLOCK + worker * ROWS
    rows = pl.ds(first, ROWS)
    for array, mem in ((k, k_mem), (v, v_mem)):
        plgpu.copy_gmem_to_smem(array.at[b, rows, n], mem.at[worker], own_full.at[worker])
    blocks = reach.stop - reach.start

    def copies(step, slot, barrier):
        head = n * call.group + jax.lax.div(step, blocks)
        queries = pl.ds((reach.start + jax.lax.rem(step, blocks)) * READ, READ)
        for array, mem in ((q, q_mem), (d_out, d_out_mem)):
            plgpu.copy_gmem_to_smem(array.at[b, queries, head], mem.at[slot], barrier)
        for array, mem in ((lse, lse_mem), (delta, delta_mem)):
            plgpu.copy_gmem_to_smem(array.at[b, head, queries], mem.at[slot], barrier)

    ring = Ring(copies, full, free, call.stages, blocks * call.group, worker)
    ring.begin()
    kv_ids = loaded(facts[2].at[b, rows], BY_ROW) if facts[1:] else None
    plgpu.barrier_wait(own_full.at[worker])

    def masked(i, weights):
        at_q = column_positions(i * READ + reach.first, READ)
        at_kv = row_positions(first)
        least = at_kv if call.mask.causal else column(-NEVER, jnp.int32)
        keep = at_q >= over(jnp.where(at_kv < reach.length, least, NEVER), 0, READ)
        if call.mask.window is not None:
            keep &= at_q < over(at_kv + call.mask.window, 0, READ)
        if kv_ids is not None:
            keep &= over(kv_ids, 0, READ) == over(loaded(facts[1].at[b, pl.ds(i * READ, READ)], BY_COLUMN), 1, READ)
        return jnp.where(keep, weights, 0.0)

    def step(at, sums):
        slot, i = ring.take(at), reach.start + jax.lax.rem(at, blocks)

        def products(scores, d_weights):
            plgpu.wgmma(scores, k_mem.at[worker], q_mem.at[slot].transpose((1, 0)))
            held = over(plgpu.load(lse_mem.at[slot], layout=BY_COLUMN), 1, READ)
            weights, slope = _weights(call, plgpu.wgmma_accumulator_load(scores), held)
            weights = _where_needed(reach, i, masked, weights)
            plgpu.wgmma(d_weights, v_mem.at[worker], d_out_mem.at[slot].transpose((1, 0)))
            held = over(plgpu.load(delta_mem.at[slot], layout=BY_COLUMN), 1, READ)
            return _d_scores(call, weights, plgpu.wgmma_accumulator_load(d_weights), held, slope)

        tile = plgpu.ACC((ROWS, READ), jnp.float32)
        weights, d_scores = pl.run_scoped(products, tile, tile)

        def add(sums):
            plgpu.wgmma(sums[0], d_scores, q_mem.at[slot])
            plgpu.wgmma(sums[1], weights, d_out_mem.at[slot])

        sums = pl.run_state(add)(tuple(plgpu.ACC.init(x) for x in sums))
        plgpu.commit_smem()  # the statistics were read as products are not, so a copy over them needs a fence
        ring.give_back(slot)
        return sums

    sums = jax.lax.fori_loop(0, ring.steps, step, (nothing(k.shape[3]), nothing(v.shape[3])))
    ring.end()
    for total, mem, out in ((sums[0] * call.scoring.scale, k_mem, dk), (sums[1], v_mem, dv)):
        _leave(call, total, (mem if staging is None else staging).at[worker], out.at[b, rows, n])


def _leave(call: _Call, total, through, out) -> None:
    """Writes the rows of a worker, by way of its part of shared memory."""
    width = through.shape[1]
    for start in range(0, total.shape[1], width):
        part = total if width == total.shape[1] else jax.lax.slice(total, (0, start), (ROWS, start + width))
        through[...] = part.astype(call.out_dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(through, out.at[:, pl.ds(start, width)])
        plgpu.wait_smem_to_gmem(0)


def _weights(call: _Call, scores, lse):
    """Weights of raw scores, and the derivative of the soft cap or None."""
    if (cap := call.scoring.soft_cap) is None:
        return jnp.exp2(scores * (LOG2_E * call.scoring.scale) - lse), None
    capped = soft_capped(scores, call.scoring)
    return jnp.exp2(capped * LOG2_E - lse), 1 - (capped * (1 / cap)) * (capped * (1 / cap))


def _d_scores(call: _Call, weights, d_weights, delta, slope):
    """Weights and gradients of scores, as they are multiplied."""
    d_scores = weights * (d_weights - delta)
    if slope is not None:
        d_scores *= slope
    return weights.astype(call.dtype), d_scores.astype(call.dtype)


def _where_needed(reach: Reach, block, masked, weights):
    """Weights, masked unless the block read is whole."""
    whole = (block >= reach.whole_start) & (block < reach.whole_stop)
    return jax.lax.cond(whole, lambda weights: weights, functools.partial(masked, block), weights)

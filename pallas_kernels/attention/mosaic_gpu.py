"""Attention on Hopper GPUs: the forward kernel, one block of 128 queries of one head per thread block.

Three warpgroups work on it. One copies keys and values (TMA) into rings of buffers in shared memory; two multiply
(wgmma), each for 64 of the queries, and hold the tensor cores in turns: while one's products run, the other makes
weights of its scores. What the mask rules out is never copied: a block of queries reads one range of key blocks, in
the middle of which lies a range that the mask leaves whole (see reach.py). Arrays stay [B, L, heads, H]: a copy strides
over heads, fills with zeros what lies behind the last token, and writes nothing there.

Shape legend: B batch, T queries, S keys, N heads, K kv heads, H head dim, I query blocks, r queries of a warpgroup, c
    keys of a block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention import spread
from meshloom.pallas_kernels.attention.kernel import MASKED, Scoring
from meshloom.pallas_kernels.attention.mosaic_gpu_tiles import (
    LOG2_E,
    Call,
    kept,
    padded_ids,
    padded_tokens,
    soft_capped,
)
from meshloom.pallas_kernels.attention.reach import Reach
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask
from meshloom.pallas_kernels.dispatch import Target, may_be_spread
from meshloom.pallas_kernels.hopper import (
    BY_ROW,
    ROWS,
    SHARED_LIMIT,
    WORKERS,
    column,
    hopper_why_not,
    loaded,
    nothing,
    over,
    tiled,
)

BLOCK_Q = WORKERS * ROWS
# With 128 keys and 128 values ptxas needs 158 of the 168 registers that three warpgroups leave each other.
BLOCKS_KV = (128, 64)
STAGES = 2
# Of each thread, where ptxas compiles the program as a whole; compiled for nvJitLink it ignores them, and all have 168.
COPY_REGISTERS, WORK_REGISTERS = 24, 240


def why_not(spec: AttentionSpec, target: Target) -> str | None:
    """The reason this kernel cannot run, or None."""
    if reason := hopper_why_not(target):
        return reason
    if spec.dtype not in ("bfloat16", "float16"):
        return f"it multiplies bfloat16 and float16, not {spec.dtype}"
    if spec.bias_shape is not None:
        return "it has no additive bias"
    if (dims := (spec.q_shape[3], spec.value_dim)) not in ((64, 64), (128, 128), (192, 128)):
        return f"its head sizes are 64, 128, and 192 with values of 128, not {dims[0]} with values of {dims[1]}"
    return spread.why_not(spec) if may_be_spread() else None


@dataclasses.dataclass(frozen=True)
class _Call(Call):
    @property
    def q_blocks(self) -> int:
        return -(-self.q_total // BLOCK_Q)

    @property
    def staged(self) -> bool:
        """Whether rows leave through memory of their own; else through that of the queries."""
        return (self.value_dim, jnp.dtype(self.out_dtype)) != (self.head_dim, jnp.dtype(self.dtype))

    @functools.cached_property
    def block_kv(self) -> int:
        """The longest block of keys with which everything fits into shared memory."""

        def needed(block: int) -> int:
            size = jnp.dtype(self.dtype).itemsize
            keys = STAGES * block * (self.head_dim + self.value_dim) * size
            rows = BLOCK_Q * self.value_dim * jnp.dtype(self.out_dtype).itemsize if self.staged else 0
            return BLOCK_Q * self.head_dim * size + keys + rows + BLOCK_Q * 4

        return next(block for block in BLOCKS_KV if needed(block) <= SHARED_LIMIT)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: None,
    mask: Mask,
    scoring: Scoring,
    dtype: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Equal to the reference up to rounding; contract and errors as in kernel.py.

    Source: Dao 2023, FlashAttention-2, algorithm 1; Shah et al. 2024, FlashAttention-3, section 3.1 (workers in turns).
    """
    batch, heads = q.shape[0], q.shape[2]
    call: _Call = _Call.of(q, k, v, mask, scoring, dtype)
    q, k, v = (padded_tokens(x) for x in (q, k, v))
    facts = [] if mask.is_static else [Reach.table(mask, call.q_total, call.kv_total, BLOCK_Q, call.block_kv, batch)]
    if mask.q_segments is not None:
        facts += [padded_ids(mask.q_segments, BLOCK_Q), padded_ids(mask.kv_segments, call.block_kv)]

    full, free = plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES)
    each = plgpu.Barrier(num_barriers=WORKERS)
    out, lse = plgpu.kernel(
        functools.partial(_forward_kernel, call),
        out_type=[
            jax.ShapeDtypeStruct((*q.shape[:3], call.value_dim), dtype),
            jax.ShapeDtypeStruct((batch, heads, call.q_blocks * BLOCK_Q), jnp.float32),
        ],
        scratch_types={
            "q_mem": tiled((WORKERS, ROWS, call.head_dim), q.dtype),
            "k_mem": tiled((STAGES, call.block_kv, call.head_dim), k.dtype),
            "v_mem": tiled((STAGES, call.block_kv, call.value_dim), v.dtype),
            "lse_mem": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
            **({"out_mem": tiled((WORKERS, ROWS, call.value_dim), dtype)} if call.staged else {}),
            **{"q_full": each, "k_full": full, "v_full": full, "k_free": free, "v_free": free, "turn": each},
        },
        grid=(heads, call.q_blocks, batch),
        grid_names=("head", "block", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_forward",
    )(q, k, v, *facts)
    return out[:, : call.q_total], lse[:, :, : call.q_total]


def _forward_kernel(call: _Call, q, k, v, *refs, k_mem, v_mem, k_full, v_full, k_free, v_free, **scratch):
    """One block of queries. `*_full`: a buffer holds what was copied; `*_free`: both workers have read it."""
    *facts, out, lse = refs
    b, n, worker = (jax.lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    # The longest runs of keys begin first under a causal mask, so that the last to end are short.
    i = call.q_blocks - 1 - jax.lax.axis_index("block")
    reach = Reach.read(facts[0], b, i) if facts else call.of_queries(i, BLOCK_Q, call.block_kv)

    @pl.when(worker == WORKERS)
    def _copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        steps = reach.stop - reach.start
        rings = ((k, k_mem, k_full, k_free), (v, v_mem, v_full, v_free))

        @pl.loop(0, steps + STAGES)
        def _step(step):
            slot = jax.lax.rem(step, STAGES)
            keys = pl.ds((reach.start + step) * call.block_kv, call.block_kv)
            for array, mem, full, free in rings:

                @pl.when(step >= STAGES)
                def _wait(free=free):
                    plgpu.barrier_wait(free.at[slot])

                @pl.when(step < steps)
                def _start(array=array, mem=mem, full=full):
                    block = array.at[b, keys, jax.lax.div(n, call.group)]
                    plgpu.copy_gmem_to_smem(block, mem.at[slot], full.at[slot])

    @pl.when(worker < WORKERS)
    def _work():
        plgpu.set_max_registers(WORK_REGISTERS, action="increase")
        place = b, n, i * BLOCK_Q + worker * ROWS
        rings = k_mem, v_mem, k_full, v_full, k_free, v_free
        _rows(call, reach, place, worker, (q, out, lse), facts[1:], rings, **scratch)


def _rows(call: _Call, reach: Reach, place, worker, arrays, ids, rings, *, q_mem, lse_mem, q_full, turn, out_mem=None):
    """The rows of one worker, of which `place` names the row of the batch, the head and the first query."""
    (q, out, lse), (k_mem, v_mem, k_full, v_full, k_free, v_free) = arrays, rings
    b, n, first = place
    rows = pl.ds(first, ROWS)
    steps = reach.stop - reach.start
    queries = q_mem.at[worker]
    plgpu.copy_gmem_to_smem(q.at[b, rows, n], queries, q_full.at[worker])
    q_ids = loaded(ids[0].at[b, rows], BY_ROW) if ids else None
    factor = LOG2_E * (call.scoring.scale if call.scoring.soft_cap is None else 1.0)

    def masked(j, scores):
        """The scores of key block `j`, far below any other where the mask rules them out."""
        first_key, first_query = j * call.block_kv, reach.first + worker * ROWS
        segments = (q_ids, ids[1].at[b, pl.ds(first_key, call.block_kv)]) if ids else None
        keep = kept(call.mask, reach, first_key, call.block_kv, first_query, segments)
        # Below what a row starts with, so that the weight is zero in a row that has no key yet.
        return jnp.where(keep, scores, 2 * MASKED)

    def step(at, carry):
        """One key block. Comes with the tensor cores held, and with the keys there."""
        total, top, norm = carry
        j, slot, next_slot = reach.start + at, jax.lax.rem(at, STAGES), jax.lax.rem(at + 1, STAGES)

        def products(scores):
            plgpu.wgmma(scores, queries, k_mem.at[slot].transpose((1, 0)))
            plgpu.barrier_arrive(turn.at[1 - worker])
            return plgpu.wgmma_accumulator_load(scores)

        scores = pl.run_scoped(products, plgpu.ACC((ROWS, call.block_kv), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        if call.scoring.soft_cap is not None:
            scores = soft_capped(scores, call.scoring)
        whole = (j >= reach.whole_start) & (j < reach.whole_stop)
        scores = jax.lax.cond(whole, lambda scores: scores, functools.partial(masked, j), scores)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        kept = jnp.exp2((top - new_top) * factor)
        weights = jnp.exp2(scores * factor - over(new_top * factor, 0, call.block_kv))
        norm = norm * kept + jnp.sum(weights, axis=1)
        total *= over(kept, 0, call.value_dim)
        weights = weights.astype(call.dtype)
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_wait(turn.at[worker])

        def values(total):
            plgpu.wgmma(total, weights, v_mem.at[slot])
            pl.when(at + 1 < steps)(lambda: plgpu.barrier_wait(k_full.at[next_slot]))

        total = pl.run_state(values)(plgpu.ACC.init(total))
        plgpu.barrier_arrive(v_free.at[slot])
        return total, new_top, norm

    pl.when(worker == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
    for barrier in (q_full.at[worker], k_full.at[0], turn.at[worker]):
        plgpu.barrier_wait(barrier)
    begin = nothing(call.value_dim), column(MASKED), column(0.0)
    total, top, norm = jax.lax.fori_loop(0, steps, step, begin)
    plgpu.barrier_arrive(turn.at[1 - worker])
    pl.when(worker == 0)(lambda: plgpu.barrier_wait(turn.at[0]))

    safe = jnp.where(norm == 0, 1.0, norm)
    leaving = (q_mem if out_mem is None else out_mem).at[worker]
    leaving[...] = (total / over(safe, 0, call.value_dim)).astype(call.out_dtype)
    # The greatest score lacks the scale, unless a soft cap brought it in.
    lse_mem[worker] = jnp.where(norm == 0, MASKED, top * (factor / LOG2_E) + jnp.log(safe))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(leaving, out.at[b, rows, n])
    plgpu.copy_smem_to_gmem(lse_mem.at[worker], lse.at[b, n, rows])
    plgpu.wait_smem_to_gmem(0)

"""Ragged paged attention on Hopper GPUs: mixed prefill and decode rows over pages where they lie.

XLA deals the rows out into items (a decode row, or a tile of a sequence's rows) and gathers the queries of each kv head
beside each other; a thread block takes one item and one kv head, or a split of its keys where a call has few of both.
One warpgroup copies that head's keys and values out of their pages (TMA, a page at a time, striding over the heads of a
token), one or two multiply. Keys are never gathered or copied in device memory. A decode row fills few of a product's
64 rows: those that are wasted take a quarter of the time that memory takes for the keys.

Exponentials are base 2, as in the hardware. Shape legend: see spec.py; I items, t rows of an item, G = N / K query
    heads of a kv head, R >= t * G queries of an item, s splits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.attention.kernel import MASKED, Scoring, with_sinks
from meshloom.pallas_kernels.attention.mosaic_gpu_tiles import LOG2_E, column_positions, soft_capped
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_spread import on_own_heads, spread_why_not
from meshloom.pallas_kernels.attention.pages import KVPages, Ragged
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.hopper import CORES, ROWS, column, hopper_why_not, nothing, over, row_positions, tiled

# Keys of a block, and buffers of it.
BLOCK, STAGES = 64, 2
# Rows that one copy of queries and sums wants.
LEAST_ROWS = 8
# Splits of a sequence's keys at most: their partial rows are merged by XLA.
MOST_SPLITS = 16


def why_not(spec: PagedSpec, target: Target) -> str | None:
    """Why this kernel cannot run a call, or None."""
    if reason := hopper_why_not(target):
        return reason
    if reason := spread_why_not(spec):
        return reason
    if spec.dtype not in ("bfloat16", "float16") or spec.element != spec.dtype:
        return f"it multiplies queries and keys in bfloat16; got {spec.dtype} and a cache in {spec.element}"
    head_dim = spec.q_shape[-1]
    if head_dim not in (64, 128) or spec.pages_shape[-1] != head_dim:
        return f"its head sizes are 64 and 128, in rows of their own; got {head_dim} in rows of {spec.pages_shape[-1]}"
    page_size = spec.pages_shape[1] * spec.pages_shape[2] // spec.kv_heads
    if page_size % LEAST_ROWS or (BLOCK % page_size and page_size % BLOCK):
        return f"pages of {page_size} tokens are no whole parts of {BLOCK} keys, nor {LEAST_ROWS} or more of them"
    if (group := spec.q_shape[1] // spec.kv_heads) > ROWS:
        return f"{group} query heads read one kv head; it has {ROWS} rows for them"
    if spec.distance_bias:
        return "a bias by distance needs a gather per score"
    return None


def paged_attention_hopper(
    q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, scoring: PagedScoring, sinks: Float[Array, "N"] | None
) -> Float[Array, "T N H"]:
    """Equal to the reference up to rounding; rows that are padding are zeros. Reads only pages that sequences have."""
    return on_own_heads(functools.partial(_attend, scoring), q, pages, ragged, sinks)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static facts of a call.

    Attributes:
        tile: rows of an item. group: query heads of a kv head. workers: warpgroups that multiply.
        queries: R, what an item has room for in the arrays that are copied.
    """

    tile: int
    group: int
    workers: int
    splits: int
    page_size: int
    window: int | None
    scoring: Scoring
    dtype: Any
    out_dtype: Any

    @classmethod
    def of(cls, q: Any, pages: KVPages, ragged: Ragged, scoring: PagedScoring, parts: bool) -> "_Call":
        rows, heads, _ = q.shape
        group, sequences = heads // pages.kv_heads, ragged.kv_lens.size
        decode = rows <= sequences
        workers = 1 if decode or rows * group <= ROWS else 2
        tile = 1 if decode else min(workers * ROWS // group, rows)
        blocks = pages.kv_heads * min(rows, sequences + rows // tile)
        longest = -(-ragged.capacity * pages.page_size // BLOCK)
        splits = max(1, min(2 * CORES // blocks, longest // 4, MOST_SPLITS)) if decode else 1
        scored = Scoring(float(scoring.scale), None if scoring.soft_cap is None else float(scoring.soft_cap))
        out_dtype = jnp.dtype(jnp.float32) if parts or splits > 1 else q.dtype
        return cls(tile, group, workers, splits, pages.page_size, scoring.window, scored, q.dtype, out_dtype)

    @property
    def queries(self) -> int:
        used = self.tile * self.group
        return -(-used // LEAST_ROWS) * LEAST_ROWS if self.workers == 1 else self.workers * ROWS

    @property
    def copied(self) -> int:
        """Rows of a worker that are copied."""
        return min(self.queries, ROWS)


# Fields of an item, the columns of an int32 [I, 5].
SEQUENCE, POSITION, FIRST, LAST, LENGTH = range(5)


def _items(call: _Call, ragged: Ragged, rows: int) -> tuple[Int[Array, "I 5"], Int[Array, "I t"], Int[Array, "T"]]:
    """Items, the row of the step that each of their rows is, and at which place of them each row of the step is.

    An item past the last has no blocks. Blocks are of keys, from FIRST to before LAST.
    """
    tile, sequences = call.tile, ragged.kv_lens.size
    counts = ragged.cu_q_lens[1:] - ragged.cu_q_lens[:-1]
    counts = jnp.where(jnp.arange(sequences) < ragged.num_seqs, counts, 0)
    each = -(-counts // tile)
    before = jnp.cumsum(each) - each
    item = jnp.arange(min(rows, sequences + rows // tile), dtype=jnp.int32)
    sequence = jnp.clip(jnp.searchsorted(before + each, item, side="right"), 0, sequences - 1)
    done = tile * (item - before[sequence])
    length = ragged.kv_lens[sequence]
    position = length - counts[sequence] + done
    used = jnp.clip(counts[sequence] - done, 1, tile)
    first = 0 * position if call.window is None else jnp.maximum(position + 1 - call.window, 0) // BLOCK
    last = jnp.where(item < jnp.sum(each), (position + used - 1) // BLOCK + 1, first)
    row = jnp.minimum((ragged.cu_q_lens[sequence] + done)[:, None] + jnp.arange(tile), rows - 1)
    mine = ragged.sequence_of(rows)
    place = before[mine] * tile + jnp.arange(rows) - ragged.cu_q_lens[mine]
    fields = jnp.stack([sequence, position, first, last, length], axis=1)
    return fields.astype(jnp.int32), row, place


def _attend(
    scoring: PagedScoring, q: Float[Array, "T N H"], pages: KVPages, ragged: Ragged, sinks: Float[Array, "N"] | None
) -> Float[Array, "T N H"]:
    """On one device: all that it has of the heads."""
    rows, heads, head_dim = q.shape
    kv_heads = pages.kv_heads
    call = _Call.of(q, pages, ragged, scoring, parts=sinks is not None)
    items, row, place = _items(call, ragged, rows)
    # [I, t, K, G, H] as [I, K, t * G, H], filled up to R.
    queries = q.reshape(rows, kv_heads, call.group, head_dim)[row].swapaxes(1, 2)
    queries = queries.reshape(len(items), kv_heads, -1, head_dim)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, call.queries - queries.shape[2]), (0, 0)))
    by_token = (-1, call.page_size, kv_heads, head_dim)
    out, lse = _launch(call, items, ragged.page_table, queries, pages.k.reshape(by_token), pages.v.reshape(by_token))

    def by_row(x, *last):
        """[s, I, K, R, ...] as [s, T, N, ...]."""
        x = x[:, :, :, : call.tile * call.group].reshape(call.splits, len(items), kv_heads, call.tile, -1, *last)
        return x.swapaxes(2, 3).reshape(call.splits, -1, heads, *last)[:, place]

    out = by_row(out, head_dim)
    if call.out_dtype == jnp.float32:
        lse = by_row(lse)
        total = jax.nn.logsumexp(lse, axis=0)
        out = jnp.sum(out * jnp.exp(lse - total)[..., None], axis=0)
        if sinks is not None:
            out = with_sinks(out[None], total.T[None], sinks)[0][0]
    else:
        out = out[0]
    return jnp.where((jnp.arange(rows) < ragged.total)[:, None, None], out, 0).astype(q.dtype)


def _launch(call: _Call, items, table, q: Float[Array, "I K R H"], k: Float[Array, "P page K H"], v):
    count, kv_heads, _, head_dim = q.shape
    per_block = max(1, BLOCK // call.page_size)
    full, free = (plgpu.Barrier(num_arrivals=n, num_barriers=STAGES) for n in (per_block, call.workers))
    each = plgpu.Barrier(num_barriers=call.workers)
    kv_mem = tiled((STAGES, BLOCK, head_dim), k.dtype)
    return plgpu.kernel(
        functools.partial(_kernel, call),
        out_type=[
            jax.ShapeDtypeStruct((call.splits, *q.shape), call.out_dtype),
            jax.ShapeDtypeStruct((call.splits, *q.shape[:3]), jnp.float32),
        ],
        scratch_types={
            "q_mem": tiled((call.workers, ROWS, head_dim), q.dtype),
            "out_mem": tiled((call.workers, ROWS, head_dim), call.out_dtype),
            "lse_mem": plgpu.SMEM((call.workers, ROWS), jnp.float32),
            **{"k_mem": kv_mem, "v_mem": kv_mem, "k_full": full, "v_full": full, "k_free": free, "v_free": free},
            **{"q_full": each, "cleared": plgpu.Barrier()},
        },
        # Items last: the longest sequences of a step are as often first as last.
        grid=(call.splits, count, kv_heads),
        grid_names=("split", "item", "head"),
        num_threads=call.workers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_attention",
    )(items, table, q, k, v)


def _kernel(call: _Call, items, table, q, k, v, out, lse, *, k_mem, v_mem, k_full, v_full, k_free, v_free, **scratch):
    """One item, one kv head, one split. `*_full`: a buffer holds what was copied; `*_free`: workers have read it."""
    split, i, head, worker = (jax.lax.axis_index(name) for name in ("split", "item", "head", "warpgroup"))
    first, last, length = (items[i, field] for field in (FIRST, LAST, LENGTH))
    share = jax.lax.div(last - first + call.splits - 1, call.splits)
    start = first + split * share
    steps = jnp.maximum(jnp.minimum(last, start + share) - start, 0)

    @pl.when(worker == call.workers)
    def _copy():
        sequence, final = items[i, SEQUENCE], jax.lax.div(jnp.maximum(length - 1, 0), call.page_size)
        tokens = min(call.page_size, BLOCK)
        rings = ((k, k_mem, k_full, k_free), (v, v_mem, v_full, v_free))

        @pl.loop(0, steps + STAGES)
        def _step(step):
            slot = jax.lax.rem(step, STAGES)

            @pl.when(step >= STAGES)
            def _wait():
                for _, _, _, free in rings:
                    plgpu.barrier_wait(free.at[slot])

            @pl.when(step < steps)
            def _start():
                for part in range(0, BLOCK, tokens):
                    at = (start + step) * BLOCK + part
                    # Where the sequence ends inside of the block, its last page once more, of which nothing is used.
                    page = table[sequence, jnp.minimum(jax.lax.div(at, call.page_size), final)]
                    own = pl.ds(pl.multiple_of(jax.lax.rem(at, call.page_size), tokens), tokens)
                    for array, mem, full, _ in rings:
                        source = array.at[page, own, head]
                        plgpu.copy_gmem_to_smem(source, mem.at[slot, pl.ds(part, tokens)], full.at[slot])

    @pl.when(worker < call.workers)
    def _work():
        rings = k_mem, v_mem, k_full, v_full, k_free, v_free
        reach = start, steps, items[i, POSITION], length
        _rows(call, reach, (split, i, head), worker, (q, out, lse), rings, **scratch)


def _rows(call: _Call, reach, place, worker, arrays, rings, *, q_mem, out_mem, lse_mem, q_full, cleared):
    """The 64 queries of one worker."""
    (start, steps, position, length), (split, i, head) = reach, place
    (q, out, lse), (k_mem, v_mem, k_full, v_full, k_free, v_free) = arrays, rings
    queries, rows = q_mem.at[worker], pl.ds(worker * ROWS, call.copied)
    head_dim, copied = q_mem.shape[2], pl.ds(0, call.copied)
    plgpu.copy_gmem_to_smem(q.at[i, head, rows], queries.at[copied], q_full.at[worker])
    factor = LOG2_E * (call.scoring.scale if call.scoring.soft_cap is None else 1.0)

    def masked(first_key, scores):
        """The scores of a block, far below any other where a row may not read the key."""
        token = position + jax.lax.div(row_positions(worker * ROWS), call.group)
        keys = column_positions(first_key, BLOCK)
        keep = keys <= over(token, 0, BLOCK)
        if call.window is not None:
            keep &= keys > over(token - call.window, 0, BLOCK)
        # Below what a row starts with, so that the weight is zero in a row that has no key yet.
        return jnp.where(keep, scores, 2 * MASKED)

    def clear(slot, first_key):
        """Zeros for the values past the end: what a freed page held, even NaN, would survive a weight of zero."""

        def zeros():
            values = plgpu.load(v_mem.at[slot], layout=plgpu.Layout.WGMMA)
            written = over(row_positions(first_key) < length, 0, head_dim)
            v_mem[slot] = jnp.where(written, values, jnp.zeros_like(values))
            plgpu.commit_smem()

        pl.when((worker == 0) & (first_key + BLOCK > length))(zeros)
        if call.workers > 1:
            pl.when(worker == 0)(lambda: plgpu.barrier_arrive(cleared))
            pl.when(worker > 0)(lambda: plgpu.barrier_wait(cleared))

    def step(at, carry):
        total, top, norm = carry
        slot, first_key = jax.lax.rem(at, STAGES), (start + at) * BLOCK
        plgpu.barrier_wait(k_full.at[slot])

        def products(scores):
            plgpu.wgmma(scores, queries, k_mem.at[slot].transpose((1, 0)))
            return plgpu.wgmma_accumulator_load(scores)

        scores = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        if call.scoring.soft_cap is not None:
            scores = soft_capped(scores, call.scoring)
        whole = first_key + BLOCK - 1 <= position
        if call.window is not None:
            whole &= first_key > position + call.tile - 1 - call.window
        scores = jax.lax.cond(whole, lambda scores: scores, functools.partial(masked, first_key), scores)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        kept = jnp.exp2((top - new_top) * factor)
        weights = jnp.exp2(scores * factor - over(new_top * factor, 0, BLOCK))
        norm = norm * kept + jnp.sum(weights, axis=1)
        total *= over(kept, 0, head_dim)
        weights = weights.astype(call.dtype)
        plgpu.barrier_wait(v_full.at[slot])
        pl.when(at == steps - 1)(lambda: clear(slot, first_key))
        total = pl.run_state(lambda total: plgpu.wgmma(total, weights, v_mem.at[slot]))(plgpu.ACC.init(total))
        plgpu.barrier_arrive(v_free.at[slot])
        return total, new_top, norm

    plgpu.barrier_wait(q_full.at[worker])
    total, top, norm = jax.lax.fori_loop(0, steps, step, (nothing(head_dim), column(MASKED), column(0.0)))
    safe = jnp.where(norm == 0, 1.0, norm)
    out_mem[worker] = (total / over(safe, 0, head_dim)).astype(call.out_dtype)
    # The greatest score lacks the scale, unless a soft cap brought it in.
    lse_mem[worker] = jnp.where(norm == 0, MASKED, top * (factor / LOG2_E) + jnp.log(safe))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_mem.at[worker, copied], out.at[split, i, head, rows])
    plgpu.copy_smem_to_gmem(lse_mem.at[worker, copied], lse.at[split, i, head, rows])
    plgpu.wait_smem_to_gmem(0)

"""Block sizes of attention's TPU kernels that a search found, and which of them a call can have."""

import dataclasses
from typing import Any

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.attention.visits import Blocks
from meshloom.pallas_kernels.tuning import Sizes, bucket, key_of, tuned

LANES = 128
# Bytes of float32 scores of a pair of blocks: 2048 x 2048. Of the kernels' temporaries they are the largest.
MOST_SCORES = 2**24


def attention_key(q: Any, k: Any, v: Any, mask: Mask, scoring: Scoring, biased: bool = False) -> str:
    """A call by what decides its schedule; shapes are [B, L, N, H]."""
    return key_of(
        head=q.shape[3],
        values=v.shape[3],
        dtype=str(q.dtype),
        queries=bucket(q.shape[1]),
        keys=bucket(k.shape[1]),
        causal=mask.causal,
        window=None if mask.window is None else bucket(mask.window),
        capped=scoring.soft_cap is not None,
        biased=biased,
        segments=mask.q_segments is not None,
        lengths=mask.kv_lens is not None,
        offset=mask.offset is not None,
    )


def tuned_blocks(
    op: str, q: Any, k: Any, v: Any, mask: Mask, scoring: Scoring, own: Blocks, biased: bool = False
) -> Blocks:
    """`own`, or the blocks that are known to be better; shorter ones where the sequences end before."""

    def cut(sizes: Sizes) -> Blocks:
        most = (-(-total // LANES) * LANES for total in (own.q_total, own.kv_total))
        block_q, block_kv = (min(sizes[name], limit) for name, limit in zip(("block_q", "block_kv"), most, strict=True))
        return dataclasses.replace(own, block_q=block_q, block_kv=block_kv)

    def refuse(sizes: Sizes) -> str | None:
        if sizes["block_q"] % LANES or sizes["block_kv"] % LANES:
            return f"blocks are multiples of {LANES} tokens"
        blocks = cut(sizes)
        if 4 * blocks.block_q * blocks.block_kv > MOST_SCORES:
            return f"scores of {blocks.block_q} x {blocks.block_kv} take more than {MOST_SCORES:,} bytes"
        if _padded(blocks) > _padded(own):
            return f"it pads {own.q_total} x {own.kv_total} tokens to more than {own.block_q} x {own.block_kv} do"
        return None

    sizes = tuned(op, attention_key(q, k, v, mask, scoring, biased), refuse)
    return own if sizes is None else cut(sizes)


def _padded(blocks: Blocks) -> int:
    """Scores of all pairs of blocks."""
    (down, across), size = blocks.counts, blocks.block_q * blocks.block_kv
    return down * across * size

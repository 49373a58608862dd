"""Attention in blocks with an online softmax, as plain XLA; only blocks that the mask can allow are visited.

The pairs (query block, key block) are listed once, at trace time, from the causal offset and the window; a `lax.scan`
runs over the list, so the program's size does not grow with the sequence. Pairs that only the data rules out (segments,
lengths, an offset) are in the list and skipped when they come up, unless the arrays may be spread over devices: these
run one program and would have to agree first. Scores exist for one pair at a time. The backward pass recomputes them
from the log-sum-exp (Dao 2023, FlashAttention-2, algorithm 2).

Shape legend: B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim, I query blocks, J key blocks, P
    pairs, c block length.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.kernel import MASKED, Scoring
from meshloom.pallas_kernels.attention.spec import Mask, soft_capped
from meshloom.pallas_kernels.attention.visits import Blocks
from meshloom.pallas_kernels.dispatch import may_be_spread

# Scores of one pair and head take 256 KiB in float32. Gradient of 2,048 causal tokens, 8 heads of 64, seconds of CPU
# for blocks of 128, 256 and 512: float32 0.33, 0.40, 0.51; bfloat16 0.26, 0.23, 0.27.
BLOCK = 256


@dataclasses.dataclass(frozen=True)
class _Chunks(Blocks):
    """Square blocks, and the arrays in the shapes that are cut into them."""

    @classmethod
    def of(cls, q_total: int, kv_total: int) -> "_Chunks":
        longest = max(q_total, kv_total)
        block = BLOCK if longest > BLOCK else longest
        return cls(q_total, kv_total, block, block)

    @property
    def block(self) -> int:
        return self.block_q

    def padded(self, x: Float[Array, "B L N H"]) -> Float[Array, "B L_up N H"]:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.block), (0, 0), (0, 0)))

    def rows(self, x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K G T_up H"]:
        x = self.padded(x)
        return x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)

    def keys(self, x: Float[Array, "B S K H"]) -> Float[Array, "B K S_up H"]:
        return self.padded(x).transpose(0, 2, 1, 3)

    def row_sums(self, x: Float[Array, "B N T"], kv_heads: int) -> Float[Array, "B K G T_up"]:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.block)))
        return x.reshape(x.shape[0], kv_heads, -1, x.shape[2])

    def biases(self, bias: Float[Array, "#B #N T S"], kv_heads: int) -> Float[Array, "#B #K #G T_up S_up"]:
        pads = ((0, -self.q_total % self.block), (0, -self.kv_total % self.block))
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, 0), *pads))
        heads = (1, 1) if bias.shape[1] == 1 else (kv_heads, -1)
        return bias.reshape(bias.shape[0], *heads, *bias.shape[2:])


def _block(x, index, block: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _put(x, index, block: int, axis: int, value):
    return jax.lax.dynamic_update_slice_in_dim(x, value, index * block, axis)


def _corner(x, pair, block: int):
    """The [..., c, c] block of `x` [..., T, S] at a pair, and where it starts."""
    start = (0,) * (x.ndim - 2) + (pair[0] * block, pair[1] * block)
    return jax.lax.dynamic_slice(x, start, (*x.shape[:-2], block, block)), start


def _scores(blocks: _Chunks, mask: Mask, scoring: Scoring, pair, q, k, bias):
    """Masked scores of one pair [B, K, G, c, c], the derivative of the soft cap, and the mask [b, 1, 1, c, c]."""
    raw = scoring.scale * jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = soft_capped(raw, scoring.soft_cap)
    slope = None if scoring.soft_cap is None else 1 - (scores / scoring.soft_cap) ** 2
    if bias is not None:
        scores += _corner(bias, pair, blocks.block)[0]
    lanes = jnp.arange(blocks.block)
    q_index, kv_index = (index * blocks.block + lanes for index in pair)
    allowed = mask.allowed(q_index, kv_index, blocks.q_total, blocks.kv_total)[:, None, None]
    return jnp.where(allowed, scores, MASKED), slope, allowed


def _over_pairs(blocks: _Chunks, mask: Mask, visit, start):
    """Folds `visit(carry, pair) -> carry` over the pairs that the mask allows."""
    pairs = blocks.pairs(mask)
    if mask.is_static or may_be_spread():
        return jax.lax.scan(lambda carry, pair: (visit(carry, pair), None), start, jnp.asarray(pairs))[0]
    seen = jnp.any(blocks.seen(mask, pairs), axis=0)

    def step(carry, at):
        pair, wanted = at
        return jax.lax.cond(wanted, visit, lambda carry, pair: carry, carry, pair), None

    return jax.lax.scan(step, start, (jnp.asarray(pairs), seen))[0]


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N T S"] | None,
    mask: Mask,
    scoring: Scoring,
    dtype: Any,
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Equal to the reference up to rounding. Products run in q's dtype, softmax in float32."""
    blocks = _Chunks.of(q.shape[1], k.shape[1])
    block, kv_heads = blocks.block, k.shape[2]
    q_BKGTH, k_BKSH, v_BKSH = blocks.rows(q, kv_heads), blocks.keys(k), blocks.keys(v)
    table = None if bias is None else blocks.biases(bias, kv_heads)

    def visit(carry, pair):
        i, j = pair
        q_i, k_j, v_j = _block(q_BKGTH, i, block, 3), _block(k_BKSH, j, block, 2), _block(v_BKSH, j, block, 2)
        scores, _, allowed = _scores(blocks, mask, scoring, pair, q_i, k_j, table)
        top_i, norm_i, out_i = (_block(x, i, block, 3) for x in carry)
        new_top = jnp.maximum(top_i, jnp.max(scores, axis=-1))
        weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top_i - new_top)
        values = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v_j, preferred_element_type=jnp.float32)
        new = (new_top, norm_i * keep + jnp.sum(weights, axis=-1), out_i * keep[..., None] + values)
        return tuple(_put(x, i, block, 3, each) for x, each in zip(carry, new, strict=True))

    rows = q_BKGTH.shape[:-1]
    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1])))
    top, norm, out = _over_pairs(blocks, mask, visit, start)
    safe = jnp.where(norm == 0, 1.0, norm)
    out = (out / safe[..., None]).astype(dtype).transpose(0, 3, 1, 2, 4)
    lse = (top + jnp.log(safe)).reshape(q.shape[0], q.shape[2], -1)
    return out.reshape(*out.shape[:2], q.shape[2], -1)[:, : blocks.q_total], lse[:, :, : blocks.q_total]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    bias: Float[Array, "#B #N T S"] | None,
    mask: Mask,
    scoring: Scoring,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    d_out: Float[Array, "B T N Hv"],
    dtype: Any,
) -> tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"], Float[Array, "#B #N T S"] | None
]:
    """Gradients, block by block; sums over blocks in float32."""
    blocks = _Chunks.of(q.shape[1], k.shape[1])
    block, kv_heads = blocks.block, k.shape[2]
    q_BKGTH, d_out_BKGTH = (blocks.rows(x, kv_heads) for x in (q, d_out))
    k_BKSH, v_BKSH = blocks.keys(k), blocks.keys(v)
    lse_BKGT, delta_BKGT = (blocks.row_sums(x, kv_heads) for x in (lse, delta))
    table = None if bias is None else blocks.biases(bias, kv_heads)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def visit(carry, pair):
        dq, dk, dv, d_table = carry
        i, j = pair
        q_i, lse_i, delta_i, d_out_i = (_block(x, i, block, 3) for x in (q_BKGTH, lse_BKGT, delta_BKGT, d_out_BKGTH))
        k_j, v_j = (_block(x, j, block, 2) for x in (k_BKSH, v_BKSH))
        scores, slope, allowed = _scores(blocks, mask, scoring, pair, q_i, k_j, table)
        weights = jnp.where(allowed, jnp.exp(scores - lse_i[..., None]), 0.0)
        d_scores = weights * (product("bkgth,bksh->bkgts", d_out_i, v_j) - delta_i[..., None])
        if d_table is not None:
            old, where = _corner(d_table, pair, block)
            shared = tuple(axis for axis in range(3) if d_table.shape[axis] == 1)
            new = old + jnp.sum(d_scores, axis=shared, keepdims=True)
            d_table = jax.lax.dynamic_update_slice(d_table, new, where)
        d_raw = (scoring.scale * (d_scores if slope is None else d_scores * slope)).astype(q.dtype)
        dq_i = product("bkgts,bksh->bkgth", d_raw, k_j)
        dk_j = product("bkgts,bkgth->bksh", d_raw, q_i)
        dv_j = product("bkgts,bkgth->bksh", weights.astype(q.dtype), d_out_i)
        dq = _put(dq, i, block, 3, _block(dq, i, block, 3) + dq_i)
        dk = _put(dk, j, block, 2, _block(dk, j, block, 2) + dk_j)
        dv = _put(dv, j, block, 2, _block(dv, j, block, 2) + dv_j)
        return dq, dk, dv, d_table

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_BKGTH, k_BKSH, v_BKSH)]
    start = (*zeros, None if table is None else jnp.zeros(table.shape, jnp.float32))
    dq, dk, dv, d_table = _over_pairs(blocks, mask, visit, start)
    dq = dq.transpose(0, 3, 1, 2, 4).reshape(q.shape[0], -1, *q.shape[2:])[:, : blocks.q_total]
    dk, dv = (x.transpose(0, 2, 1, 3)[:, : blocks.kv_total] for x in (dk, dv))
    d_bias = None
    if bias is not None and d_table is not None:
        d_bias = d_table.reshape(*bias.shape[:2], *d_table.shape[3:])[:, :, : blocks.q_total, : blocks.kv_total]
    return dq.astype(dtype), dk.astype(dtype), dv.astype(dtype), d_bias

"""Attention in blocks with an online softmax, as plain XLA; only blocks that the mask can allow are visited.

The pairs (query block, key block) are listed once, at trace time, from the causal offset and the window; a `lax.scan`
runs over the list, so the program's size does not grow with the sequence. Scores exist for one pair at a time. The
backward pass recomputes them from the saved log-sum-exp (Dao 2023, FlashAttention-2, algorithm 2).

Shape legend: B batch, T queries, S keys, N heads, K kv heads, G = N / K, H head dim, I query blocks, J key blocks, c
    block length.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.spec import Mask, soft_capped

# Scores of one pair and head take 256 KiB in float32. Not tuned yet: no other size has been measured.
BLOCK = 256
# Finite, so that a row with no key yet gives exp(0) * 0 and not NaN.
MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class _Static:
    """What shapes a program of the chunked implementation besides the arrays."""

    scale: float
    soft_cap: float | None
    q_total: int
    kv_total: int
    block: int

    def pairs(self, mask: Mask) -> np.ndarray:
        """int32 [pairs, 2]: the (query block, key block) pairs with at least one allowed position."""
        q_blocks, kv_blocks = -(-self.q_total // self.block), -(-self.kv_total // self.block)
        offset = self.kv_total - self.q_total
        pairs = []
        for i in range(q_blocks):
            first = i * self.block + offset
            last = min((i + 1) * self.block, self.q_total) - 1 + offset
            for j in range(kv_blocks):
                too_late = mask.causal and j * self.block > last
                too_early = mask.window is not None and (j + 1) * self.block - 1 <= first - mask.window
                if not (too_late or too_early):
                    pairs.append((i, j))
        return np.asarray(pairs or [(0, 0)], np.int32)


def attention_chunked(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None,
    bias: None = None,
) -> Float[Array, "B T N Hv"]:
    """Blockwise attention; equal to the reference up to rounding. Products run in q's dtype, softmax in float32."""
    batch, q_total, heads, head_dim = q.shape
    kv_total, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    longest = max(q_total, kv_total)
    static = _Static(scale, soft_cap, q_total, kv_total, BLOCK if longest > BLOCK else longest)
    q_BKGTH = _padded(q, static.block).reshape(batch, -1, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = (_padded(x, static.block).transpose(0, 2, 1, 3) for x in (k, v))
    out = _attend(static, q_BKGTH, k_BKSH, v_BKSH, mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, v.shape[-1])[:, :q_total]


def _padded(x: Float[Array, "B L N H"], block: int) -> Float[Array, "B L_up N H"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))


def _block(x, index, block: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _put(x, index, block: int, axis: int, value):
    return jax.lax.dynamic_update_slice_in_dim(x, value, index * block, axis)


def _scores(static: _Static, mask: Mask, pair, q, k):
    """Masked scores of one pair [B, K, G, c, c], what they were before the soft cap, and the mask [b, 1, 1, c, c]."""
    raw = static.scale * jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    lanes = jnp.arange(static.block)
    allowed = mask.allowed(
        pair[0] * static.block + lanes, pair[1] * static.block + lanes, static.q_total, static.kv_total
    )[:, None, None]
    return jnp.where(allowed, soft_capped(raw, static.soft_cap), MASKED), raw, allowed


def _forward(static: _Static, q, k, v, mask: Mask):
    """Output [B, K, G, T, H] and log-sum-exp [B, K, G, T], float32."""
    rows = q.shape[:-1]
    block = static.block

    def visit(carry, pair):
        i, j = pair
        scores, _, allowed = _scores(static, mask, pair, _block(q, i, block, 3), _block(k, j, block, 2))
        top_i, norm_i, out_i = (_block(x, i, block, 3) for x in carry)
        new_top = jnp.maximum(top_i, jnp.max(scores, axis=-1))
        weights = jnp.where(allowed, jnp.exp(scores - new_top[..., None]), 0.0)
        keep = jnp.exp(top_i - new_top)
        values = jnp.einsum(
            "bkgts,bksh->bkgth",
            weights.astype(v.dtype),
            _block(v, j, block, 2),
            preferred_element_type=jnp.float32,
        )
        new = (new_top, norm_i * keep + jnp.sum(weights, axis=-1), out_i * keep[..., None] + values)
        return tuple(_put(x, i, block, 3, each) for x, each in zip(carry, new, strict=True)), None

    start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, v.shape[-1])))
    (top, norm, out), _ = jax.lax.scan(visit, start, jnp.asarray(static.pairs(mask)))
    safe = jnp.where(norm == 0, 1.0, norm)
    return (out / safe[..., None]).astype(q.dtype), top + jnp.log(safe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q, k, v, mask: Mask):
    return _forward(static, q, k, v, mask)[0]


def _attend_fwd(static: _Static, q, k, v, mask: Mask):
    out, lse = _forward(static, q, k, v, mask)
    return out, (q, k, v, mask, out, lse)


def _attend_bwd(static: _Static, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    block, dtype = static.block, q.dtype
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def visit(carry, pair):
        dq, dk, dv = carry
        i, j = pair
        q_i, lse_i, delta_i, d_out_i = (_block(x, i, block, 3) for x in (q, lse, delta, d_out))
        k_j, v_j = (_block(x, j, block, 2) for x in (k, v))
        scores, raw, allowed = _scores(static, mask, pair, q_i, k_j)
        weights = jnp.where(allowed, jnp.exp(scores - lse_i[..., None]), 0.0)
        d_weights = jnp.einsum("bkgth,bksh->bkgts", d_out_i, v_j, preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - delta_i[..., None])
        if static.soft_cap is not None:
            d_scores = d_scores * (1 - jnp.tanh(raw / static.soft_cap) ** 2)
        d_scores = (static.scale * d_scores).astype(dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dq_i = product("bkgts,bksh->bkgth", d_scores, k_j)
        dk_j = product("bkgts,bkgth->bksh", d_scores, q_i)
        dv_j = product("bkgts,bkgth->bksh", weights.astype(dtype), d_out_i)
        dq = _put(dq, i, block, 3, _block(dq, i, block, 3) + dq_i)
        dk = _put(dk, j, block, 2, _block(dk, j, block, 2) + dk_j)
        dv = _put(dv, j, block, 2, _block(dv, j, block, 2) + dv_j)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads, _ = jax.lax.scan(visit, start, jnp.asarray(static.pairs(mask)))
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)

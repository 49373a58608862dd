"""The layers every family is made of: linear, norms, rotary embedding, attention, MLP and mixture of experts.

A layer computes in the dtype of its weights, with norms, softmax and routing in float32. Linear weights are `[out,
in]`, the order of Hugging Face files, so that loading turns nothing.

Shape legend: B batch, T tokens, N heads, K kv heads, H head dim, D model, F inner, E experts, V vocab.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from meshloom.models.config import Activation, DecoderConfig, LayerSpec, MoEConfig, RopeConfig
from meshloom.models.sequence import Layout, attend, capacity_of, positions_of
from meshloom.pallas_kernels import KVPages, matmul, routed_experts, top_experts

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype) -> nnx.Param:
    """A parameter drawn from N(0, scale^2)."""
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """y = x W^T + b with W `[out, in]`, which may be quantized."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, scale: float, rngs: nnx.Rngs, dtype):
        self.weight = normal_param(rngs, (d_out, d_in), scale, dtype)
        self.bias = nnx.Param(jnp.zeros(d_out, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*rows I"], out_dtype=None) -> Float[Array, "*rows O"]:
        """Accumulates and returns in `out_dtype`, or in the dtype of the weights."""
        y = matmul(x, self.weight.get_value(), out_dtype=out_dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * w, in float32 (Zhang & Sennrich 2019); `offset` 1 makes it (1 + w), Gemma's form."""

    def __init__(self, size: int, *, eps: float, offset: bool = False, dtype):
        self.weight = nnx.Param(jnp.zeros(size, dtype) if offset else jnp.ones(size, dtype))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (normed * (1 + weight if self.offset else weight)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * w + b, in float32 (Ba et al. 2016)."""

    def __init__(self, size: int, *, eps: float, bias: bool, dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        normed = normed * self.weight[...].astype(jnp.float32)
        return (normed if self.bias is None else normed + self.bias[...].astype(jnp.float32)).astype(x.dtype)


def make_norm(config: DecoderConfig, dtype) -> RMSNorm | LayerNorm:
    """The norm over the model dimension that the configuration asks for."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias, dtype=dtype)


def rotate(
    x: Float[Array, "*rows N H"], positions: Int[Array, "*rows"], rope: RopeConfig, capacity: int
) -> Float[Array, "*rows N H"]:
    """Applies rotary position embedding to the first `rope.rotated(H)` dimensions of every head.

    Args:
        capacity: longest sequence the program could meet, in tokens; `longrope` picks its factors by it.
    """
    head_dim = x.shape[-1]
    rotated = rope.rotated(head_dim)
    frequencies = rope.frequencies(head_dim, long_context=capacity > rope.original_context)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = (rope.attention_factor * f(angles) for f in (jnp.cos, jnp.sin))
    head = x[..., :rotated].astype(jnp.float32)
    if rope.interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(head.shape)
    else:
        first, second = jnp.split(head, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if rotated == head_dim else jnp.concatenate([turned, x[..., rotated:]], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with grouped kv heads, over any token layout."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype):
        heads, kv_heads, head_dim = config.n_heads, config.n_kv_heads, config.head_dim

        def linear(d_in: int, d_out: int, bias: bool) -> Linear:
            return Linear(d_in, d_out, bias=bias, scale=config.init_scale, rngs=rngs, dtype=dtype)

        self.q = linear(config.d_model, heads * head_dim, config.qkv_bias)
        self.k = linear(config.d_model, kv_heads * head_dim, config.qkv_bias)
        self.v = linear(config.d_model, kv_heads * head_dim, config.qkv_bias)
        self.out = linear(heads * head_dim, config.d_model, config.out_bias)
        for name in ("q_norm", "k_norm"):
            norm = RMSNorm(head_dim, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype)
            setattr(self, name, norm if config.qk_norm else None)
        self.head_dim = head_dim
        self.rope = spec.rope
        self.window = spec.window
        self.scale = config.attention_scale
        self.soft_cap = config.attention_soft_cap

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "*rows D"], layout: Layout, pages: KVPages | None
    ) -> tuple[Float[Array, "*rows D"], KVPages | None]:
        q, k, v = (project(x).reshape(*x.shape[:-1], -1, self.head_dim) for project in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            rows = x.shape[:-1]
            positions = positions_of(rows, layout)
            capacity = capacity_of(rows, layout, 0 if pages is None else pages.page_size)
            q, k = (rotate(each, positions, self.rope, capacity) for each in (q, k))
        y, pages = attend(q, k, v, layout, pages, window=self.window, scale=self.scale, soft_cap=self.soft_cap)
        return self.out(y.reshape(*x.shape[:-1], -1)), pages


class MLP(nnx.Module):
    """down(activation(gate x) * up x), or down(activation(up x)) without a gate."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Activation,
        gated: bool,
        bias: bool,
        scale: float,
        rngs: nnx.Rngs,
        dtype,
    ):
        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, bias=bias, scale=scale, rngs=rngs, dtype=dtype)

        self.gate = linear(d_model, d_ff) if gated else None
        self.up = linear(d_model, d_ff)
        self.down = linear(d_ff, d_model)
        self.activation = activation

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        activation = ACTIVATIONS[self.activation]
        inner = activation(self.up(x)) if self.gate is None else activation(self.gate(x)) * self.up(x)
        return self.down(inner)


class ExpertWeights(nnx.Module):
    """One projection of all experts, `[E, out, in]`, which may be quantized."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, scale: float, rngs: nnx.Rngs, dtype):
        self.weight = normal_param(rngs, (n_experts, d_out, d_in), scale, dtype)


class MoE(nnx.Module):
    """Top-k routed gated experts without capacity limits.

    No row is dropped, so the output of a token does not depend on its neighbours (Gale et al. 2022, MegaBlocks).
    """

    def __init__(self, d_model: int, moe: MoEConfig, *, activation: Activation, scale: float, rngs: nnx.Rngs, dtype):
        def experts(d_in: int, d_out: int) -> ExpertWeights:
            return ExpertWeights(moe.n_experts, d_in, d_out, scale=scale, rngs=rngs, dtype=dtype)

        self.router = Linear(d_model, moe.n_experts, bias=False, scale=scale, rngs=rngs, dtype=dtype)
        self.gate = experts(d_model, moe.d_ff)
        self.up = experts(d_model, moe.d_ff)
        self.down = experts(moe.d_ff, d_model)
        self.moe = moe
        self.activation = activation

    @jax.named_scope("moe")
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        probabilities = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        weights, chosen = top_experts(probabilities, self.moe.top_k)
        if self.moe.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        matrices = (each.weight.get_value() for each in (self.gate, self.up, self.down))
        return routed_experts(x, weights, chosen, *matrices, activation=ACTIVATIONS[self.activation])

"""The decoder-only transformer, written once for training, prefill and decode.

The same `__call__` takes whole rows, packed documents or a ragged step over a paged cache. It knows no mesh, no
platform and no kernel: sharding is derived from its trace, and kernels are chosen behind `attention` and
`paged_attention`.

Shape legend: B batch, T tokens, R rows whose logits are wanted, D model, V vocab.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from meshloom.models.config import DecoderConfig, LayerSpec
from meshloom.models.layers import MLP, Attention, Linear, MoE, make_norm, normal_param
from meshloom.models.sequence import Layout, positions_of
from meshloom.models.stack import Cache, LayerStack
from meshloom.pallas_kernels import KVPages, matmul
from meshloom.pallas_kernels.attention.context.spreading import token_order
from meshloom.pallas_kernels.attention.spec import soft_capped


class Embedding(nnx.Module):
    """A table of rows `[V, D]`, which may be quantized, looked up by id, and multiplied with to unembed when tied."""

    def __init__(self, rows: int, size: int, *, scale: float, rngs: nnx.Rngs, dtype):
        self.weight = normal_param(rngs, (rows, size), scale, dtype)

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        return self.weight.get_value()[ids]

    def logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """x W^T in float32."""
        return matmul(x, self.weight.get_value(), out_dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Unembedding:
    """What makes logits of hidden rows: soft_cap * tanh((x W^T + b) / soft_cap).

    Attributes:
        weight: `[V, D]`. bias: `[V]` or None; or what the module's state holds in their place, such as a spec.
    """

    weight: Any
    bias: Any
    soft_cap: float | None


class DecoderLayer(nnx.Module):
    """Attention and MLP around the residual, with the norms where the family puts them."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, *, rngs: nnx.Rngs, dtype):
        self.attention = Attention(config, spec, rngs=rngs, dtype=dtype)
        options = {"activation": config.activation, "scale": config.init_scale, "rngs": rngs, "dtype": dtype}
        if spec.moe:
            self.mlp: MoE | MLP = MoE(config.d_model, config.moe, **options)
        else:
            self.mlp = MLP(config.d_model, config.d_ff, gated=config.gated, bias=config.mlp_bias, **options)
        self.attention_norm = make_norm(config, dtype) if config.pre_norm else None
        self.mlp_norm = make_norm(config, dtype) if config.pre_norm and not config.shared_norm else None
        self.post_attention_norm = make_norm(config, dtype) if config.post_norm else None
        self.post_mlp_norm = make_norm(config, dtype) if config.post_norm else None
        self.parallel = config.parallel
        self.shared_norm = config.shared_norm

    def __call__(
        self, x: Float[Array, "*rows D"], layout: Layout, pages: KVPages | None
    ) -> tuple[Float[Array, "*rows D"], KVPages | None]:
        normed = x if self.attention_norm is None else self.attention_norm(x)
        y, pages = self.attention(normed, layout, pages)
        y = y if self.post_attention_norm is None else self.post_attention_norm(y)
        if self.shared_norm:
            return x + y + self.mlp(normed), pages
        residual = x if self.parallel else x + y
        z = self.mlp(residual if self.mlp_norm is None else self.mlp_norm(residual))
        z = z if self.post_mlp_norm is None else self.post_mlp_norm(z)
        return (x + y + z if self.parallel else residual + z), pages


class Decoder(nnx.Module):
    """A decoder-only language model."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        options = {"scale": config.init_scale, "rngs": rngs, "dtype": param_dtype}
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model, **options)
        learned = config.learned_positions + config.position_offset
        self.positions = Embedding(learned, config.d_model, **options) if config.learned_positions else None
        self.layers = LayerStack(
            lambda i, rngs: DecoderLayer(config, config.layers[i], rngs=rngs, dtype=param_dtype),
            config.n_layers,
            period=config.period,
            scan=config.scan_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.final_norm = make_norm(config, param_dtype)
        tied = config.tie_embeddings
        self.unembed = None if tied else Linear(config.d_model, config.vocab_size, bias=config.unembed_bias, **options)

    def __call__(
        self,
        tokens: Int[Array, "*rows"],
        layout: Layout = None,
        cache: Cache | None = None,
        rows: Int[Array, "R"] | None = None,
        unembed: bool = True,
    ) -> tuple[Float[Array, "*out V_or_D"], Cache | None]:
        """Next-token logits, and the updated cache.

        Args:
            tokens: int32 `[B, T]`, or `[T]` rows of a ragged step.
            layout: None (plain rows), `Packed` documents, or `Ragged` with a `cache` from `init_cache`.
            rows: with a ragged step, the token rows whose logits are wanted; None is all.
            unembed: False returns what logits are made of, `[..., D]`, for a loss that takes `unembedding` itself.
        Returns:
            float32 logits `[B, T, V]`, `[T, V]` or `[R, V]`; the cache, or None without one.
        """
        x = self.embed(tokens)
        if self.config.embed_scale != 1.0:
            x = x * jnp.asarray(self.config.embed_scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions_of(tokens.shape, layout) + self.config.position_offset)
        x, cache = self.layers(x, layout, cache)
        if rows is not None:
            x = x[rows]
        x = self.final_norm(x)
        return (self._logits(x) if unembed else x), cache

    def token_order(self, length: int) -> str:
        """How `Packed` tokens of rows of this length should come on the mesh in scope; see `token_order`."""
        return token_order(length, self.config.n_heads)

    @property
    def unembedding(self) -> Unembedding:
        """The arrays behind the logits."""
        layer = self.embed if self.unembed is None else self.unembed
        bias = None if self.unembed is None or self.unembed.bias is None else self.unembed.bias.get_value()
        return Unembedding(layer.weight.get_value(), bias, self.config.logit_soft_cap)

    @jax.named_scope("unembed")
    def _logits(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        logits = self.embed.logits(x) if self.unembed is None else self.unembed(x, jnp.float32)
        return soft_capped(logits, self.config.logit_soft_cap)

    def init_cache(self, num_pages: int, page_size: int, dtype=jnp.float32, shards: int = 1, lanes: int = 1) -> Cache:
        """An empty paged cache of `num_pages` pages of `page_size` tokens, in every layer; see `KVPages.zeros`."""
        sizes = num_pages, page_size, self.config.n_kv_heads, self.config.head_dim
        return self.layers.init_cache(lambda: KVPages.zeros(*sizes, dtype, shards, lanes))

    def example_inputs(self, batch: int = 8, length: int = 128) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract arguments with which the module can be traced."""
        return (jax.ShapeDtypeStruct((batch, length), jnp.int32),)

"""The encoder-decoder transformer with relative position biases (T5), from the same layers as the decoder-only model.

The encoder reads whole rows; the decoder takes the same layouts as `Decoder`, a ragged step over a paged cache
included, and reads the encoder's output through cross-attention.

Shape legend: B batch, T tokens, S sequences of a ragged step, L encoder length, N heads, H head dim, D model, V vocab.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from meshloom.models.config import EncoderDecoderConfig
from meshloom.models.decoder import Embedding
from meshloom.models.layers import MLP, Linear, RMSNorm, normal_param
from meshloom.models.sequence import Layout, attend
from meshloom.models.stack import Cache, LayerStack
from meshloom.pallas_kernels import KVPages, Mask, Ragged, attention
from meshloom.pallas_kernels.attention.spec import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """The encoder's output for each sequence, and how much of each row is not padding (None: all of it)."""

    hidden: Float[Array, "S L D"] | Leaf
    lens: Int[Array, "S"] | Leaf | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _EncoderCall:
    mask: Mask | Leaf
    bias: Float[Array, "1 N L L"] | Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecoderCall:
    layout: Layout | Leaf
    memory: Memory | Leaf
    distance_bias: Float[Array, "N distances"] | Leaf


class RelativeBias(nnx.Module):
    """A learned bias per head and bucket of relative distance (Raffel et al. 2020, section 2.1), for all layers."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, dtype):
        self.weight = normal_param(rngs, (config.position_buckets, config.n_heads), config.init_scale, dtype)
        self.max_distance = config.max_distance

    def _bucket(self, distance: Int[Array, "*shape"], buckets: int) -> Int[Array, "*shape"]:
        """Half the buckets are exact distances, the other half logarithmic up to `max_distance`."""
        exact = buckets // 2
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        return jnp.where(
            distance < exact, distance, jnp.minimum(exact + (ratio * (buckets - exact)).astype(int), buckets - 1)
        )

    def causal(self) -> Float[Array, "N distances"]:
        """Bias of the key d tokens back, d = 0..max_distance (all farther ones share the last)."""
        buckets = self._bucket(jnp.arange(self.max_distance + 1), self.weight.shape[0])
        return self.weight[...][buckets].T.astype(jnp.float32)

    def both_ways(self, length: int) -> Float[Array, "1 N L L"]:
        """Bias of every key for every query of a row; later keys use the upper half of the buckets."""
        position = jnp.arange(length)
        ahead = position[None, :] - position[:, None]
        half = self.weight.shape[0] // 2
        bucket = self._bucket(jnp.abs(ahead), half) + jnp.where(ahead > 0, half, 0)
        return self.weight[...][bucket].transpose(2, 0, 1)[None].astype(jnp.float32)


class MultiHead(nnx.Module):
    """The four projections of an attention whose scores are not scaled (T5 folds the scale into initialisation)."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, dtype):
        inner = config.n_heads * config.head_dim
        options = {"bias": False, "scale": config.init_scale, "rngs": rngs, "dtype": dtype}
        self.q = Linear(config.d_model, inner, **options)
        self.k = Linear(config.d_model, inner, **options)
        self.v = Linear(config.d_model, inner, **options)
        self.out = Linear(inner, config.d_model, **options)
        self.head_dim = config.head_dim

    def heads(self, project: Linear, x: Float[Array, "*rows D"]) -> Float[Array, "*rows N H"]:
        """One projection, split into heads."""
        return project(x).reshape(*x.shape[:-1], -1, self.head_dim)

    def merge(self, y: Float[Array, "*rows N H"]) -> Float[Array, "*rows D"]:
        """Heads back to the model dimension."""
        return self.out(y.reshape(*y.shape[:-2], -1))


class _Layer(nnx.Module):
    """What encoder and decoder layers share: self-attention and MLP, each behind a norm."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, dtype):
        self.attention = MultiHead(config, rngs=rngs, dtype=dtype)
        self.mlp = MLP(
            config.d_model,
            config.d_ff,
            activation=config.activation,
            gated=config.gated,
            bias=False,
            scale=config.init_scale,
            rngs=rngs,
            dtype=dtype,
        )
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)


class EncoderLayer(_Layer):
    """Bidirectional self-attention and MLP."""

    def __call__(self, x: Float[Array, "B L D"], call: _EncoderCall, pages: None) -> tuple[Float[Array, "B L D"], None]:
        normed, attn = self.attention_norm(x), self.attention
        q, k, v = (attn.heads(project, normed) for project in (attn.q, attn.k, attn.v))
        x = x + attn.merge(attention(q, k, v, mask=call.mask, scale=1.0, bias=call.bias))
        return x + self.mlp(self.mlp_norm(x)), None


class CrossDecoderLayer(_Layer):
    """Causal self-attention, attention to the encoder's output, and MLP."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, dtype):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.cross = MultiHead(config, rngs=rngs, dtype=dtype)
        self.cross_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "*rows D"], call: _DecoderCall, pages: KVPages | None
    ) -> tuple[Float[Array, "*rows D"], KVPages | None]:
        normed, attn = self.attention_norm(x), self.attention
        q, k, v = (attn.heads(project, normed) for project in (attn.q, attn.k, attn.v))
        y, pages = attend(q, k, v, call.layout, pages, scale=1.0, distance_bias=call.distance_bias)
        x = x + attn.merge(y)
        x = x + self._cross_attend(self.cross_norm(x), call)
        return x + self.mlp(self.mlp_norm(x)), pages

    def _cross_attend(self, x: Float[Array, "*rows D"], call: _DecoderCall) -> Float[Array, "*rows D"]:
        q = self.cross.heads(self.cross.q, x)
        k, v = (self.cross.heads(project, call.memory.hidden) for project in (self.cross.k, self.cross.v))
        lens = call.memory.lens
        if not isinstance(call.layout, Ragged):
            return self.cross.merge(attention(q, k, v, mask=Mask(causal=False, kv_lens=lens), scale=1.0))
        sequence = call.layout.sequence_of(x.shape[0])
        mask = Mask(causal=False, kv_lens=None if lens is None else lens[sequence])
        return self.cross.merge(attention(q[:, None], k[sequence], v[sequence], mask=mask, scale=1.0)[:, 0])


class Tower(nnx.Module):
    """A layer stack with its relative bias and final norm."""

    def __init__(self, config: EncoderDecoderConfig, layer: type[_Layer], n_layers: int, *, rngs: nnx.Rngs, dtype):
        self.relative_bias = RelativeBias(config, rngs=rngs, dtype=dtype)
        self.layers = LayerStack(
            lambda i, rngs: layer(config, rngs=rngs, dtype=dtype),
            n_layers,
            period=1,
            scan=config.scan_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)


class EncoderDecoder(nnx.Module):
    """An encoder-decoder language model."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        options = {"scale": config.init_scale, "rngs": rngs, "dtype": param_dtype}
        self.config = config
        self.embed = Embedding(config.vocab_size, config.d_model, **options)
        self.encoder = Tower(config, EncoderLayer, config.n_encoder_layers, rngs=rngs, dtype=param_dtype)
        self.decoder = Tower(config, CrossDecoderLayer, config.n_decoder_layers, rngs=rngs, dtype=param_dtype)
        tied = config.tie_embeddings
        self.unembed = None if tied else Linear(config.d_model, config.vocab_size, bias=False, **options)

    def encode(self, tokens: Int[Array, "B L"], lens: Int[Array, "B"] | None = None) -> Memory:
        """Encodes whole rows; tokens at positions >= lens are padding."""
        call = _EncoderCall(Mask(causal=False, kv_lens=lens), self.encoder.relative_bias.both_ways(tokens.shape[1]))
        x, _ = self.encoder.layers(self.embed(tokens), call)
        return Memory(self.encoder.final_norm(x), lens)

    def decode(
        self,
        tokens: Int[Array, "*rows"],
        memory: Memory,
        layout: Layout = None,
        cache: Cache | None = None,
        rows: Int[Array, "R"] | None = None,
    ) -> tuple[Float[Array, "*out V"], Cache | None]:
        """Next-token logits given the encoder's output; layouts, cache and rows as in `Decoder`.

        With a ragged step, sequence s of the step reads row s of `memory`.
        """
        call = _DecoderCall(layout, memory, self.decoder.relative_bias.causal())
        x, cache = self.decoder.layers(self.embed(tokens), call, cache)
        x = self.decoder.final_norm(x if rows is None else x[rows])
        if self.unembed is not None:
            return self.unembed(x, jnp.float32), cache
        scale = self.config.d_model**-0.5 if self.config.scale_tied_logits else 1.0
        return self.embed.logits(x * jnp.asarray(scale, x.dtype)), cache

    def __call__(
        self, tokens: Int[Array, "B L"], decoder_tokens: Int[Array, "B T"], lens: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Logits `[B, T, V]` of teacher-forced decoding; the pair keeps `Decoder`'s return."""
        return self.decode(decoder_tokens, self.encode(tokens, lens))

    def init_cache(self, num_pages: int, page_size: int, dtype=jnp.float32) -> Cache:
        """An empty paged cache for the decoder's self-attention."""
        heads, head_dim = self.config.n_heads, self.config.head_dim
        return self.decoder.layers.init_cache(lambda: KVPages.zeros(num_pages, page_size, heads, head_dim, dtype))

    def example_inputs(self, batch: int = 8, length: int = 128) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Abstract arguments with which the module can be traced."""
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        return (tokens, tokens)

"""What a transformer is, in numbers: the frozen configuration that every family maps to.

A configuration describes the architecture only. It knows nothing of meshes, devices, kernels or files; `families/`
translates Hugging Face and GGUF metadata to and from it.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.core.errors import ModelError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RopeScaling = Literal["none", "linear", "llama3", "longrope", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, RoFormer) of the first `fraction` of each head.

    Attributes:
        theta: base of the geometric series of wavelengths.
        fraction: share of the head dimension that rotates (GPT-NeoX 0.25; GPT-J 64 of 256).
        interleaved: pairs are neighbours (GPT-J) instead of the two halves of the head.
        scaling: how wavelengths are stretched beyond the trained context.
        factor: stretch factor (`linear`, `llama3`, `yarn`).
        low_frequency_factor, high_frequency_factor, original_context: `llama3` (Llama 3.1 report, section 3.4.3).
        beta_fast, beta_slow: `yarn` ramp (Peng et al. 2023, section 3.2).
        long_factors, short_factors: `longrope` divisors, one per rotated pair (Ding et al. 2024).
        attention_factor: multiplies cos and sin (`longrope`, `yarn`).
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    interleaved: bool = False
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    long_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ModelError(f"rope fraction is the rotated share of a head, in (0, 1]; got {self.fraction}")
        if self.factor <= 0 or self.theta <= 0:
            raise ModelError(f"rope theta and factor must be positive; got theta={self.theta}, factor={self.factor}")

    def rotated(self, head_dim: int) -> int:
        """Number of leading head dimensions that rotate (even)."""
        return int(head_dim * self.fraction + 1e-6) // 2 * 2

    def frequencies(self, head_dim: int, *, long_context: bool = False) -> Float[Array, "half"]:
        """Angular frequency (radians per position) of each rotated pair, float32."""
        rotated = self.rotated(head_dim)
        frequencies = self.theta ** -(jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
        match self.scaling:
            case "none":
                return frequencies
            case "linear":
                return frequencies / self.factor
            case "llama3":
                return self._llama3(frequencies)
            case "yarn":
                return self._yarn(frequencies, rotated)
            case "longrope":
                factors = self.long_factors if long_context else self.short_factors
                return frequencies / jnp.asarray(factors, jnp.float32)

    def _llama3(self, frequencies: Float[Array, "half"]) -> Float[Array, "half"]:
        # Wavelengths longer than context/low are divided by `factor`, shorter than context/high are kept,
        # between: a ramp.
        turns = self.original_context * frequencies / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        keep = jnp.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / self.factor)

    def _yarn(self, frequencies: Float[Array, "half"], rotated: int) -> Float[Array, "half"]:
        def pair_that_turns(times: float) -> float:
            return rotated * math.log(self.original_context / (times * 2 * math.pi)) / (2 * math.log(self.theta))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), rotated - 1)
        ramp = jnp.clip((jnp.arange(rotated // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP (Shazeer et al. 2017; Mixtral, Qwen3-MoE routing).

    Attributes:
        n_experts: experts per layer. top_k: experts per token. d_ff: inner width of one expert.
        normalize: divide the chosen experts' softmax weights by their sum.
        dense_layers: indices of layers that keep a dense MLP of `DecoderConfig.d_ff`.
    """

    n_experts: int
    top_k: int
    d_ff: int
    normalize: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise ModelError(f"top_k must lie in 1..n_experts={self.n_experts}; got {self.top_k}")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one decoder layer from the next; layers with equal specs may share one scanned body."""

    window: int | None
    rope: RopeConfig | None
    moe: bool


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only transformer.

    Attributes (sizes in elements):
        family: the `models.families` entry that maps names to and from Hugging Face.
        vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff: the usual sizes; n_kv_heads divides n_heads.
        context: longest sequence the model was made for, in tokens (a hard limit with learned positions).
        activation, gated: MLP nonlinearity, and whether a gate branch multiplies it (SwiGLU, GeGLU).
        norm: root mean square or layer norm; norm_eps its epsilon; norm_offset: RMS scale is `1 + weight` (Gemma).
        norm_bias: layer norm has a bias.
        pre_norm: normalise a branch's input (all but OPT-350m). post_norm: normalise its output too (Gemma 2, 3).
        parallel: attention and MLP both read the layer input and are added together (GPT-J, GPT-NeoX).
        shared_norm: with `parallel`, both read one norm (GPT-J).
        rope: rotary embedding, or None. learned_positions: rows of a learned table, or 0; position_offset: first row
            used (OPT 2).
        qkv_bias, out_bias, mlp_bias, unembed_bias: which projections have a bias. qk_norm: RMS norm of q and k per
            head.
        attention_scale: multiplies q @ k; None is head_dim ** -0.5. attention_soft_cap, logit_soft_cap: c * tanh(x /
            c).
        embed_scale: multiplies token embeddings.
        window: sliding-window width in tokens; global_every: with a window, every n-th layer attends globally (Gemma
            2: 2,
            Gemma 3: 6; 0 none); local_rope: rope of the windowed layers when it differs.
        window_from: first layer that slides (Qwen's max_window_layers).
        moe: mixture of experts, or None. tie_embeddings: unembed with the embedding table.
        scan_layers: stack equal layers and scan over them (short compile) or unroll (fast CPU decode).
        remat: what the backward pass recomputes: nothing, the whole layer, or all but matrix products.
        init_scale: standard deviation of fresh weights.
    """

    family: str = "llama"
    vocab_size: int = 32_000
    d_model: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 64
    d_ff: int = 1536
    context: int = 2048
    activation: Activation = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    norm_bias: bool = True
    pre_norm: bool = True
    post_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    rope: RopeConfig | None = RopeConfig()
    learned_positions: int = 0
    position_offset: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    embed_scale: float = 1.0
    window: int | None = None
    global_every: int = 0
    window_from: int = 0
    local_rope: RopeConfig | None = None
    moe: MoEConfig | None = None
    tie_embeddings: bool = True
    scan_layers: bool = False
    remat: Literal["none", "full", "dots"] = "none"
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "context"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.window is not None and self.window < 1:
            raise ModelError(f"window is a number of tokens >= 1, or None; got {self.window}")
        if self.global_every and self.window is None:
            raise ModelError(f"global_every={self.global_every} needs a window for the other layers")
        if self.shared_norm and not self.parallel:
            raise ModelError("shared_norm is only meaningful with parallel=True")

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One spec per layer, in order."""
        return tuple(self._layer(i) for i in range(self.n_layers))

    def _layer(self, i: int) -> LayerSpec:
        is_global = bool(self.global_every) and (i + 1) % self.global_every == 0
        slides = self.window is not None and i >= self.window_from and not is_global
        return LayerSpec(
            window=self.window if slides else None,
            rope=self.local_rope if slides and self.local_rope is not None else self.rope,
            moe=self.moe is not None and i not in self.moe.dense_layers,
        )

    @functools.cached_property
    def period(self) -> int:
        """Length of the shortest pattern of layer specs that repeats; the unit a scan runs over."""
        specs = self.layers
        return next(p for p in range(1, len(specs) + 1) if all(specs[i] == specs[i % p] for i in range(len(specs))))


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """Architecture of an encoder-decoder transformer with relative position biases (T5; Raffel et al. 2020).

    Attributes:
        family, vocab_size, d_model, n_heads, head_dim, d_ff, activation, gated, norm_eps, tie_embeddings: as in
            `DecoderConfig`.
        n_encoder_layers, n_decoder_layers: depths.
        position_buckets, max_distance: relative distances are bucketed, logarithmically up to `max_distance` tokens.
        context: longest sequence to plan caches for, in tokens.
        scale_tied_logits: with tied embeddings, divide logits by sqrt(d_model).
        start_token: first decoder token.
    """

    family: str = "t5"
    vocab_size: int = 32_128
    d_model: int = 512
    n_encoder_layers: int = 6
    n_decoder_layers: int = 6
    n_heads: int = 8
    head_dim: int = 64
    d_ff: int = 1024
    context: int = 512
    activation: Activation = "gelu_tanh"
    gated: bool = True
    norm_eps: float = 1e-6
    position_buckets: int = 32
    max_distance: int = 128
    tie_embeddings: bool = False
    scale_tied_logits: bool = True
    start_token: int = 0
    scan_layers: bool = False
    remat: Literal["none", "full", "dots"] = "none"
    init_scale: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_encoder_layers", "n_decoder_layers", "n_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.position_buckets % 4:
            raise ModelError(
                f"position_buckets must be a multiple of 4 (two signs, exact half); got {self.position_buckets}"
            )


ModelConfig = DecoderConfig | EncoderDecoderConfig

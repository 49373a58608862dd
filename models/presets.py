"""Architectures by name, without weights: to plan for, to train from scratch, or to try with random weights.

`meshloom plan llama3-70b --devices ...` reads nothing from disk; `meshloom.load("tiny")` draws random weights.
"""

import math

from meshloom.models.config import DecoderConfig, EncoderDecoderConfig, ModelConfig, MoEConfig, RopeConfig

_LLAMA31_ROPE = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_context=8192)


def _llama3(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> DecoderConfig:
    """Llama 3.1 (Grattafiori et al. 2024, table 3)."""
    return DecoderConfig(
        family="llama",
        vocab_size=128_256,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        d_ff=d_ff,
        context=131_072,
        rope=_LLAMA31_ROPE,
        tie_embeddings=False,
    )


def _llama2(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int) -> DecoderConfig:
    return DecoderConfig(
        family="llama",
        vocab_size=32_000,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=128,
        d_ff=d_ff,
        context=4096,
        tie_embeddings=False,
    )


def _mistral(**differences) -> DecoderConfig:
    fields = {
        "family": "mistral",
        "vocab_size": 32_000,
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "d_ff": 14_336,
        "context": 32_768,
        "tie_embeddings": False,
    }
    return DecoderConfig(**fields | differences)


def _qwen3(**fields) -> DecoderConfig:
    common = {
        "vocab_size": 151_936,
        "head_dim": 128,
        "context": 40_960,
        "norm_eps": 1e-6,
        "rope": RopeConfig(theta=1_000_000.0),
        "qk_norm": True,
        "tie_embeddings": False,
    }
    return DecoderConfig(**common | fields)


def _gemma(d_model: int, **fields) -> DecoderConfig:
    common = {
        "d_model": d_model,
        "head_dim": 256,
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "norm_offset": True,
        "post_norm": True,
        "attention_scale": 256**-0.5,
        "embed_scale": math.sqrt(d_model),
    }
    return DecoderConfig(**common | fields)


def _gpt(family: str, d_model: int, n_layers: int, n_heads: int, **fields) -> DecoderConfig:
    common = {
        "n_kv_heads": n_heads,
        "head_dim": d_model // n_heads,
        "d_ff": 4 * d_model,
        "context": 2048,
        "activation": "gelu_tanh",
        "gated": False,
        "norm": "layer",
        "mlp_bias": True,
    }
    return DecoderConfig(family=family, d_model=d_model, n_layers=n_layers, n_heads=n_heads, **common | fields)


_LEARNED = {"rope": None, "qkv_bias": True, "out_bias": True}

PRESETS: dict[str, ModelConfig] = {
    "tiny": DecoderConfig(
        vocab_size=8192, d_model=256, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=768, context=1024
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        context=8192,
        rope=RopeConfig(theta=100_000.0),
    ),
    "llama2-7b": _llama2(4096, 32, 32, 32, 11_008),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28_672),
    "llama3-8b": _llama3(4096, 32, 32, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 28_672),
    "llama3-405b": _llama3(16_384, 126, 128, 53_248),
    "mistral-7b": _mistral(window=4096),
    "mixtral-8x7b": _mistral(
        family="mixtral",
        rope=RopeConfig(theta=1_000_000.0),
        moe=MoEConfig(n_experts=8, top_k=2, d_ff=14_336),
    ),
    "qwen2-7b": DecoderConfig(
        family="qwen2",
        vocab_size=152_064,
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        d_ff=18_944,
        context=32_768,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1_000_000.0),
        qkv_bias=True,
        tie_embeddings=False,
    ),
    "qwen3-8b": _qwen3(family="qwen3", d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8, d_ff=12_288),
    "qwen3-30b-a3b": _qwen3(
        family="qwen3_moe",
        d_model=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        d_ff=6144,
        moe=MoEConfig(n_experts=128, top_k=8, d_ff=768),
    ),
    "gemma2-9b": _gemma(
        3584,
        family="gemma2",
        vocab_size=256_000,
        n_layers=42,
        n_heads=16,
        n_kv_heads=8,
        d_ff=14_336,
        context=8192,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        window=4096,
        global_every=2,
    ),
    "gemma3-4b": _gemma(
        2560,
        family="gemma3",
        vocab_size=262_208,
        n_layers=34,
        n_heads=8,
        n_kv_heads=4,
        d_ff=10_240,
        context=131_072,
        window=1024,
        global_every=6,
        rope=RopeConfig(theta=1_000_000.0, scaling="linear", factor=8.0),
        local_rope=RopeConfig(),
        qk_norm=True,
    ),
    "phi3-mini": DecoderConfig(
        family="phi3",
        vocab_size=32_064,
        d_model=3072,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=96,
        d_ff=8192,
        context=4096,
        window=2047,
        tie_embeddings=False,
    ),
    "gpt2": _gpt("gpt2", 768, 12, 12, vocab_size=50_257, context=1024, learned_positions=1024, **_LEARNED),
    "gptj-6b": _gpt(
        "gptj",
        4096,
        28,
        16,
        vocab_size=50_400,
        parallel=True,
        shared_norm=True,
        rope=RopeConfig(fraction=0.25, interleaved=True),
        unembed_bias=True,
        tie_embeddings=False,
    ),
    "neox-20b": _gpt(
        "gpt_neox",
        6144,
        44,
        64,
        vocab_size=50_432,
        activation="gelu",
        parallel=True,
        rope=RopeConfig(fraction=0.25),
        qkv_bias=True,
        out_bias=True,
        tie_embeddings=False,
    ),
    "opt-6.7b": _gpt(
        "opt",
        4096,
        32,
        32,
        vocab_size=50_272,
        activation="relu",
        learned_positions=2048,
        position_offset=2,
        **_LEARNED,
    ),
    "t5-base": EncoderDecoderConfig(
        d_model=768,
        n_encoder_layers=12,
        n_decoder_layers=12,
        n_heads=12,
        d_ff=3072,
        activation="relu",
        gated=False,
        tie_embeddings=True,
    ),
}

"""Llama 2, 3 and 3.1 (Touvron et al. 2023; Grattafiori et al. 2024) and Mistral 7B (Jiang et al. 2023).

The common pre-norm decoder: most other families are these few functions with differences.
"""

from typing import Any

from meshloom.models.config import DecoderConfig
from meshloom.models.families.base import Family, HFConfig, activation_to_hf
from meshloom.models.families.rope import rope_from_hf, rope_to_hf
from meshloom.models.weight_map import Rule, linear, rule

OLD_BUFFERS = (r"\.rotary_emb\.inv_freq$",)


def common_from_hf(hf: HFConfig, *, theta: float = 10_000.0, **differences: Any) -> DecoderConfig:
    """The keys that Llama and its descendants share; `theta` is the family's default rope base."""
    d_model, heads = hf.take("hidden_size"), hf.take("num_attention_heads")
    hf.expect("is_encoder_decoder", False)
    fields = {
        "family": hf.family,
        "vocab_size": hf.take("vocab_size"),
        "d_model": d_model,
        "n_layers": hf.take("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": hf.take("num_key_value_heads", heads),
        "head_dim": hf.take("head_dim", d_model // heads),
        "d_ff": hf.take("intermediate_size"),
        "context": (context := hf.take("max_position_embeddings", 2048)),
        "tie_embeddings": hf.take("tie_word_embeddings", False),
        "norm_eps": hf.take("rms_norm_eps", 1e-6),
        "init_scale": hf.take("initializer_range", 0.02),
    }
    if "activation" not in differences:
        differences["activation"] = hf.activation("hidden_act", "silu")
    if "rope" not in differences:
        differences["rope"] = rope_from_hf(hf, context=context, theta=theta)
    return DecoderConfig(**fields | differences)


def common_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Inverse of `common_from_hf`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context,
        "hidden_act": activation_to_hf(config.activation),
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_to_hf(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_scale,
    }


def attention_rules(prefix: str = "model.layers.{i}.self_attn") -> tuple[Rule, ...]:
    """Separate q, k, v and output projections, with q and k norms where the family has them."""
    pairs = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out", "q_norm": "q_norm", "k_norm": "k_norm"}
    return tuple(
        r for file, part in pairs.items() for r in linear(f"{prefix}.{file}", f"layers.{{i}}.attention.{part}")
    )


def mlp_rules(prefix: str = "model.layers.{i}.mlp") -> tuple[Rule, ...]:
    """Gate, up and down projections."""
    return tuple(
        r for part in ("gate", "up", "down") for r in linear(f"{prefix}.{part}_proj", f"layers.{{i}}.mlp.{part}")
    )


def outer_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Embedding, final norm and unembedding; a tied unembedding may be repeated in the file."""
    unembed = "embed" if config.tie_embeddings else "unembed"
    return (
        rule("model.embed_tokens.weight", "embed.weight"),
        *linear("model.norm", "final_norm"),
        rule("lm_head.weight", f"{unembed}.weight", duplicate=config.tie_embeddings),
    )


def norm_rules() -> tuple[Rule, ...]:
    """The two pre-norms of a layer."""
    return (
        *linear("model.layers.{i}.input_layernorm", "layers.{i}.attention_norm"),
        *linear("model.layers.{i}.post_attention_layernorm", "layers.{i}.mlp_norm"),
    )


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Names of Llama's weights."""
    return (*outer_rules(config), *norm_rules(), *attention_rules(), *mlp_rules())


def _llama_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    return common_from_hf(hf, qkv_bias=bias, out_bias=bias, mlp_bias=hf.take("mlp_bias", False))


def _llama_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral_from_hf(hf: HFConfig) -> DecoderConfig:
    return common_from_hf(hf, window=hf.optional("sliding_window", 4096))


def _mistral_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config) | {"sliding_window": config.window}


LLAMA = Family("llama", ("llama",), "LlamaForCausalLM", _llama_from_hf, _llama_to_hf, rules, ignored=OLD_BUFFERS)
MISTRAL = Family(
    "mistral", ("mistral",), "MistralForCausalLM", _mistral_from_hf, _mistral_to_hf, rules, ignored=OLD_BUFFERS
)

"""Gemma 2 (Riviere et al. 2024) and the text model of Gemma 3 (2025).

Norms around both branches, windowed layers among global ones, scaled embeddings.
"""

import math
from collections.abc import Mapping
from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig, RopeConfig
from meshloom.models.families.base import Family, HFConfig
from meshloom.models.families.llama import attention_rules, common_from_hf, common_to_hf, mlp_rules, outer_rules
from meshloom.models.families.qwen import check_layer_types, layer_types
from meshloom.models.families.rope import rope_from_parameters, rope_to_hf
from meshloom.models.weight_map import Rule, linear


def _gemma_from_hf(hf: HFConfig, **differences: Any) -> DecoderConfig:
    hf.optional("hidden_act")  # written by old exporters, never read: hidden_activation is what counts
    hf.expect("use_bidirectional_attention", False)
    bias = hf.take("attention_bias", False)
    config = common_from_hf(
        hf,
        head_dim=hf.take("head_dim", 256),
        tie_embeddings=hf.take("tie_word_embeddings", True),
        activation=hf.activation("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=True,
        post_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=hf.take("query_pre_attn_scalar", 256) ** -0.5,
        attention_soft_cap=differences.pop("attention_soft_cap"),
        logit_soft_cap=differences.pop("logit_soft_cap"),
        embed_scale=math.sqrt(hf.take("hidden_size")),
        **differences,
    )
    return check_layer_types(hf, config)


def _gemma_to_hf(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.attention_scale**-2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise ModelError(
            f"Gemma stores attention_scale as a whole number n of n ** -0.5; {config.attention_scale} is none"
        )
    common = common_to_hf(config)
    return common | {
        "hidden_activation": common.pop("hidden_act"),
        "query_pre_attn_scalar": round(scalar),
        "attention_bias": config.qkv_bias,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "sliding_window": config.window,
        "layer_types": layer_types(config),
    }


def _gemma2_from_hf(hf: HFConfig) -> DecoderConfig:
    return _gemma_from_hf(
        hf,
        attention_soft_cap=hf.optional("attn_logit_softcapping", 50.0),
        logit_soft_cap=hf.optional("final_logit_softcapping", 30.0),
        window=hf.take("sliding_window", 4096),
        global_every=2,
    )


def _gemma3_from_hf(hf: HFConfig) -> DecoderConfig:
    context = hf.take("max_position_embeddings", 131_072)
    everywhere = hf.optional("rope_parameters") or {}
    outer = {
        "full_attention": {"rope_theta": hf.take("rope_theta", 1_000_000.0), **(hf.optional("rope_scaling") or {})},
        "sliding_attention": {"rope_theta": hf.take("rope_local_base_freq", 10_000.0)},
    }
    ropes: dict[str, RopeConfig] = {
        kind: rope_from_parameters(outer[kind] | (everywhere.get(kind) or {}), family=hf.family, context=context)
        for kind in outer
    }
    return _gemma_from_hf(
        hf,
        attention_soft_cap=hf.optional("attn_logit_softcapping"),
        logit_soft_cap=hf.optional("final_logit_softcapping"),
        context=context,
        window=hf.take("sliding_window", 4096),
        global_every=_global_every(hf),
        rope=ropes["full_attention"],
        local_rope=ropes["sliding_attention"],
        qk_norm=True,
    )


def _global_every(hf: HFConfig) -> int:
    stated = [hf.optional(key) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
    kinds = hf.optional("layer_types") or []
    # Read off the list where there is one: the pattern's own key is dropped by some writers.
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else stated[0] or stated[1] or 6


def _gemma3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    ropes = {"full_attention": rope_to_hf(config.rope), "sliding_attention": rope_to_hf(config.local_rope)}
    return _gemma_to_hf(config) | {"rope_parameters": ropes, "sliding_window_pattern": config.global_every}


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    }
    named = (r for file, part in norms.items() for r in linear(f"model.layers.{{i}}.{file}", f"layers.{{i}}.{part}"))
    return (*outer_rules(config), *named, *attention_rules(), *mlp_rules())


# What a multimodal config.json leaves out of its text_config (Gemma3TextConfig's defaults).
_GEMMA3_DEFAULTS = {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}


def _text_only(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text model's part of a multimodal config.json."""
    return _GEMMA3_DEFAULTS | values["text_config"] if "text_config" in values else values


GEMMA2 = Family("gemma2", ("gemma2",), "Gemma2ForCausalLM", _gemma2_from_hf, _gemma_to_hf, _rules)
GEMMA3 = Family(
    "gemma3",
    ("gemma3_text", "gemma3"),
    "Gemma3ForCausalLM",
    _gemma3_from_hf,
    _gemma3_to_hf,
    _rules,
    unwrap=_text_only,
    renames=(
        (r"^(model\.language_model|language_model\.model)\.", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    ignored=(r"(^|\.)vision_tower\.", r"(^|\.)multi_modal_projector\."),
)

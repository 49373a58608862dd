"""Qwen2 (Yang et al. 2024: biases on q, k, v), Qwen3 (2025: normed q and k) and Qwen3-MoE."""

from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.families.base import Family, HFConfig
from meshloom.models.families.llama import (
    OLD_BUFFERS,
    attention_rules,
    common_from_hf,
    common_to_hf,
    mlp_rules,
    norm_rules,
    outer_rules,
    rules,
)
from meshloom.models.weight_map import Rule, rule


def _window(hf: HFConfig) -> dict[str, Any]:
    """Qwen slides in the layers from `max_window_layers` on, and only when told to."""
    slides, width = hf.take("use_sliding_window", False), hf.optional("sliding_window", 4096)
    first = hf.take("max_window_layers", 28)
    return {"window": width, "window_from": first} if slides and width is not None else {}


def _window_to_hf(config: DecoderConfig) -> dict[str, Any]:
    slides = config.window is not None
    return {
        "use_sliding_window": slides,
        "sliding_window": config.window,
        "max_window_layers": config.window_from if slides else config.n_layers,
    }


def check_layer_types(hf: HFConfig, config: DecoderConfig) -> DecoderConfig:
    """Refuse a list of layer types that is not the one which the other settings imply."""
    stated = hf.optional("layer_types")
    implied = layer_types(config)
    if stated is not None and stated != implied:
        raise ModelError(
            f"{hf.family}: layer_types={stated} is not supported with the other settings, which imply {implied}"
        )
    return config


def layer_types(config: DecoderConfig) -> list[str]:
    """Hugging Face's name for the kind of each layer."""
    return ["full_attention" if layer.window is None else "sliding_attention" for layer in config.layers]


def _qwen2_from_hf(hf: HFConfig) -> DecoderConfig:
    return check_layer_types(hf, common_from_hf(hf, qkv_bias=True, **_window(hf)))


def _qwen2_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config) | _window_to_hf(config)


def _qwen3_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    head_dim = hf.take("head_dim", 128)  # not hidden_size / heads, as elsewhere
    return check_layer_types(
        hf, common_from_hf(hf, head_dim=head_dim, qk_norm=True, qkv_bias=bias, out_bias=bias, **_window(hf))
    )


def _qwen3_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config) | _window_to_hf(config) | {"attention_bias": config.qkv_bias}


def _qwen3_moe_from_hf(hf: HFConfig) -> DecoderConfig:
    bias = hf.take("attention_bias", False)
    n_layers, step = hf.take("num_hidden_layers"), hf.take("decoder_sparse_step", 1)
    dense_only = hf.take("mlp_only_layers", [])
    moe = MoEConfig(
        n_experts=hf.optional("num_experts") or hf.take("num_local_experts", 128),
        top_k=hf.take("num_experts_per_tok", 8),
        d_ff=hf.take("moe_intermediate_size", 768),
        normalize=hf.take("norm_topk_prob", False),
        dense_layers=tuple(i for i in range(n_layers) if i in dense_only or (i + 1) % step),
    )
    window = hf.optional("sliding_window", 4096) if hf.take("use_sliding_window", False) else None
    hf.optional("max_window_layers")  # every layer slides or none does
    hf.optional("num_local_experts")
    return common_from_hf(hf, qk_norm=True, qkv_bias=bias, out_bias=bias, window=window, moe=moe)


def _qwen3_moe_to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config) | {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "num_experts": config.moe.n_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.d_ff,
        "norm_topk_prob": config.moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.moe.dense_layers),
    }


def _moe_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    experts = (
        rule(f"model.layers.{{i}}.mlp.experts.{{e}}.{part}_proj.weight", f"layers.{{i}}.mlp.{part}.weight")
        for part in ("gate", "up", "down")
    )
    sparse = _for_layers(
        config, sparse=True, rules=(rule("model.layers.{i}.mlp.gate.weight", "layers.{i}.mlp.router.weight"), *experts)
    )
    dense = _for_layers(config, sparse=False, rules=mlp_rules())
    return (*outer_rules(config), *norm_rules(), *attention_rules(), *sparse, *dense)


def _for_layers(config: DecoderConfig, *, sparse: bool, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules of one kind of layer, with the numbers filled in: both kinds call their parameters gate, up and down."""
    return tuple(
        rule(each.file.replace("{i}", str(i)), *(part.replace("{i}", str(i)) for part in each.parts))
        for i, layer in enumerate(config.layers)
        if layer.moe == sparse
        for each in rules
    )


QWEN2 = Family("qwen2", ("qwen2",), "Qwen2ForCausalLM", _qwen2_from_hf, _qwen2_to_hf, rules, ignored=OLD_BUFFERS)
QWEN3 = Family("qwen3", ("qwen3",), "Qwen3ForCausalLM", _qwen3_from_hf, _qwen3_to_hf, rules, ignored=OLD_BUFFERS)
QWEN3_MOE = Family(
    "qwen3_moe",
    ("qwen3_moe",),
    "Qwen3MoeForCausalLM",
    _qwen3_moe_from_hf,
    _qwen3_moe_to_hf,
    _moe_rules,
    ignored=OLD_BUFFERS,
)

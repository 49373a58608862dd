"""GPT-2 (Radford et al. 2019): learned positions, layer norms with bias, weights stored `[in, out]`, q, k, v fused."""

from typing import Any

from meshloom.models.config import DecoderConfig
from meshloom.models.families.base import Family, HFConfig, activation_to_hf
from meshloom.models.weight_map import Rows, Rule, linear, rule

_TRANSPOSED = Rows(transposed=True)


def _from_hf(hf: HFConfig) -> DecoderConfig:
    hf.expect("scale_attn_weights", True)
    hf.expect("scale_attn_by_inverse_layer_idx", False)
    hf.expect("add_cross_attention", False)
    d_model, heads = hf.take("n_embd", 768), hf.take("n_head", 12)
    return DecoderConfig(
        family=hf.family,
        vocab_size=hf.take("vocab_size", 50_257),
        d_model=d_model,
        n_layers=hf.take("n_layer", 12),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=hf.take("n_inner", 4 * d_model),
        context=(context := hf.take("n_positions", 1024)),
        activation=hf.activation("activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=hf.take("layer_norm_epsilon", 1e-5),
        rope=None,
        learned_positions=context,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=hf.take("tie_word_embeddings", True),
        init_scale=hf.take("initializer_range", 0.02),
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.context,
        "activation_function": activation_to_hf(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_scale,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    file, layer = "transformer.h.{i}", "layers.{i}"
    unembed = "embed" if config.tie_embeddings else "unembed"
    return (
        rule("transformer.wte.weight", "embed.weight"),
        rule("transformer.wpe.weight", "positions.weight"),
        *linear("transformer.ln_f", "final_norm"),
        rule("lm_head.weight", f"{unembed}.weight", duplicate=config.tie_embeddings),
        *linear(f"{file}.ln_1", f"{layer}.attention_norm"),
        *linear(f"{file}.ln_2", f"{layer}.mlp_norm"),
        rule(f"{file}.attn.c_attn.weight", *(f"{layer}.attention.{part}.weight" for part in "qkv"), form=_TRANSPOSED),
        rule(f"{file}.attn.c_attn.bias", *(f"{layer}.attention.{part}.bias" for part in "qkv")),
        *linear(f"{file}.attn.c_proj", f"{layer}.attention.out", _TRANSPOSED),
        *linear(f"{file}.mlp.c_fc", f"{layer}.mlp.up", _TRANSPOSED),
        *linear(f"{file}.mlp.c_proj", f"{layer}.mlp.down", _TRANSPOSED),
    )


GPT2 = Family(
    "gpt2",
    ("gpt2",),
    "GPT2LMHeadModel",
    _from_hf,
    _to_hf,
    _rules,
    renames=((r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer."),),  # the published file leaves the prefix out
    ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
)

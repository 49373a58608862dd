"""OPT (Zhang et al. 2022): learned positions that start at row 2, ReLU, biases everywhere."""

from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig
from meshloom.models.families.base import Family, HFConfig, activation_to_hf
from meshloom.models.weight_map import Rule, linear, rule


def _from_hf(hf: HFConfig) -> DecoderConfig:
    d_model, heads = hf.take("hidden_size"), hf.take("num_attention_heads")
    if not hf.take("do_layer_norm_before", True) or hf.take("word_embed_proj_dim", d_model) != d_model:
        raise ModelError(
            "opt: do_layer_norm_before=False and word_embed_proj_dim other than hidden_size (OPT-350m alone has them)"
            " are not supported; use another size, for example facebook/opt-125m or facebook/opt-1.3b"
        )
    hf.expect("_remove_final_layer_norm", False)
    hf.expect("layer_norm_elementwise_affine", True)
    bias = hf.take("enable_bias", True)
    context = hf.take("max_position_embeddings", 2048)
    return DecoderConfig(
        family=hf.family,
        vocab_size=hf.take("vocab_size"),
        d_model=d_model,
        n_layers=hf.take("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=hf.take("ffn_dim"),
        context=context,
        activation=hf.activation("activation_function", "relu"),
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        rope=None,
        learned_positions=context,
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=hf.take("tie_word_embeddings", True),
        init_scale=hf.take("init_std", 0.02),
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "ffn_dim": config.d_ff,
        "max_position_embeddings": config.context,
        "activation_function": activation_to_hf(config.activation),
        "do_layer_norm_before": True,
        "enable_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "init_std": config.init_scale,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    file, layer = "model.decoder.layers.{i}", "layers.{i}"
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
    unembed = "embed" if config.tie_embeddings else "unembed"
    return (
        rule("model.decoder.embed_tokens.weight", "embed.weight"),
        rule("model.decoder.embed_positions.weight", "positions.weight"),
        *linear("model.decoder.final_layer_norm", "final_norm"),
        rule("lm_head.weight", f"{unembed}.weight", duplicate=config.tie_embeddings),
        *linear(f"{file}.self_attn_layer_norm", f"{layer}.attention_norm"),
        *linear(f"{file}.final_layer_norm", f"{layer}.mlp_norm"),
        *(
            r
            for name, part in attention.items()
            for r in linear(f"{file}.self_attn.{name}", f"{layer}.attention.{part}")
        ),
        *linear(f"{file}.fc1", f"{layer}.mlp.up"),
        *linear(f"{file}.fc2", f"{layer}.mlp.down"),
    )


OPT = Family("opt", ("opt",), "OPTForCausalLM", _from_hf, _to_hf, _rules, renames=((r"^decoder\.", "model.decoder."),))

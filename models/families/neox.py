"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): parallel branches, q, k, v fused head by head."""

from typing import Any

from meshloom.models.config import DecoderConfig
from meshloom.models.families.base import Family, HFConfig, activation_to_hf
from meshloom.models.families.rope import rope_from_hf, rope_to_hf
from meshloom.models.weight_map import PerHead, Rule, linear, rule


def _from_hf(hf: HFConfig) -> DecoderConfig:
    d_model, heads = hf.take("hidden_size"), hf.take("num_attention_heads")
    bias = hf.take("attention_bias", True)
    context = hf.take("max_position_embeddings", 2048)
    return DecoderConfig(
        family=hf.family,
        vocab_size=hf.take("vocab_size"),
        d_model=d_model,
        n_layers=hf.take("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=hf.take("intermediate_size"),
        context=context,
        activation=hf.activation("hidden_act", "gelu"),
        gated=False,
        norm="layer",
        norm_eps=hf.take("layer_norm_eps", 1e-5),
        parallel=hf.take("use_parallel_residual", True),
        rope=rope_from_hf(
            hf,
            context=context,
            theta=float(hf.take("rotary_emb_base", 1e4)),
            fraction=float(hf.take("rotary_pct", 0.25)),
        ),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tie_embeddings=hf.take("tie_word_embeddings", False),
        init_scale=hf.take("initializer_range", 0.02),
    )


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context,
        "hidden_act": activation_to_hf(config.activation),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        "rope_parameters": rope_to_hf(config.rope) | {"partial_rotary_factor": config.rope.fraction},
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_scale,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    file, layer = "gpt_neox.layers.{i}", "layers.{i}"
    by_head = PerHead(config.n_heads)
    unembed = "embed" if config.tie_embeddings else "unembed"
    return (
        rule("gpt_neox.embed_in.weight", "embed.weight"),
        *linear("gpt_neox.final_layer_norm", "final_norm"),
        rule("embed_out.weight", f"{unembed}.weight", duplicate=config.tie_embeddings),
        *linear(f"{file}.input_layernorm", f"{layer}.attention_norm"),
        *linear(f"{file}.post_attention_layernorm", f"{layer}.mlp_norm"),
        *(
            rule(
                f"{file}.attention.query_key_value.{kind}",
                *(f"{layer}.attention.{part}.{kind}" for part in "qkv"),
                form=by_head,
            )
            for kind in ("weight", "bias")
        ),
        *linear(f"{file}.attention.dense", f"{layer}.attention.out"),
        *linear(f"{file}.mlp.dense_h_to_4h", f"{layer}.mlp.up"),
        *linear(f"{file}.mlp.dense_4h_to_h", f"{layer}.mlp.down"),
    )


NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    "GPTNeoXForCausalLM",
    _from_hf,
    _to_hf,
    _rules,
    renames=((r"^lm_head\.", "embed_out."),),
    ignored=(r"\.attention\.bias$", r"\.attention\.masked_bias$", r"\.rotary_emb\.inv_freq$"),
)

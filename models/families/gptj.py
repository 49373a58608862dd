"""GPT-J (Wang & Komatsuzaki 2021): parallel branches after one norm, neighbours rotate, the unembedding has a bias."""

from typing import Any

from meshloom.models.config import DecoderConfig, RopeConfig
from meshloom.models.families.base import Family, HFConfig, activation_to_hf
from meshloom.models.weight_map import Rule, linear, rule


def _from_hf(hf: HFConfig) -> DecoderConfig:
    hf.expect("tie_word_embeddings", False)
    hf.expect("scale_attn_weights", True)
    hf.expect("rotary", True)
    d_model, heads = hf.take("n_embd", 4096), hf.take("n_head", 16)
    head_dim = d_model // heads
    return DecoderConfig(
        family=hf.family,
        vocab_size=hf.take("vocab_size", 50_400),
        d_model=d_model,
        n_layers=hf.take("n_layer", 28),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=head_dim,
        d_ff=hf.take("n_inner", 4 * d_model),
        context=hf.take("n_positions", 2048),
        activation=hf.activation("activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        norm_eps=hf.take("layer_norm_epsilon", 1e-5),
        parallel=True,
        shared_norm=True,
        rope=RopeConfig(fraction=hf.take("rotary_dim", 64) / head_dim, interleaved=True),
        mlp_bias=True,
        unembed_bias=True,
        tie_embeddings=False,
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
        "rotary_dim": config.rope.rotated(config.head_dim),
        "activation_function": activation_to_hf(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": False,
        "initializer_range": config.init_scale,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    file, layer = "transformer.h.{i}", "layers.{i}"
    attention = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}
    return (
        rule("transformer.wte.weight", "embed.weight"),
        *linear("transformer.ln_f", "final_norm"),
        *linear("lm_head", "unembed"),
        *linear(f"{file}.ln_1", f"{layer}.attention_norm"),
        *(rule(f"{file}.attn.{name}.weight", f"{layer}.attention.{part}.weight") for name, part in attention.items()),
        *linear(f"{file}.mlp.fc_in", f"{layer}.mlp.up"),
        *linear(f"{file}.mlp.fc_out", f"{layer}.mlp.down"),
    )


GPTJ = Family(
    "gptj",
    ("gptj",),
    "GPTJForCausalLM",
    _from_hf,
    _to_hf,
    _rules,
    ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$", r"\.attn\.embed_positions$"),
)

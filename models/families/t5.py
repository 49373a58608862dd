"""T5 1.0 (Raffel et al. 2020: ReLU, tied embeddings, scaled logits) and 1.1 / Flan (gated GELU, own unembedding)."""

from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import EncoderDecoderConfig
from meshloom.models.families.base import Family, HFConfig
from meshloom.models.weight_map import Rule, rule

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu"}


def _from_hf(hf: HFConfig) -> EncoderDecoderConfig:
    projection = hf.take("feed_forward_proj", "relu")
    kind = projection.removeprefix("gated-")
    gated = projection != kind
    if kind not in _ACTIVATIONS or (kind == "gelu" and not gated):
        raise ModelError(
            f"t5: feed_forward_proj={projection!r} is not supported; supported: relu, gated-gelu, gated-silu"
        )
    hf.expect("is_encoder_decoder", True)
    for derived in ("is_gated_act", "dense_act_fn", "output_past"):
        hf.optional(derived)
    layers = hf.take("num_layers", 6)
    # transformers 5 says here whether logits are scaled, and always says that embeddings are tied; before, one key said
    # both.
    scaled = hf.take("scale_decoder_outputs", hf.take("tie_word_embeddings", True))
    return EncoderDecoderConfig(
        family=hf.family,
        vocab_size=hf.take("vocab_size"),
        d_model=hf.take("d_model"),
        n_encoder_layers=layers,
        n_decoder_layers=hf.take("num_decoder_layers", layers),
        n_heads=hf.take("num_heads"),
        head_dim=hf.take("d_kv"),
        d_ff=hf.take("d_ff"),
        context=hf.take("n_positions", 512),
        activation=_ACTIVATIONS[kind],
        gated=gated,
        norm_eps=hf.take("layer_norm_epsilon", 1e-6),
        position_buckets=hf.take("relative_attention_num_buckets", 32),
        max_distance=hf.take("relative_attention_max_distance", 128),
        tie_embeddings=scaled,
        scale_tied_logits=scaled,
        start_token=hf.take("decoder_start_token_id", 0),
    )


def _to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    activation = "gelu" if config.activation == "gelu_tanh" else config.activation
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "num_layers": config.n_encoder_layers,
        "num_decoder_layers": config.n_decoder_layers,
        "num_heads": config.n_heads,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "n_positions": config.context,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.position_buckets,
        "relative_attention_max_distance": config.max_distance,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.start_token,
    }


def _tower(tower: str, mlp: int, gated: bool) -> tuple[Rule, ...]:
    block, layer = f"{tower}.block.{{i}}.layer", f"{tower}.layers.{{i}}"
    projections = {"q": "q", "k": "k", "v": "v", "o": "out"}
    up = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    bias = f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        rule(bias, f"{tower}.relative_bias.weight"),
        *(rule(f"{block}.0.SelfAttention.{a}.weight", f"{layer}.attention.{b}.weight") for a, b in projections.items()),
        rule(f"{block}.0.layer_norm.weight", f"{layer}.attention_norm.weight"),
        *(rule(f"{block}.1.EncDecAttention.{a}.weight", f"{layer}.cross.{b}.weight") for a, b in projections.items()),
        rule(f"{block}.1.layer_norm.weight", f"{layer}.cross_norm.weight"),
        *(
            rule(f"{block}.{mlp}.DenseReluDense.{a}.weight", f"{layer}.mlp.{b}.weight")
            for a, b in (up | {"wo": "down"}).items()
        ),
        rule(f"{block}.{mlp}.layer_norm.weight", f"{layer}.mlp_norm.weight"),
        rule(f"{tower}.final_layer_norm.weight", f"{tower}.final_norm.weight"),
    )


def _rules(config: EncoderDecoderConfig) -> tuple[Rule, ...]:
    unembed = "embed" if config.tie_embeddings else "unembed"
    return (
        rule("shared.weight", "embed.weight"),
        rule("encoder.embed_tokens.weight", "embed.weight", duplicate=True),
        rule("decoder.embed_tokens.weight", "embed.weight", duplicate=True),
        *_tower("encoder", 1, config.gated),
        *_tower("decoder", 2, config.gated),
        rule("lm_head.weight", f"{unembed}.weight", duplicate=config.tie_embeddings),
    )


T5 = Family(
    "t5",
    ("t5",),
    "T5ForConditionalGeneration",
    _from_hf,
    _to_hf,
    _rules,
    ignored=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
)

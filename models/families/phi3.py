"""Phi-3 and Phi-4 mini (Abdin et al. 2024): Llama with fused projections and, in the long variants, LongRoPE."""

from typing import Any

from meshloom.models.config import DecoderConfig
from meshloom.models.families.base import Family, HFConfig
from meshloom.models.families.llama import common_from_hf, common_to_hf, norm_rules, outer_rules
from meshloom.models.weight_map import Rule, linear, rule


def _from_hf(hf: HFConfig) -> DecoderConfig:
    return common_from_hf(hf, window=hf.optional("sliding_window"), norm_eps=hf.take("rms_norm_eps", 1e-5))


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    common = common_to_hf(config)
    original = config.rope.original_context if config.rope.scaling == "longrope" else config.context
    # transformers reads these two from outside rope_parameters.
    return common | {
        "original_max_position_embeddings": original,
        "partial_rotary_factor": config.rope.fraction,
        "sliding_window": config.window,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    attention, mlp = "layers.{i}.attention", "layers.{i}.mlp"
    return (
        *outer_rules(config),
        *norm_rules(),
        rule(
            "model.layers.{i}.self_attn.qkv_proj.weight",
            *(f"{attention}.{part}.weight" for part in "qkv"),
        ),
        *linear("model.layers.{i}.self_attn.o_proj", f"{attention}.out"),
        rule("model.layers.{i}.mlp.gate_up_proj.weight", f"{mlp}.gate.weight", f"{mlp}.up.weight"),
        *linear("model.layers.{i}.mlp.down_proj", f"{mlp}.down"),
    )


PHI3 = Family("phi3", ("phi3",), "Phi3ForCausalLM", _from_hf, _to_hf, _rules)

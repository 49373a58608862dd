"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts in every layer."""

from typing import Any

from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.families.base import Family, HFConfig
from meshloom.models.families.llama import (
    OLD_BUFFERS,
    attention_rules,
    common_from_hf,
    common_to_hf,
    norm_rules,
    outer_rules,
)
from meshloom.models.weight_map import Rule, rule


def _from_hf(hf: HFConfig) -> DecoderConfig:
    moe = MoEConfig(
        n_experts=hf.take("num_local_experts", 8),
        top_k=hf.take("num_experts_per_tok", 2),
        d_ff=hf.take("intermediate_size"),
        normalize=True,
    )
    return common_from_hf(hf, theta=1_000_000.0, window=hf.optional("sliding_window"), moe=moe)


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return common_to_hf(config) | {
        "intermediate_size": config.moe.d_ff,
        "num_local_experts": config.moe.n_experts,
        "num_experts_per_tok": config.moe.top_k,
        "sliding_window": config.window,
    }


def _rules(config: DecoderConfig) -> tuple[Rule, ...]:
    block = "model.layers.{i}.block_sparse_moe"
    experts = (
        rule(f"{block}.experts.{{e}}.{file}.weight", f"layers.{{i}}.mlp.{part}.weight")
        for file, part in {"w1": "gate", "w3": "up", "w2": "down"}.items()
    )
    router = rule(f"{block}.gate.weight", "layers.{i}.mlp.router.weight")
    return (*outer_rules(config), *norm_rules(), *attention_rules(), router, *experts)


MIXTRAL = Family("mixtral", ("mixtral",), "MixtralForCausalLM", _from_hf, _to_hf, _rules, ignored=OLD_BUFFERS)

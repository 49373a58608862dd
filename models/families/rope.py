"""Rotary embedding settings in config.json, both ways: `rope_parameters`, and before transformers 5 `rope_scaling`."""

import math
from collections.abc import Mapping
from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import RopeConfig
from meshloom.models.families.base import HFConfig

_SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


def rope_from_hf(hf: HFConfig, *, context: int, theta: float = 10_000.0, fraction: float = 1.0) -> RopeConfig:
    """Reads all spellings; `theta` and `fraction` are the family's defaults, `context` the longest sequence."""
    outer = {
        "rope_theta": hf.take("rope_theta", theta),
        "partial_rotary_factor": hf.take("partial_rotary_factor", fraction),
        "original_max_position_embeddings": hf.optional("original_max_position_embeddings"),
    }
    scaling = hf.optional("rope_scaling") or {}
    inner = hf.optional("rope_parameters") or {}
    return rope_from_parameters(outer | scaling | inner, family=hf.family, context=context)


def rope_from_parameters(parameters: Mapping[str, Any], *, family: str, context: int) -> RopeConfig:
    """One set of rope parameters, as transformers 5 nests them.

    Raises:
        ModelError: a scaling, or a setting of one, that is not supported.
    """
    read = HFConfig(parameters, family)
    kind = {"su": "longrope", "default": "default"}.get(
        name := read.optional("rope_type") or read.optional("type") or "default", name
    )
    read.optional("type")
    shared = {
        "theta": float(read.take("rope_theta", 10_000.0)),
        "fraction": float(read.take("partial_rotary_factor", 1.0)),
    }
    original = int(read.take("original_max_position_embeddings", context))
    match kind:
        case "default":
            rope = RopeConfig(**shared)
            read.optional("factor")
        case "linear":
            rope = RopeConfig(**shared, scaling="linear", factor=float(read.take("factor")))
        case "llama3":
            rope = RopeConfig(
                **shared,
                scaling="llama3",
                factor=float(read.take("factor")),
                low_frequency_factor=float(read.take("low_freq_factor")),
                high_frequency_factor=float(read.take("high_freq_factor")),
                original_context=original,
            )
        case "yarn":
            factor = float(read.take("factor", context / original))
            read.expect("truncate", True)
            rope = RopeConfig(
                **shared,
                scaling="yarn",
                factor=factor,
                beta_fast=float(read.take("beta_fast", 32)),
                beta_slow=float(read.take("beta_slow", 1)),
                original_context=original,
                attention_factor=float(
                    read.take("attention_factor", 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1)
                ),
            )
        case "longrope":
            factor = float(read.take("factor", context / original))
            computed = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
            rope = RopeConfig(
                **shared,
                scaling="longrope",
                long_factors=tuple(map(float, read.take("long_factor"))),
                short_factors=tuple(map(float, read.take("short_factor"))),
                original_context=original,
                attention_factor=float(read.take("attention_factor", computed)),
            )
        case _:
            raise ModelError(f"{family}: rope_type={kind!r} is not supported; supported: {', '.join(_SCALINGS)}")
    read.finish()
    return rope


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of one rope."""
    kind = "default" if rope.scaling == "none" else rope.scaling
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        parameters["partial_rotary_factor"] = rope.fraction
    if rope.scaling in ("linear", "llama3", "yarn"):
        parameters["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn", "longrope"):
        parameters["original_max_position_embeddings"] = rope.original_context
    match rope.scaling:
        case "llama3":
            parameters |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
        case "yarn":
            parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        case "longrope":
            parameters |= {"long_factor": list(rope.long_factors), "short_factor": list(rope.short_factors)}
    if rope.scaling in ("yarn", "longrope"):
        parameters["attention_factor"] = rope.attention_factor
    return parameters

"""Configurations as plain dictionaries, for JSON files of our own (a training run's `meshloom.json`)."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import DecoderConfig, EncoderDecoderConfig, ModelConfig, MoEConfig, RopeConfig

_NESTED = {"rope": RopeConfig, "local_rope": RopeConfig, "moe": MoEConfig}


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """All fields, nested ones as dictionaries; `config_from_dict` gives an equal configuration."""
    return dataclasses.asdict(config)


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Inverse of `config_to_dict`, also after a trip through JSON (lists become tuples again).

    Raises:
        ModelError: a key that no configuration has.
    """
    kind = EncoderDecoderConfig if "n_encoder_layers" in values else DecoderConfig
    return _build(kind, values)


def _build(kind: type, values: Mapping[str, Any]) -> Any:
    known = typing.get_type_hints(kind)
    if unknown := sorted(values.keys() - known.keys()):
        raise ModelError(f"{kind.__name__} has no field {', '.join(unknown)}; fields: {', '.join(known)}")
    fields = {}
    for name, value in values.items():
        nested = name in _NESTED and value is not None
        fields[name] = _build(_NESTED[name], value) if nested else tuple(value) if isinstance(value, list) else value
    return kind(**fields)

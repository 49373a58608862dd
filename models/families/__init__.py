"""The model families, found by our name or by Hugging Face's `model_type`."""

import difflib
from collections.abc import Mapping
from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.families.base import Family
from meshloom.models.families.gemma import GEMMA2, GEMMA3
from meshloom.models.families.gpt2 import GPT2
from meshloom.models.families.gptj import GPTJ
from meshloom.models.families.llama import LLAMA, MISTRAL
from meshloom.models.families.mixtral import MIXTRAL
from meshloom.models.families.neox import NEOX
from meshloom.models.families.opt import OPT
from meshloom.models.families.phi3 import PHI3
from meshloom.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from meshloom.models.families.t5 import T5

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA2,
        GEMMA3,
        PHI3,
        GPT2,
        GPTJ,
        NEOX,
        OPT,
        MIXTRAL,
        T5,
    )
}
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}


def family_named(name: str) -> Family:
    """The family of `config.family`.

    Raises:
        ModelError: there is none of that name.
    """
    if name not in FAMILIES:
        raise ModelError(f"there is no model family {name!r}; families: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ModelError: its `model_type` is missing or not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    near = difflib.get_close_matches(str(model_type), _BY_MODEL_TYPE, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    raise ModelError(f"model_type={model_type!r} is not supported{hint}; supported: {', '.join(_BY_MODEL_TYPE)}")


__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

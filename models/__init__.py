"""Models: one decoder, one encoder-decoder, the families that map to them, and their files.

Names are imported when first used, so that `import meshloom.models` stays cheap.
"""

import importlib
from typing import Any

_HOMES = {
    "load": "language_model",
    "LanguageModel": "language_model",
    "resolve": "source",
    "abstract": "source",
    "ModelSource": "source",
    "PRESETS": "presets",
    "Tokenizer": "tokenizer",
    "IncrementalDecoder": "tokenizer",
    "train_byte_bpe": "tokenizer",
    "Decoder": "decoder",
    "EncoderDecoder": "encoder_decoder",
    "DecoderConfig": "config",
    "EncoderDecoderConfig": "config",
    "config_to_dict": "config_dict",
    "config_from_dict": "config_dict",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

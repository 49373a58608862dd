"""What a model family is: a mapping of configurations both ways, and a list of weight names. Nothing else.

`HFConfig` reads a Hugging Face `config.json` strictly: every key is used, is known to change nothing in a forward pass,
or is refused by name. A setting that would be ignored would give wrong numbers without a word.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from meshloom.core.errors import ModelError
from meshloom.models.config import Activation, ModelConfig
from meshloom.models.weight_map import Rule

_REQUIRED = object()

# Keys that change nothing in a forward pass: provenance, generation defaults, training-only settings, output formats.
# fmt: off
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map",
    "tokenizer_class", "prefix", "model_max_length", "use_cache", "cache_implementation", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "task_specific_params", "is_decoder", "n_ctx", "n_special", "predict_special_tokens",
    "is_llama_config", "attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout", "hidden_dropout",
    "dropout", "dropout_rate", "layerdrop", "activation_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop",
    "attn_pdrop", "embedding_dropout", "classifier_dropout_prob", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "pretraining_tp", "gradient_checkpointing", "output_attentions", "output_hidden_states",
    "return_dict", "return_dict_in_generate", "output_past", "problem_type", "id2label", "label2id",
    "chunk_size_feed_forward", "initializer_factor", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "_attn_implementation_autoset",
    "attn_implementation", "_attn_implementation", "unsloth_version", "unsloth_fixed", "transformers.js_config",
}
# fmt: on

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


class HFConfig:
    """A `config.json` being read: remembers which keys were used, so that `finish` can refuse the others."""

    def __init__(self, values: Mapping[str, Any], family: str):
        self.values = values
        self.family = family
        self._used: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key; absent or null gives the default.

        Raises:
            ModelError: absent without a default.
        """
        value = self.optional(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"config.json of this {self.family} model has no {name!r}, which the architecture needs")
        return default

    def optional(self, name: str, default: Any = None) -> Any:
        """The value of a key where null means none; absent gives the default."""
        self._used.add(name)
        return self.values.get(name, default)

    def expect(self, name: str, only: Any) -> None:
        """Refuse any other value than `only` (or the key's absence)."""
        value = self.take(name, only)
        if value != only:
            raise ModelError(f"{self.family}: {name}={value!r} is not supported; the only supported value is {only!r}")

    def activation(self, name: str, default: str) -> Activation:
        """The nonlinearity that a key names."""
        value = self.take(name, default)
        if value not in _ACTIVATIONS:
            raise ModelError(f"{self.family}: {name}={value!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def finish(self) -> None:
        """Refuse keys that were neither used nor are without effect; unset ones (null, false, 0, empty) pass."""
        unknown = sorted(
            key for key, value in self.values.items() if value and key not in self._used and key not in _WITHOUT_EFFECT
        )
        if unknown:
            shown = ", ".join(f"{key}={self.values[key]!r}" for key in unknown)
            raise ModelError(
                f"{self.family}: config.json sets {shown}, which is not supported;"
                " remove a key that has no effect on the model"
            )


def activation_to_hf(activation: Activation) -> str:
    """Hugging Face's name of a nonlinearity."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face, as a `DecoderConfig` or `EncoderDecoderConfig` and a list of names.

    Attributes:
        name: our name, `config.family`.
        model_types: values of `model_type` in config.json that mean this family; the first is written.
        architecture: class that transformers opens a saved folder with.
        from_hf, to_hf: configuration both ways; `to_hf` leaves out what `save` knows better (dtype, token ids).
        rules: names of the weights in safetensors files.
        renames: regular expressions and replacements that turn other spellings of names into those of `rules`.
        ignored: regular expressions of names that hold no weights (buffers of old checkpoints), or none of ours.
        unwrap: picks the language model's part of a multimodal config.json.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    from_hf: Callable[[HFConfig], ModelConfig]
    to_hf: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], tuple[Rule, ...]]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    unwrap: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """Configuration of a config.json; refuses what is not supported, by name."""
        hf = HFConfig(self.unwrap(values), self.name)
        config = self.from_hf(hf)
        hf.finish()
        return config

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The config.json that transformers reads as the same architecture."""
        return {"architectures": [self.architecture], "model_type": self.model_types[0], **self.to_hf(config)}

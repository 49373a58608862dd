"""Which model a run trains: architecture, tokenizer, first weights and mesh, from its configuration."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from meshloom.core.errors import ConfigError, ModelError
from meshloom.core.topology import make_mesh, use_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.presets import PRESETS
from meshloom.models.source import ModelSource, abstract_module, resolve
from meshloom.models.tokenizer import Tokenizer
from meshloom.train.config import TrainConfig
from meshloom.train.corpus import train_tokenizer
from meshloom.train.sources import Documents

# A trained vocabulary is rounded up to a multiple of this, so that it divides over devices; the ids above are unused.
VOCABULARY_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Start:
    """What is trained.

    Attributes:
        config: the architecture.
        tokenizer: of the data and of the model.
        source: where the first weights come from, or None for fresh ones.
    """

    config: DecoderConfig
    tokenizer: Tokenizer
    source: ModelSource | None

    def module(self) -> nnx.Module:
        """The abstract module, with float32 parameters."""
        return abstract_module(self.config, jnp.float32)

    def first_params(self, module: nnx.Module, shardings: Any) -> Any:
        """The source's weights as `nnx.state(module, nnx.Param)`, placed by `shardings`."""
        assert self.source is not None
        return nnx.state(self.source.weights(module, shardings, None), nnx.Param)


def start_of(config: TrainConfig, documents: Documents) -> Start:
    """The start of a new run; trains the tokenizer if there is one to train.

    Raises:
        ConfigError, ModelError: the model cannot be trained as configured.
    """
    preset = config.model in PRESETS
    source = None if preset else resolve(config.model)
    model = PRESETS[config.model] if source is None else source.config
    if not isinstance(model, DecoderConfig):
        raise ModelError(f"{config.model} is an encoder-decoder; training is for decoders")
    if source is not None and config.sizes.given():
        raise ConfigError(f"sizes can replace those of a preset; {config.model} has weights of its own sizes")
    tokenizer = _tokenizer(config, source, documents)
    if source is None:
        vocabulary = -(-tokenizer.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        model = dataclasses.replace(model, vocab_size=vocabulary, **config.sizes.given())
    elif tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.model} {model.vocab_size}")
    _check_length(config, model)
    return Start(dataclasses.replace(model, scan_layers=config.scan_layers, remat=config.remat), tokenizer, source)


def _check_length(config: TrainConfig, model: DecoderConfig) -> None:
    if config.sequence_length > model.context:
        raise ConfigError(f"sequence_length={config.sequence_length} exceeds the model's context of {model.context}")


def _tokenizer(config: TrainConfig, source: ModelSource | None, documents: Documents) -> Tokenizer:
    if config.tokenizer == "train" or (config.tokenizer == "auto" and source is None):
        return train_tokenizer(documents, config.vocab_size)
    if config.tokenizer == "auto":
        tokenizer = source.tokenizer()
    elif (pathlib.Path(config.tokenizer).expanduser() / "tokenizer.json").is_file():
        return Tokenizer.load(pathlib.Path(config.tokenizer).expanduser())
    else:
        tokenizer = resolve(config.tokenizer).tokenizer()
    if tokenizer is None:
        raise ConfigError(f"{config.model} has no tokenizer; name one with tokenizer=")
    return tokenizer


def mesh_of(config: TrainConfig) -> Mesh:
    """The mesh of a run. "auto": fsdp takes as many devices as divide the micro-batch, tensor the rest."""
    devices = use_devices(config.devices)
    if config.mesh != "auto":
        return make_mesh(config.mesh, devices)
    fsdp = math.gcd(len(devices), config.micro_batch)
    axes = {"fsdp": fsdp, "tensor": len(devices) // fsdp}
    return make_mesh({name: size for name, size in axes.items() if size > 1} or {"fsdp": 1}, devices)


def compute_dtype(config: TrainConfig) -> str:
    """The dtype of the computation. On the CPU bfloat16 products with a transposed operand, which is what the backward
    pass has, are no faster than float32 ones."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"

"""Everything that a run needs before its first step, made from its configuration: data, model, layout, programs.

Order matters: what is cheap and can fail comes first, and nothing is drawn or compiled until all of it holds together.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from meshloom.core.checkpoint import Checkpointer, check_writable, tree_bytes
from meshloom.core.config import to_dict
from meshloom.core.errors import ConfigError
from meshloom.core.executable import load_executable
from meshloom.core.processes import check_agreement
from meshloom.core.topology import make_mesh, use_devices
from meshloom.models.config import DecoderConfig, ModelConfig
from meshloom.models.language_model import load as load_model
from meshloom.models.presets import PRESETS
from meshloom.models.source import ModelSource, abstract_module, resolve
from meshloom.models.tokenizer import Tokenizer, train_byte_bpe
from meshloom.sharding import derive
from meshloom.sharding.explain import bytes_text, spec_text
from meshloom.sharding.layout import Layout
from meshloom.train.config import TrainConfig
from meshloom.train.corpus import Corpus, tokenize
from meshloom.train.data import Batch, Batches
from meshloom.train.documents import Documents, find_documents
from meshloom.train.optimizer import make_optimizer, make_schedule
from meshloom.train.plan import baked_settings, choose_mesh
from meshloom.train.run_folder import Identity, RunFolder
from meshloom.train.state import TrainState, restore_state
from meshloom.train.step import (
    Weights,
    abstract_batch,
    abstract_weights,
    fresh_weights,
    lower_step,
    make_step,
    place_batch,
    share,
    with_optimizer,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that can begin.

    Attributes:
        documents: what the data is called. module: abstract, float32. begun: the folder already holds this run.
    """

    config: TrainConfig
    model: DecoderConfig
    module: nnx.Module
    layout: Layout
    tokenizer: Tokenizer
    corpus: Corpus
    documents: str
    dtype: Any
    begun: bool

    @property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        mesh = self.layout.mesh
        assert isinstance(mesh, Mesh)  # training has devices
        return mesh

    @property
    def mesh_text(self) -> str:
        """`fsdp=4,tensor=2`."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())

    @functools.cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate by step."""
        return make_schedule(self.config)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW as configured."""
        return make_optimizer(self.config, self.module)

    @functools.cached_property
    def abstract_weights(self) -> Weights:
        """Shapes and shardings of parameters and optimizer."""
        return abstract_weights(self.module, self.optimizer, self.layout)

    @functools.cached_property
    def abstract_batch(self) -> Batch:
        """Shape and sharding of a placed batch."""
        sizes = {"rows": self.config.batch_size, "length": self.config.sequence_length}
        return abstract_batch(self.layout, accumulation=self.config.accumulation, **sizes)

    @property
    def plain_step(self) -> Callable[..., Any]:
        """The step without recomputation, whose products are the useful ones."""
        module = abstract_module(dataclasses.replace(self.model, remat="none"), jnp.float32)
        # The loss that computes no logits twice, whatever the program that runs does.
        return make_step(module, self.optimizer, self.schedule, dtype=self.dtype, loss="reference")

    @functools.cached_property
    def lowered_step(self) -> jax.stages.Lowered:
        """The step, ready to compile."""
        step = make_step(self.module, self.optimizer, self.schedule, dtype=self.dtype, layout=self.layout)
        return lower_step(step, self.abstract_weights, self.abstract_batch, self.layout)

    @functools.cached_property
    def compiled_step(self) -> jax.stages.Compiled:
        """The step, compiled, or as the configuration's file has it compiled."""
        if self.config.executable is None:
            return self.lowered_step.compile()
        settings = baked_settings(self.config)
        return load_executable(self.config.executable, self.lowered_step, self.mesh, settings)

    def batches(self) -> Batches:
        """This process's rows, from the first one on."""
        config = self.config
        sizes = {"length": config.sequence_length, "batch_size": config.batch_size, "parts": config.accumulation}
        return Batches(self.corpus, **sizes, seed=config.seed, share=share(self.layout))

    def place(self, batch: Batch) -> Batch:
        """Rows onto the devices."""
        return place_batch(batch, self.layout, accumulation=self.config.accumulation)

    def start(self, folder: RunFolder) -> TrainState:
        """Writes the run's description and makes the first weights, each part on its device."""
        if not self.begun and jax.process_index() == 0:
            folder.write(self.identity, self.tokenizer)
        if self.config.model is None or self.config.model in PRESETS:
            return TrainState(fresh_weights(self.module, self.optimizer, self.layout, seed=self.config.seed), 0)
        options = {"dtype": jnp.float32, "scan_layers": self.config.scan_layers}
        loaded = load_model(self.config.model, placement=lambda *_: self.layout.shardings, **options)
        return TrainState(with_optimizer(loaded.module, self.optimizer, self.layout), 0)

    def restore(self, checkpoints: Checkpointer, step: int, batches: Batches) -> TrainState:
        """The state after `step` steps; `batches` goes on from there."""
        state, position = restore_state(checkpoints, step, self.abstract_weights)
        batches.restore(position)
        return state

    @property
    def identity(self) -> Identity:
        """What makes this run this run."""
        return Identity(self.model, self.config, jnp.dtype(self.dtype).name, self.corpus.key)

    def print_plan(self, console: Console) -> None:
        """Says what will be trained, on what, and how it is spread over the devices."""
        count = sum(math.prod(row.shape) for row in self.layout.rows)
        kind, number = self.mesh.devices.flat[0].device_kind, self.mesh.size
        tokens, rows = len(self.corpus.tokens), self.config.batch_size
        say = functools.partial(console.print, highlight=False, soft_wrap=True)
        say(f"data    {self.documents}: {tokens:,} tokens, vocabulary {self.tokenizer.vocab_size}")
        say(f"model   {self.model.family}, {count:,} parameters, {self.model.n_layers} layers")
        say(
            f"step    {rows} x {self.config.sequence_length} tokens in {self.config.accumulation} part(s), "
            f"{self.identity.dtype}"
            + ("" if self.config.executable is None else f", compiled before: {self.config.executable}")
        )
        say(f"devices {number} x {kind}, mesh {self.mesh_text}; sharding derived from the program:")
        by_spec: dict[str, list[Any]] = {}
        for row in self.layout.rows:
            by_spec.setdefault(spec_text(row) if row.rule != "replicated" else "replicated", []).append(row)
        for spec, held in by_spec.items():
            names = ", ".join(row.name for row in held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
            say(f"  {spec:<24} {bytes_text(sum(row.bytes_per_device for row in held)):>9} per device  {names}")
        optimizer = tree_bytes(self.abstract_weights) / max(tree_bytes(self.abstract_weights[0]), 1)
        whole = bytes_text(round(self.layout.bytes_per_device * optimizer))
        say(f"  weights {bytes_text(self.layout.bytes_per_device)} per device, with optimizer {whole}")


def prepare(config: TrainConfig, console: Console) -> Setup:
    """Reads data and model and derives the layout.

    Raises:
        MeshloomError: anything that would stop the run later, as far as it can be known.
    """
    folder = RunFolder(config.run_dir)
    check_writable(folder.path, 0)
    stored = folder.read()
    if stored is not None:
        folder.check_configuration(stored, config)
    devices = use_devices(config.devices)
    source = None if config.model is None else resolve(config.model)
    model = _architecture(config, source)
    mesh = make_mesh(choose_mesh(config, model, devices) if config.mesh == "auto" else config.mesh, devices)
    documents = find_documents(config.data)
    tokenizer = Tokenizer.load(folder.tokenizer) if stored else _tokenizer(config, source, documents, model, console)
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {model.vocab_size} rows for them; "
            "use the model's own tokenizer, or a smaller vocab_size"
        )
    corpus = tokenize(documents, tokenizer, console=console)
    module = abstract_module(model, jnp.float32)
    example = jax.ShapeDtypeStruct((8, max(config.sequence_length, 2)), np.int32)
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    layout = derive(module, mesh, example)
    setup = Setup(
        config, model, module, layout, tokenizer, corpus, documents.where, jnp.dtype(dtype), stored is not None
    )
    if stored is not None:
        folder.check_identity(stored, setup.identity)
    _ = setup.abstract_batch  # refuses rows that do not divide over the mesh
    if config.executable is not None:
        _ = setup.compiled_step  # refuses a program of another step or other devices
    # No process may write to the folder before all have read it.
    check_agreement(to_dict(config) | {"begun": setup.begun, "corpus": corpus.key})
    return setup


def _architecture(config: TrainConfig, source: ModelSource | None) -> DecoderConfig:
    """The model's configuration, laid out for training."""
    if source is None:
        sizes = dataclasses.asdict(config.architecture)
        model: ModelConfig = DecoderConfig(vocab_size=config.vocab_size, context=config.sequence_length, **sizes)
    else:
        model = source.config
    if not isinstance(model, DecoderConfig):
        raise ConfigError(f"model: {config.model} is an encoder-decoder; training takes decoders")
    if config.sequence_length > model.context:
        raise ConfigError(
            f"sequence_length={config.sequence_length} is longer than {config.model}'s context of "
            f"{model.context} tokens"
        )
    return dataclasses.replace(model, scan_layers=config.scan_layers, remat=config.remat)


def _tokenizer(
    config: TrainConfig, source: ModelSource | None, documents: Documents, model: DecoderConfig, console: Console
) -> Tokenizer:
    has_words = source is not None and config.model not in PRESETS
    if config.tokenizer == "auto" and has_words and (own := source.tokenizer()) is not None:
        return own
    if config.tokenizer in ("auto", "train"):
        if config.vocab_size > model.vocab_size:
            raise ConfigError(f"vocab_size={config.vocab_size} is more than the {model.vocab_size} of {config.model}")
        console.print(f"training a tokenizer of {config.vocab_size} ids on {documents.where}", highlight=False)
        return train_byte_bpe(documents.read(), config.vocab_size)
    path = pathlib.Path(config.tokenizer).expanduser()
    if not path.is_dir():
        raise ConfigError(f'tokenizer is "auto", "train" or a folder with tokenizer.json; got {config.tokenizer!r}')
    return Tokenizer.load(path)

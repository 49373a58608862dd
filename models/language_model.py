"""A loaded model: module, configuration, tokenizer and where they live; `load` makes one, `save` writes one.

The dtype of the weights is the dtype of the computation. On accelerators it defaults to that of the files; on the CPU
to float32, whose one-row products, which decode consists of, XLA runs fast there. Weights may be held as int8 instead.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from meshloom.core.errors import ModelError
from meshloom.models.config import ModelConfig
from meshloom.models.families import family_named
from meshloom.models.quantize import is_quantized, quantize_weights, why_not
from meshloom.models.source import abstract_module, resolve
from meshloom.models.tokenizer import Tokenizer
from meshloom.models.weights import count_parameters, replacing, save_weights, write_json

# From an abstract module and example inputs to a pytree of NamedSharding like `nnx.state(module, nnx.Param)`.
Placement = Callable[[nnx.Module, tuple[Any, ...]], Any]

Tokens = Int[Array, "B T"] | Int[np.ndarray, "B T"]
DecoderTokens = Int[Array, "B U"] | Int[np.ndarray, "B U"]


class LanguageModel:
    """A model ready to compute.

    Attributes:
        module: the `nnx.Module` with its weights.
        config: its architecture.
        tokenizer: text to ids and back, or None when the source had none.
        mesh: the devices its weights are spread over, or None for one device.
    """

    def __init__(self, module: nnx.Module, config: ModelConfig, tokenizer: Tokenizer | None, mesh: Mesh | None = None):
        self.module = module
        self.config = config
        self.tokenizer = tokenizer
        self.mesh = mesh
        graphdef, _ = nnx.split(module)
        self._forward = jax.jit(lambda state, *tokens: nnx.merge(graphdef, state)(*tokens)[0])

    def logits(self, tokens: Tokens, decoder_tokens: DecoderTokens | None = None) -> Float[Array, "B _ V"]:
        """Next-token logits at every position, float32 `[B, T, V]`.

        Args:
            tokens: int32 ids; for an encoder-decoder those of the encoder.
            decoder_tokens: for an encoder-decoder, int32 ids of the decoder, whose positions the logits are of.
        Raises:
            ModelError: decoder tokens missing for an encoder-decoder, or given to a decoder.
        """
        given = [tokens] if decoder_tokens is None else [tokens, decoder_tokens]
        wanted = len(self.module.example_inputs())
        if len(given) != wanted:
            raise ModelError(f"logits of a {self.config.family} model take {wanted} token arrays; got {len(given)}")
        return self._forward(nnx.state(self.module), *map(jnp.asarray, given))

    def save(self, folder: str | pathlib.Path) -> None:
        """Write safetensors, config.json, generation_config.json and the tokenizer, as transformers opens them.

        The weights keep their dtype; files over 5 GB are split. The folder is replaced only when all is written.

        Raises:
            CheckpointError: the folder holds other things, or cannot be written; it is left as it was.
            ModelError: the weights are quantized.
        """
        self._refuse_quantized()
        family = family_named(self.config.family)
        with replacing(folder) as partial:
            save_weights(partial, self.module, family.rules(self.config))
            # Null where unknown: transformers' own defaults may lie outside the vocabulary.
            special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            if self.tokenizer is not None:
                self.tokenizer.save(partial)
                special |= self.tokenizer.special_ids()
            dtype = jax.tree.leaves(nnx.state(self.module, nnx.Param))[0].dtype.name
            write_json(partial / "config.json", family.write_config(self.config) | special | {"dtype": dtype})

    def save_checkpoint(self, folder: str | pathlib.Path) -> None:
        """Write Meshloom's own form, as training does: an orbax checkpoint that any mesh restores, and the tokenizer.

        Raises:
            CheckpointError: the folder holds other things, or cannot be written; it is left as it was.
            ModelError: the weights are quantized.
        """
        self._refuse_quantized()
        from meshloom.models.run_weights import write_run  # orbax takes 1.5 s to import

        write_run(folder, self.module, self.config, self.tokenizer)

    @property
    def quantized(self) -> bool:
        """Whether the weights are held as int8."""
        return is_quantized(self.module)

    def _refuse_quantized(self) -> None:
        if self.quantized:
            raise ModelError("int8 weights cannot be saved: load the model without quantize to save it")


def load(
    source: str | pathlib.Path,
    *,
    dtype: Any = None,
    placement: Placement | None = None,
    scan_layers: bool | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Load a model: `smollm2`, a preset, a Hugging Face id or folder, a .gguf file, or the folder of a training run.

    Args:
        dtype: floating-point type of the weights and the computation; None is that of the files, float32 on the CPU.
        placement: says where every weight goes (`sharding.derive` makes one); None is the default device.
        scan_layers: stack layers and scan over them, or unroll; None is unrolled, for a training run as it was trained.
        quantize: "int8" holds the weights as int8, with a scale per row; "auto" does so where it costs little and gains
            most: on a CPU, if the files hold 8 bits or less themselves. They are read in `dtype` first.
    Raises:
        ModelError, CheckpointError: nothing of that name, not supported, or its files are defective.
    """
    if quantize not in ("auto", "int8", None):
        raise ModelError(f'quantize is "int8", "auto" or None; got {quantize!r}')
    found = resolve(source)
    config = found.config if scan_layers is None else dataclasses.replace(found.config, scan_layers=scan_layers)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else found.dtype
    module = abstract_module(config, dtype)
    shardings = None if placement is None else placement(module, module.example_inputs())
    with _ProgressBar(f"loading {found.where}", count_parameters(module)) as progress:
        module = found.weights(module, shardings, progress.advance)
    if quantize == "auto":
        gains = jax.default_backend() == "cpu" and found.quantized and why_not(module) is None
        quantize = "int8" if gains else None
    if quantize == "int8":
        module = quantize_weights(module)
    return LanguageModel(module, config, found.tokenizer(), _mesh(shardings))


def _mesh(shardings: Any) -> Mesh | None:
    placed = jax.tree.leaves(shardings, is_leaf=lambda x: isinstance(x, NamedSharding))
    meshes = (each.mesh for each in placed if isinstance(each, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


class _ProgressBar:
    """A bar on stderr that appears when loading takes longer than a second and someone is watching."""

    def __init__(self, title: str, total: int):
        self._title, self._total = title, total
        self._started = time.monotonic()
        self._done = 0
        self._bar = None

    def __enter__(self) -> "_ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, elements: int) -> None:
        self._done += elements
        if self._bar is None and sys.stderr.isatty() and time.monotonic() - self._started > 1:
            self._bar = self._start()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def _start(self):
        from rich.console import Console
        from rich.progress import Progress as Bar

        bar = Bar(console=Console(stderr=True), transient=True)
        self._task = bar.add_task(self._title, total=self._total)
        bar.start()
        return bar

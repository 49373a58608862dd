"""The training loop: `train(config)` begins a run or goes on with one, and loses nothing however it ends.

A checkpoint holds parameters, optimizer state and where the data stands, so that a run which is killed and started again
takes the very steps it would have taken: on the same mesh the losses are the same bits. SIGTERM and SIGINT end the run
after the step it is in, with a checkpoint. A loss or gradient that is not finite ends it without one.
"""

import dataclasses
import math
import pathlib
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from meshloom.core.checkpoint import Checkpointer, check_writable, gigabytes, size_in_bytes
from meshloom.core.compile import enable_compilation_cache
from meshloom.core.errors import ConfigError, MeshloomError
from meshloom.core.hardware import peak_flops
from meshloom.core.metrics import MetricsLog, plot_loss, read_metrics
from meshloom.models.config_dict import config_from_dict
from meshloom.models.language_model import LanguageModel
from meshloom.models.language_model import load as load_model
from meshloom.sharding.derive import derive
from meshloom.sharding.explain import bytes_text, spec_text
from meshloom.sharding.layout import Layout
from meshloom.train.config import TrainConfig
from meshloom.train.corpus import Corpus, tokenise
from meshloom.train.data import Batches, heldout_batches, heldout_rows, training_rows
from meshloom.train.folder import RunFolder
from meshloom.train.model import Start, compute_dtype, mesh_of, start_of
from meshloom.train.progress import StepProgress, amount_bar, duration, standard_error
from meshloom.train.sources import documents
from meshloom.train.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """A run on disk, finished or stopped.

    Attributes:
        folder: what `meshloom.load` and `meshloom serve` take.
        step: the last step that was taken.
        finished: whether that is the last step of the run.
    """

    folder: pathlib.Path
    step: int
    finished: bool

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def final_loss(self) -> float:
        """The loss of the last logged step, in nats per token."""
        return self.metrics[-1]["loss"]

    def load(self) -> LanguageModel:
        """The trained model, from the newest checkpoint."""
        return load_model(self.folder)


def train(config: TrainConfig) -> Run:
    """Trains a model, or goes on with the run in `config.run`, until its last step, SIGTERM or SIGINT.

    Raises:
        ConfigError: settings that make no sense together, or differ from those the run in this folder began with.
        CheckpointError: the folder cannot be written, its disk is too small, or a checkpoint cannot be written or read.
        MeshloomError: the loss or the gradient is no longer finite.
    """
    console = standard_error()
    mesh = mesh_of(config)
    enable_compilation_cache()
    with RunFolder(config.run) as folder:
        folder.check(config)
        start, corpus = _prepare(config, folder, console)
        module = start.module()
        layout = derive(module, mesh)
        trainer = Trainer(module, layout, config, compute_dtype(config))
        _announce(console, config, start, corpus, layout)
        if folder.record is not None and not _same_mesh(folder.record["train"], config):
            console.print("the mesh has changed: losses go on up to rounding, not bit by bit", highlight=False)
        checkpointer = Checkpointer(folder.checkpoints, config.keep)
        _check_room(folder, config, trainer)
        folder.begin(config, start.config, start.tokenizer, corpus.fingerprint)
        return _Loop(config, folder, checkpointer, trainer, start, corpus, console).run()


def _prepare(config: TrainConfig, folder: RunFolder, console: Console) -> tuple[Start, Corpus]:
    """Model, tokenizer and corpus; those of the run, if it has begun."""
    texts = documents(config.data)
    if folder.record is None:
        with amount_bar(console, f"tokenizer from {texts.name}", 0):
            start = start_of(config, texts)
    else:
        model = config_from_dict(folder.record["model"])
        start = Start(model, folder.tokenizer(), None)
    with amount_bar(console, f"tokens of {texts.name}", texts.size) as advance:
        corpus = tokenise(texts, start.tokenizer, advance)
    if folder.record is not None and folder.record["data"] != corpus.fingerprint:
        raise ConfigError(
            f"{texts.name} has changed since the run in {folder.path} began: going on would train on other data. "
            "Restore it, or give another folder (run) to start anew"
        )
    return start, corpus


def _announce(console: Console, config: TrainConfig, start: Start, corpus: Corpus, layout: Layout) -> None:
    """The plan: what is trained, on what, and how it lies on the devices."""
    parameters = sum(math.prod(row.shape) for row in layout.rows)
    axes = " ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    tokens = config.steps * config.batch_size * config.sequence_length
    table = Table(title=f"derived layout on {axes}", title_justify="left")
    for heading in ("parameter", "shape", "spec", "rule"):
        table.add_column(heading, overflow="fold")
    table.add_column("per device", justify="right")
    for names, row in _alike(layout):
        name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
        shape = " x ".join(map(str, row.shape))
        table.add_row(name, shape, spec_text(row), row.rule, bytes_text(row.bytes_per_device * len(names)))
    console.print(
        f"model    {start.config.family}, {parameters / 1e6:.3g}M parameters, {compute_dtype(config)} computation\n"
        f"data     {len(corpus.ends):,} documents, {len(corpus.tokens):,} tokens\n"
        f"plan     {config.steps} steps of {config.batch_size} x {config.sequence_length} tokens: "
        f"{tokens / len(corpus.tokens):.2g} epochs\n"
        f"folder   {config.run}",
        highlight=False,
    )
    console.print(table)


def _alike(layout: Layout) -> list[tuple[list[str], Any]]:
    """Rows that differ only in the number of their layer, together."""
    groups: dict[Any, tuple[list[str], Any]] = {}
    for row in layout.rows:
        kind = ".".join("*" if part.isdecimal() else part for part in row.name.split("."))
        groups.setdefault((kind, row.shape, spec_text(row), row.rule), ([], row))[0].append(row.name)
    return list(groups.values())


def _same_mesh(recorded: dict[str, Any], config: TrainConfig) -> bool:
    return (recorded["devices"], recorded["mesh"]) == (config.devices, config.mesh)


def _check_room(folder: RunFolder, config: TrainConfig, trainer: Trainer) -> None:
    """While one checkpoint more than `keep` is written, all of them are on disk."""
    held = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    check_writable(folder.checkpoints, max(0, size_in_bytes(trainer.abstract) * (config.keep + 1) - held))


class _Loop:
    """The state of a run that is under way."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        checkpointer: Checkpointer,
        trainer: Trainer,
        start: Start,
        corpus: Corpus,
        console: Console,
    ):
        self._config = config
        self._folder = folder
        self._checkpointer = checkpointer
        self._trainer = trainer
        self._start = start
        self._console = console
        hold_out = config.heldout_every > 0
        share = {"process": jax.process_index(), "processes": jax.process_count()}
        rows = training_rows(corpus, config.sequence_length, hold_out=hold_out)
        self._batches = Batches(rows, config.batch_size, seed=config.seed, **share)
        self._heldout = []
        if hold_out:
            rows = heldout_rows(corpus, config.sequence_length)
            self._heldout = heldout_batches(rows, config.micro_batch, config.heldout_batches, **share)
        self._peak = peak_flops(list(trainer.mesh.devices.flat), compute_dtype(config))

    def run(self) -> Run:
        """All steps that are left."""
        try:
            step, state = self._first_state()
            if step >= self._config.steps:
                self._console.print(f"{self._folder.path} is finished: step {step} of {self._config.steps}")
                return Run(self._folder.path, step, True)
            self._compile()
            with MetricsLog(self._folder.metrics, resume_step=step) as log, _Signals() as signals:
                step = self._steps(step, state, log, signals)
            self._checkpointer.wait()
        finally:
            self._batches.close()
            self._checkpointer.close()
        return self._ended(step)

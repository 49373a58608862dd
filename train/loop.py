"""`train`: from a configuration to a trained run, and on from wherever an earlier attempt stopped.

The loop owns order and nothing else: what may not fail late is checked first (configuration, data, disk), then every
step is dispatch, fetch the next rows, report, and now and then a checkpoint that holds weights, optimizer and data
position. A process killed at any moment continues bitwise on the same mesh.

Several processes run the same configuration on a `run_dir` that all of them see; `core/processes.py` says how each is
started. All compute and save, the first one reports; a signal to any of them stops all after the same step.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from meshloom.core.checkpoint import Checkpointer, check_writable, tree_bytes
from meshloom.core.counting import count_flops
from meshloom.core.errors import ConfigError, MeshloomError
from meshloom.core.hardware import peak_flops
from meshloom.core.metrics import MetricsFile, ProgressReport, plot_loss, read_metrics
from meshloom.core.processes import any_process, join_processes, joined
from meshloom.models.language_model import LanguageModel
from meshloom.models.language_model import load as load_model
from meshloom.train.config import TrainConfig
from meshloom.train.data import Batches
from meshloom.train.plan import followed
from meshloom.train.run_folder import RunFolder
from meshloom.train.setup import Setup, prepare
from meshloom.train.state import TrainState


class TrainingDivergedError(MeshloomError):
    """The loss is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted training run.

    Attributes:
        folder: holds meshloom.json, tokenizer/, checkpoints/, metrics.jsonl and loss.png.
        metrics: the lines of metrics.jsonl: step, loss (nats per token), grad_norm, learning_rate, tokens,
            tokens_per_second, mfu (fraction of the devices' peak).
        steps: optimizer steps done. interrupted: stopped by a signal before the last step.
    """

    folder: pathlib.Path
    metrics: list[dict[str, Any]]
    steps: int
    interrupted: bool = False

    @property
    def final_loss(self) -> float:
        """Loss of the last step reported, nats per token."""
        return self.metrics[-1]["loss"] if self.metrics else math.nan

    def load(self) -> LanguageModel:
        """The model of the newest checkpoint."""
        return load_model(self.folder)

    def figures(self) -> dict[str, Any]:
        """What `meshloom train --json` prints."""
        # The first step of a process waits for things that later ones do not: the median is the pace.
        pace = [line["tokens_per_second"] for line in self.metrics]
        used = [line["mfu"] for line in self.metrics if line["mfu"] is not None]
        return {
            "folder": str(self.folder),
            "steps": self.steps,
            "interrupted": self.interrupted,
            "first_loss": self.metrics[0]["loss"] if self.metrics else None,
            "final_loss": self.final_loss if self.metrics else None,
            "tokens": sum(line["tokens"] for line in self.metrics),
            "tokens_per_second": float(np.median(pace)) if pace else None,
            "mfu": float(np.median(used)) if used else None,
        }


def train(config: TrainConfig) -> Run:
    """Trains, and returns the run. Called again with the same configuration it goes on, or returns what is complete.

    SIGINT and SIGTERM finish the step, save and return; a second SIGINT interrupts at once.

    Raises:
        ConfigError: the configuration, or the data it names, cannot be trained on; or `run_dir` holds another run.
        CheckpointError: the disk is full, `run_dir` cannot be written, or a checkpoint cannot be read.
        TrainingDivergedError: the loss is not finite; the last checkpoint from before is kept.
    """
    config = followed(config)
    join_processes()
    first = joined()[0] == 0
    console = Console(stderr=True, soft_wrap=True, quiet=not first)
    setup = prepare(config, console)
    folder = RunFolder(config.run_dir)
    with Checkpointer(folder.checkpoints, keep=config.keep) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done >= config.steps:
            console.print(f"{folder.path} is complete: {done} of {config.steps} steps are done")
            return Run(folder.path, read_metrics(folder.metrics), done)
        check_writable(folder.checkpoints, (config.keep + 1) * tree_bytes(setup.abstract_weights))
        setup.print_plan(console)
        batches = setup.batches()
        with contextlib.closing(batches):
            state = setup.restore(checkpoints, done, batches) if done else setup.start(folder)
            if done:
                console.print(f"going on from step {done} of {folder.path}")
            last = _steps(config, setup, state, batches, checkpoints, folder, console)
    metrics = read_metrics(folder.metrics)
    if first:
        plot_loss(metrics, folder.plot, title=f"{folder.path.name}: {setup.documents} on {setup.mesh_text}")
    run = Run(folder.path, metrics, last, interrupted=last < config.steps)
    if run.interrupted:
        console.print(f"stopped after step {last} of {config.steps}, saved; the same command goes on from there")
    else:
        console.print(f"done: loss {run.final_loss:.4f}; serve it with `meshloom serve {folder.path}`")
    return run


def _steps(
    config: TrainConfig,
    setup: Setup,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpointer,
    folder: RunFolder,
    console: Console,
) -> int:
    """Runs the remaining steps, or up to a signal; returns the number of the last one, which is saved."""
    with console.status("compiling the step") if console.is_terminal else contextlib.nullcontext():
        step = setup.compiled_step
        meter = Meter(setup)
    first = jax.process_index() == 0  # which reports; all of them compute and save
    with (
        MetricsFile(folder.metrics, after=state.done) if first else contextlib.nullcontext() as lines,
        ProgressReport(console, total=config.steps, start=state.done) as progress,
        stop_requested() as stop,
    ):
        batch = setup.place(next(batches))
        meter.start()
        while True:
            state, metrics = state.advance(step, batch)
            position = batches.state()
            last = state.done == config.steps
            if not last:  # rows are fetched while the devices compute
                batch = setup.place(next(batches))
            values = {name: getattr(metrics, name).item() for name in ("loss", "grad_norm", "learning_rate", "tokens")}
            if not math.isfinite(values["loss"]):
                raise TrainingDivergedError(_diverged(state.done, values["loss"], checkpoints))
            speed = meter.lap(values["tokens"])
            progress.show(state.done, loss=values["loss"], **speed)
            if lines is not None and (last or state.done % config.log_every == 0):
                lines.write({"step": state.done, **values, **speed})
            stopping = any_process(stop.is_set())
            if last or stopping or state.done % config.checkpoint_every == 0:
                checkpoints.save(state.done, state.items(position))
            if last or stopping:
                checkpoints.wait()
                return state.done


def _diverged(step: int, loss: float, checkpoints: Checkpointer) -> str:
    good = checkpoints.latest_step()
    kept = f"the checkpoint of step {good} is kept" if good else "there is no checkpoint yet"
    return (
        f"the loss of step {step} is {loss}; {kept}. Try a lower learning_rate, a longer warm-up or a lower clip_norm "
        "in another run_dir"
    )


class Meter:
    """Tokens per second and MFU of each step, by the wall clock."""

    def __init__(self, setup: Setup):
        self._flops = count_flops(setup.plain_step, setup.abstract_weights, setup.abstract_batch, jnp.int32(0)).flops
        peak_dtype = jnp.dtype(setup.dtype).name
        try:
            self._peak: float | None = peak_flops(list(setup.mesh.devices.flat), peak_dtype)
        except ConfigError:  # a chip without a figure for this dtype: no MFU rather than a wrong one
            self._peak = None

    def start(self) -> None:
        """The first step begins now."""
        self._last = time.perf_counter()

    def lap(self, tokens: int) -> dict[str, float | None]:
        """Figures of the step that ends now and trained on `tokens` tokens."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        mfu = None if self._peak is None else self._flops / seconds / self._peak
        return {"tokens_per_second": tokens / seconds, "mfu": mfu}


@contextlib.contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set inside the block; a second SIGINT acts as it did before."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may handle signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: Any) -> None:
        event.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

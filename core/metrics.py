"""What a run reports: `metrics.jsonl` for machines, a progress bar for people, a plot at the end.

One JSON object per line, flushed at once, so that a killed process loses nothing that it had reported. Standard output
is left alone: people are told on standard error.
"""

import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Seconds between lines where no terminal shows a bar.
PLAIN_INTERVAL = 5.0


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline is unfinished, or nothing.
    return [json.loads(line) for line in lines[:-1]]


class MetricsFile:
    """Appends to `metrics.jsonl`.

    Args:
        after: last step that the run goes on from; lines of later steps will be written again and are removed.
    """

    def __init__(self, path: str | pathlib.Path, *, after: int = 0):
        self.path = pathlib.Path(path)
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(_line(each) for each in kept), encoding="utf-8")
        os.replace(partial, self.path)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: Mapping[str, Any]) -> None:
        """One line; floats keep all their digits. `values` holds "step"."""
        self._file.write(_line(values))
        self._file.flush()


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"


class ProgressReport:
    """A bar on a terminal: loss, tokens/s, MFU, time left. Elsewhere a plain line every few seconds.

    Args:
        total: steps of the whole run. start: steps already done.
    """

    def __init__(self, console: Console, *, total: int, start: int = 0):
        self._console, self._total, self._start = console, total, start
        self._began = self._told = time.monotonic()
        columns = [
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("train", total=total, completed=start, figures="")

    def __enter__(self) -> "ProgressReport":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, step: int, *, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        """Reports that `step` steps are done."""
        figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tok/s" + ("" if mfu is None else f"  MFU {mfu:.1%}")
        self._bar.update(self._task, completed=step, figures=figures)
        now = time.monotonic()
        due = step in (self._start + 1, self._total) or now - self._told >= PLAIN_INTERVAL
        if due and not self._console.is_terminal:
            self._told = now
            left = (now - self._began) / (step - self._start) * (self._total - step)
            minutes, seconds = divmod(round(left), 60)
            self._console.print(f"step {step}/{self._total}  {figures}  left {minutes}:{seconds:02d}", highlight=False)


def plot_loss(metrics: list[dict[str, Any]], path: str | pathlib.Path, *, title: str) -> None:
    """Draws loss over steps, and the learning rate beside it, as a PNG that appears complete.

    Args:
        metrics: lines with "step", "loss" (nats per token) and "learning_rate".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.5 s that a run pays at its end
    from matplotlib.figure import Figure

    path = pathlib.Path(path)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [line["step"] for line in metrics]
    axes.plot(steps, [line["loss"] for line in metrics], color="tab:blue", linewidth=1.2, label="loss")
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(
        steps, [line["learning_rate"] for line in metrics], color="tab:gray", linewidth=0.8, label="learning rate"
    )
    rate.set(ylabel="learning rate", ylim=(0, None))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    os.replace(partial, path)

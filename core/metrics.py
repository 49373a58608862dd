"""The record of a run: `metrics.jsonl`, one JSON object per line with its "step", and a picture of the loss.

A line is on disk when `write` returns. A run that goes on from step k first drops what was written after it, so that no
step stands there twice and the file is that of a run that was never interrupted.
"""

import json
import math
import os
import pathlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from meshloom.core.errors import CheckpointError


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: beside it first, then renamed over it."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """All complete lines of a `metrics.jsonl`, in order; a last line without its end (a killed process) is left out.

    Raises:
        CheckpointError: a complete line is no JSON object with a "step"; its number is named.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    records = []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f'{path}, line {number}: no JSON object with a "step": {line[:60]!r}') from error
    return records


class MetricsLog:
    """Appends to `metrics.jsonl`.

    Attributes:
        records: what the file holds, from step 1 on.
    """

    def __init__(self, path: str | pathlib.Path, *, resume_step: int = 0):
        """Opens the file and drops its lines after `resume_step`."""
        self._path = pathlib.Path(path)
        self.records = [record for record in read_metrics(self._path) if record["step"] <= resume_step]
        replace_text(self._path, "".join(map(_line, self.records)))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; it is on disk afterwards. Floats are written so that reading gives the same bits."""
        self.records.append(record)
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def plot_loss(records: Sequence[dict[str, Any]], path: str | pathlib.Path, title: str) -> None:
    """Draws "loss", and "heldout_loss" where there is one, over the step, into a PNG. Nothing without records."""
    if not records:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.3 s, wanted once
    from matplotlib.figure import Figure

    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    heldout = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.35, label="loss of a step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8, label="running mean")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="tab:orange", markersize=4, label="held-out text")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    partial = pathlib.Path(path).with_suffix(".partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Exponential mean whose memory is `share` of the series (at least 5 values), without a bias to the first."""
    keep = 1 - 1 / max(5.0, share * len(values))
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means if all(map(math.isfinite, means)) else list(values)

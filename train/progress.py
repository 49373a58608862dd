"""What a person sees of a run: a bar on a terminal, else a line now and then. All of it on standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Without a terminal: seconds between two lines.
LINE_EVERY = 10.0


class StepProgress:
    """Shows the steps of a run."""

    def __init__(self, console: Console, total: int, done: int):
        self._console = console
        self._total = total
        self._printed = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("training", total=total, completed=done, values="")

    def __enter__(self) -> "StepProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, record: dict[str, Any], seconds_left: float) -> None:
        """Shows a line of metrics.jsonl."""
        step = record["step"]
        values = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.1%}"
        if "heldout_loss" in record:
            values += f"  held-out loss {record['heldout_loss']:.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, values=values)
            return
        now = time.monotonic()
        if now - self._printed >= LINE_EVERY or step == self._total or "heldout_loss" in record:
            self._printed = now
            self._console.print(f"step {step}/{self._total}  {values}  {duration(seconds_left)} left", highlight=False)


@contextmanager
def amount_bar(console: Console, title: str, total: int) -> Iterator[Any]:
    """A bar for work of known size, gone when done; yields the function that advances it by an amount."""
    if not console.is_terminal:
        console.print(f"{title} ...", highlight=False)
        yield lambda amount: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda amount: bar.advance(task, amount)


def standard_error() -> Console:
    """The console of a run. A pipe has no width: wide enough there that the rows of the plan stay lines."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else 140)


def duration(seconds: float) -> str:
    """`0:07`, `12:34` or `3:12:34`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

"""Metrics survive a kill, lose nothing on resuming, and are shown where there is a terminal and where there is none."""

import io
import json

from rich.console import Console

from meshloom.core import metrics
from meshloom.core.metrics import MetricsFile, ProgressReport, plot_loss, read_metrics


def test_lines_after_the_resumed_step_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as lines:
        for step in range(1, 6):
            lines.write({"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with MetricsFile(path, after=3) as lines:
        lines.write({"step": 4, "loss": 0.1})
    assert read_metrics(path) == [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] + [{"step": 4, "loss": 0.1}]


def test_every_line_is_on_disk_at_once(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as lines:
        lines.write({"step": 1, "loss": 0.1 + 0.2})
        [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["loss"] == 0.1 + 0.2  # every digit


def test_no_terminal_gets_plain_lines_and_not_too_many(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=120)
    with ProgressReport(console, total=20, start=10) as progress:
        for step in range(11, 21):
            clock[0] += 2.0
            progress.show(step, loss=2.5, tokens_per_second=1234.5, mfu=0.5)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "step 11/20  loss 2.5000  1,234 tok/s  MFU 50.0%  left 0:18"
    assert [line.split()[1] for line in lines] == ["11/20", "14/20", "17/20", "20/20"]


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressReport(console, total=2) as progress:
        progress.show(1, loss=2.5, tokens_per_second=10.0, mfu=None)
        progress.show(2, loss=2.25, tokens_per_second=10.0, mfu=None)
    shown = console.file.getvalue()
    assert "loss 2.2500" in shown
    assert "MFU" not in shown


def test_the_plot_is_a_picture(tmp_path):
    lines = [{"step": s, "loss": 3 / s, "learning_rate": 1e-3} for s in range(1, 9)]
    plot_loss(lines, tmp_path / "loss.png", title="a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]

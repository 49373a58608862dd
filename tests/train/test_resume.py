"""Nothing is lost: a run that is killed with SIGKILL, at any moment, goes on to bitwise the same losses."""

import pathlib
import signal
import time

import pytest

from meshloom.core.checkpoint import Checkpointer
from meshloom.core.metrics import read_metrics
from tests.train.runs import start_process, tiny_config, write_texts

STEPS = 24
SECONDS = 240


def reported(folder: pathlib.Path) -> int:
    """Last step in metrics.jsonl, 0 before the first."""
    lines = read_metrics(folder / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def finish(config, devices: int) -> list[str]:
    """Runs to the end; the losses with all their digits."""
    process = start_process(config, devices)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return [repr(line["loss"]) for line in read_metrics(config.run_dir / "metrics.jsonl")]


def kill_after(config, devices: int, step: int) -> None:
    """Starts the run and kills it as soon as `step` is reported."""
    process = start_process(config, devices)
    deadline = time.monotonic() + SECONDS
    while reported(config.run_dir) < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("devices", "mesh"), [(1, "fsdp=1"), (8, "fsdp=4,tensor=2")])
def test_killed_run_continues_bitwise(tmp_path, devices, mesh):
    write_texts(tmp_path / "texts")
    shared = {"mesh": mesh, "steps": STEPS, "checkpoint_every": 5, "data": str(tmp_path / "texts")}
    whole = tiny_config(tmp_path / "whole", **shared)
    killed = tiny_config(tmp_path / "killed", **shared)
    expected = finish(whole, devices)
    assert len(expected) == STEPS
    kill_after(killed, devices, 2)  # before the first checkpoint
    kill_after(killed, devices, 11)  # while or after the second is written
    assert 0 < (Checkpointer(killed.run_dir / "checkpoints").latest_step() or 0) < STEPS
    assert finish(killed, devices) == expected


def test_terminated_run_saves_and_says_how_to_go_on(tmp_path):
    config = tiny_config(tmp_path, mesh="fsdp=1", steps=2000, checkpoint_every=1000)
    process = start_process(config, 1)
    while reported(config.run_dir) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert "the same command goes on from there" in errors
    assert Checkpointer(config.run_dir / "checkpoints").latest_step() == reported(config.run_dir)

"""Two processes of four devices train as one process of eight does."""

import json
import socket

import numpy as np

from meshloom.core.processes import ADDRESS, COUNT, INDEX, TIMEOUT
from meshloom.train.loop import train
from tests.train.runs import start_process, tiny_config


def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    alone = train(tiny_config(tmp_path, steps=4, run_dir=tmp_path / "alone"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(ADDRESS, f"127.0.0.1:{port}")
    monkeypatch.setenv(COUNT, "2")
    monkeypatch.setenv(TIMEOUT, "120")
    config = tiny_config(tmp_path, steps=4, run_dir=tmp_path / "together")
    processes = []
    for index in range(2):
        monkeypatch.setenv(INDEX, str(index))
        processes.append(start_process(config, devices=4))
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n\n".join(errors)
    finally:
        for process in processes:
            process.kill()
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in alone.metrics], rtol=1e-5)

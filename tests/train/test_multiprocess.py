"""Two processes of four devices train and verify as one process of eight does, and go on where two others stopped.

A pair costs an interpreter start and a compilation in each process, so the tests share two pairs.
"""

import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from meshloom.core.config import to_dict
from meshloom.core.metrics import read_metrics
from meshloom.core.processes import ADDRESS, COUNT, INDEX, TIMEOUT
from meshloom.train.config import TrainConfig
from meshloom.train.loop import train
from tests.train.runs import tiny_config

STEPS = 6
SECONDS = 240
# Trains; then verifies a tiny model on two meshes, the one with a `tensor` axis with a planted error.
CHILD = """
import json, pathlib, sys
import jax
import jax.numpy as jnp
from meshloom.core.config import from_dict
from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract_module
from meshloom.sharding.constrain import constrained
from meshloom.train import step
from meshloom.train.config import TrainConfig
from meshloom.train.loop import train
from meshloom.train.verify import verify

def planted(module, layout):
    forward = constrained(module, layout)
    def half(params, *inputs):
        norm = params["final_norm"]
        norm["weight"] = norm["weight"].replace(0.5 * norm["weight"].get_value())
        return forward(params, *inputs)
    return half if "tensor" in layout.mesh.shape else forward

train(from_dict(TrainConfig, json.loads(sys.argv[1])))
if verified := sys.argv[2]:
    step.constrained = planted
    sizes = {"vocab_size": 96, "d_model": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    module = abstract_module(DecoderConfig(**sizes, init_scale=0.2), jnp.float32)
    report = verify(module, [make_mesh("data=2,fsdp=4"), make_mesh("fsdp=4,tensor=2")])
    pathlib.Path(f"{verified}{jax.process_index()}").write_text(json.dumps(report.to_json()))
"""


def free_port() -> int:
    """A port below those that systems give to outgoing connections: nobody takes it before the processes do."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as candidate:
            try:
                candidate.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port in 20000..29999")


def run_pair(folder: pathlib.Path, config: TrainConfig, verified: pathlib.Path | str = "") -> None:
    """Runs two processes of four devices to their end; what they print goes to files, which cannot fill up."""
    folder.mkdir()
    arguments = [sys.executable, "-c", CHILD, json.dumps(to_dict(config)), str(verified)]
    shared = {ADDRESS: f"127.0.0.1:{free_port()}", COUNT: "2", TIMEOUT: "120"}
    shared |= {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    shared |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # half the compile time, which is most of theirs
    # The second pair compiles the step of the first again.
    shared |= {"JAX_COMPILATION_CACHE_DIR": os.environ["XDG_CACHE_HOME"]}
    shared |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    logs = [folder / f"log{index}" for index in range(2)]
    processes = []
    try:
        for index, log in enumerate(logs):
            with log.open("w") as output:
                environment = os.environ | shared | {INDEX: str(index)}
                processes.append(subprocess.Popen(arguments, env=environment, stdout=output, stderr=output))
        deadline = time.monotonic() + SECONDS
        # The one that fails says why; the other would wait for it.
        while (codes := [process.poll() for process in processes]) != [0, 0]:
            failed = any(code not in (None, 0) for code in codes) or time.monotonic() > deadline
            said = "\n\n".join(
                f"{log.name} {code}: {log.read_text()[-4000:]}" for log, code in zip(logs, codes, strict=True)
            )
            assert not failed, said
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def config_of(folder: pathlib.Path, run: str) -> TrainConfig:
    return tiny_config(folder, run_dir=folder / run, steps=STEPS, checkpoint_every=3)


@pytest.fixture(scope="module")
def pair(own_cache, tmp_path_factory):
    """The folder in which a pair trained `whole` and verified."""
    folder = tmp_path_factory.mktemp("pair")
    run_pair(folder / "logs", config_of(folder, "whole"), folder / "verified")
    return folder


def losses(folder: pathlib.Path) -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_two_processes_train_as_one_does(pair):
    alone = train(config_of(pair, "alone"))
    np.testing.assert_allclose(losses(pair / "whole"), [line["loss"] for line in alone.metrics], rtol=1e-5)


def test_two_processes_go_on_bitwise_where_two_others_were_killed(pair):
    shutil.copytree(pair / "whole", pair / "killed")
    shutil.rmtree(pair / "killed" / "checkpoints" / "6")  # as if killed before it; metrics are ahead of checkpoints
    assert (pair / "killed" / "checkpoints" / "3").is_dir()
    run_pair(pair / "more_logs", config_of(pair, "killed"))
    assert "going on from step 3" in (pair / "more_logs" / "log0").read_text()
    assert losses(pair / "killed") == losses(pair / "whole")


def test_two_processes_verify_and_agree_on_the_verdict(pair):
    report = json.loads((pair / "verified0").read_text())
    assert json.loads((pair / "verified1").read_text()) == report
    assert (report["devices"], report["processes"]) == (8, 2)
    right, wrong = report["meshes"]
    assert right["ok"]
    assert 0 < right["gradient"]["difference"] < right["gradient"]["tolerance"]
    assert not wrong["ok"]
    assert (wrong["first_parting"]["stage"], wrong["first_parting"]["where"]) == ("forward", "final_norm.weight")

"""A tiny run for the tests of this folder: a model of 20 thousand parameters on four hundred short documents."""

import json
import os
import pathlib
import random
import subprocess
import sys
from typing import Any

from meshloom.core.config import to_dict
from meshloom.train.config import ArchitectureConfig, TrainConfig

TINY = ArchitectureConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64)


def write_texts(folder: pathlib.Path, count: int = 400) -> pathlib.Path:
    """Deterministic documents of words in a regular order, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    words = random.Random(0)
    lines = []
    for _ in range(count):
        start, length = words.randrange(50), words.randrange(5, 40)
        lines.append(json.dumps({"text": " ".join(f"w{(start + i) % 50}" for i in range(length))}))
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_config(folder: pathlib.Path, **changes: Any) -> TrainConfig:
    """A run under `folder` on one device."""
    texts = folder / "texts"
    if not texts.exists():
        write_texts(texts)
    values = {
        "data": str(texts),
        "architecture": TINY,
        "vocab_size": 300,
        "sequence_length": 32,
        "batch_size": 8,
        "steps": 6,
        "learning_rate": 1e-2,
        "mesh": "fsdp=4,tensor=2",
        "run_dir": folder / "run",
        "checkpoint_every": 2,
        "dtype": "float32",  # exact enough to compare one mesh with another
    }
    return TrainConfig(**values | changes)


def start_process(config: TrainConfig, devices: int) -> subprocess.Popen[str]:
    """Trains in a process of its own that sees `devices` devices, until it is done or killed."""
    script = (
        "import json, sys; from meshloom.core.config import from_dict; from meshloom.train.config import TrainConfig; "
        "from meshloom.train.loop import train; train(from_dict(TrainConfig, json.loads(sys.argv[1])))"
    )
    # Half of the time of such a process is compiling the same step again.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": os.environ["XDG_CACHE_HOME"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"} | compiled
    arguments = [sys.executable, "-c", script, json.dumps(to_dict(config))]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)

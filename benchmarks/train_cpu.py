"""Training speed on this machine: a 29M-parameter Llama (8 layers of 512, 8192 tokens), 4 rows of 512 tokens.

    python benchmarks/train_cpu.py float32
    python benchmarks/train_cpu.py bfloat16 --unrolled

Prints the median tokens/s of the steps after the first two, and the seconds the step took to compile.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract_module
from meshloom.sharding.derive import derive
from meshloom.train.config import TrainConfig
from meshloom.train.step import Trainer

ROWS, LENGTH = 4, 512
MODEL = {"vocab_size": 8192, "d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "d_ff": 1536}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--unrolled", action="store_true", help="unroll the layers instead of scanning over them")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    module = abstract_module(DecoderConfig(**MODEL, scan_layers=not options.unrolled), jnp.float32)
    config = TrainConfig(batch_size=ROWS, sequence_length=LENGTH)
    trainer = Trainer(module, derive(module, make_mesh("fsdp=1")), config, options.dtype)
    begin = time.perf_counter()
    trainer.compile()
    compiled = time.perf_counter() - begin
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], (ROWS, LENGTH + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }
    state, seconds = trainer.init(0), []
    for _ in range(options.steps):
        begin = time.perf_counter()
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics["loss"])
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[2:])
    rate, flops = ROWS * LENGTH / median, trainer.flops / median / 1e9
    print(f"{options.dtype}: {rate:.0f} tokens/s, {flops:.0f} GFLOP/s of the model's, compiled in {compiled:.1f} s")


if __name__ == "__main__":
    main()

"""Training speed on this machine: a 29M-parameter Llama (8 layers of 512, 8192 tokens), 4 rows of 512 tokens.

    python benchmarks/train_cpu.py float32
    python benchmarks/train_cpu.py bfloat16 --unrolled --json

Prints the median tokens/s of the steps after the first two, and the seconds the step took to compile.
"""

import argparse
import json
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
from meshloom.train.data import Batch
from meshloom.train.optimizer import make_optimizer, make_schedule
from meshloom.train.step import compile_step, fresh_weights, make_step, place_batch

ROWS, LENGTH = 4, 512
MODEL = DecoderConfig(vocab_size=8192, d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, d_ff=1536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--unrolled", action="store_true", help="unroll the layers instead of scanning over them")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = TrainConfig(batch_size=ROWS, sequence_length=LENGTH)
    fields = {**vars(MODEL), "scan_layers": not options.unrolled}
    module = abstract_module(DecoderConfig(**fields), jnp.float32)
    layout = derive(module, make_mesh("fsdp=1", jax.devices()[:1]))
    schedule = make_schedule(config)
    optimizer = make_optimizer(config, module)
    weights = fresh_weights(module, optimizer, layout, seed=0)
    shape = (ROWS, LENGTH + 1)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, shape, dtype=np.int32)
    positions = np.tile(np.arange(LENGTH + 1, dtype=np.int32), (ROWS, 1))
    batch = place_batch(Batch(tokens, np.ones(shape, np.int32), positions), layout, accumulation=1)
    begin = time.perf_counter()
    step = compile_step(make_step(module, optimizer, schedule, dtype=options.dtype), weights, batch, layout)
    compiled = time.perf_counter() - begin
    seconds = []
    for number in range(options.steps):
        begin = time.perf_counter()
        weights, metrics = step(weights, batch, jax.device_put(jnp.int32(number), layout.replicated))
        jax.block_until_ready(metrics.loss)
        seconds.append(time.perf_counter() - begin)
    rate = ROWS * LENGTH / statistics.median(seconds[2:])
    figures = {"dtype": options.dtype, "unrolled": options.unrolled, "tokens_per_second": rate, "compile_s": compiled}
    print(
        json.dumps(figures) if options.json else f"{options.dtype}: {rate:.0f} tokens/s, compiled in {compiled:.1f} s"
    )


if __name__ == "__main__":
    main()

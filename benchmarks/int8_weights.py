"""What int8 weights gain and lose on this machine, on SmolLM2-135M: `python benchmarks/int8_weights.py`.

Prints the speed at which memory is read; the time of all products of one step, with float32 weights, and with int8
weights and activations of 16 or 8 bits, in turn; and how far the model's predictions on texts of the standard library
move, as the mean Kullback-Leibler divergence from the float32 model and the share of positions with the same first
choice.
"""

import argparse
import functools
import inspect
import random
import textwrap
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshloom import models
from meshloom.core.compile import enable_compilation_cache
from meshloom.models.decoder import Embedding
from meshloom.models.language_model import LanguageModel
from meshloom.models.layers import Linear
from meshloom.pallas_kernels import matmul, quantize, quantized_matmul

TEXTS = (argparse, inspect, random, textwrap)  # modules, whose source is read
LENGTH = 512
REPEATS = 15
WAYS: dict[str, Callable] = {
    "float32": matmul,
    "int8, 16-bit activations": functools.partial(quantized_matmul, activations="int16"),
    "int8, 8-bit activations": functools.partial(quantized_matmul, activations="int8"),
}


def best_ms(run: Callable, *arguments: jax.Array) -> float:
    """Milliseconds of the fastest of some calls."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * 1e3


def products(product: Callable) -> Callable:
    """All products of a step one after the other, each waiting for the one before."""

    def run(weights: list, x: jax.Array) -> jax.Array:
        carried = jnp.zeros((x.shape[0], 1))
        for weight in weights:
            carried = product(x[:, : weight.shape[1]] + 1e-9 * carried, weight)[:, :1]
        return carried

    return jax.jit(run)


def log_probabilities(lm: LanguageModel, tokens: np.ndarray) -> jax.Array:
    return jax.nn.log_softmax(lm.logits(tokens), axis=-1)


def main() -> None:
    """Prints the three tables."""
    enable_compilation_cache()
    big = jnp.ones((64, 2**20))
    milliseconds = best_ms(jax.jit(jnp.sum), big)
    print(f"memory: {big.nbytes / milliseconds / 1e6:.0f} GB/s (the sum of {big.nbytes / 2**20:.0f} MiB)\n")

    lm = models.load("smollm2")
    held = [node.weight.get_value() for _, node in nnx.iter_graph(lm.module) if isinstance(node, Linear | Embedding)]
    rounded = jax.block_until_ready([quantize(weight) for weight in held])
    widest = max(weight.shape[1] for weight in held)
    runs = {name: products(product) for name, product in WAYS.items()}
    print(f"| rows | {' | '.join(f'{name} (ms)' for name in runs)} |\n|{'---|' * (1 + len(runs))}")
    for rows in (1, 8, 32, 128, 512):
        x = jax.random.normal(jax.random.key(0), (rows, widest))
        times = [best_ms(run, held if name == "float32" else rounded, x) for name, run in runs.items()]
        print(f"| {rows} | {' | '.join(f'{each:.1f}' for each in times)} |", flush=True)

    tokens = np.stack([lm.tokenizer.encode(inspect.getsource(each))[:LENGTH] for each in TEXTS])
    exact = log_probabilities(lm, tokens)
    print("\n| weights and activations | mean KL divergence from float32 | same first choice |\n|---|---|---|")
    for name, product in list(WAYS.items())[1:]:
        small = models.load("smollm2", quantize="int8")
        with mock.patch("meshloom.pallas_kernels.matmul.quantized_matmul", product):
            moved = log_probabilities(small, tokens)
        divergence = jnp.mean(jnp.sum(jnp.exp(exact) * (exact - moved), axis=-1))
        same = jnp.mean(jnp.argmax(exact, axis=-1) == jnp.argmax(moved, axis=-1))
        print(f"| {name} | {divergence:.4f} | {same:.1%} |")


if __name__ == "__main__":
    main()

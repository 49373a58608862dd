"""Time and memory of the cross entropy of a linear layer, forward and backward: in blocks, and with all its logits.

    python benchmarks/linear_cross_entropy.py
    python benchmarks/linear_cross_entropy.py --target v5e

Without a target it runs on this machine's CPU: the least CPU time of five runs, and the temporary memory that XLA
plans. With one, that chip's compiler is asked about one device of it, and nothing runs.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from meshloom.core.ahead import target_devices
from meshloom.core.program_report import report
from meshloom.core.topology import parse_devices
from meshloom.pallas_kernels.cross_entropy import CROSS_ENTROPY, linear_cross_entropy

# tokens of a device, model, vocabulary: SmolLM2-135M, the 29M-parameter Llama of train_cpu.py; Llama-3-8B.
CPU_SIZES = ((2048, 576, 49152), (2048, 512, 8192))
TARGET_SIZES = ((4096, 4096, 128256), (8192, 4096, 128256))


def abstract(size: tuple[int, int, int], dtype: str, device: jax.Device) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x, weight and targets on one device."""
    tokens, model, vocab = size
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = (((tokens, model), dtype), ((vocab, model), dtype), ((tokens,), "int32"))
    return tuple(jax.ShapeDtypeStruct(shape, each, sharding=sharding) for shape, each in shapes)


def compiled(implementation: str, arrays: tuple[jax.ShapeDtypeStruct, ...], device: jax.Device) -> jax.stages.Compiled:
    """The sum of all rows' losses and its gradients."""

    def loss(x, weight, targets):
        return linear_cross_entropy(x, weight, targets, implementation=implementation)[0].sum()

    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("data",))):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()


def seconds(program: jax.stages.Compiled, arrays: tuple[jax.ShapeDtypeStruct, ...]) -> float:
    """The least of five runs, in CPU time of all cores: neighbours on the machine change that less than the clock's."""
    draw = np.random.default_rng(0)
    x, weight = (jnp.asarray(draw.normal(size=each.shape), each.dtype) for each in arrays[:2])
    targets = jnp.asarray(draw.integers(0, len(weight), len(x)), jnp.int32)
    weight = jax.block_until_ready(0.05 * weight)
    found = []
    for _ in range(6):
        begin = time.process_time()
        jax.block_until_ready(program(x, weight, targets))
        found.append(time.process_time() - begin)
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="a chip to compile for: v5e, v5p, v6e, h100")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.target is None:
        device, sizes, dtypes = jax.devices()[0], CPU_SIZES, ["float32", "bfloat16"]
    else:
        shape = {"v5p": "2x2x1", "h100": "8"}.get(options.target, "2x2")
        device = target_devices(parse_devices(f"{options.target}:{shape}"))[0]
        sizes, dtypes = TARGET_SIZES, ["bfloat16"]
    for size in sizes:
        for dtype in dtypes:
            for each in CROSS_ENTROPY:
                arrays = abstract(size, dtype, device)
                program = compiled(each.name, arrays, device)
                memory = report(program, {"data": 1}).temporary_bytes / 2**20
                taken = "" if options.target else f"{1e3 * seconds(program, arrays):6.0f} ms CPU "
                print(f"{size} {dtype:9} {each.name:10} {taken}{memory:7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

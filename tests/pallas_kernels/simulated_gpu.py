"""A GPU simulated on the CPU, for kernels of `plgpu.kernel`: memories, copies, barriers, warpgroups, races.

JAX's simulator multiplies at once, takes no operand from registers, knows no accumulator that begins with a value and
looks for no races of a product. Here a product reads when it begins and again, for its result, when it is awaited, the
latest that hardware may; both reads are checked. Warpgroups run at once, each on a thread of XLA's pool, which has one
for every CPU device: on two cores with one device three of them would wait for each other without end.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """Kernels traced inside run on a simulated GPU; a race, a read out of bounds and a barrier misused raise.

    Memory begins as NaN. An accumulator may not outlive the body of the loop that it is made in.
    """
    pending: list[tuple[Any, Any, Any]] = []
    sums: dict[int, jax.Array] = {}

    def read(operand: Any) -> jax.Array:
        if isinstance(operand, jax.Array) and isinstance(jax.typeof(operand), jax.core.ShapedArray):
            return operand
        value = operand[...]
        # Products read by the proxy that copies write by, so what is read needs no fence before it is overwritten.
        plgpu.commit_smem()
        return value

    def begin(acc: Any, a: Any, b: Any) -> None:
        read(a), read(b)
        pending.append((acc, a, b))

    def awaited(acc: Any, *, wait_n: int = 0) -> jax.Array:
        while len(pending) > wait_n:
            into, a, b = pending.pop(0)
            dtype = jnp.int32 if jnp.issubdtype(read(a).dtype, jnp.integer) else jnp.float32
            product = jnp.dot(read(a).astype(dtype), read(b).astype(dtype))
            sums[id(into)] = sums.get(id(into), 0) + product
        return sums.pop(id(acc))

    def run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
        def run(begin_with: Any) -> Any:
            values, tree = jax.tree.flatten(begin_with)
            accs = [object() for _ in values]
            sums.update(zip(map(id, accs), values, strict=True))
            body(tree.unflatten(accs))
            return tree.unflatten([awaited(acc) for acc in accs])

        return run

    with (
        mock.patch.object(plgpu, "wgmma", begin),
        mock.patch.object(plgpu, "wgmma_accumulator_load", awaited),
        mock.patch.object(plgpu.ACC, "init", lambda array: array),
        mock.patch.object(pl, "run_state", run_state),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
    ):
        yield

"""The kernels on this machine's CPU against XLA's own, by time.

Both sides of a comparison take turns, so that what else the machine does meets both; the best of each counts.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshloom.core.topology import make_mesh
from meshloom.pallas_kernels.attention import Mask, attention
from meshloom.pallas_kernels.matmul import quantize, quantized_matmul
from meshloom.pallas_kernels.matmul.quantized.training import quantized_training_matmul

ROW_COUNTS = (1, 32, 128)
DTYPES = ("float32", "bfloat16")
# Rows that the comparison makes: two of each attention and product, three of the training product.
CPU_ROWS = 2 * len(DTYPES) + 2 * len(ROW_COUNTS) + 3
# In turns; a product of one row takes less than a millisecond.
RUNS = 15


@dataclasses.dataclass(frozen=True)
class Seconds:
    """One way to compute an op on this CPU: the best of several runs, and the peer's time over it."""

    op: str
    kernel: str
    seconds: float
    times_peer: float


def kernels_on_cpu(*, tokens: int = 2048, size: int = 4096, rows: int = 2048) -> Iterator[Seconds]:
    """All comparisons.

    Args:
        tokens: of attention. size: of the weight `[size, size]` of a product. rows: of the training product.
    """
    for dtype in DTYPES:
        yield from attentions(tokens, dtype)
    for count in ROW_COUNTS:
        yield from products(count, size)
    yield from training_products(rows, size // 4, size * 11 // 16)


def attentions(tokens: int, dtype: str) -> Iterator[Seconds]:
    """Causal attention forward and backward, 8 heads of 64: ours beside `jax.nn.dot_product_attention`."""
    q, k, v = _normal(dtype, *[(1, tokens, 8, 64)] * 3)
    forms = {
        "jax.nn.dot_product_attention": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        "meshloom chunked": lambda q, k, v: attention(q, k, v, mask=Mask()),
    }
    calls = {name: _gradient(form, q, k, v) for name, form in forms.items()}
    yield from _compared(f"attention forward and backward, {tokens} tokens, {dtype}", calls)


def products(count: int, size: int) -> Iterator[Seconds]:
    """Rows by a square weight: in float32, and rounded to int8 with a weight in int8."""
    x, w = _normal("float32", (count, size), (size, size))
    held = jax.block_until_ready(jax.jit(quantize)(w))
    calls = {
        "XLA, float32": _call(lambda x, w: jnp.einsum("ri,oi->ro", x, w), x, w),
        "meshloom int8 by int8": _call(lambda x, w: quantized_matmul(x, w, activations="int8"), x, held),
    }
    yield from _compared(f"product, {count} x {size} x {size}", calls)


def training_products(rows: int, inputs: int, outputs: int) -> Iterator[Seconds]:
    """Both backward products of a bfloat16 product, by XLA and by ours, beside twice the forward product."""
    x, w, dy = _normal("bfloat16", (rows, inputs), (outputs, inputs), (rows, outputs))

    def product(x, w):
        return jnp.einsum("ri,oi->ro", x, w)

    def backward(form: Callable[[Any, Any], Any]) -> Callable[[], Any]:
        with _this_cpu():
            _, pull = jax.vjp(form, x, w)
        return _call(lambda pull, dy: pull(dy), pull, dy)

    forward = _call(product, x, w)
    calls = {
        "the forward product, twice": lambda: (forward(), forward()),
        "XLA": backward(product),
        "meshloom quantized_training_matmul": backward(quantized_training_matmul),
    }
    yield from _compared(f"both backward products, {rows} x {inputs} x {outputs}, bfloat16", calls)


def _this_cpu() -> Any:
    """Tells kernels what they run on, as training and serving do."""
    return jax.set_mesh(make_mesh({"fsdp": 1}, jax.devices()[:1]))


def _normal(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)


def _gradient(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    def total(*arguments):
        return jnp.sum(function(*arguments).astype(jnp.float32))

    return _call(jax.grad(total, argnums=tuple(range(len(arguments)))), *arguments)


def _compared(op: str, calls: dict[str, Callable[[], Any]]) -> Iterator[Seconds]:
    """Each of them, the first being the peer of all."""
    best = dict.fromkeys(calls, float("inf"))
    with _this_cpu():
        for run in range(RUNS + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                jax.block_until_ready(call())
                if run:  # the first one compiles
                    best[name] = min(best[name], time.perf_counter() - start)
    peer = next(iter(best.values()))
    for name, seconds in best.items():
        yield Seconds(op, name, seconds, peer / seconds)

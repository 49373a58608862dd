"""What a device does, measured: memory bandwidth as STREAM counts it, and matrix products by number format.

These are rates that programs compiled by XLA reach, best of several, and so below what a data sheet promises; on a
machine that does other work too they vary by a factor of two from run to run.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

DTYPES = ("float32", "bfloat16", "int8")

# McCalpin 1995, Memory Bandwidth and Machine Balance: arrays of each kernel that count as moved, written ones once.
_STREAM: Mapping[str, tuple[int, Callable[..., jax.Array]]] = {
    "copy": (2, lambda a, b, c: jnp.copy(b)),
    "scale": (2, lambda a, b, c: 3 * b),
    "add": (3, lambda a, b, c: b + c),
    "triad": (3, lambda a, b, c: b + 3 * c),
}
_LEAST_ARRAY = 64 * 2**20  # bytes
_MOST_ARRAY = 512 * 2**20  # bytes: three of these move in 0.2 s on a slow laptop
_BANDWIDTH_SECONDS = 0.2  # per kernel, once it is compiled
_PRODUCT_SECONDS = 0.03  # a product that takes this long is large enough to tell the peak
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rates of one device.

    Attributes:
        memory_bytes: of the device, or of the machine for a CPU.
        bandwidth: bytes/s by STREAM kernel ("copy", "scale", "add", "triad").
        flops: operations/s of the best product by dtype.
    """

    memory_bytes: int
    bandwidth: Mapping[str, float]
    flops: Mapping[str, float]


def measure(device: jax.Device, progress: Callable[[str], None] = lambda what: None) -> Measured:
    """Measures bandwidth and products; about 3 s on an idle CPU.

    Args:
        progress: is told what is measured next.
    """
    progress("memory bandwidth")
    bandwidth = measure_bandwidth(device)
    flops = {}
    for dtype in DTYPES:
        progress(f"{dtype} products")
        flops[dtype] = measure_flops(device, dtype)
    return Measured(memory(device)[0], bandwidth, flops)


def memory(device: jax.Device) -> tuple[int, int]:
    """Bytes of a device's memory and how many of them are free; of the machine's for a CPU, 0 where nobody says."""
    if device.platform == "cpu":
        return machine_memory()
    stats = device.memory_stats() or {}
    limit = int(stats.get("bytes_limit", 0))
    return limit, limit - int(stats.get("bytes_in_use", 0))


def machine_memory() -> tuple[int, int]:
    """Bytes of this machine's memory, and how many of them are free; caches of files count as taken."""
    page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return page * pages, page * free


def array_bytes(device: jax.Device) -> int:
    """Bytes of each of the three arrays of `measure_bandwidth`: four times a CPU's last-level cache, as STREAM asks.

    Never more than a sixteenth of what is free, so that measuring takes no memory that somebody needs.
    """
    cache = 0
    if device.platform == "cpu" and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        cache = max(os.sysconf("SC_LEVEL3_CACHE_SIZE"), 0)
    elif device.platform != "cpu":
        cache = 64 * 2**20  # second-level caches of GPUs are 40 to 126 MB, a TPU's vector memory up to 128
    wanted = min(max(_LEAST_ARRAY, 4 * cache), _MOST_ARRAY)
    free = memory(device)[1]
    return min(wanted, free // 16) if free else wanted


def measure_bandwidth(device: jax.Device, size: int | None = None) -> dict[str, float]:
    """Bytes/s by STREAM kernel, float32. Results are written over an array that is there, as STREAM does.

    Args:
        size: bytes of each array, instead of `array_bytes`.
    """
    count = max((array_bytes(device) if size is None else size) // 4, 1)
    a, b, c = (jax.device_put(np.full(count, value, np.float32), device) for value in (1, 2, 3))
    found = {}
    for name, (arrays, kernel) in _STREAM.items():
        program = jax.jit(kernel, donate_argnums=0, keep_unused=True)
        a = program(a, b, c).block_until_ready()
        seconds: list[float] = []
        while len(seconds) < 3 or (sum(seconds) < _BANDWIDTH_SECONDS and len(seconds) < 50):
            start = time.perf_counter()
            a = program(a, b, c).block_until_ready()
            seconds.append(time.perf_counter() - start)
        found[name] = arrays * 4 * count / min(seconds)
    return found


def measure_flops(device: jax.Device, dtype: str) -> float:
    """Operations/s of the best square product: 256 wide and then twice as wide until one takes 0.03 s.

    int8 products accumulate in int32, float32 ones are of full precision (no bfloat16 passes, no TF32).
    """
    best, size, longest = 0.0, 256, 1024 if device.platform == "cpu" else 8192
    while size <= longest:
        seconds = _product_seconds(device, dtype, size)
        best = max(best, 2 * size**3 / seconds)
        if seconds > _PRODUCT_SECONDS:
            break
        size *= 2
    return best


def _product_seconds(device: jax.Device, dtype: str, size: int) -> float:
    # Ones would let a GPU clock higher than data does: bits that do not change take less power.
    tile = np.random.default_rng(0).integers(-8, 9, (256, 256))
    x = jax.device_put(jnp.asarray(np.tile(tile, (size // 256, size // 256)), dtype), device)
    accumulator = "int32" if dtype == "int8" else None
    product = jax.jit(
        functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST, preferred_element_type=accumulator)
    )
    product(x, x).block_until_ready()
    # Accelerators take work ahead of time: with a few products in their queue the host's share is hidden.
    queued = 1 if device.platform == "cpu" else 8
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for result in [product(x, x) for _ in range(queued)]:
            result.block_until_ready()
        seconds.append((time.perf_counter() - start) / queued)
    return min(seconds)


@functools.cache
def measured_peak_flops(dtype: str) -> float:
    """Operations/s of products on the first local device, measured once per process; 0.3 s with their compiles."""
    return measure_flops(jax.local_devices()[0], dtype)


@functools.cache
def measured_cpu() -> Measured:
    """This machine's processor, measured once per process."""
    return measure(jax.local_devices(backend="cpu")[0])

"""What chips can do, from the vendors' data sheets; and what this CPU does, measured.

Figures are dense (no sparsity) and per device as JAX counts devices: a v4 or v5p chip with both its cores is one, a
tpu7x chip is two.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from meshloom.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as one JAX device.

    Attributes:
        name: the key of device strings such as "v5e:4x4".
        flops: peak FLOP/s by dtype ("bfloat16", "float32", "int8", "float8").
        hbm_bytes: memory per device. hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s, one direction, summed over the links to neighbours in the same slice or node.
        kinds: how `jax.Device.device_kind` spells it, lower case.
        source: where the figures come from; links of TPUs: Austin et al. 2025, How to Scale Your Model, part 2.
        devices_per_chip: JAX devices on one chip of a topology such as "tpu7x:2x2x1".
    """

    name: str
    flops: dict[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    kinds: tuple[str, ...]
    source: str
    devices_per_chip: int = 1


_TERA, _GIB = 1e12, 2**30

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4",
            {"bfloat16": 275 * _TERA, "int8": 275 * _TERA},
            32 * _GIB,
            1.228 * _TERA,
            6 * 45e9,
            ("tpu v4",),
            "Google Cloud TPU v4 system architecture",
        ),
        Chip(
            "v5e",
            {"bfloat16": 197 * _TERA, "int8": 394 * _TERA},
            16 * _GIB,
            0.819 * _TERA,
            4 * 45e9,
            ("tpu v5 lite", "tpu v5e"),
            "Google Cloud TPU v5e system architecture",
        ),
        Chip(
            "v5p",
            {"bfloat16": 459 * _TERA, "int8": 918 * _TERA},
            95 * _GIB,
            2.765 * _TERA,
            6 * 90e9,
            ("tpu v5", "tpu v5p"),
            "Google Cloud TPU v5p system architecture",
        ),
        Chip(
            "v6e",
            {"bfloat16": 918 * _TERA, "int8": 1836 * _TERA},
            32 * _GIB,
            1.64 * _TERA,
            4 * 90e9,
            ("tpu v6 lite", "tpu v6e"),
            "Google Cloud TPU v6e (Trillium) system architecture",
        ),
        Chip(
            "tpu7x",
            {"bfloat16": 2307 / 2 * _TERA, "float8": 4614 / 2 * _TERA},
            192 // 2 * _GIB,
            7.38 / 2 * _TERA,
            6 * 90e9 / 2,
            ("tpu7x",),
            "Google Cloud TPU7x (Ironwood) system architecture, half a chip",
            devices_per_chip=2,
        ),
        Chip(
            "a100",
            {"bfloat16": 312 * _TERA, "float32": 19.5 * _TERA, "int8": 624 * _TERA},
            80 * 10**9,
            2.039 * _TERA,
            300e9,
            ("nvidia a100-sxm4-80gb",),
            "NVIDIA A100 80GB SXM data sheet",
        ),
        Chip(
            "h100",
            {"bfloat16": 989.4 * _TERA, "float32": 66.9 * _TERA, "int8": 1978.9 * _TERA, "float8": 1978.9 * _TERA},
            80 * 10**9,
            3.35 * _TERA,
            450e9,
            ("nvidia h100 80gb hbm3",),
            "NVIDIA H100 SXM data sheet",
        ),
        Chip(
            "h200",
            {"bfloat16": 989.4 * _TERA, "float32": 66.9 * _TERA, "int8": 1978.9 * _TERA, "float8": 1978.9 * _TERA},
            141 * 10**9,
            4.8 * _TERA,
            450e9,
            ("nvidia h200",),
            "NVIDIA H200 SXM data sheet",
        ),
        Chip(
            "b200",
            {"bfloat16": 2250 * _TERA, "float32": 75 * _TERA, "int8": 4500 * _TERA, "float8": 4500 * _TERA},
            180 * 10**9,
            7.7 * _TERA,
            900e9,
            ("nvidia b200",),
            "NVIDIA HGX B200 data sheet, per GPU",
        ),
    )
}


def chip_of_kind(kind: str) -> Chip | None:
    """The table row of a `jax.Device.device_kind`, or None for a CPU or a chip that is not in the table."""
    return next((chip for chip in CHIPS.values() if kind.lower() in chip.kinds), None)


def chip_named(name: str) -> Chip:
    """The table row called `name`. Raises ConfigError that lists the table."""
    if name not in CHIPS:
        raise ConfigError(f"unknown chip {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]


def peak_flops(devices: list[jax.Device], dtype: str) -> float:
    """Peak FLOP/s of all `devices` together: the data sheet's, or on a CPU one measured product's.

    Simulated CPU devices share one processor, so their number does not count.

    Raises:
        ConfigError: no figure is known for the chip, or for `dtype` on it.
    """
    if devices[0].platform == "cpu":
        return measured_peak_flops(dtype)
    chip = chip_of_kind(devices[0].device_kind)
    if chip is None:
        raise ConfigError(f"no peak is known for {devices[0].device_kind!r}; known: {', '.join(CHIPS)}")
    if dtype not in chip.flops:
        raise ConfigError(f"no {dtype} peak is known for {chip.name}; known: {', '.join(chip.flops)}")
    return len(devices) * chip.flops[dtype]


@functools.cache
def measured_peak_flops(dtype: str) -> float:
    """FLOP/s of the best of five 1024 x 1024 x 1024 products on the first local device; 0.2 s with its compile."""
    size = 1024
    x = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator, as one JAX device.

    Attributes:
        name: the key of device strings such as "v5e:4x4".
        flops: peak FLOP/s by dtype ("bfloat16", "float16", "float32", "int8", "float8").
        hbm_bytes: memory per device. hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s, one direction, summed over the links to neighbours in the same slice or node.
        network_bandwidth: bytes/s of one device, one direction, between slices or nodes.
        node_devices: GPUs of a node, or None for a TPU, whose slices have many sizes.
        torus: for a TPU, the dimensions of a slice, 2 or 3. pod_chips: chips of the largest slice.
        efficiency: share of the peak that large products reach in a training step, the one constant per chip of the
            cost model: fitted to published runs where there are any (docs/planner.md), else assumed.
        price_per_hour: US dollars per device, on demand, or None where nobody lists one; a default to override.
        watts: board or chip power, or None where the vendor does not say.
        kinds: how `jax.Device.device_kind` spells it, lower case; empty for a chip to plan with only.
        source: of peaks, memory, networks and power; of TPUs' links, and of v4's and tpu7x's networks: Austin et al.
            2025, How to Scale Your Model, part 2.
        devices_per_chip: JAX devices on one chip of a topology such as "tpu7x:2x2x1".
    """

    name: str
    flops: dict[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    source: str
    node_devices: int | None = None
    torus: int = 0
    pod_chips: int = 0
    efficiency: float = 0.6
    price_per_hour: float | None = None
    watts: float | None = None
    kinds: tuple[str, ...] = ()
    devices_per_chip: int = 1


_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


_A100 = Chip(
    name="a100",
    flops={"bfloat16": 312 * _TERA, "float32": 19.5 * _TERA, "int8": 624 * _TERA},
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=2.039 * _TERA,
    link_bandwidth=300 * _GIGA,
    network_bandwidth=25 * _GIGA,
    node_devices=8,
    efficiency=0.55,
    price_per_hour=5.07,
    watts=400.0,
    kinds=("nvidia a100-sxm4-80gb",),
    source="NVIDIA A100 80GB SXM data sheet; network of a DGX A100, 200 Gb/s per GPU",
)
_H100 = Chip(
    name="h100",
    flops={"bfloat16": 989.4 * _TERA, "float32": 66.9 * _TERA, "int8": 1978.9 * _TERA, "float8": 1978.9 * _TERA},
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=3.35 * _TERA,
    link_bandwidth=450 * _GIGA,
    network_bandwidth=50 * _GIGA,
    node_devices=8,
    price_per_hour=6.88,
    watts=700.0,
    kinds=("nvidia h100 80gb hbm3",),
    source="NVIDIA H100 SXM data sheet; network of a DGX H100, 400 Gb/s per GPU",
)

# Prices are the on-demand list prices of Google Cloud (TPUs, V100, A100) and AWS (H100, H200, B200) of 2025.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops={"bfloat16": 275 * _TERA, "int8": 275 * _TERA},
            hbm_bytes=32 * _GIB,
            hbm_bandwidth=1.228 * _TERA,
            link_bandwidth=6 * 45 * _GIGA,
            network_bandwidth=6.25 * _GIGA,
            torus=3,
            pod_chips=4096,
            price_per_hour=3.22,
            watts=192.0,
            kinds=("tpu v4",),
            source="Google Cloud TPU v4 system architecture",
        ),
        Chip(
            name="v5e",
            flops={"bfloat16": 197 * _TERA, "int8": 394 * _TERA},
            hbm_bytes=16 * _GIB,
            hbm_bandwidth=0.819 * _TERA,
            link_bandwidth=4 * 45 * _GIGA,
            network_bandwidth=3.125 * _GIGA,
            torus=2,
            pod_chips=256,
            efficiency=0.71,
            price_per_hour=1.20,
            kinds=("tpu v5 lite", "tpu v5e"),
            source="Google Cloud TPU v5e system architecture",
        ),
        Chip(
            name="v5p",
            flops={"bfloat16": 459 * _TERA, "int8": 918 * _TERA},
            hbm_bytes=95 * _GIB,
            hbm_bandwidth=2.765 * _TERA,
            link_bandwidth=6 * 90 * _GIGA,
            network_bandwidth=6.25 * _GIGA,
            torus=3,
            pod_chips=8960,
            efficiency=0.81,
            price_per_hour=4.20,
            kinds=("tpu v5", "tpu v5p"),
            source="Google Cloud TPU v5p system architecture",
        ),
        Chip(
            name="v6e",
            flops={"bfloat16": 918 * _TERA, "int8": 1836 * _TERA},
            hbm_bytes=32 * _GIB,
            hbm_bandwidth=1.64 * _TERA,
            link_bandwidth=4 * 90 * _GIGA,
            network_bandwidth=12.5 * _GIGA,
            torus=2,
            pod_chips=256,
            efficiency=0.48,
            price_per_hour=2.70,
            kinds=("tpu v6 lite", "tpu v6e"),
            source="Google Cloud TPU v6e (Trillium) system architecture",
        ),
        Chip(
            name="tpu7x",
            flops={"bfloat16": 2307 / 2 * _TERA, "float8": 4614 / 2 * _TERA},
            hbm_bytes=192 // 2 * _GIB,
            hbm_bandwidth=7.38 / 2 * _TERA,
            link_bandwidth=6 * 90 / 2 * _GIGA,
            network_bandwidth=12.5 / 2 * _GIGA,
            torus=3,
            pod_chips=9216,
            kinds=("tpu7x",),
            source="Google Cloud TPU7x (Ironwood) system architecture, half a chip; network as v6e",
            devices_per_chip=2,
        ),
        Chip(
            name="v100",
            flops={"float16": 125 * _TERA, "float32": 15.7 * _TERA},
            hbm_bytes=32 * 10**9,
            hbm_bandwidth=0.9 * _TERA,
            link_bandwidth=150 * _GIGA,
            network_bandwidth=12.5 / 2 * _GIGA,
            node_devices=8,
            price_per_hour=2.48,
            watts=300.0,
            source="NVIDIA V100 SXM2 data sheet; network of a DGX-1, four 100 Gb/s ports for eight GPUs",
        ),
        dataclasses.replace(
            _A100,
            name="a100-40",
            hbm_bytes=40 * 10**9,
            hbm_bandwidth=1.555 * _TERA,
            price_per_hour=3.67,
            kinds=("nvidia a100-sxm4-40gb",),
            source="NVIDIA A100 40GB SXM data sheet; network of a DGX A100, 200 Gb/s per GPU",
        ),
        _A100,
        _H100,
        dataclasses.replace(
            _H100,
            name="h200",
            hbm_bytes=141 * 10**9,
            hbm_bandwidth=4.8 * _TERA,
            price_per_hour=7.91,
            kinds=("nvidia h200",),
            source="NVIDIA H200 SXM data sheet; network of a DGX H200, 400 Gb/s per GPU",
        ),
        Chip(
            name="b200",
            flops={"bfloat16": 2250 * _TERA, "float32": 75 * _TERA, "int8": 4500 * _TERA, "float8": 4500 * _TERA},
            hbm_bytes=180 * 10**9,
            hbm_bandwidth=7.7 * _TERA,
            link_bandwidth=900 * _GIGA,
            network_bandwidth=50 * _GIGA,
            node_devices=8,
            price_per_hour=14.24,
            watts=1000.0,
            kinds=("nvidia b200",),
            source="NVIDIA HGX B200 data sheet, per GPU; network of a DGX B200, 400 Gb/s per GPU",
        ),
        Chip(
            name="mi250x",
            flops={"bfloat16": 383 / 2 * _TERA, "float32": 47.9 / 2 * _TERA},
            hbm_bytes=64 * 10**9,
            hbm_bandwidth=3.2768 / 2 * _TERA,
            link_bandwidth=400 / 2 * _GIGA,
            network_bandwidth=100 / 8 * _GIGA,
            node_devices=8,
            efficiency=0.35,
            watts=560 / 2,
            source="AMD Instinct MI250X data sheet, half a module (one GCD is a device); network of a Frontier node, "
            "four 25 GB/s ports for eight",
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

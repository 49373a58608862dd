"""What chips can do, from the vendors' data sheets; and what this CPU does, measured.

Figures are dense (no sparsity) and per device as JAX counts devices: a v4 or v5p chip with both its cores is one, a
tpu7x chip is two. Each has a source of its own (`Chip.sources`), which says so where the figure could not be compared
with the vendor's own page.
"""

import dataclasses
from collections.abc import Mapping

import jax

from meshloom.core.errors import ConfigError
from meshloom.core.measure import Measured, measured_peak_flops

# The fields of `Chip` that are figures of a data sheet, and so have a source.
FIGURES = ("flops", "hbm_bytes", "hbm_bandwidth", "link_bandwidth", "network_bandwidth", "price_per_hour", "watts")


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
        sources: by figure (`FIGURES`, those that are set): the document, and the arithmetic where it is derived.
        devices_per_chip: JAX devices on one chip of a topology such as "tpu7x:2x2x1".
    """

    name: str
    flops: dict[str, float]
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    sources: Mapping[str, str]
    node_devices: int | None = None
    torus: int = 0
    pod_chips: int = 0
    efficiency: float = 0.6
    price_per_hour: float | None = None
    watts: float | None = None
    kinds: tuple[str, ...] = ()
    devices_per_chip: int = 1

    def figures(self) -> dict[str, float | dict[str, float]]:
        """Those of `FIGURES` that are set, in SI units and dollars."""
        return {name: getattr(self, name) for name in FIGURES if getattr(self, name) is not None}


_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


def _sources(sheet: str, *, link: str, network: str, **others: str) -> dict[str, str]:
    """`sheet` for peaks and memory, and what else there is."""
    both = {"flops": sheet, "hbm_bytes": sheet, "hbm_bandwidth": sheet}
    return both | {"link_bandwidth": link, "network_bandwidth": network} | others


def _page(name: str) -> str:
    return f'Google Cloud documentation, page "{name}"'


def _ici(page: str, both_ways: int, links: int) -> str:
    """Google's pages give both directions together: 400 GB/s for v5e, where older ones say 1,600 Gb/s in one.

    Austin et al. 2025, How to Scale Your Model, part 2, has 45 and 90 GB/s per link, a tenth less. The vendor's figure
    is taken, as for everything else here.
    """
    per_link = both_ways // 2 // links
    return f"{page}: bidirectional ICI bandwidth {both_ways} GB/s per chip, / 2 = {links} links x {per_link} GB/s"


_GOOGLE_PRICE = "Google Cloud list price, us regions, on demand, 2025; not verified against the price page"
_NOT_READ = "; not verified against the vendor's own document, third-party copies agree"


def _aws(instance: str, dollars: float) -> str:
    return (
        f"AWS {instance}, 8 GPUs, on demand, 2025: {dollars} $/h / 8; not verified against AWS's price page, which "
        "also changes"
    )


_NVLINK = "NVLink {} GB/s in both directions, / 2"
_A100_SHEET = "NVIDIA A100 SXM data sheet, dense" + _NOT_READ
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
    sources=_sources(
        _A100_SHEET,
        link=f"{_A100_SHEET}: {_NVLINK.format(600)}",
        network="DGX A100: eight 200 Gb/s ports for eight GPUs, / 8 bits; not verified against NVIDIA's data sheet",
        price_per_hour=_GOOGLE_PRICE,
        watts=_A100_SHEET,
    ),
)
_H100_SHEET = "NVIDIA H100 SXM data sheet, half of its sparse peaks" + _NOT_READ
_DGX_H100 = "DGX {}: eight 400 Gb/s ports for eight GPUs, / 8 bits; not verified against NVIDIA's data sheet"
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
    sources=_sources(
        _H100_SHEET,
        link=f"{_H100_SHEET}: {_NVLINK.format(900)}",
        network=_DGX_H100.format("H100"),
        price_per_hour=_aws("p5.48xlarge", 55.04),
        watts=_H100_SHEET,
    ),
)
_H200_SHEET = "NVIDIA H200 SXM data sheet, half of its sparse peaks" + _NOT_READ
_B200_SHEET = "NVIDIA HGX B200, 1,000 W, half of its sparse peaks; per GPU" + _NOT_READ
_V100_SHEET = "NVIDIA V100 SXM2 32GB data sheet; not verified against it"
_MI250X_SHEET = "AMD Instinct MI250X data sheet, half a module (one die is a device)" + _NOT_READ

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            flops={"bfloat16": 275 * _TERA, "int8": 275 * _TERA},
            hbm_bytes=32 * _GIB,
            hbm_bandwidth=1.2 * _TERA,
            link_bandwidth=6 * 50 * _GIGA,
            network_bandwidth=6.25 * _GIGA,
            torus=3,
            pod_chips=4096,
            price_per_hour=3.22,
            watts=192.0,
            kinds=("tpu v4",),
            sources=_sources(
                _page("TPU v4"),
                link="6 links x 50 GB/s, one direction: 400 Gb/s per link, as third parties say; not verified: "
                "Google's page gives none (Austin et al. 2025, How to Scale Your Model: 45 GB/s)",
                network="Austin et al. 2025, How to Scale Your Model, part 2; not verified against Google's pages",
                price_per_hour=_GOOGLE_PRICE,
                watts=f"{_page('TPU v4')}: measured maximum; mean 170 W",
            ),
        ),
        Chip(
            name="v5e",
            flops={"bfloat16": 197 * _TERA, "int8": 393 * _TERA},
            hbm_bytes=16 * _GIB,
            hbm_bandwidth=0.819 * _TERA,
            link_bandwidth=4 * 50 * _GIGA,
            network_bandwidth=3.125 * _GIGA,
            torus=2,
            pod_chips=256,
            efficiency=0.7,
            price_per_hour=1.20,
            kinds=("tpu v5 lite", "tpu v5e"),
            sources=_sources(
                _page("TPU v5e"),
                hbm_bandwidth=f"{_page('TPU v5e')}, older form: 819 GB/s; the new one says 800 GiB/s, 5 % more",
                link=_ici(_page("TPU v5e"), 400, 4),
                network=f"{_page('TPU v5e')}: 6.4 Tb/s per pod, / 256 chips / 8 bits",
                price_per_hour=_GOOGLE_PRICE,
            ),
        ),
        Chip(
            name="v5p",
            flops={"bfloat16": 459 * _TERA, "int8": 918 * _TERA},
            hbm_bytes=95 * _GIB,
            hbm_bandwidth=2.765 * _TERA,
            link_bandwidth=6 * 100 * _GIGA,
            network_bandwidth=6.25 * _GIGA,
            torus=3,
            pod_chips=8960,
            efficiency=0.8,
            price_per_hour=4.20,
            kinds=("tpu v5", "tpu v5p"),
            sources=_sources(
                _page("TPU v5p"),
                flops=f"{_page('TPU v5p')} for bfloat16; int8 is twice that in Austin et al. 2025, How to Scale Your "
                "Model, part 2, not verified against Google's page, which lists FP8 at 459 TFLOP/s and no int8",
                link=_ici(_page("TPU v5p"), 1200, 6),
                network=f"{_page('TPU v5p')}: 50 Gb/s per chip, / 8 bits",
                price_per_hour=_GOOGLE_PRICE,
            ),
        ),
        Chip(
            name="v6e",
            flops={"bfloat16": 918 * _TERA, "int8": 1836 * _TERA},
            hbm_bytes=32 * _GIB,
            hbm_bandwidth=1.638 * _TERA,
            link_bandwidth=4 * 100 * _GIGA,
            network_bandwidth=12.5 * _GIGA,
            torus=2,
            pod_chips=256,
            efficiency=0.51,
            price_per_hour=2.70,
            kinds=("tpu v6 lite", "tpu v6e"),
            sources=_sources(
                _page("TPU v6e"),
                hbm_bandwidth=f"{_page('TPU7x')}, column v6e: 1,638 GB/s",
                link=_ici(_page("TPU7x"), 800, 4),
                network=f"{_page('TPU7x')}: 100 Gb/s per chip, / 8 bits",
                price_per_hour=_GOOGLE_PRICE,
            ),
        ),
        Chip(
            name="tpu7x",
            flops={"bfloat16": 2307 / 2 * _TERA, "float8": 4614 / 2 * _TERA},
            hbm_bytes=192 // 2 * _GIB,
            hbm_bandwidth=7.38 / 2 * _TERA,
            link_bandwidth=6 * 100 / 2 * _GIGA,
            network_bandwidth=12.5 / 2 * _GIGA,
            torus=3,
            pod_chips=9216,
            kinds=("tpu7x",),
            sources=_sources(
                f"{_page('TPU7x')}, / 2 devices per chip",
                link=f"{_ici(_page('TPU7x'), 1200, 6)}; / 2 devices per chip",
                network=f"{_page('TPU7x')}: 100 Gb/s per chip, / 8 bits / 2 devices per chip",
            ),
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
            sources=_sources(
                _V100_SHEET,
                link=f"{_V100_SHEET}: {_NVLINK.format(300)}",
                network="DGX-1: four 100 Gb/s ports for eight GPUs, / 8 bits; not verified against NVIDIA's data sheet",
                price_per_hour=_GOOGLE_PRICE,
                watts=_V100_SHEET,
            ),
        ),
        dataclasses.replace(
            _A100,
            name="a100-40",
            hbm_bytes=40 * 10**9,
            hbm_bandwidth=1.555 * _TERA,
            price_per_hour=3.67,
            kinds=("nvidia a100-sxm4-40gb",),
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
            sources=_sources(
                _H200_SHEET,
                link=f"{_H200_SHEET}: {_NVLINK.format(900)}",
                network=_DGX_H100.format("H200"),
                price_per_hour=_aws("p5e.48xlarge", 63.3),
                watts=_H200_SHEET,
            ),
        ),
        Chip(
            name="b200",
            flops={"bfloat16": 2250 * _TERA, "float32": 80 * _TERA, "int8": 4500 * _TERA, "float8": 4500 * _TERA},
            hbm_bytes=180 * 10**9,
            hbm_bandwidth=8.0 * _TERA,
            link_bandwidth=900 * _GIGA,
            network_bandwidth=50 * _GIGA,
            node_devices=8,
            price_per_hour=14.24,
            watts=1000.0,
            kinds=("nvidia b200",),
            sources=_sources(
                _B200_SHEET,
                hbm_bytes="DGX B200: 1,440 GB / 8 GPUs" + _NOT_READ,
                link=f"{_B200_SHEET}: {_NVLINK.format('1,800')}",
                network=_DGX_H100.format("B200"),
                price_per_hour=_aws("p6-b200.48xlarge", 113.93),
                watts=_B200_SHEET,
            ),
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
            sources=_sources(
                _MI250X_SHEET,
                link="OLCF Frontier User Guide: 200 GB/s between the two dies of a module; links to other modules, 50 "
                "to 100 GB/s for each pair, are left out",
                network="Frontier node: four 25 GB/s ports for eight dies; not verified against the user guide",
                watts=_MI250X_SHEET,
            ),
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


def cpu_chip(count: int, measured: Measured) -> Chip:
    """One of `count` simulated devices that share a processor and its memory equally.

    What one device sends another is read and written once: half the bandwidth. The peaks are of products
    already, so that no share of them is taken off.
    """
    bandwidth = max(measured.bandwidth.values())
    share = f"measured, / {count} device{'s' if count > 1 else ''}"
    link = f"half of the best STREAM kernel (each byte is read and written), {share}"
    return Chip(
        name="cpu",
        flops={dtype: rate / count for dtype, rate in measured.flops.items()},
        hbm_bytes=measured.memory_bytes // count,
        hbm_bandwidth=bandwidth / count,
        link_bandwidth=bandwidth / 2 / count,
        network_bandwidth=bandwidth / 2 / count,
        efficiency=1.0,
        sources={
            "flops": f"best product of each dtype, {share}",
            "hbm_bytes": f"the machine's memory, {share}",
            "hbm_bandwidth": f"best STREAM kernel, {share}",
            "link_bandwidth": link,
            "network_bandwidth": link,
        },
    )

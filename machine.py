"""`meshloom info`: what runs here, what its data sheet promises, and what it does when measured."""

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import meshloom
from meshloom import cli
from meshloom.core.compile import cache_folder
from meshloom.core.hardware import CHIPS, Chip, chip_of_kind, cpu_chip
from meshloom.core.measure import Measured, machine_memory, measure, memory

_UNITS = {
    "hbm_bytes": (2**30, "GiB"),
    "hbm_bandwidth": (1e9, "GB/s"),
    "link_bandwidth": (1e9, "GB/s"),
    "network_bandwidth": (1e9, "GB/s"),
    "price_per_hour": (1, "$/h"),
    "watts": (1, "W"),
}


def info(command: cli.Info) -> dict[str, Any]:
    """Prints this machine, or with `chips` the table; returns it in SI units."""
    # A pipe has no width: wide enough for a source, so that a row stays a line.
    out = Console(width=None if sys.stdout.isatty() else 220, quiet=command.json)
    if command.chips:
        out.print(chip_table(list(CHIPS.values())))
        return {"chips": {name: chip_json(chip) for name, chip in CHIPS.items()}}
    devices = jax.devices()
    measured = None
    if command.measure:
        with Console(stderr=True, quiet=command.json).status("measuring") as status:
            measured = measure(devices[0], lambda what: status.update(f"measuring {what}"))
    chip = chip_of_kind(devices[0].device_kind)
    if devices[0].platform == "cpu" and measured is not None:
        chip = cpu_chip(len(devices), measured)
    machine, free = machine_memory()
    result = {
        "meshloom": meshloom.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": machine,
        "memory_free_bytes": free,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "device_memory_bytes": [None if device.platform == "cpu" else memory(device)[0] or None for device in devices],
        "cache": str(cache_folder()),
        "compilation_cache": jax.config.jax_compilation_cache_dir or str(cache_folder() / "xla"),
    }
    for name, value in result.items():
        out.print(f"{name:<19}  {_text(name, value)}", markup=False, highlight=False, soft_wrap=True)
    if chip is not None:
        out.print(chip_table([chip]))
    if measured is not None:
        out.print(measured_table(measured, chip if chip is not None and chip.name in CHIPS else None))
    return result | {
        "chip": None if chip is None else chip_json(chip),
        "measured": None if measured is None else measured_json(measured),
    }


def chip_json(chip: Chip) -> dict[str, Any]:
    """Figures in FLOP/s, bytes, bytes/s, dollars per hour and watts, and where each is from."""
    return {"name": chip.name, **chip.figures(), "efficiency": chip.efficiency, "sources": dict(chip.sources)}


def measured_json(measured: Measured) -> dict[str, Any]:
    """Rates of the first device, in bytes/s and operations/s."""
    return {
        "bandwidth_bytes_per_s": dict(measured.bandwidth),
        "products_flops": dict(measured.flops),
    }


def chip_table(chips: list[Chip]) -> Table:
    """Every figure of each chip, per device, with its source."""
    table = Table("chip", "figure", "value", "source", title="per device")
    for chip in chips:
        for name, value in chip.figures().items():
            if isinstance(value, dict):
                scale, unit = _flops_unit(max(value.values()))
                text = ", ".join(f"{dtype} {rate / scale:.4g}" for dtype, rate in value.items()) + f" {unit}"
            else:
                scale, unit = _UNITS[name]
                text = f"{value / scale:.4g} {unit}"
            table.add_row(chip.name, name, text, chip.sources[name])
        table.add_section()
    return table


def measured_table(measured: Measured, chip: Chip | None) -> Table:
    """What the first device did, beside the data sheet's figure where there is one."""
    table = Table("measured on one device", "rate", "data sheet", "share")
    promised = {} if chip is None else chip.flops
    bandwidth = None if chip is None else chip.hbm_bandwidth
    rows = [(f"STREAM {name}", rate, bandwidth, 1e9, "GB/s") for name, rate in measured.bandwidth.items()]
    rows += [
        (f"{name} products", rate, promised.get(name), *_flops_unit(rate)) for name, rate in measured.flops.items()
    ]
    for name, rate, sheet, scale, unit in rows:
        beside = ("", "") if sheet is None else (f"{sheet / scale:.4g} {unit}", f"{rate / sheet:.0%}")
        table.add_row(name, f"{rate / scale:.4g} {unit}", *beside)
    return table


def _flops_unit(rate: float) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if rate >= 1e12 else (1e9, "GFLOP/s")


def _text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(name, each) for each in value)
    return f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") and value is not None else str(value)

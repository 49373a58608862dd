"""The chip table is complete enough to compute with, and devices find their row."""

from unittest.mock import Mock

import jax
import pytest

from meshloom.core import topology
from meshloom.core.errors import ConfigError
from meshloom.core.hardware import CHIPS, FIGURES, chip_named, chip_of_kind, cpu_chip, peak_flops
from meshloom.core.measure import Measured, measured_peak_flops
from meshloom.core.topology import measured_chip, parse_devices


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_chip_has_peaks_memory_and_links(chip):
    assert max(chip.flops.values()) > 1e14
    assert 8 * 2**30 < chip.hbm_bytes < 2**39
    assert chip.network_bandwidth < chip.link_bandwidth < chip.hbm_bandwidth < 1e13
    assert 0 < chip.efficiency < 1


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_figure_that_is_set_has_a_source_and_nothing_else_has_one(chip):
    assert set(chip.sources) == {name for name in FIGURES if getattr(chip, name) is not None} == set(chip.figures())
    assert all(len(source) > 20 for source in chip.sources.values())


def test_links_of_tpus_are_half_of_what_their_pages_give_for_both_directions():
    both_ways = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "tpu7x": 1200e9}
    for name, bandwidth in both_ways.items():
        chip = CHIPS[name]
        assert chip.link_bandwidth * chip.devices_per_chip == bandwidth / 2
        assert f"{bandwidth / 1e9:.0f} GB/s per chip, / 2" in chip.sources["link_bandwidth"]


MEASURED = Measured(
    memory_bytes=32 * 2**30,
    bandwidth={"copy": 16e9, "scale": 12e9, "add": 10e9, "triad": 10e9},
    flops={"float32": 80e9, "bfloat16": 160e9, "int8": 320e9},
)


def test_simulated_devices_share_the_measured_processor_equally():
    one, eight = cpu_chip(1, MEASURED), cpu_chip(8, MEASURED)
    assert eight.hbm_bytes == 4 * 2**30
    assert eight.flops == {dtype: rate / 8 for dtype, rate in one.flops.items()}
    assert (one.hbm_bandwidth, one.link_bandwidth) == (16e9, 8e9)
    assert (eight.hbm_bandwidth, eight.link_bandwidth) == (2e9, 1e9)
    assert set(eight.sources) == set(eight.figures())
    assert all("measured, / 8 devices" in source for source in eight.sources.values())


def test_only_a_cpu_is_measured_to_plan_for_it(monkeypatch):
    monkeypatch.setattr(topology, "measured_cpu", lambda: MEASURED)
    jax.devices()  # else what is asked here would be what the other tests of this process run on
    assert measured_chip(parse_devices("cpu:4")) == cpu_chip(4, MEASURED)
    assert measured_chip(parse_devices("v5e:2x2")) is None
    assert measured_chip(parse_devices("local")) is None


def test_device_kinds_lead_to_their_row():
    assert chip_of_kind("TPU v5 lite").name == "v5e"
    assert chip_of_kind("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of_kind(jax.devices()[0].device_kind) is None


def devices(kind, count=1):
    return [Mock(spec=jax.Device, platform="tpu" if kind.startswith("TPU") else "gpu", device_kind=kind)] * count


def test_a_peak_is_that_of_all_devices_and_half_a_tpu7x_chip_is_a_device():
    assert peak_flops(devices("TPU v5", 4), "bfloat16") == 4 * 459e12
    assert peak_flops(devices("TPU7x", 2), "bfloat16") == 2307e12


def test_a_peak_that_is_not_known_is_refused_instead_of_guessed():
    with pytest.raises(ConfigError, match="no peak is known for 'NVIDIA GeForce RTX 4090'; known: v4"):
        peak_flops(devices("NVIDIA GeForce RTX 4090", 8), "bfloat16")
    with pytest.raises(ConfigError, match="no float32 peak is known for v5e; known: bfloat16, int8"):
        peak_flops(devices("TPU v5 lite"), "float32")


def test_unknown_names_list_the_table():
    with pytest.raises(ConfigError, match="unknown chip 'v9'; known: v4, v5e"):
        chip_named("v9")


def test_simulated_devices_share_one_measured_peak():
    assert (
        peak_flops(jax.devices()[:1], "float32")
        == peak_flops(jax.devices(), "float32")
        == measured_peak_flops("float32")
    )

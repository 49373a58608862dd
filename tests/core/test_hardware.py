"""The chip table is complete enough to compute with, and devices find their row."""

from unittest.mock import Mock

import jax
import pytest

from meshloom.core.errors import ConfigError
from meshloom.core.hardware import CHIPS, chip_named, chip_of_kind, measured_peak_flops, peak_flops


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_chip_has_peaks_memory_links_and_a_source(chip):
    assert max(chip.flops.values()) > 1e14
    assert 8 * 2**30 < chip.hbm_bytes < 2**39
    assert chip.network_bandwidth < chip.link_bandwidth < chip.hbm_bandwidth < 1e13
    assert 0 < chip.efficiency < 1
    assert chip.source


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

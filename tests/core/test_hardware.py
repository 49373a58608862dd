"""The chip table is complete enough to compute with, and devices find their row."""

import jax
import pytest

from meshloom.core.errors import ConfigError
from meshloom.core.hardware import CHIPS, chip_named, chip_of_kind, measured_peak_flops, peak_flops


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_chip_has_peaks_memory_links_and_a_source(chip):
    assert chip.flops["bfloat16"] > 1e14
    assert 8 * 2**30 < chip.hbm_bytes < 2**39
    assert chip.link_bandwidth < chip.hbm_bandwidth < 1e13
    assert chip.source


def test_device_kinds_lead_to_their_row():
    assert chip_of_kind("TPU v5 lite").name == "v5e"
    assert chip_of_kind("NVIDIA H100 80GB HBM3").name == "h100"
    assert chip_of_kind(jax.devices()[0].device_kind) is None


def test_unknown_names_list_the_table():
    with pytest.raises(ConfigError, match="unknown chip 'v9'; known: v4, v5e"):
        chip_named("v9")


def test_simulated_devices_share_one_measured_peak():
    assert (
        peak_flops(jax.devices()[:1], "float32")
        == peak_flops(jax.devices(), "float32")
        == measured_peak_flops("float32")
    )

"""Measured rates are those of the programs that ran, within what the machine can do, and cost little."""

import time
from unittest.mock import Mock

import jax
import pytest

from meshloom.core import measure as measuring
from meshloom.core.measure import DTYPES, array_bytes, machine_memory, measure, measure_bandwidth, measure_flops


def test_a_measurement_has_every_kernel_and_dtype_and_tells_what_it_does(monkeypatch):
    monkeypatch.setattr(measuring, "array_bytes", lambda device: 2**20)
    monkeypatch.setattr(measuring, "_PRODUCT_SECONDS", 0.0)
    told = []
    found = measure(jax.devices()[0], told.append)
    assert told == ["memory bandwidth", "float32 products", "bfloat16 products", "int8 products"]
    assert set(found.bandwidth) == {"copy", "scale", "add", "triad"}
    assert set(found.flops) == set(DTYPES)
    assert found.memory_bytes == machine_memory()[0]
    assert all(1e8 < rate < 1e14 for rate in found.bandwidth.values())
    assert all(1e8 < rate < 1e16 for rate in found.flops.values())


def clock(monkeypatch, step):
    """Lets the clock move on by `step` seconds whenever it is looked at."""
    now = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: step * next(now))


def test_bytes_count_as_stream_counts_them(monkeypatch):
    clock(monkeypatch, 0.5)
    found = measure_bandwidth(jax.devices()[0], 4096)
    assert found == {"copy": 2 * 8192, "scale": 2 * 8192, "add": 3 * 8192, "triad": 3 * 8192}


def test_products_count_two_operations_per_multiply_and_stop_growing_when_slow(monkeypatch):
    clock(monkeypatch, 0.5)
    assert measure_flops(jax.devices()[0], "float32") == 2 * 256**3 / 0.5
    clock(monkeypatch, 1e-3)
    assert measure_flops(jax.devices()[0], "int8") == pytest.approx(2 * 1024**3 / 1e-3)


@pytest.mark.parametrize(("free", "expected"), [(2**40, 256 * 2**20), (2**30, 2**26)])
def test_arrays_are_larger_than_caches_and_small_beside_the_free_memory(free, expected):
    device = Mock(spec=jax.Device, platform="gpu", memory_stats=lambda: {"bytes_limit": free, "bytes_in_use": 0})
    assert array_bytes(device) == expected
    assert array_bytes(jax.devices()[0]) <= machine_memory()[1] // 8

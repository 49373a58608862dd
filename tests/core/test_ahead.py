"""Programs for hardware that is elsewhere: the real compilers, asked here."""

import importlib.util
import itertools
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core import ahead
from meshloom.core.ahead import compiler_missing, compiler_options, target_devices
from meshloom.core.errors import ConfigError
from meshloom.core.program_report import OutOfMemoryError, compile_and_report
from meshloom.core.topology import make_mesh, parse_devices
from tests.compilers import needs_cuda, needs_tpu

FOR_TPU = pytest.param("v5e:2x2", marks=needs_tpu)
FOR_GPU = pytest.param("h100:8", marks=needs_cuda)


def compiled_for(text: str, rows: int = 1024, width: int = 256):
    """A product whose weight is stored over fsdp and gathered, on the devices of `text`."""
    where = parse_devices(text)
    mesh = make_mesh({"fsdp": where.count}, target_devices(where))
    stored = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=stored)
    w = jax.ShapeDtypeStruct((width, width), jnp.bfloat16, sharding=stored)
    lowered = jax.jit(lambda x, w: jnp.tanh(x @ w), out_shardings=stored).lower(x, w)
    return compile_and_report(lowered, dict(mesh.shape), compiler_options(where))


@pytest.mark.parametrize("text", [FOR_TPU, FOR_GPU, "cpu:8"])
def test_a_stored_weight_is_gathered_on_every_target(text):
    _, report = compiled_for(text)
    # A CPU multiplies bfloat16 as float32, and XLA converts before it gathers.
    assert report.bytes_by_kind["all_gather"] == 256 * 256 * (4 if text == "cpu:8" else 2)
    assert report.argument_bytes == (1024 + 256) * 256 * 2 // parse_devices(text).count


@needs_tpu
def test_a_gather_over_a_whole_torus_is_a_gather():
    """Not a sum of arrays that are zero elsewhere, which sends twice as much."""
    _, report = compiled_for("v5p:4x4x4")
    assert report.bytes_by_kind == {"all_gather": 256 * 256 * 2}


@needs_tpu
@pytest.mark.parametrize(
    ("text", "axes"),
    [("v5p:4x4x4", {"fsdp": 64}), ("v5e:4x4", {"fsdp": 4, "tensor": 4}), ("2xv5e:4x4", {"data": 2, "fsdp": 16})],
)
def test_the_last_axis_runs_along_links_and_the_first_one_over_slices(text, axes):
    mesh = make_mesh(axes, target_devices(parse_devices(text)))
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
    row = mesh.devices.reshape(-1, list(axes.values())[-1])[0]
    steps = [np.abs(np.subtract(a.coords, b.coords)) for a, b in itertools.pairwise(row)]
    assert sum(step.sum() for step in steps[:3]) == 3
    if text.startswith("2x"):
        assert [{device.slice_index for device in half.flat} for half in mesh.devices] == [{0}, {1}]


@needs_tpu
def test_a_part_of_a_slice_is_taken_as_it_is_listed():
    devices = target_devices(parse_devices("v5e:2x4"))[:3]
    assert list(make_mesh({"tensor": 3}, devices).devices.flat) == devices


@pytest.mark.parametrize("text", [FOR_TPU, FOR_GPU])
def test_a_persistent_cache_is_left_alone(text, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    try:
        for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
            jax.config.update(name, value)
        for _ in range(2):  # a second one would be read from the cache, which needs the devices
            compiled_for(text)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert not list(tmp_path.iterdir())
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


@needs_tpu
@pytest.mark.parametrize(
    "text", ["v4:2x2x2", "v5e:1x1", "v5e:2x4", "2xv5e:4x4", "v5p:2x1x1", "v5p:4x4x4", "v6e:2x2", "tpu7x:2x2x1"]
)
def test_the_compiler_knows_every_slice_that_can_be_written(text):
    where = parse_devices(text)
    devices = target_devices(where)
    assert len(devices) == where.count
    assert devices[0].device_kind.lower() in ahead.CHIPS[where.platform].kinds


@needs_tpu
def test_a_program_that_does_not_fit_is_refused_with_both_sizes():
    with pytest.raises(OutOfMemoryError, match="on each device, which has 15") as refused:
        compiled_for("v5e:1x1", rows=2**22, width=4096)
    assert refused.value.needed_bytes > refused.value.available_bytes > 15 * 2**30


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda")])
def test_without_a_compiler_the_extra_to_install_is_named(monkeypatch, text, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    where = parse_devices(text)
    assert f"pip install 'meshloom[{extra}]'" in compiler_missing(where)
    with pytest.raises(ConfigError, match="needs its compiler"):
        target_devices(where)


def test_chips_that_no_compiler_knows_are_to_plan_with_only():
    assert "no compiler for mi250x" in compiler_missing(parse_devices("mi250x:8"))
    assert compiler_missing(parse_devices("cpu:8")) is None


def test_kernels_of_a_gpu_that_is_elsewhere_are_not_timed():
    assert compiler_options(parse_devices("h100:8")) == {"xla_gpu_autotune_level": 0}
    assert compiler_options(parse_devices("v5e:2x2")) == {}


def test_every_gpu_target_is_in_the_hardware_table():
    for name, gpu in ahead._GPUS.items():
        chip = ahead.CHIPS[name]
        assert gpu.name.lower().startswith(chip.kinds[0][:11])
        np.testing.assert_allclose(gpu.memory, chip.hbm_bytes, rtol=0.08)
        assert f"core_count: {gpu.cores}" in ahead.target_config(gpu, chip.hbm_bandwidth)


@pytest.mark.parametrize(
    ("attached", "expected"),
    [
        ((), {"TPU_SKIP_MDS_QUERY": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}),
        (("/dev/nvidia0",), {"TPU_SKIP_MDS_QUERY": "1"}),
        (("/dev/vfio/0", "/dev/nvidia0"), {}),
    ],
)
def test_a_plugin_starts_as_a_compiler_only_where_its_hardware_is_absent(monkeypatch, attached, expected):
    monkeypatch.setattr(ahead.glob, "glob", lambda pattern: [path for path in attached if fnmatch(path, pattern)])
    monkeypatch.setattr(ahead.os, "environ", variables := {})
    ahead.compilers_only()
    assert {name: value for name, value in variables.items() if "SKIP" in name} == expected


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setattr(ahead.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(ahead.os, "environ", variables := {"TPU_SKIP_MDS_QUERY": "0"})
    ahead.compilers_only()
    assert variables["TPU_SKIP_MDS_QUERY"] == "0"

"""Device strings and meshes say what they mean or are refused with what would work."""

import itertools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.topology import abstract_mesh, make_mesh, network, parse_devices, simulate_cpu_devices, use_devices


@pytest.mark.parametrize(
    ("text", "platform", "count"),
    [
        ("local", "local", 0),
        ("cpu:8", "cpu", 8),
        ("v5e:4x4", "v5e", 16),
        ("2xv5e:16x16", "v5e", 512),
        ("h100:16x8", "h100", 128),
        ("v5p:2x2x1", "v5p", 4),
        ("tpu7x:2x2x1", "tpu7x", 8),  # two devices per chip
        ("2xh100:16x8@25", "h100", 256),
        ("3xa100-40:8@12.5", "a100-40", 24),
        ("2xv5e:16x16@100", "v5e", 512),
    ],
)
def test_device_strings(text, platform, count):
    devices = parse_devices(text)
    assert (devices.platform, devices.count) == (platform, count)


@pytest.mark.parametrize("text", ["", "cpu", "cpu:0", "cpu:x", "8", "v5e:4x"])
def test_malformed_device_strings_are_refused(text):
    with pytest.raises(ConfigError, match="got"):
        parse_devices(text)


def test_unknown_chip_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown chip 'v5x' in 'v5x:2x2'; did you mean 'v5"):
        parse_devices("v5x:2x2")


def test_mesh_axes_keep_one_order_and_fill_the_rest():
    mesh = make_mesh("tensor=2,fsdp=-1")
    assert dict(mesh.shape) == {"fsdp": 4, "tensor": 2}
    assert mesh.axis_names == ("fsdp", "tensor")


def test_a_mesh_for_devices_that_do_not_exist_has_the_same_axes_and_errors():
    mesh = abstract_mesh({"tensor": 8, "fsdp": -1}, 128)
    assert dict(mesh.shape) == {"fsdp": 16, "tensor": 8}
    assert mesh.axis_names == ("fsdp", "tensor")
    with pytest.raises(ShardingError, match="needs 64 devices; there are 128"):
        abstract_mesh("fsdp=64", 128)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("fsdp=3", "needs 3 devices; there are 8"),
        ("fdsp=8", r"unknown mesh axis 'fdsp'; did you mean 'fsdp'\?"),
        ("fsdp", "axis=size pairs"),
        ("fsdp=2,fsdp=4", "stands twice"),
        ("fsdp=0,tensor=8", "at least 1 device; got 0"),
        ("fsdp=-1,tensor=3", "must divide 8 devices"),
        ("fsdp=-1,tensor=-1", "one axis may be -1"),
    ],
)
def test_impossible_meshes_are_refused_with_both_numbers(axes, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(axes)


def test_simulating_another_number_of_devices_too_late_is_refused():
    assert jax.device_count() == 8
    simulate_cpu_devices(8)
    with pytest.raises(ConfigError, match=r"already runs with 8 cpu device\(s\), too late to simulate 4"):
        simulate_cpu_devices(4)


def test_devices_that_are_not_here_are_refused():
    assert len(use_devices("cpu:8")) == 8
    with pytest.raises(ConfigError, match="h100:8 is 8 x h100, but this process has 8 x cpu"):
        use_devices("h100:8")


def test_the_network_of_a_slice_has_one_level_and_of_several_two():
    (ici,) = network(parse_devices("v5e:4x4"))
    assert (ici.name, ici.devices, ici.bandwidth) == ("ici", 16, 200e9)
    inside, between = network(parse_devices("2xv5e:16x16"))
    assert (inside.devices, between.name, between.devices) == (256, "dcn", 512)


def test_the_network_of_gpus_is_that_of_their_nodes():
    (nvlink,) = network(parse_devices("h100:8"))
    assert (nvlink.name, nvlink.devices, nvlink.bandwidth) == ("nvlink", 8, 450e9)
    nvlink, between = network(parse_devices("h100:16x8"))
    assert (nvlink.devices, between.name, between.devices, between.bandwidth) == (8, "network", 128, 50e9)


def test_the_network_of_islands_has_three_levels_and_their_devices_share_the_line():
    nvlink, between, line = network(parse_devices("2xh100:16x8@25"))
    assert (nvlink.name, nvlink.devices, nvlink.bandwidth) == ("nvlink", 8, 450e9)
    assert (between.name, between.devices, between.bandwidth) == ("network", 128, 50e9)
    assert (line.name, line.devices, line.bandwidth) == ("line", 256, 25e9 / 128)


def test_islands_of_one_node_have_no_network_inside():
    assert [level.name for level in network(parse_devices("2xh100:8@25"))] == ["nvlink", "line"]


def test_slices_may_have_another_line_than_the_tables():
    _, between = network(parse_devices("2xv5e:16x16@100"))
    assert (between.name, between.devices, between.bandwidth) == ("dcn", 512, 100e9 / 256)


@given(islands=st.integers(2, 9), nodes=st.integers(1, 300), gpus=st.integers(1, 8), tenths=st.integers(1, 10**5))
def test_islands_are_read_as_written_and_each_level_holds_whole_groups_of_the_one_inside(islands, nodes, gpus, tenths):
    devices = parse_devices(f"{islands}xh100:{nodes}x{gpus}@{tenths / 10}")
    assert (devices.islands, devices.shape, devices.count) == (islands, (islands * nodes, gpus), islands * nodes * gpus)
    levels = network(devices)
    assert levels[-1].devices == devices.count
    assert levels[-1].bandwidth * nodes * gpus == pytest.approx(tenths * 1e8)
    assert all(outer.devices % inner.devices == 0 for inner, outer in itertools.pairwise(levels))


def test_both_devices_of_a_tpu7x_chip_are_in_its_slice():
    assert network(parse_devices("tpu7x:2x2x1"))[0].devices == 8


def test_a_node_larger_than_any_is_refused_with_how_to_write_it():
    with pytest.raises(ConfigError, match="a node has at most 8 x h100; write nodes x GPUs, as in h100:2x8"):
        parse_devices("h100:16")


def test_devices_with_no_known_network_are_refused():
    with pytest.raises(ConfigError, match="unknown chip 'cpu'"):
        network(parse_devices("cpu:8"))


def test_names_of_chips_may_have_a_hyphen():
    assert parse_devices("a100-40:2x8").count == 16


@pytest.mark.parametrize(
    ("text", "there_is"),
    [
        ("v5e:3x5", "slices of v5e are 1x1, 2x2, 2x4"),
        ("v5e:32x32", "8x16, 16x16"),
        ("v6e:4x4x4", "slices of v6e are"),
        ("v5p:4x4", "slices of v5p are AxBxC"),
        ("v5p:3x4x4", "each 1, 2 or a multiple of 4"),
        ("v4:16x16x20", "of at most 4096 chips"),
        ("2xh100:4x8", "say its GB/s, as in 2xh100:4x8@25; on one network, write nodes x GPUs, as in h100:8x8"),
        ("2xh100:4x16@25", "a node has at most 8 x h100"),
        ("2xv5e:3x5@25", "slices of v5e are"),
        ("h100:4x8@25", "the GB/s of the line between islands or slices"),
        ("v5e:4x4@25", "the GB/s of the line between islands or slices"),
        ("2xcpu:4@25", "the GB/s of the line between islands or slices"),
        ("2xh100:4x8@0", "more than 0"),
        ("h100:16x8+a100:8x8", "islands of the slower chip and the smaller group, as in"),
    ],
)
def test_slices_and_nodes_that_nobody_builds_are_refused_with_those_there_are(text, there_is):
    with pytest.raises(ConfigError, match=there_is):
        parse_devices(text)

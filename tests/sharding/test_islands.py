"""Islands: what crosses the slow line between them, which axes lie inside, and what a plan makes of it."""

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
import pytest

from meshloom.core.hardware import chip_named
from meshloom.core.topology import network, parse_devices
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.sharding.collectives import axis_spans, seconds
from meshloom.sharding.planner import Candidate, Traced, meshes, plan_training, price_mesh, trace_model
from meshloom.sharding.workload import TrainWorkload

WORKLOAD = TrainWorkload(2**20, 4096)


@functools.cache
def traced() -> Traced:
    def module_of(remat):
        return abstract_module(dataclasses.replace(PRESETS["llama3-8b"], scan_layers=True, remat=remat), jnp.float32)

    return trace_model(module_of, WORKLOAD, ("full",))


def priced(text: str, mesh: dict[str, int]) -> list[Candidate]:
    """All ways to train Llama-3-8B on a mesh, a million tokens a step."""
    devices = parse_devices(text)
    return list(price_mesh(traced(), devices, chip_named(devices.platform), mesh, WORKLOAD, ("full",)))


def fastest(candidates: Iterable[Candidate]) -> Candidate:
    return min((each for each in candidates if each.fits), key=lambda each: each.step_time_s)


def levels_of(candidate: Candidate) -> dict[str, str]:
    """Axis -> the outermost level that its collectives cross."""
    return {each.axis: each.level for each in candidate.breakdown.collectives}


@pytest.mark.parametrize(
    ("axis", "levels"),
    [("tensor", [("nvlink", 8)]), ("fsdp", [("network", 16)]), ("data", [("line", 2)])],
)
def test_each_axis_has_a_level_of_its_own_where_the_sizes_are_those_of_the_network(axis, levels):
    devices = parse_devices("2xh100:16x8@25")
    spans = axis_spans(devices, network(devices), {"data": 2, "fsdp": 16, "tensor": 8}, axis)
    assert [(span.level, span.ways) for span in spans] == levels


def test_one_axis_over_everything_crosses_all_three_levels():
    devices = parse_devices("2xh100:16x8@25")
    spans = axis_spans(devices, network(devices), {"fsdp": 256}, "fsdp")
    assert [(span.level, span.ways) for span in spans] == [("nvlink", 8), ("network", 16), ("line", 2)]


def test_an_island_sends_a_sum_over_the_line_once():
    # 32 devices in two islands have 1 GB each to add up: half of it leaves each island and half comes back.
    devices = parse_devices("2xh100:2x8@1")
    spans = axis_spans(devices, network(devices), {"fsdp": 32}, "fsdp")
    line = [span for span in spans if span.level == "line"]
    inside = [span for span in spans if span.level != "line"]
    share = 1e9 / 16  # of one device, when each island has added up its own
    alone = seconds("all_reduce", share, line)
    assert alone == pytest.approx(2 * (0.5 * 1e9 / 1e9 + 1e-3))
    assert seconds("all_reduce", 1e9, spans) == pytest.approx(seconds("all_reduce", 1e9, inside) + alone)


@pytest.mark.parametrize(("text", "slow"), [("2xh100:2x8@1", "line"), ("2xv5p:2x2x4@1", "dcn")])
def test_the_best_plan_leaves_a_slow_line_to_data(text, slow):
    tried = meshes(parse_devices(text).count, experts=False)
    best = fastest(each for mesh in tried for each in priced(text, mesh))
    assert {axis for axis, level in levels_of(best).items() if level == slow} == {"data"}


def test_only_data_crosses_the_line_though_a_small_model_has_fewer_partial_sums_than_gradients():
    def module_of(remat):
        return abstract_module(dataclasses.replace(PRESETS["tiny"], scan_layers=True, remat=remat), jnp.float32)

    found = plan_training(module_of, parse_devices("2xh100:2x4@25"), TrainWorkload(2**15, 256), remats=("full",))
    assert {axis for axis, level in levels_of(found[0]).items() if level == "line"} == {"data"}
    inside = [not each.leaves_islands for each in found if each.fits]
    assert inside == sorted(inside, reverse=True)


def test_a_plan_that_gathers_weights_over_the_line_is_slower_and_says_that_it_does():
    gathers = fastest(priced("2xh100:2x8@1", {"fsdp": 32}))
    assert levels_of(gathers)["fsdp"] == "line"
    assert gathers.step_time_s > fastest(priced("2xh100:2x8@1", {"data": 2, "fsdp": 16})).step_time_s


def test_a_faster_line_takes_less_time_and_one_network_the_least():
    mesh = {"data": 2, "fsdp": 16}
    slow, fast, one = (fastest(priced(text, mesh)) for text in ("2xh100:2x8@1", "2xh100:2x8@50", "h100:4x8"))
    assert slow.step_time_s > fast.step_time_s > one.step_time_s

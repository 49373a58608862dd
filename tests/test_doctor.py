"""A plan that does not fit gets its largest arrays named and changes that were compiled and fit."""

import dataclasses
import functools
import io

import jax.numpy as jnp
import pytest
from rich.console import Console

from meshloom.core.ahead import target_devices
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import parse_devices
from meshloom.doctor import diagnose
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.planning import compile_best, compile_candidate
from meshloom.sharding.planner import plan_training
from meshloom.sharding.workload import TrainWorkload

CONFIG = PRESETS["tiny"]
WORKLOAD = TrainWorkload(32 * 256, 256)
WHERE = parse_devices("cpu:8")


@functools.cache
def module(remat: str):
    return abstract_module(dataclasses.replace(CONFIG, scan_layers=True, remat=remat), jnp.float32)


def priced(memory: int):
    """Everything that the planner prices on eight devices of so much memory each."""
    chip = dataclasses.replace(CHIPS["v5e"], name="cpu", hbm_bytes=memory)
    return plan_training(module, WHERE, WORKLOAD, chip=chip, limit=10**6)


def chosen(candidates, mesh: dict[str, int], remat: str, parts: int):
    for each in candidates:
        if {axis: size for axis, size in each.mesh.items() if size > 1} == mesh and (each.remat, each.parts) == (
            remat,
            parts,
        ):
            return each
    raise AssertionError("not priced")


@pytest.fixture(scope="module")
def diagnosis():
    roomy = priced(2**34)
    devices = target_devices(WHERE)
    large = compile_candidate(CONFIG, WHERE, devices, chosen(roomy, {"fsdp": 8}, "none", 1), WORKLOAD)
    memory = large.compiled.peak_bytes * 2 // 3
    candidates = priced(memory)
    failing = dataclasses.replace(chosen(candidates, {"fsdp": 8}, "none", 1), compiled=large.compiled)
    assert not failing.fits
    return diagnose(CONFIG, WHERE, failing, candidates, WORKLOAD, Console(file=io.StringIO()))


def test_the_largest_arrays_of_what_does_not_fit_are_named_with_their_lines(diagnosis):
    sizes = [each.bytes for each in diagnosis.buffers]
    assert sizes == sorted(sizes, reverse=True)
    assert any(each.source.split(":")[0].endswith(".py") for each in diagnosis.buffers)
    # A row of logits per device and token is the largest thing that this small a model makes.
    assert any("unembed" in each.operation or "loss" in each.operation for each in diagnosis.buffers[:4])


def test_every_change_was_compiled_and_fits_fastest_first(diagnosis):
    assert diagnosis.remedies
    times = [each.candidate.step_time_s for each in diagnosis.remedies]
    assert times == sorted(times)
    for remedy in diagnosis.remedies:
        assert remedy.candidate.compiled.peak_bytes <= remedy.candidate.hbm_bytes
        assert remedy.change
    assert len({each.change for each in diagnosis.remedies}) == len(diagnosis.remedies)


def test_the_diagnosis_is_a_table_and_json(diagnosis):
    out = io.StringIO()
    for table in diagnosis.tables():
        Console(file=out, width=200).print(table)
    assert "changes that make it fit, each compiled" in out.getvalue()
    assert diagnosis.to_json()["remedies"][0]["fits"]


@pytest.mark.parametrize(
    ("least", "advice"), [(9, "alone fill 9 of them, and there are 8; plan for more"), (8, "plan for shorter rows")]
)
def test_where_no_change_fits_it_says_how_many_devices_would(diagnosis, least, advice):
    assert diagnosis.least_devices <= 8
    console = Console(file=io.StringIO(), width=150)
    console.print(*dataclasses.replace(diagnosis, buffers=(), remedies=(), least_devices=least).tables())
    assert advice in console.file.getvalue()


def test_compiling_goes_on_until_enough_plans_fit():
    candidates = priced(2**34)[:3]
    found = compile_best(CONFIG, WHERE, candidates, WORKLOAD, 1, Console(file=io.StringIO()))
    assert [each.compiled is not None for each in found] == [True, False, False]
    assert found[0].fits

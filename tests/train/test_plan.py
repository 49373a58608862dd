"""Runs that follow a plan: its file, reviewed and edited, its compiled step, and the mesh that a search finds."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from meshloom import cli
from meshloom.core.compile import CompileGuard
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.executable import ExecutableError
from meshloom.core.topology import parse_devices, use_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.planning import compile_best
from meshloom.sharding.plan_file import read_plan
from meshloom.sharding.planner import plan_training
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig
from meshloom.train.loop import train
from meshloom.train.plan import choose_mesh, followed
from meshloom.train.run_folder import RunFolder
from meshloom.train.setup import prepare
from tests.train.runs import tiny_config, write_texts


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan for eight chips of a TPU, reviewed and moved to eight simulated devices."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    asked = "plan tiny --devices v5e:2x4 --batch-tokens 512 --sequence-length 32 --mesh fsdp=4,tensor=2 --compile 0"
    assert cli.main([*asked.split(), "--out", str(path)]) == 0
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"devices": "cpu:8"}))
    return path


def test_a_plan_file_is_replayed_by_a_run(plan, tmp_path):
    written = read_plan(plan)
    run = train(
        TrainConfig(
            data=str(write_texts(tmp_path / "texts")), plan=plan, steps=2, run_dir=tmp_path / "run", vocab_size=300
        )
    )
    stored = json.loads((tmp_path / "run" / "meshloom.json").read_text())["train"]
    assert run.steps == 2
    assert (stored["mesh"], stored["devices"], stored["model"]) == ("fsdp=4,tensor=2", "cpu:8", "tiny")
    assert stored["batch_size"] * stored["sequence_length"] == 512
    assert (stored["accumulation"], stored["remat"]) == (written.parts, written.remat)
    assert stored["plan"] is None


def test_a_flag_against_the_plan_is_refused(plan):
    with pytest.raises(ConfigError, match=r"mesh: .*plan.json says fsdp=4,tensor=2, the configuration fsdp=8"):
        followed(TrainConfig(plan=plan, mesh="fsdp=8"))
    assert followed(TrainConfig(plan=plan, mesh="fsdp=4,tensor=2")).plan is None


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"candidates": []}', '{"candidates": [{"mesh": 3}]}'])
def test_what_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is no training plan"):
        read_plan(path)
    with pytest.raises(ConfigError, match="cannot read the plan"):
        read_plan(tmp_path / "missing.json")


def test_a_plan_that_does_not_fit_is_refused(plan, tmp_path):
    content = json.loads(plan.read_text())
    content["candidates"][0]["fits"] = False
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="does not fit its devices"):
        read_plan(path)


def test_the_mesh_of_a_run_is_the_planners_choice_and_takes_its_batch(tmp_path):
    devices = use_devices("cpu:8")
    model = PRESETS["tiny"]
    many = choose_mesh(tiny_config(tmp_path, mesh="auto", batch_size=1024), model, devices)
    assert many.get("data", 1) * many.get("fsdp", 1) == 8  # many tokens: weights are less to move than partial sums
    narrow = choose_mesh(tiny_config(tmp_path, mesh="auto", batch_size=2), model, devices)
    assert narrow["tensor"] == 4  # two rows leave four devices each
    odd = dataclasses.replace(model, n_heads=3, n_kv_heads=3, d_ff=33, vocab_size=257)
    with pytest.raises(ShardingError, match="no mesh of 8 devices takes 3 rows"):
        choose_mesh(tiny_config(tmp_path, mesh="auto", batch_size=3), odd, devices)


@pytest.fixture(scope="module")
def step_file(tmp_path_factory):
    """The step of `small_run`, compiled with a plan for eight devices, and the figures of that plan."""
    folder = tmp_path_factory.mktemp("executable")
    run = small_run(folder)
    size = dataclasses.asdict(run.architecture)
    model = DecoderConfig(vocab_size=run.vocab_size, context=run.sequence_length, **size)
    workload = TrainWorkload(run.batch_size * run.sequence_length, run.sequence_length)

    def module_of(remat):
        return abstract_module(dataclasses.replace(model, scan_layers=True, remat=remat), jnp.float32)

    searched = parse_devices("v5e:2x4")
    found = plan_training(module_of, searched, workload, mesh="fsdp=4,tensor=2", remats=("dots",), limit=100)
    chosen = [each for each in found if each.parts == 2]
    path, quiet = folder / "step.bin", Console(file=io.StringIO())

    def keep(program):
        program.save(path, run)

    (planned,) = compile_best(model, parse_devices("cpu:8"), chosen, workload, 1, quiet, run=run, keep=keep)
    assert planned.compiled is not None
    return path


def small_run(folder, **changes):
    data = str(write_texts(folder / "texts"))
    sizes = {"batch_size": 16, "accumulation": 2, "remat": "dots", "dtype": "bfloat16", "learning_rate": 3e-4}
    sizes |= {"devices": "cpu:8", "mesh": "fsdp=4,tensor=2"}
    return tiny_config(folder, data=data, **sizes | changes)


def test_a_step_compiled_with_the_plan_is_the_runs_own_and_nothing_compiles(step_file, tmp_path):
    setup = prepare(small_run(tmp_path, executable=step_file), Console(file=io.StringIO()))
    plain = prepare(small_run(tmp_path), Console(file=io.StringIO()))
    results = []
    for each in (setup, plain):
        state, batches = each.start(RunFolder(tmp_path / "run")), each.batches()
        batch = each.place(next(batches))
        batches.close()
        with CompileGuard(allowed=each is plain) as guard:
            state, metrics = state.advance(each.compiled_step, batch)
        results.append((state.weights, metrics))
    assert guard.compiles  # of the plain one: the guard counts
    for mine, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_run_with_an_executable_ends_and_is_the_same_run_without_it(step_file, tmp_path):
    assert train(small_run(tmp_path, executable=step_file)).steps == small_run(tmp_path).steps
    assert json.loads((tmp_path / "run" / "meshloom.json").read_text())["train"]["executable"] == str(step_file)
    assert train(small_run(tmp_path)).steps == small_run(tmp_path).steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, "learning_rate is 0.0003 in it and 0.001 here"),
        ({"steps": 7}, "steps is 6 in it and 7 here"),
        ({"batch_size": 32}, r"argument 1.tokens is int32\[2, 8, .*\] in it and int32\[2, 16"),
        ({"remat": "none"}, "the model, its layout or the code differ"),
        ({"mesh": "fsdp=8"}, "is for mesh"),
    ],
)
def test_an_executable_of_another_run_is_refused_before_anything_is_written(step_file, tmp_path, changes, message):
    with pytest.raises(ExecutableError, match=message):
        train(small_run(tmp_path, executable=step_file, **changes))
    assert not (tmp_path / "run" / "meshloom.json").exists()

"""Serving as planned: the mesh of `auto`, the engine of a plan file, and the programs that a plan compiles."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from meshloom import cli
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.models.language_model import LanguageModel
from meshloom.models.presets import PRESETS
from meshloom.models.quantize import quantize_weights
from meshloom.models.random_weights import random_weights
from meshloom.models.source import abstract_module
from meshloom.placement import followed, serving_mesh
from meshloom.serve.config import EngineConfig
from meshloom.serve.engine import Engine
from meshloom.serve.plan import choose_axes, lowered_steps, planned_engine, prefill_tokens, replica_axes, search
from meshloom.serve.request import SamplingParams
from meshloom.sharding import derive
from meshloom.sharding.plan_file import read_plan, read_serving_plan
from meshloom.sharding.workload import ServeWorkload
from meshloom.train.plan import chip_of
from tests.serve.conftest import CONFIG, SMALL

PROMPTS = [[5, 9, 33, 12], [100, 2, 3], [7] * 20]
WORKLOAD = ServeWorkload(16, 8)


def chosen(preset, devices, **sizes):
    where = parse_devices(devices)
    return choose_axes(PRESETS[preset], where, EngineConfig(**sizes), chip=chip_of(where))


def test_a_large_model_is_served_on_all_devices_and_a_small_one_on_few():
    assert chosen("llama3-8b", "v5e:2x4").axes == {"tensor": 8}
    small = chosen("tiny", "v5e:2x4")
    assert small.axes == {"tensor": 2}
    assert small.reason.startswith("tensor=2 on 2 of 8 devices: predicted ")
    assert "one device" in small.reason  # what it was compared with
    assert "1 sequence(s)" in chosen("tiny", "v5e:2x4", max_num_seqs=1).reason


def test_the_choice_is_the_same_every_time():
    assert chosen("tiny", "cpu:8") == chosen("tiny", "cpu:8")


def test_a_model_that_fits_nowhere_has_no_choice():
    with pytest.raises(ShardingError, match="no mesh of 4 x v5e holds the model and one request"):
        chosen("llama3-70b", "v5e:2x2")


def on_mesh(lm, axes, count):
    """The same weights on the first `count` devices."""
    mesh = make_mesh(axes, jax.devices()[:count])
    module = nnx.clone(lm.module)
    nnx.update(module, derive(module, mesh).place(nnx.state(module, nnx.Param)))
    return LanguageModel(module, lm.config, lm.tokenizer, mesh)


def test_every_mesh_that_can_be_chosen_splits_heads_that_divide_or_keeps_their_cache_whole():
    where = parse_devices("cpu:8")
    module = abstract_module(dataclasses.replace(CONFIG, scan_layers=True), jnp.bfloat16)
    found = search(module, where, WORKLOAD, chip=chip_of(where), limit=2**31)
    assert {tuple(replica_axes(each.mesh).items()) for each in found} == {(("tensor", n),) for n in (1, 2, 4, 8)}


@pytest.mark.parametrize("ways", [2, 8])  # 2 kv heads that divide over the axis, and that do not
def test_tokens_on_a_mesh_that_can_be_chosen_are_those_of_one_device(lm, engine, ways):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    alone = [each.token_ids for each in engine.generate(PROMPTS, params)]
    with Engine(on_mesh(lm, {"tensor": ways}, ways), SMALL, quiet=True) as spread:
        assert [each.token_ids for each in spread.generate(PROMPTS, params)] == alone


def test_an_engine_as_planned_holds_the_whole_batch():
    sizes = {"batch": 96, "input_length": 1000, "output_length": 100}
    planned = planned_engine(EngineConfig(page_size=16), kv_dtype="bfloat16", **sizes)
    assert (planned.max_num_seqs, planned.buckets) == (96, (1, 8, 32, 96, 128, 512, 1024))
    assert planned.num_pages == 96 * 69  # 1,100 tokens are 68.75 pages
    scaled = planned_engine(EngineConfig(), kv_dtype="int8", **sizes)
    assert (scaled.cache_dtype, scaled.page_size, scaled.num_pages) == ("int8", 128, 96 * 9)
    assert prefill_tokens(1024) == 1024
    assert prefill_tokens(100_000) == 2048


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_what_a_plan_compiles_is_the_program_that_the_engine_runs(weights, monkeypatch):
    where = parse_devices("cpu:8")
    module = abstract_module(dataclasses.replace(CONFIG, scan_layers=True), jnp.bfloat16)
    found = search(module, where, WORKLOAD, chip=chip_of(where), limit=2**31)
    wanted = (2, weights, weights, 4)
    planned = next(
        each for each in found if (each.mesh["tensor"], each.weight_dtype, each.kv_dtype, each.batch) == wanted
    )
    mesh = make_mesh(replica_axes(planned.mesh), jax.devices()[:2])
    lowered = lowered_steps(CONFIG, mesh, planned, WORKLOAD)
    concrete = abstract_module(CONFIG, jnp.bfloat16)
    concrete = random_weights(concrete, seed=0, shardings=derive(concrete, mesh).shardings)
    if weights == "int8":
        quantize_weights(concrete)
    monkeypatch.setattr("meshloom.serve.runner.Runner.compile", lambda *_: None)
    sizes = planned_engine(EngineConfig(), batch=planned.batch, input_length=16, output_length=8, kv_dtype=weights)
    engine = Engine(LanguageModel(concrete, CONFIG, None, mesh), sizes, quiet=True)
    shapes = {shape.tokens: shape for shape in engine._runner._shapes}
    for name, tokens in (("decode", 4), ("prefill", 16)):
        assert lowered[name].as_text() == engine._runner.lower(shapes[tokens]).as_text(), name


@pytest.fixture
def plan_file(tmp_path, capsys):
    """A plan for eight chips of a TPU, reviewed and moved to eight simulated devices."""
    path = tmp_path / "plan.json"
    asked = "plan tiny --devices v5e:2x4 --requests 64:16 --slo ttft=1,tpot=0.05 --candidates 1 --json"
    assert cli.main([*asked.split(), "--out", str(path)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(path.read_text())
    assert content["not_compiled_because"] == "--compile 0"
    assert content["candidates"][0]["kv_dtype"] == "int8"
    best = content["candidates"][0] | {"batch": 4, "mesh": {"data": 4, "fsdp": 1, "expert": 1, "tensor": 2}}
    path.write_text(json.dumps(content | {"devices": "cpu:8", "candidates": [best]}))
    return path


def test_a_served_plan_is_one_replica_with_its_engine_and_types(plan_file, capsys):
    command, mesh = followed(cli.Serve(), plan_file)
    written = read_serving_plan(plan_file)
    assert (dict(mesh.shape), list(mesh.devices.flat)) == ({"tensor": 2}, jax.devices()[:2])
    assert (command.model, command.engine.max_num_seqs, command.engine.cache_dtype) == ("tiny", 4, written.kv_dtype)
    assert (command.quantize == "int8") == (written.weight_dtype == "int8")
    assert "one of 4 replicas, each on 2 device(s), is served here" in capsys.readouterr().err


def test_a_flag_or_format_against_a_serving_plan_is_refused(plan_file):
    with pytest.raises(ConfigError, match=r"model: .*plan.json says tiny, the command smollm2-135m; leave one"):
        followed(cli.Serve(model="smollm2-135m"), plan_file)
    with pytest.raises(ConfigError, match=r"engine.max_num_seqs: .*plan.json says 4, the command 9"):
        followed(cli.Serve(engine=EngineConfig(max_num_seqs=9)), plan_file)
    with pytest.raises(ConfigError, match=r"engine.kv_cache_memory: .*plan.json says how many pages there are"):
        followed(cli.Serve(engine=EngineConfig(kv_cache_memory=2)), plan_file)
    content = json.loads(plan_file.read_text())
    content["candidates"][0]["kv_dtype"] = "int4"
    plan_file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="kv_dtype=int4 cannot be served; this engine has bfloat16, int8"):
        followed(cli.Serve(), plan_file)
    with pytest.raises(ConfigError, match=r"is no training plan .* --batch-tokens"):
        read_plan(plan_file)


def test_auto_asks_the_planner_and_a_given_mesh_overrides_it(capsys):
    mesh = serving_mesh(cli.Serve(model="tiny", devices="cpu:8", mesh="auto"))
    said = capsys.readouterr().err
    assert dict(mesh.shape) == chosen("tiny", "cpu:8").axes
    assert said == f"mesh auto: {chosen('tiny', 'cpu:8').reason}\n"
    assert dict(serving_mesh(cli.Serve(model="tiny", devices="cpu:8", mesh="fsdp=8")).shape) == {"fsdp": 8}
    assert serving_mesh(cli.Serve(model="tiny")) is None
    assert capsys.readouterr().err == ""


def test_without_a_plan_a_fixed_rule_and_the_reason_stand_in(capsys):
    mesh = serving_mesh(cli.Serve(model="t5-base", devices="cpu:8"))
    assert dict(mesh.shape) == {"fsdp": 4, "tensor": 2}
    said = capsys.readouterr().err
    assert said.startswith("mesh auto: fsdp=4,tensor=2, by a fixed rule, for there is no plan: t5-base is an encoder")

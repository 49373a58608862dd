"""Runs that follow a plan: its file, reviewed and edited, and the mesh that a search finds."""

import dataclasses
import json

import pytest

from meshloom import cli
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.topology import use_devices
from meshloom.models.presets import PRESETS
from meshloom.sharding.plan_file import read_plan
from meshloom.train.config import TrainConfig
from meshloom.train.loop import train
from meshloom.train.plan import choose_mesh, followed
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

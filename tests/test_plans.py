"""`meshloom plan`: layouts, training and serving plans, purchases; what is shown, compiled and refused."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from meshloom import plans
from meshloom.core import topology
from meshloom.core.executable import read_header
from meshloom.core.topology import parse_devices
from meshloom.models.source import default_axes
from tests.command_line import MEASURED, run, write_model
from tests.compilers import needs_tpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "small")


def test_a_plan_for_simulated_devices_has_the_measured_processors_figures(capsys, monkeypatch):
    monkeypatch.setattr(topology, "measured_cpu", lambda: MEASURED)
    asked = "plan tiny --devices cpu:8 --batch-tokens 4096 --sequence-length 512 --compile 0"
    status, out, err = run(capsys, *asked.split(), "--json")
    assert status == 0
    assert "cpu:8: this machine's processor, measured, in 8 equal parts" in err
    values = json.loads(out)
    assert values["figures"] == "measured"
    assert {each["hbm_bytes"] for each in values["candidates"]} == {4 * 2**30}


def test_plan_is_json_with_every_parameter(capsys):
    status, out, _ = run(capsys, "plan", "tiny", "--devices", "cpu:8", "--mesh", "fsdp=-1,tensor=2", "--json")
    plan = json.loads(out)
    assert status == 0
    assert plan["mesh"] == {"fsdp": 4, "tensor": 2}
    rows = {row["parameter"]: row for row in plan["parameters"]}
    gate = next(row for name, row in rows.items() if name.endswith("0.mlp.gate.weight"))
    assert gate["spec"] == "P(None, tensor, fsdp)"
    assert gate["rule"] == "pair + store"
    assert gate["bytes_per_device"] * 8 == 2 * math.prod(gate["shape"])
    assert plan["bytes_per_device"] == sum(row["bytes_per_device"] for row in plan["parameters"])


def test_plan_shows_a_table_with_one_line_per_parameter(capsys):
    out = run(capsys, "plan", "tiny", "--devices", "h100:8")[1]
    assert [heading in out for heading in ("parameter", "shape", "spec", "rule", "per device")] == [True] * 5
    [line] = [line for line in out.splitlines() if "embed.weight" in line]
    assert "8192 x 256" in line
    assert "P(tensor, fsdp)" in line


@pytest.mark.parametrize(
    ("model", "devices", "mesh"),
    [
        ("llama3-8b", "h100:8", {"fsdp": 4, "tensor": 2}),
        ("smollm2-135m", "cpu:8", {"fsdp": 8}),  # 3 kv heads do not divide by 2
        ("qwen3-30b-a3b", "2xv5e:4x4", {"fsdp": 16, "expert": 2}),
        ("tiny", "cpu:2", {"fsdp": 2}),
        ("tiny", "cpu:7", {"fsdp": 7}),
        ("t5-base", "cpu:8", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_plan_chooses_the_documented_mesh(model, devices, mesh):
    count = parse_devices(devices).count
    assert default_axes(model, count) == mesh


def test_a_training_plan_is_json_best_first_and_a_picture(tmp_path, capsys):
    chart = tmp_path / "plan.png"
    asked = "plan smollm2-135m --devices v5e:2x2 --batch-tokens 65536 --sequence-length 1024 --candidates 3 --json"
    status, out, _ = run(capsys, *asked.split(), "--compile", "0", "--chart", str(chart))
    plan = json.loads(out)
    assert (status, plan["compiled"], len(plan["candidates"])) == (0, False, 3)
    assert plan["not_compiled_because"] == "--compile 0"
    assert plan["candidates"] == sorted(plan["candidates"], key=lambda each: each["step_time_s"])
    for each in plan["candidates"]:
        assert math.prod(each["mesh"].values()) == 4
        assert each["fits"]
        assert each["memory_per_device_bytes"] < each["hbm_bytes"] == 16 * 2**30
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_training_plan_explains_its_cost(capsys):
    asked = "plan smollm2-135m --devices v5e:2x2 --batch-tokens 65536 --sequence-length 1024 --explain-cost --compile 0"
    status, out, _ = run(capsys, *asked.split())
    assert status == 0
    assert "predicted, not compiled" in out
    assert "reduce_scatter of gradients over" in out


def test_a_serving_plan_keeps_within_the_times_asked_for(capsys):
    asked = "plan smollm2-135m --devices v5e:2x2 --requests 256:64 --slo ttft=0.5,tpot=0.02 --candidates 3 --json"
    status, out, _ = run(capsys, *asked.split())
    plan = json.loads(out)
    assert (status, len(plan["candidates"])) == (0, 3)
    for each in plan["candidates"]:
        assert each["fits"]
        assert each["meets_targets"]
        assert (each["ttft_s"] <= 0.5, each["tpot_s"] <= 0.02) == (True, True)


@needs_tpu
def test_the_steps_of_the_best_serving_plan_are_compiled_for_devices_that_are_not_here(model, capsys):
    asked = "--devices v5e:2x2 --requests 16:8 --slo ttft=1,tpot=0.05 --candidates 2 --compile 1 --json"
    status, out, _ = run(capsys, "plan", model, *asked.split())
    plan = json.loads(out)
    best, other = plan["candidates"]
    assert (status, plan["compiled"], best["fits"]) == (0, True, True)
    assert 0 < best["memory_per_device_bytes"] < best["compiled_memory_per_device_bytes"] < best["hbm_bytes"]
    assert best["compile_seconds"] > 0
    assert all(each["compiled_bytes"] is not None for each in best["collectives"].values())
    assert (best["prefill"]["tokens"], best["prefill"]["compile_seconds"] > 0) == (16, True)
    assert other["compiled_memory_per_device_bytes"] is None


def test_without_the_compiler_a_serving_plan_is_predicted_and_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    asked = "plan tiny --devices v5e:2x2 --requests 256:64 --compile 1"
    status, out, err = run(capsys, *asked.split())
    assert status == 0
    assert "predicted, not compiled" in out
    assert "pip install 'meshloom[tpu]'" in err


def test_the_cheapest_purchase_follows_the_prices(capsys):
    asked = "plan smollm2-135m --cheapest --requests 256:64:5,32:32:1 --slo ttft=1,tpot=0.1 --offers v5e:1x1,h100:1"
    for prices, chosen in (("v5e=1,h100=50", "v5e:1x1"), ("v5e=50,h100=1", "h100:1")):
        status, out, _ = run(capsys, *asked.split(), "--json", "--prices", prices)
        bought = json.loads(out)
        assert (status, list(bought["counts"])) == (0, [chosen])
        assert [sum(share.values()) for share in bought["shares"]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("tiny --requests 256:64 --mesh fsdp=2", "--mesh: of a layout or training plan, and this is a serving plan"),
        (
            "tiny --devices v5e:2x2 --cheapest --requests 256:64",
            "this is a purchase; it chooses devices itself, among --offers",
        ),
        (
            "tiny --batch-tokens 4096 --slo ttft=1,tpot=1",
            "--slo: of a serving plan or purchase, and this is a training plan",
        ),
        ("tiny --cheapest", "--cheapest needs --requests"),
        ("tiny --devices v5e:2x2 --requests 256:64 --executable s.bin", "--executable: of a training plan"),
        ("tiny --devices v5e:2x2 --requests 256:64 --out /no/plan.json", "cannot write the plan to /no/plan.json"),
        ("tiny --devices v5e:2x2 --requests 256:64 --compile -1", "--compile is a number of plans, 0 or more; got -1"),
        ("tiny --cheapest --requests 256:64 --slo ttft=1", '--slo is "ttft=SECONDS,tpot=SECONDS"'),
        ("tiny --cheapest --requests 256 --slo ttft=1,tpot=1", 'requests per second", as in "1024:256:2.5'),
        ("tiny --cheapest --requests 2:2 --slo ttft=1,tpot=1 --prices h100=-1", "h100 must be greater than 0; got -1"),
        ("tiny --devices v5e:2x2 --requests 256:64,32:32", "for one kind of requests, --cheapest for many"),
        ("t5-base --devices v5e:2x2 --requests 256:64", "serving plans are for decoders"),
    ],
)
def test_a_serving_plan_that_cannot_be_made_says_why(capsys, asked, message):
    status, _, err = run(capsys, "plan", *asked.split())
    assert status == 2
    assert message in err


def test_a_parameter_and_a_scope_are_explained_with_what_they_move(capsys):
    asked = "plan tiny --devices v5e:2x2 --mesh fsdp=2,tensor=2 --explain"
    status, out, _ = run(capsys, *asked.split(), "embed.weight")
    assert (status, "P(tensor, fsdp)" in out, "vocab" in out) == (0, True, True)
    assert "all_gather over fsdp" in out
    status, out, _ = run(
        capsys, *["plan", "tiny", "--devices", "v5e:2x2", "--mesh", "fsdp=4", "--explain", "embed.weight"]
    )
    assert (status, "the residual, before the vocabulary; it divides by fsdp=4" in out) == (0, True)
    status, out, _ = run(capsys, *asked.split(), "mlp")
    assert (status, "layers.py:" in out) == (0, True)
    status, _, err = run(capsys, *asked.split(), "embed.wait")
    assert (status, "embed.weight" in err) == (2, True)


class Sorted(nnx.Module):
    """Its rows are mixed across the batch."""

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((64, 64)))

    def __call__(self, x):
        return jnp.sort(x @ self.weight, axis=0)

    def example_inputs(self):
        return (jax.ShapeDtypeStruct((64, 64, 64), jnp.float32),)


def test_a_layout_that_moves_what_no_rule_intends_is_refused_when_strict(capsys, monkeypatch):
    dense = "plan tiny --devices v5e:2x2 --mesh fsdp=2,tensor=2 --strict --json"
    experts = "plan qwen3-30b-a3b --devices v5e:4x4 --mesh fsdp=4,expert=4 --strict --json"
    tokens = "plan tiny --devices v5e:2x2 --mesh fsdp=2,context=2 --strict --json"
    assert [run(capsys, *asked.split())[0] for asked in (dense, experts, tokens)] == [0, 0, 0]
    monkeypatch.setattr(plans, "abstract", lambda *_, **__: (None, nnx.eval_shape(Sorted)))
    status, _, err = run(capsys, *dense.split())
    assert (status, "which no rule of the layout intends" in err) == (2, True)


@needs_tpu
def test_the_best_plan_is_compiled_for_devices_that_are_not_here(capsys, tmp_path):
    asked = "plan tiny --devices v5e:2x2 --batch-tokens 4096 --sequence-length 256 --candidates 2 --compile 1 --json"
    (settings := tmp_path / "train.toml").write_text("steps = 7\nlearning_rate = 3e-4\n")
    step = tmp_path / "step.bin"
    flags = ["--executable", str(step), "--train-config", str(settings)]
    status, out, _ = run(capsys, *asked.split(), *flags)
    plan = json.loads(out)
    assert plan["executable"] == str(step)
    header = read_header(step)
    assert (header.device_kind, header.mesh) == ("TPU v5 lite", {"fsdp": 4})
    assert (header.settings["steps"], header.settings["learning_rate"]) == (7, 3e-4)
    best, other = plan["candidates"]
    assert (status, plan["compiled"], best["fits"]) == (0, True, True)
    assert 0 < best["compiled_memory_per_device_bytes"] < best["hbm_bytes"]
    assert other["compiled_memory_per_device_bytes"] is None
    compiled = {kind: each["compiled_bytes"] for kind, each in best["collectives"].items()}
    assert sum(compiled.values()) > 0
    assert 0 < best["compiled_step_time_s"] < 2 * best["step_time_s"]


def test_no_executable_is_written_and_the_command_fails_where_no_plan_fits(capsys, monkeypatch, tmp_path):
    def compile_best(config, where, candidates, *_, **__):
        return [dataclasses.replace(each, needed_bytes=2**40) for each in candidates]

    monkeypatch.setattr(topology, "measured_cpu", lambda: MEASURED)
    monkeypatch.setattr("meshloom.planning.compile_best", compile_best)
    monkeypatch.setattr("meshloom.doctor.diagnose", lambda *_: None)
    asked = "plan tiny --devices cpu:8 --batch-tokens 4096 --sequence-length 256 --candidates 1 --json"
    status, out, err = run(capsys, *asked.split(), "--executable", str(tmp_path / "step.bin"))
    assert (status, json.loads(out)["executable"], list(tmp_path.iterdir())) == (1, None, [])
    assert "no plan fits: " in err


def test_without_the_compiler_a_plan_is_predicted_and_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    asked = "plan tiny --devices v5e:2x2 --batch-tokens 4096 --sequence-length 256"
    status, out, err = run(capsys, *asked.split())
    assert status == 0
    assert "predicted, not compiled" in out
    assert "pip install 'meshloom[tpu]'" in err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("llama3-8b --devices v5e:4x4 --batch-tokens 100000", "no whole number of rows of 4096 tokens; use 98304"),
        ("llama3-8b --devices local --batch-tokens 65536 --compile 0", "for devices of the hardware table"),
        ("llama3-8b --devices v5e:4x4 --mesh fsdp=8 --batch-tokens 65536", "needs 8 devices; there are 16"),
        ("llama3-8b --devices v5e:4x4 --explain-cost", "--explain-cost: of a training plan, and this is a layout; say"),
        ("llama3-8b --devices v5e:4x4 --sequence-length 64", "--sequence-length: of a training plan"),
        ("llama3-8b --devices v5e:4x4 --batch-tokens 65536 --candidates 0", "at least 1 plan must be asked for; got 0"),
        (
            "llama3-8b --devices v5e:4x4 --batch-tokens 262144 --sequence-length 262144",
            "longer than llama3-8b's context",
        ),
        ("smollm2-135m --devices v5e:2x2 --batch-tokens 65536 --chart /no/where.png", "cannot write the chart"),
        ("smollm2-135m --devices v5e:2x2 --batch-tokens 65536 --out /no/plan.json", "cannot write the plan"),
        ("smollm2-135m --devices v5e:2x2 --batch-tokens 65536 --chart plan.xyz", "cannot write the chart to plan.xyz"),
        ("tiny --devices v5e:2x2 --batch-tokens 4096 --executable s --compile 0", "and --compile 0 compiles none"),
        (
            "tiny --devices v5e:2x2 --batch-tokens 4096 --executable /no/s.bin",
            "cannot write the executable to /no/s.bin",
        ),
        ("tiny --devices v100:8 --batch-tokens 4096 --executable s.bin", "--executable: no compiler for v100"),
        ("tiny --devices v5e:2x2 --batch-tokens 4096 --train-config t", "what is inside the program of --executable"),
        ("tiny --devices v5e:2x2 --executable s.bin", "--executable: of a training plan, and this is a layout"),
        ("llama3-8b --devices v100:8 --batch-tokens 65536", "no bfloat16 peak is known for v100"),
        ("t5-base --devices v5e:4x4 --batch-tokens 65536", "training plans are for decoders"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(asked, message, capsys):
    status, _, err = run(capsys, "plan", *asked.split())
    assert status == 2
    assert message in err


@needs_tpu
def test_kernels_of_a_plan_are_named_with_what_was_passed_over(capsys):
    asked = "plan tiny --devices v5e:2x2 --compile 0 --candidates 1 --kernels --json"
    trained = json.loads(run(capsys, *asked.split(), "--batch-tokens", "8192", "--sequence-length", "256")[1])
    kernels = {row["op"]: row for row in trained["kernels"]}
    assert kernels["attention"]["chosen"] == "mosaic_tpu"
    assert "q_shape=(32,256,4,64)" in kernels["attention"]["call"]
    assert kernels["attention over a mesh"]["declined"] == {"ring": "no mesh in scope spreads tokens"}
    served = json.loads(run(capsys, *asked.split(), "--requests", "64:16")[1])
    (paged,) = {row["chosen"] for row in served["kernels"] if row["op"] == "paged_attention"}
    assert paged in ("mosaic_tpu", "chunked")
    for row in (*trained["kernels"], *served["kernels"]):
        assert row["times_traced"] > 0
        assert row["chosen"] not in row["declined"]


def test_on_a_cpu_the_kernels_for_tpus_decline(capsys, monkeypatch):
    monkeypatch.setattr(topology, "measured_cpu", lambda: MEASURED)
    asked = "plan tiny --devices cpu:8 --batch-tokens 8192 --sequence-length 256 --mesh fsdp=8 --compile 0 --kernels"
    status, out, _ = run(capsys, *asked.split())
    assert status == 0
    assert re.search(r"attention .*chunked .*mosaic_tpu: it runs on TPUs, not on cpu", out)

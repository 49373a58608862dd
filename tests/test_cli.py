"""The command line: what it accepts, what it refuses and how it says so."""

import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys

import pytest
from flax import nnx
from rich.console import Console

from meshloom import cli, commands, machine
from meshloom.core import topology
from meshloom.core.errors import ConfigError
from meshloom.core.executable import read_header
from meshloom.core.hardware import CHIPS
from meshloom.core.measure import Measured
from meshloom.core.topology import parse_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.language_model import LanguageModel
from meshloom.models.source import default_axes
from meshloom.models.tokenizer import train_byte_bpe

ONE_PROGRAM = ["--engine.max-num-seqs", "2", "--engine.buckets", "8"]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command line run in this process."""
    status = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


def parse(*arguments):
    name = " ".join(arguments[: 2 if arguments[0] == "bench" else 1])
    return cli.parse(cli.COMMANDS[name], list(arguments[len(name.split()) :]), prog=f"meshloom {name}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_explains_every_flag_and_its_default(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*name.split(), "--help"])
    assert exit_info.value.code == 0
    explained = options(capsys.readouterr().out)
    positional = {"--model", "--source", "--out"} - explained.keys()
    assert explained.keys() == {"--help", *cli.flags(cli.COMMANDS[name])} - positional
    for flag, text in explained.items():
        assert flag == "--help" or "(default: " in text, flag
        assert len(text.partition("(default: ")[0].split()) >= 2, f"{flag} is not explained: {text!r}"


def options(shown):
    """Flag -> its explanation, out of a help page whose rows begin with the flag in the third column."""
    rows = []
    for line in shown.replace("│", " ").splitlines():
        if re.match("  -[-h]", line) and not line.startswith("  ---"):
            rows.append("")
        if rows:
            rows[-1] += line.rstrip() + "\n"
    # After the flag and its metavar, two spaces or a line break.
    parts = [re.split(r"\n +|  +", row.strip(), maxsplit=1) for row in rows]
    return {re.search(r"--[\w.-]+", head)[0]: " ".join(text.split()) for head, text in parts}


def test_the_overview_names_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    assert run(capsys)[1] == out


def test_every_command_has_its_function():
    assert all(callable(getattr(commands, name.replace(" ", "_"))) for name in cli.COMMANDS)


def test_the_version_is_printed(capsys):
    from meshloom import __version__

    assert run(capsys, "--version") == (0, f"meshloom {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srve", "tiny"], "there is no command 'srve'; did you mean 'serve'?"),
        (["bench", "srve"], "there is no command 'bench srve'; did you mean 'bench serve'?"),
        (["serve", "--prot", "80"], "meshloom serve has no option --prot; did you mean '--port'?"),
        (
            ["serve", "--engine.page_sizes=4"],
            "meshloom serve has no option --engine.page_sizes=4; did you mean '--engine.page-size'?",
        ),
        (["info", "extra"], "meshloom info does not take 'extra'; `meshloom info --help` lists what it takes"),
        (["serve", "--port", "65536"], "port must lie in 0..65535; got 65536"),
        (["generate", "--top-p", "0"], "top_p must lie in (0, 1]; got 0.0"),
        (["plan", "tiny", "--devices", "cpu:8", "--mesh", "fsdp=3"], "mesh {'fsdp': 3} needs 3 devices; there are 8"),
        (["info", "--config", "missing.toml"], "cannot read missing.toml: No such file or directory"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
    assert run(capsys, *arguments) == (2, "", f"error: {message}\n")


def test_with_json_an_error_is_json_too(capsys):
    status, out, err = run(capsys, "plan", "lama3-8b", "--json")
    assert status == 2
    assert "nearest: llama3-8b" in json.loads(out)["error"]
    assert err == f"error: {json.loads(out)['error']}\n"


def test_a_value_of_the_wrong_type_is_status_2(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["serve", "--port", "eighty"])
    assert exit_info.value.code == 2
    assert "--port" in capsys.readouterr().err


def test_an_interrupt_is_quiet_and_status_130(monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "info", interrupted)
    assert run(capsys, "info") == (130, "", "")


def test_training_that_was_interrupted_is_reported_and_status_130(monkeypatch, capsys):
    monkeypatch.setattr(commands, "train", lambda command: {"steps": 3, "interrupted": True})
    assert run(capsys, "train", "--json") == (130, '{"steps": 3, "interrupted": true}\n', "")


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('model = "tiny"\nport = 9000\nhost = "0.0.0.0"\n[engine]\nmax_num_seqs = 4\npage_size = 8\n')
    command = parse("serve", "--config", str(file), "--port", "9001", "--engine.page-size", "32")
    assert (command.model, command.host, command.port) == ("tiny", "0.0.0.0", 9001)
    assert command.engine == dataclasses.replace(cli.Serve().engine, max_num_seqs=4, page_size=32)
    assert parse("serve", f"--config={file}", "smollm2").model == "smollm2"


def test_a_nested_table_changes_only_what_it_names(tmp_path):
    file = tmp_path / "generate.toml"
    file.write_text("[engine]\npage_size = 8\n")
    assert parse("generate", "--config", str(file)).engine == dataclasses.replace(cli.ONE_SEQUENCE, page_size=8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 80", "unknown key 'prot'; did you mean 'port'?"),
        ("[engine]\nbukets = [1]", "engine: unknown key 'bukets'; did you mean 'buckets'?"),
        ('port = "80"', "port must be int; got '80'"),
        ("port = 70000", "port must lie in 0..65535; got 70000"),
        ('config = "other.toml"', "a file given with --config cannot name another"),
        ("port =", "is not valid TOML"),
    ],
)
def test_a_key_or_value_that_a_file_may_not_hold_is_refused(text, message, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse("serve", "--config", str(file))
    assert message in str(error.value)


def test_required_arguments_may_come_from_the_file(tmp_path):
    file = tmp_path / "convert.toml"
    file.write_text('source = "tiny"\nout = "folder"\n')
    command = parse("convert", "--config", str(file), "--dtype", "bfloat16")
    assert (command.source, str(command.out), command.dtype) == ("tiny", "folder", "bfloat16")


def test_json_may_be_asked_for_in_the_file(tmp_path, capsys):
    file = tmp_path / "info.toml"
    file.write_text("json = true\n")
    status, out, _ = run(capsys, "info", "--no-measure", "--config", str(file))
    assert status == 0
    assert json.loads(out)["backend"] == "cpu"


MEASURED = Measured(
    memory_bytes=32 * 2**30,
    bandwidth={"copy": 16e9, "scale": 12e9, "add": 10e9, "triad": 10e9},
    flops={"float32": 80e9, "bfloat16": 160e9, "int8": 320e9},
)


def test_info_is_json_with_versions_devices_and_measured_rates(capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda device, progress: MEASURED)
    status, out, err = run(capsys, "info", "--json")
    values = json.loads(out)
    assert (status, err) == (0, "")
    assert values["devices"] == ["cpu"] * 8
    assert {"meshloom", "jax", "flax", "memory_bytes", "cache", "compilation_cache"} <= set(values)
    assert values["measured"]["bandwidth_bytes_per_s"] == MEASURED.bandwidth
    assert values["measured"]["products_flops"] == MEASURED.flops
    assert values["chip"]["flops"] == {dtype: rate / 8 for dtype, rate in MEASURED.flops.items()}
    text = run(capsys, "info")[1]
    assert f"flax                 {values['flax']}\n" in text
    assert re.search(r"STREAM copy +│ 16 GB/s", text)
    assert re.search(r"int8 products +│ 320 GFLOP/s", text)


def test_info_without_measuring_says_so_and_prints_the_table_with_sources(capsys):
    values = json.loads(run(capsys, "info", "--no-measure", "--json")[1])
    assert (values["measured"], values["chip"]) == (None, None)
    chips = json.loads(run(capsys, "info", "--chips", "--json")[1])["chips"]
    assert chips["v5e"]["link_bandwidth"] == 200e9
    assert "bidirectional" in chips["v5e"]["sources"]["link_bandwidth"]
    assert re.search(r"h100 +│ hbm_bandwidth +│ 3350 GB/s +│ NVIDIA H100", run(capsys, "info", "--chips")[1])


def test_a_measurement_stands_beside_the_data_sheet():
    console = Console(file=io.StringIO(), width=120)
    console.print(machine.measured_table(MEASURED, CHIPS["v5e"]))
    assert re.search(r"STREAM copy +│ 16 GB/s +│ 819 GB/s +│ 2%", console.file.getvalue())


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


def test_convert_goes_to_meshloom_and_back_unchanged(tmp_path, capsys):
    first, native, back = (str(tmp_path / name) for name in ("first", "native", "back"))
    assert run(capsys, "convert", "tiny", first)[0] == 0
    assert run(capsys, "convert", first, native, "--to", "meshloom")[0] == 0
    assert run(capsys, "convert", native, back)[0] == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "back")]
    assert weights[0] == weights[1]
    status, _, err = run(capsys, "convert", "tiny", native)
    assert status == 2
    assert "which no model has: save into a new or empty folder" in err


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


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
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
        ("tiny --requests 256:64 --mesh fsdp=2", "--mesh: of a layout, and this is a serving plan"),
        ("tiny --batch-tokens 4096 --slo ttft=1,tpot=1", "--slo: of a serving plan, and this is a training plan"),
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


def test_a_layout_that_moves_what_no_rule_intends_is_refused_when_strict(capsys):
    dense = "plan tiny --devices v5e:2x2 --mesh fsdp=2,tensor=2 --strict --json"
    assert run(capsys, *dense.split())[0] == 0
    experts = "plan qwen3-30b-a3b --devices v5e:4x4 --mesh fsdp=16 --strict"
    status, _, err = run(capsys, *experts.split())
    assert (status, "which no rule of the layout intends" in err) == (2, True)


def test_verify_says_that_a_mesh_trains_as_one_device_does(capsys):
    asked = "verify tiny --devices cpu:8 --mesh fsdp=4,tensor=2 --json"
    status, out, _ = run(capsys, *asked.split())
    (mesh,) = (report := json.loads(out))["meshes"]
    assert (status, report["ok"], mesh["first_parting"]) == (0, True, None)
    assert mesh["gradient"]["difference"] <= mesh["gradient"]["tolerance"]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
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


def test_convert_writes_a_folder_that_loads(model, tmp_path, capsys):
    out = tmp_path / "converted"
    status, shown, _ = run(capsys, "convert", model, str(out), "--dtype", "bfloat16")
    assert (status, shown) == (0, f"wrote {model} as bfloat16 to {out}\n")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    status, shown, _ = run(capsys, "plan", str(out), "--devices", "cpu:2", "--json")
    assert status == 0
    assert {row["dtype"] for row in json.loads(shown)["parameters"]} == {"bfloat16"}


def test_chat_as_json_prints_the_conversation_when_it_ends(capsys, monkeypatch):
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]

    def chat(lm, config, *, console):
        assert console.stderr
        return talk

    monkeypatch.setattr("meshloom.commands._load", lambda command: None)
    monkeypatch.setattr("meshloom.serve.chat.chat", chat)
    assert json.loads(run(capsys, "chat", "tiny", "--json")[1]) == {"model": "tiny", "messages": talk}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model that compiles in a second or two."""
    config = DecoderConfig(
        vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, context=64
    )
    folder = tmp_path_factory.mktemp("model") / "small"
    LanguageModel(Decoder(config, rngs=nnx.Rngs(0)), config, train_byte_bpe(["def f(x):"], 300)).save(folder)
    return str(folder)


@pytest.fixture
def program(tmp_path):
    """Runs `python -m meshloom.cli` in a process of its own, whose caches lie in a temporary folder."""

    def call(*arguments, stdin=""):
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-m", "meshloom.cli", *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
        )

    return call


def test_generate_prints_text_or_json_and_keeps_programs_for_the_next_start(model, program, tmp_path):
    asked = ["generate", model, "--max-tokens", "4", *ONE_PROGRAM]
    done = program(*asked, "--prompt", "f(x)", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["finish_reason"] == "length"
    assert any((tmp_path / "meshloom" / "xla").iterdir())
    assert program(*asked, stdin="f(x)").stdout == answer["text"] + "\n"


def test_bench_serve_prints_the_promised_keys(model, program):
    sizes = ["--requests", "2", "--input-len", "4", "--output-len", "3"]
    done = program("bench", "serve", "--offline", "--model", model, *sizes, *ONE_PROGRAM, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["output_tokens_per_second"] > 0
    assert result["total_tokens_per_second"] > result["output_tokens_per_second"]
    assert {"p50", "p90", "p99", "mean"} == set(result["ttft_s"]) == set(result["itl_s"])

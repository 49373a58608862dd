"""The command line: what it accepts, what it refuses and how it says so."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from meshloom import cli, commands
from meshloom.core.errors import ConfigError
from tests.command_line import run, write_model

ONE_PROGRAM = ["--engine.max-num-seqs", "2", "--engine.buckets", "8"]


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
        (
            ["plan", "tiny", "--devices", "cpu:8", "--mesh", "fsdp=3"],
            "mesh {'fsdp': 3} needs 3 devices; there are 8: the product must be 8; one may be -1",
        ),
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


def test_verify_says_that_a_mesh_trains_as_one_device_does(capsys):
    asked = "verify tiny --devices cpu:8 --mesh fsdp=4,tensor=2 --json"
    status, out, _ = run(capsys, *asked.split())
    (mesh,) = (report := json.loads(out))["meshes"]
    assert (status, report["ok"], mesh["first_parting"]) == (0, True, None)
    assert mesh["gradient"]["difference"] <= mesh["gradient"]["tolerance"]


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
    return write_model(tmp_path_factory.mktemp("model") / "small")


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

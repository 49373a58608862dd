"""A whole run: what it leaves behind is a model, and what cannot work is said before the first step."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import meshloom
from meshloom.core.checkpoint import Checkpointer
from meshloom.core.errors import CheckpointError, ConfigError, MeshloomError, ShardingError
from meshloom.core.metrics import read_metrics
from meshloom.core.topology import make_mesh
from meshloom.models.language_model import LanguageModel
from meshloom.train import loop
from meshloom.train.loop import train
from meshloom.train.run_folder import RunFolder
from meshloom.train.setup import prepare
from tests.train.runs import TINY, tiny_config


def test_a_run_leaves_a_model_metrics_and_a_plot(finished):
    run, config = finished
    assert [line["step"] for line in run.metrics] == list(range(1, 13))
    assert run.metrics[-1]["loss"] == run.final_loss < run.metrics[0]["loss"] - 1.0
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu"} == run.metrics[0].keys()
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Checkpointer(run.folder / "checkpoints").steps() == [10, 12]
    description = json.loads((run.folder / "meshloom.json").read_text())
    assert description["format"] == 1
    assert description["model"]["vocab_size"] == config.vocab_size
    assert json.loads(json.dumps(run.figures()))["final_loss"] == run.final_loss


def test_the_loaded_run_is_the_model_in_memory(finished):
    run, config = finished
    setup = prepare(config, Console(stderr=True))
    state = setup.restore(Checkpointer(run.folder / "checkpoints"), 12, setup.batches())
    params, _ = state.weights
    in_memory = LanguageModel(_merged(setup.module, params), setup.model, setup.tokenizer)
    tokens = np.asarray([setup.tokenizer.encode("w1 w2 w3 w4 w5 w6 w7")], np.int32)
    loaded = run.load()
    assert loaded.tokenizer.decode(tokens[0].tolist()) == "w1 w2 w3 w4 w5 w6 w7"
    np.testing.assert_allclose(loaded.logits(tokens), in_memory.logits(tokens), atol=1e-5)
    spread = meshloom.load(str(run.folder), mesh=make_mesh("fsdp=2,tensor=4"))
    np.testing.assert_allclose(spread.logits(tokens), in_memory.logits(tokens), atol=1e-5)


def _merged(module, params):
    graphdef, _ = nnx.split(module)
    return nnx.merge(graphdef, params)


def test_a_complete_run_is_returned_as_it_is(finished, capsys):
    run, config = finished
    again = train(config)
    assert again.metrics == run.metrics
    assert "is complete: 12 of 12 steps" in capsys.readouterr().err


def test_a_changed_configuration_is_refused_and_named(finished):
    _, config = finished
    with pytest.raises(ConfigError, match=r"learning_rate: 0\.01 -> 0\.5.*another run_dir"):
        train(dataclasses.replace(config, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"steps: 12 -> 20.*schedule=constant"):
        train(dataclasses.replace(config, steps=20))


def test_changed_texts_and_precision_are_refused(finished, tmp_path):
    run, config = finished
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    with pytest.raises(ConfigError, match="computes in float32, and dtype=bfloat16"):
        train(dataclasses.replace(config, run_dir=copy, dtype="bfloat16"))
    description = json.loads((copy / "meshloom.json").read_text())
    (copy / "meshloom.json").write_text(json.dumps(description | {"corpus": "other"}))
    with pytest.raises(ConfigError, match=r"no longer those that this run began with \(hash other"):
        train(dataclasses.replace(config, run_dir=copy))


def test_another_mesh_goes_on_from_the_same_checkpoint(finished, tmp_path):
    run, config = finished
    copy = tmp_path / "run"
    shutil.copytree(run.folder, copy)
    shutil.rmtree(copy / "checkpoints" / "12")
    resumed = train(dataclasses.replace(config, run_dir=copy, mesh="data=2,fsdp=4"))
    assert [line["step"] for line in resumed.metrics] == list(range(1, 13))
    np.testing.assert_allclose(resumed.final_loss, run.final_loss, rtol=1e-5)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(tmp_path, steps=8, learning_rate=1e30, warmup_steps=0, clip_norm=1e30, checkpoint_every=1)
    with pytest.raises(MeshloomError, match=r"the loss of step \d+ is (nan|inf); .* is kept"):
        train(config)
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    assert lines
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert Checkpointer(config.run_dir / "checkpoints").latest_step() == lines[-1]["step"]


@pytest.fixture
def no_step(monkeypatch):
    """Whatever fails must fail before anything is compiled or drawn."""

    def must_not_run(*_):
        raise AssertionError("the first step was reached")

    monkeypatch.setattr(loop, "_steps", must_not_run)


def test_an_unwritable_folder_is_reported_before_the_first_step(tmp_path, no_step):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/run"):
        train(tiny_config(tmp_path, run_dir=tmp_path / "file" / "run"))


def test_a_full_disk_is_reported_before_the_first_step(tmp_path, no_step, monkeypatch):
    free = shutil._ntuple_diskusage(2**40, 2**40, 2**16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(CheckpointError, match=r"has 6\.1e-05 GiB free, but checkpoints need 0\.00"):
        train(tiny_config(tmp_path))
    assert not RunFolder(tmp_path / "run").description.exists()


def test_rows_that_do_not_divide_over_the_mesh_are_refused(tmp_path, no_step):
    with pytest.raises(ShardingError, match="a batch of 2 rows does not divide over fsdp = 4"):
        train(tiny_config(tmp_path, accumulation=4))


def test_a_vocabulary_beyond_the_model_is_refused(tmp_path, no_step):
    with pytest.raises(ConfigError, match="vocab_size=9000 is more than the 8192 of tiny"):
        train(tiny_config(tmp_path, model="tiny", vocab_size=9000))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        train(tiny_config(tmp_path, model="t5-base"))
    with pytest.raises(ConfigError, match="sequence_length=2000 is longer than tiny's context of 1024"):
        train(tiny_config(tmp_path, model="tiny", sequence_length=2000))


def test_training_starts_from_the_weights_of_a_run(finished, tmp_path):
    run, _ = finished
    tuned = train(tiny_config(tmp_path, model=str(run.folder), steps=1, learning_rate=1e-6))
    assert abs(tuned.final_loss - run.final_loss) < 0.5  # fresh weights would begin a unit higher
    assert tuned.load().config == run.load().config


def test_loss_falls_on_the_standard_library(tmp_path):
    config = tiny_config(
        tmp_path, data="stdlib", architecture=TINY, vocab_size=257, sequence_length=64, batch_size=16, steps=20
    )
    run = train(config)
    assert run.final_loss < run.metrics[0]["loss"] - 1.0

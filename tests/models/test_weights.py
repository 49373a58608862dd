"""Weights stream in and out: all defects in one error, one tensor in host memory, folders as transformers has them."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import meshloom.models as models
from meshloom.core.errors import CheckpointError
from meshloom.core.topology import make_mesh
from meshloom.models import weights
from meshloom.models.families import family_named, family_of
from meshloom.models.source import abstract_module
from meshloom.models.stack import parameter_slots
from meshloom.models.tensor_files import INDEX, Planned, SafetensorsSource, write_safetensors
from meshloom.models.weight_map import expand
from tests.models.golden_cases import NAMES, Golden, recipe


def tensors_of(golden: Golden) -> dict[str, np.ndarray]:
    return {name: recipe.weight(name, tuple(shape)) for name, shape in golden.tensors.items()}


def write(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    golden = Golden("llama")
    return golden, models.load(golden.write(tmp_path_factory.mktemp("llama")))


# Loading


def test_every_defect_is_named_in_one_error(tmp_path):
    golden = Golden("llama")
    tensors = tensors_of(golden)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((4, 5), np.float32)
    tensors["lm_head.weight"] = np.zeros((130, 48), np.float32)
    with pytest.raises(CheckpointError) as caught:
        models.load(write(tmp_path, golden.config, tensors))
    message = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight, expected shape (80, 48)" in message
    assert "missing: model.norm.weight, expected shape (48,)" in message
    assert "unexpected: model.layers.7.mlp.up_proj.weight of shape (4, 5)" in message
    assert "misshapen: lm_head.weight has shape (130, 48), expected (131, 48)" in message


def test_truncated_tensors_are_named_with_both_sizes(tmp_path):
    golden = Golden("llama")
    golden.write(tmp_path)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(
        CheckpointError, match=rf"truncated tensor: \S+ ends at byte {size} of \S+, which has {size - 100}"
    ):
        models.load(tmp_path)
    os.truncate(file, 40)
    with pytest.raises(
        CheckpointError, match=r"truncated file: model.safetensors has 40 bytes, its header alone needs"
    ):
        models.load(tmp_path)


def sharded_folder(folder: pathlib.Path) -> Golden:
    golden = Golden("llama")
    (folder / "config.json").write_text(json.dumps(golden.config))
    planned = [Planned(n, a.shape, a.dtype, functools.partial(lambda a: a, a)) for n, a in tensors_of(golden).items()]
    write_safetensors(folder, planned, shard_bytes=60_000)
    return golden


def test_shards_load_and_a_missing_one_is_named_with_what_it_held(tmp_path):
    golden = sharded_folder(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert sum(len(load_file(shard)) for shard in shards) == len(golden.tensors)
    assert all(shard.stat().st_size < 62_000 for shard in shards)
    np.testing.assert_allclose(models.load(tmp_path).logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)
    shards[1].unlink()
    held = [
        name
        for name, file in json.loads((tmp_path / INDEX).read_text())["weight_map"].items()
        if file == shards[1].name
    ]
    with pytest.raises(CheckpointError, match="missing shard") as caught:
        models.load(tmp_path)
    assert all(name in str(caught.value) for name in held)
    assert "missing: " not in str(caught.value)


def test_a_corrupted_index_or_header_is_an_error_not_a_traceback(tmp_path):
    sharded_folder(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": [')
    with pytest.raises(CheckpointError, match="corrupted index"):
        models.load(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((12).to_bytes(8, "little") + b'{"a": {"b": ' + b"0" * 64)
    with pytest.raises(CheckpointError, match="corrupted header"):
        models.load(tmp_path)


def test_a_repeated_tied_embedding_must_be_the_same(tmp_path):
    golden = Golden("llama-tied")
    tensors = tensors_of(golden)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    lm = models.load(write(tmp_path / "same", golden.config, tensors))
    np.testing.assert_allclose(lm.logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)
    tensors["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from embed.weight.*tie_word_embeddings"):
        models.load(write(tmp_path / "other", golden.config, tensors))


@pytest.mark.parametrize(
    ("name", "rename", "buffers"),
    [
        ("llama", {}, {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        ("gpt2", {"transformer.": ""}, {"h.0.attn.bias": (1, 1, 64, 64), "h.1.attn.masked_bias": ()}),
        ("opt", {"model.decoder.": "decoder."}, {}),
        ("neox", {}, {"gpt_neox.layers.0.attention.bias": (1, 1, 64, 64)}),
        ("gemma3", {"model.": "language_model.model."}, {"vision_tower.encoder.weight": (3, 3)}),
    ],
)
def test_older_spellings_load_and_old_buffers_are_passed_over(tmp_path, name, rename, buffers):
    golden = Golden(name)
    tensors = tensors_of(golden)
    for old, new in rename.items():
        tensors = {key.replace(old, new, 1) if key.startswith(old) else key: value for key, value in tensors.items()}
    tensors |= {key: np.ones(shape, np.float32) for key, shape in buffers.items()}
    lm = models.load(write(tmp_path, golden.config, tensors))
    np.testing.assert_allclose(lm.logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)


def test_whole_numbers_are_refused_as_weights(tmp_path):
    golden = Golden("llama")
    tensors = tensors_of(golden) | {"model.norm.weight": np.ones(48, np.int8)}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds int8"):
        models.load(write(tmp_path, golden.config, tensors))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_weights_go_straight_to_their_shards(tmp_path, scan):
    golden = Golden("qwen3-moe")
    mesh = make_mesh({"expert": 2, "fsdp": 4})

    def placement(module, inputs):
        assert [x.dtype for x in inputs] == [jnp.int32]

        def spec(leaf):
            experts = (leaf.ndim == 4 and scan) or (leaf.ndim == 3 and not scan)
            parts = ["expert" if experts and axis == leaf.ndim - 3 else None for axis in range(leaf.ndim)]
            if leaf.ndim > 1 and leaf.shape[-1] % 4 == 0:
                parts[-1] = "fsdp"
            return NamedSharding(mesh, PartitionSpec(*parts))

        return jax.tree.map(spec, nnx.state(module, nnx.Param))

    lm = models.load(golden.write(tmp_path), placement=placement, scan_layers=scan)
    assert lm.mesh == mesh
    (gate,) = [
        leaf for path, leaf in nnx.to_flat_state(nnx.state(lm.module)) if path[-4:] == (0, "mlp", "gate", "weight")
    ]
    stack = (3,) if scan else ()
    assert gate.get_value().addressable_shards[0].data.shape == (*stack, 3, 40, 12)
    np.testing.assert_allclose(lm.logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)


def test_writing_one_expert_into_split_experts_moves_no_other(tmp_path):
    mesh = make_mesh({"expert": 4, "fsdp": 2})
    array = jax.device_put(jnp.zeros((3, 8, 16, 32)), NamedSharding(mesh, PartitionSpec(None, "expert", "fsdp")))
    piece = jax.device_put(jnp.ones((16, 32)), NamedSharding(mesh, PartitionSpec("fsdp")))
    compiled = weights._write.lower(array, piece, (jnp.int32(1), jnp.int32(5))).compile()
    assert not [
        op for op in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if op in compiled.as_text()
    ]
    # In place: what comes out is what went in, and nothing of the array's size lies beside it.
    assert compiled.memory_analysis().alias_size_in_bytes == 3 * 2 * 8 * 32 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


PROBE = pathlib.Path(__file__).with_name("memory_probe.py")


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """448 MiB in 43 tensors, the largest (the embedding) of 64 MiB."""
    folder = tmp_path_factory.mktemp("large")
    config = models.DecoderConfig(
        vocab_size=16384, d_model=1024, n_layers=6, n_heads=16, n_kv_heads=16, head_dim=64, d_ff=4096, context=64
    )
    family = family_named("llama")
    tensors = expand(family.rules(config), parameter_slots(abstract_module(config, jnp.float32))).values()
    write_safetensors(
        folder,
        [
            Planned(each.name, each.shape, np.dtype(np.float32), functools.partial(np.ones, each.shape, np.float32))
            for each in tensors
            if not each.duplicate
        ],
        shard_bytes=200 * 2**20,
    )
    (folder / "config.json").write_text(json.dumps(family.write_config(config)))
    return folder, max(each.size for each in tensors) * 4


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("kind", ["unrolled", "scanned", "sharded"])
def test_loading_holds_one_tensor_beyond_the_weights(large_checkpoint, kind, capsys):
    folder, largest = large_checkpoint
    # A fixed threshold has malloc give every freed buffer back, so that reuse hides nothing.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, str(PROBE), str(folder), kind]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    measured = json.loads(result.stdout.splitlines()[-1])
    beyond = measured["peak"] - measured["weights"]
    with capsys.disabled():
        figure = f"{beyond / largest:.2f} x the largest tensor"
        print(f"\nloading {measured['weights'] / 2**20:.0f} MiB {kind} takes {figure} beyond them")
    assert measured["weights"] > 440 * 2**20
    assert beyond <= 1.2 * largest


# Saving


@pytest.mark.parametrize(("name", "scan"), [(name, i % 2 == 0) for i, name in enumerate(NAMES)])
def test_a_saved_folder_holds_what_transformers_wrote(name, scan, tmp_path):
    golden = Golden(name)
    source = golden.write(tmp_path / "in")
    lm = models.load(source, scan_layers=scan)
    lm.save(tmp_path / "out")
    saved, written = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert sorted(saved) == sorted(written)
    for tensor in written:
        np.testing.assert_array_equal(saved[tensor], written[tensor], err_msg=tensor)
    # The same architecture, in words that family and transformers share.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    family = family_of(config)
    assert family.read_config(config) == family.read_config(golden.config)
    # All other keys agree with transformers' own where it gives a value; these have two spellings, or no effect here.
    spelt = {
        "rope_parameters",
        "activation_function",
        "hidden_act",
        "sliding_window",
        "max_window_layers",
        "tie_word_embeddings",
    }
    without_effect = {"bos_token_id", "eos_token_id", "pad_token_id", "original_max_position_embeddings"}
    stated = {key for key in config.keys() & golden.config.keys() if golden.config[key] is not None}
    assert {key for key in stated if config[key] != golden.config[key]} <= spelt | without_effect
    assert config["dtype"] == "float32"


def test_half_precision_is_kept(tmp_path):
    golden = Golden("llama")
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors_of(golden).items()}
    lm = models.load(write(tmp_path / "in", golden.config | {"dtype": "bfloat16"}, tensors), dtype=jnp.bfloat16)
    lm.save(tmp_path / "out")
    source = SafetensorsSource(tmp_path / "out")
    assert {source.dtype(name).name for name in source.shapes} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    np.testing.assert_array_equal(source.read("lm_head.weight"), tensors["lm_head.weight"])


def test_a_failed_save_leaves_the_folder_as_it_was(llama, tmp_path, monkeypatch):
    _, lm = llama
    target = tmp_path / "model"
    lm.save(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    written = []

    def full_disk(stream, tensor):
        written.append(tensor.name)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        stream.write(bytes(tensor.nbytes))

    monkeypatch.setattr("meshloom.models.tensor_files._write_tensor", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device; what was there is untouched"):
        lm.save(target)
    assert len(written) == 5
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_replaces_a_model_but_nothing_else(llama, tmp_path):
    golden, lm = llama
    target = tmp_path / "model"
    lm.save(target)
    lm.save(target)
    np.testing.assert_allclose(models.load(target).logits(golden.tokens), golden.logits, rtol=0, atol=2e-4)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds thesis.tex, which no model has"):
        lm.save(target)
    assert (target / "thesis.tex").read_text() == "years of work"


def test_restacked_layers_are_the_same_model(llama):
    golden, lm = llama
    scanned = abstract_module(dataclasses.replace(lm.config, scan_layers=True), jnp.float32)
    module = weights.restack(lm.module, scanned)
    assert len(module.layers.scanned) == 1
    np.testing.assert_allclose(module(jnp.asarray(golden.tokens))[0], golden.logits, rtol=0, atol=2e-4)

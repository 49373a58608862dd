"""GGUF files: logits are those of transformers' own reader, tokenizers cut as the file says, defects are named."""

import json
import os
import struct

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

import meshloom.models as models
from meshloom.core.errors import CheckpointError, ModelError
from meshloom.models.gguf import GGUFSource
from meshloom.models.gguf_tokenizer import read_gguf_tokenizer
from meshloom.models.source import resolve
from tests.models.golden_cases import GOLDEN, recipe

NAMES = sorted(path.stem for path in (GOLDEN / "gguf").glob("*.json"))


def write_case(name, file, **changes):
    text = json.loads((GOLDEN / "gguf" / f"{name}.json").read_text())
    recipe.write_gguf(file, text["metadata"] | changes, text["tensors"])
    return file


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers_on_the_same_file(name, tmp_path):
    golden = np.load(GOLDEN / "gguf" / f"{name}.npz")
    lm = models.load(write_case(name, tmp_path / "model.gguf"), scan_layers=True)
    np.testing.assert_allclose(lm.logits(golden["tokens"]), golden["logits"], rtol=0, atol=2e-4)


def test_a_gguf_model_saves_as_a_hugging_face_folder(tmp_path):
    golden = np.load(GOLDEN / "gguf" / "gemma2.npz")
    models.load(write_case("gemma2", tmp_path / "model.gguf")).save(tmp_path / "folder")
    lm = models.load(tmp_path / "folder")
    np.testing.assert_allclose(lm.logits(golden["tokens"]), golden["logits"], rtol=0, atol=2e-4)


K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_read_row_by_row(kind, tmp_path):
    from gguf import GGUFWriter

    quantization = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[quantization]
    raw = np.random.default_rng(0).integers(
        0, 64, (3, 2 * size), dtype=np.uint8
    )  # small bytes: no NaN among the scales
    writer = GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("w", raw, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "k.gguf")
    assert source.shapes == {"w": (3, 2 * block)}
    value = source.read("w")
    assert np.isfinite(value).all()
    rows = [np.concatenate([dequantize(half, quantization) for half in row.reshape(2, size)]) for row in raw]
    np.testing.assert_array_equal(value, np.stack(rows))


def test_llama31_rope_factors_are_taken_up(tmp_path):
    text = json.loads((GOLDEN / "gguf" / "llama.json").read_text())
    tensors = text["tensors"] | {"rope_freqs.weight": ["F32", [8]]}
    recipe.write_gguf(tmp_path / "model.gguf", text["metadata"], tensors)
    rope = models.load(tmp_path / "model.gguf").config.rope
    np.testing.assert_allclose(rope.short_factors, recipe.weight("rope_freqs.weight", (8,)))
    plain = models.load(write_case("llama", tmp_path / "plain.gguf")).config.rope.frequencies(16)
    np.testing.assert_allclose(rope.frequencies(16), plain / np.asarray(rope.short_factors), rtol=1e-6)


def test_defects_are_named(tmp_path):
    file = write_case("llama", tmp_path / "model.gguf")
    size = file.stat().st_size
    os.truncate(file, size - 64)
    with pytest.raises(
        CheckpointError, match=rf"truncated tensor: blk.1.\S+ ends at byte \d+ of a file of {size - 64}"
    ):
        models.load(file)
    os.truncate(file, 100)
    with pytest.raises(CheckpointError, match="truncated or corrupted at byte"):
        models.load(file)
    file.write_bytes(b"GGML" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match="not a GGUF file of version 2 or 3"):
        models.load(file)
    file.write_bytes(b"GG")
    with pytest.raises(CheckpointError, match="it has 2 bytes"):
        models.load(file)


def test_unsupported_architecture_and_scaling_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"architecture 'rwkv6' is not supported.*llama"):
        resolve(write_case("llama", tmp_path / "a.gguf", **{"general.architecture": "rwkv6"}))
    with pytest.raises(ModelError, match="rope scaling 'yarn' is not supported"):
        resolve(write_case("llama", tmp_path / "b.gguf", **{"llama.rope.scaling.type": "yarn"}))


# Tokenizers

BYTES = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))] + [
    chr(256 + i) for i in range(68)
]


def byte_level(cut, **metadata):
    return read_gguf_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": cut,
            "tokenizer.ggml.tokens": [
                *BYTES,
                "12",
                "123",
                "1234",
                "Ġa",
                "'S",
                "b,",
                "<|im_end|>",
                "<|eot_id|>",
                "<tool>",
            ],
            "tokenizer.ggml.token_type": [1] * 262 + [3, 3, 4],
            "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "Ġ a", "' S", "b ,"],
            **metadata,
        }
    )


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("gpt-2", ["1234", "Ġa", "'", "S", "Ġ", "b", ","]),  # only lower-case contractions
        ("smollm", ["1", "2", "3", "4", "Ġa", "'", "S", "Ġ", "b", ","]),  # digit by digit
        ("llama-bpe", ["123", "4", "Ġa", "'S", "Ġ", "b", ","]),  # three digits at a time
        ("qwen2", ["1", "2", "3", "4", "Ġa", "'S", "Ġ", "b", ","]),
        ("default", ["123", "4", "Ġa", "'", "S", "Ġ", "b", ","]),
    ],
)
def test_text_is_cut_as_the_file_says(cut, pieces):
    tokenizer = byte_level(cut)
    ids = tokenizer.encode("1234 a'S b,", add_special=False)
    assert [tokenizer.backend.id_to_token(i) for i in ids] == pieces
    assert tokenizer.decode(ids) == "1234 a'S b,"


def test_special_tokens_follow_the_metadata():
    tokenizer = byte_level(
        "llama-bpe",
        **{
            "tokenizer.ggml.bos_token_id": 262,
            "tokenizer.ggml.eos_token_id": 263,
            "tokenizer.ggml.add_eos_token": True,
            "tokenizer.chat_template": "{{ bos_token }}",
        },
    )
    assert tokenizer.encode("b") == [262, *tokenizer.encode("b", add_special=False), 263]
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (262, {262, 263})
    assert tokenizer.apply_chat_template([]) == "<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("<tool><|im_end|>")) == "<tool>"
    # Without a word on it, Llama 3 begins with bos and GPT-2 does not.
    assert byte_level("gpt-2", **{"tokenizer.ggml.bos_token_id": 262}).encode("b") == tokenizer.encode(
        "b", add_special=False
    )


def test_unknown_cuts_and_kinds_are_refused_by_name():
    with pytest.raises(ModelError, match="pre-tokenizer 'deepseek-v9' is not supported; supported: default, gpt-2"):
        byte_level("deepseek-v9")
    with pytest.raises(ModelError, match="tokenizer 'rwkv' is not supported; supported: gpt2, llama"):
        read_gguf_tokenizer({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": []})
    assert read_gguf_tokenizer({}) is None


def test_smollm2_words_are_those_of_its_own_tokenizer():
    tokenizer = resolve("smollm2").tokenizer()
    # From the model's published tokenizer: digits stand alone, and so does the space before them.
    assert tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    assert tokenizer.eos_ids == {0, 2}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat, add_special=False)[0] == 1

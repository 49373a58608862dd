"""Text to ids and back: streamed pieces join to the whole, chats follow the model's template, folders round-trip."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from meshloom.core.errors import ModelError, RequestError
from meshloom.models.gguf_tokenizer import read_gguf_tokenizer
from meshloom.models.tokenizer import IncrementalDecoder, Tokenizer, train_byte_bpe

TEXTS = [
    "naïve café — 東京タワー 🗼🇯🇵 Ωmega",
    "the theme of the thing",
    "def f(x):\n    return x\n",
    "👩‍👩‍👧 family",
] * 3
BYTE_LEVEL = train_byte_bpe(TEXTS, 300)


def sentencepiece() -> Tokenizer:
    """A SentencePiece vocabulary with a byte fallback, as GGUF files hold one."""
    pieces = ["\u2581", "t", "h", "e", "\u2581t", "he", "\u2581the", "\u2581he", "o", "w", "\u2581o", "ow"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_pieces, *pieces, "<tool>"]
    return read_gguf_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0],
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )


SENTENCEPIECE = sentencepiece()


def stream(tokenizer, ids, skip_special=True):
    decoder = IncrementalDecoder(tokenizer, skip_special)
    pieces = [decoder.push(i) for i in ids]
    return pieces, decoder.flush()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize("skip_special", [True, False])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_whole(tokenizer, skip_special, data):
    # Any ids at all, also ones no text encodes to: halves of characters, special tokens, ids beyond the vocabulary.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    pieces, rest = stream(tokenizer, ids, skip_special)
    assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special=skip_special)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_streamed_text_never_holds_half_a_character(text):
    pieces, rest = stream(BYTE_LEVEL, BYTE_LEVEL.encode(text))
    assert "".join(pieces) == text
    assert rest == ""
    # A replacement character in a piece is one that the text itself has.
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_a_character_comes_with_the_token_that_completes_it():
    tokenizer = train_byte_bpe((), 257)
    pieces, rest = stream(tokenizer, tokenizer.encode("🗼"))
    assert pieces == ["", "", "", "🗼"]
    assert rest == ""
    pieces, rest = stream(tokenizer, tokenizer.encode("🗼")[:2])
    assert (pieces, rest) == (["", ""], "\ufffd")


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    ids = SENTENCEPIECE.encode("the ow€")
    words = [SENTENCEPIECE.backend.id_to_token(i) for i in ids]
    assert words == ["<s>", "\u2581the", "\u2581o", "w", "<0xE2>", "<0x82>", "<0xAC>"]
    assert SENTENCEPIECE.decode(ids) == "the ow€"
    assert SENTENCEPIECE.encode("the", add_special=False) == ids[1:2]


def test_user_defined_tokens_are_text_and_control_tokens_are_not():
    ids = SENTENCEPIECE.encode("the<tool>the</s>", add_special=False)
    assert SENTENCEPIECE.decode(ids) == "the<tool> the"
    assert SENTENCEPIECE.decode(ids, skip_special=False).endswith("</s>")


CHAT = (
    "{%- for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}"
    "<{{ message.role }}>{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer():
    return Tokenizer(BYTE_LEVEL.backend, bos_id=0, eos_ids=[0], chat_template=CHAT)


def test_chat_renders_by_the_models_template():
    messages = [{"role": "system", "content": "be <kind>"}, {"role": "user", "content": "hi"}]
    text = chat_tokenizer().apply_chat_template(messages, variables={"tools": [{"a": "<é>"}]})
    assert text == '<system>be <kind><|endoftext|>\n<user>hi<|endoftext|>\n[{"a": "<é>"}]<assistant>'
    assert not chat_tokenizer().apply_chat_template(messages, add_generation_prompt=False).endswith("<assistant>")


def test_messages_the_template_refuses_are_a_request_error():
    with pytest.raises(RequestError, match="system must come first"):
        chat_tokenizer().apply_chat_template([{"role": "user", "content": "hi"}, {"role": "system", "content": "no"}])


def test_a_template_cannot_leave_its_sandbox():
    tokenizer = Tokenizer(BYTE_LEVEL.backend, chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_model_without_a_template_says_so():
    with pytest.raises(ModelError, match="no chat template"):
        BYTE_LEVEL.apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_saved_folder_loads_as_the_same_tokenizer(tmp_path):
    first = Tokenizer(BYTE_LEVEL.backend, bos_id=0, eos_ids=[0, 5], pad_id=3, chat_template=CHAT)
    first.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.encode(TEXTS[0]) == first.encode(TEXTS[0])
    kept = ("bos_id", "eos_ids", "pad_id", "chat_template", "vocab_size")
    assert [getattr(again, name) for name in kept] == [getattr(first, name) for name in kept]


def test_eos_ids_come_from_both_files_and_older_spellings_are_read(tmp_path):
    BYTE_LEVEL.backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": [{"name": "default", "template": "x"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == {0, 7, 9}
    assert loaded.chat_template == "x"


def test_a_folder_with_vocab_and_merges_reads_as_gpt2_did(tmp_path):
    model = json.loads(BYTE_LEVEL.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("the theme") == [0, *BYTE_LEVEL.encode("the theme")]
    assert loaded.decode(loaded.encode("the theme")) == "the theme"


def test_an_empty_folder_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_training_is_repeatable_and_refuses_fewer_ids_than_bytes():
    assert train_byte_bpe(iter(TEXTS), 300).backend.to_str() == BYTE_LEVEL.backend.to_str()
    with pytest.raises(ModelError, match="got 100"):
        train_byte_bpe(TEXTS, 100)


def test_a_metaspace_decoder_streams_exactly_too():
    vocab = {"<unk>": 0, "\u2581a": 1, "b": 2, "\u2581": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Prepend("\u2581")
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    for ids in ([3, 3, 1, 2, 3, 1], [1, 2], [3, 1]):
        pieces, rest = stream(tokenizer, ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids)

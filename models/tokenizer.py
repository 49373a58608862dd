"""Text to token ids and back, one token at a time if wanted.

`Tokenizer` wraps a `tokenizers.Tokenizer` with what generation needs besides it: begin and end tokens and the chat
template. It reads and writes the files that Hugging Face folders hold. `IncrementalDecoder` turns a growing list of ids
into text such that the pieces joined are exactly the text of the whole list, and no piece ends inside a character.
Neither knows a model.
"""

import codecs
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from meshloom.core.errors import ModelError
from meshloom.models.chat_template import render_chat

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Encodes, decodes and renders chats.

    Attributes:
        backend: the wrapped `tokenizers.Tokenizer`.
        bos_id: id of the token that begins a text, or None.
        eos_ids: ids that end a generation; several for chat models (end of turn, end of text).
        pad_id: id of padding, or None.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        # The first one given is the one that Hugging Face files call eos_token.
        self._eos_order = tuple(dict.fromkeys(eos_ids))
        self.eos_ids = frozenset(self._eos_order)
        self.pad_id = pad_id
        self.chat_template = chat_template
        backend.no_truncation()
        backend.no_padding()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` puts around it what the model was trained to see (often a begin token).

        Special tokens written in the text are recognised. A rendered chat holds its own: encode it with
        `add_special=False`.
        """
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Prompt text of a conversation (encode it with `add_special=False`); `variables` are passed to the template.

        Raises:
            ModelError: the model has no chat template.
            RequestError: the template refuses the messages.
        """
        if self.chat_template is None:
            raise ModelError("this model has no chat template: it completes text; use plain prompts (/v1/completions)")
        eos = self._eos_order[0] if self._eos_order else None
        tokens = {"bos_token": self._token(self.bos_id), "eos_token": self._token(eos)}
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=tokens | dict(variables or {}),
        )

    def _token(self, token_id: int | None) -> str:
        return "" if token_id is None else self.backend.id_to_token(token_id) or ""

    def special_ids(self) -> dict[str, Any]:
        """Begin, end and padding ids under the keys that Hugging Face's config files have; absent ones left out."""
        ends = list(self._eos_order) if len(self._eos_order) > 1 else next(iter(self._eos_order), None)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": ends, "pad_token_id": self.pad_id}
        return {name: value for name, value in ids.items() if value is not None}

    def save(self, folder: str | pathlib.Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja into `folder`."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        eos = self._eos_order
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self._token(self.bos_id) or None,
            "eos_token": self._token(eos[0]) if eos else None,
            "pad_token": self._token(self.pad_id) or None,
            "clean_up_tokenization_spaces": False,
        }
        _write_json(folder / "tokenizer_config.json", settings)
        _write_json(folder / "generation_config.json", self.special_ids())
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "Tokenizer":
        """Read the tokenizer of a Hugging Face folder (tokenizer.json, or GPT-2's vocab.json and merges.txt).

        Raises:
            ModelError: no tokenizer there, or one that cannot be read.
        """
        folder = pathlib.Path(folder)
        settings = _read_json(folder / "tokenizer_config.json")
        backend = _read_backend(folder, settings)
        generation = _read_json(folder / "generation_config.json") or _read_json(folder / "config.json")
        special = {name: _token_id(backend, settings.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
        return cls(
            backend,
            bos_id=special["bos"] if special["bos"] is not None else generation.get("bos_token_id"),
            eos_ids=[i for i in (special["eos"], *_as_list(generation.get("eos_token_id"))) if i is not None],
            pad_id=special["pad"] if special["pad"] is not None else generation.get("pad_token_id"),
            chat_template=_read_chat_template(folder, settings),
        )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _token_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    # Older files write {"content": "</s>", "lstrip": ...} where newer ones write "</s>".
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None


def _read_backend(folder: pathlib.Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if path.is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        if vocab.is_file() and merges.is_file():
            return _byte_level(models.BPE.from_file(str(vocab), str(merges)), settings)
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
    raise ModelError(f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json with merges.txt")


def _byte_level(model: models.Model, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's pipeline around a BPE model (GPT-2 and OPT folders without tokenizer.json)."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    tokens = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    contents = [token["content"] if isinstance(token, dict) else token for token in tokens if token]
    backend.add_special_tokens([token for token in dict.fromkeys(contents) if backend.token_to_id(token) is not None])
    bos = _token_id(backend, settings.get("bos_token"))
    if settings.get("add_bos_token") and bos is not None:
        token = backend.id_to_token(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, bos)])
    return backend


def _read_chat_template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones; "default" is the one for chatting
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def train_byte_bpe(texts: Iterator[str] | Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) whose one special token ends a text.

    Args:
        texts: documents; read once.
        vocab_size: ids wanted, at least 257 (256 bytes and the end of text); fewer come out when the texts are short.
    """
    if vocab_size < 257:
        raise ModelError(
            f"a byte-level vocabulary needs at least 257 ids (256 bytes and {END_OF_TEXT}); got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    end = backend.token_to_id(END_OF_TEXT)
    return Tokenizer(backend, bos_id=end, eos_ids=[end], pad_id=end)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class IncrementalDecoder:
    """Text of a growing list of ids: `push` returns what each id adds, `flush` what is left at the end.

    All pieces joined equal `tokenizer.decode(ids)`. A character whose bytes are spread over several tokens is returned
    with the token that completes it. Byte-level vocabularies are decoded byte by byte in constant time; for others
    (SentencePiece style) the last few tokens are decoded again.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend
        added = self._backend.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special else set()
        self._byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Others: ids of the last piece returned and of what came since; the text of both minus that of the first is
        # new.
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Text completed by this id; often one word, "" while a character is incomplete."""
        token = None if token_id in self._skipped else self._backend.id_to_token(token_id)
        if token is None:
            return ""
        if self._byte_level:
            known = all(character in _BYTES for character in token)
            return self._utf8.decode(bytes(map(_BYTES.__getitem__, token)) if known else token.encode())
        self._held.append(token_id)
        # A run of byte tokens is text or not as a whole: wait for its end.
        return "" if len(token) == 6 and token.startswith("<0x") else self._show()

    def flush(self) -> str:
        """What `push` still held; an unfinished character comes out as U+FFFD."""
        return self._utf8.decode(b"", final=True) if self._byte_level else self._show()

    def _show(self) -> str:
        before = self._tokenizer.decode(self._shown, skip_special=False)
        text = self._tokenizer.decode(self._shown + self._held, skip_special=False)[len(before) :]
        if text:
            self._shown, self._held = self._held, []
        return text

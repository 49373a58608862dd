"""The tokenizer in a GGUF file's metadata, as a `tokenizers` pipeline.

Two kinds are known: `gpt2` (byte-level BPE with merges; `tokenizer.ggml.pre` names how text is cut before) and `llama`
(SentencePiece BPE: pieces with scores and a byte fallback). Anything else is refused by name: a wrong cut gives wrong
tokens without a word.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from meshloom.core.errors import ModelError
from meshloom.models.tokenizer import Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# How text is cut before BPE merges, after llama.cpp's names: what each regular expression matches is isolated, in turn.
_GPT2_CUT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
_CUTS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_CUT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2_CUT,),
    "phi-2": (_GPT2_CUT,),
    "olmo": (_GPT2_CUT,),
    "mpt": (_GPT2_CUT,),
    "smollm": (_DIGIT, _GPT2_CUT),
    "starcoder": (_DIGIT, _GPT2_CUT),
    "refact": (_DIGIT, _GPT2_CUT),
    "command-r": (_DIGIT, _GPT2_CUT),
    "llama-bpe": (_LLAMA3_CUT,),
    "llama3": (_LLAMA3_CUT,),
    "llama-v3": (_LLAMA3_CUT,),
    "qwen2": (_LLAMA3_CUT.replace(r"\p{N}{1,3}", r"\p{N}"),),
}
_BEGIN_BY_DEFAULT = {"llama-bpe", "llama3", "llama-v3"}

# Tokens that end a generation wherever they are control tokens: chat files often name only one of them as eos.
_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>")


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a GGUF file, or None when it holds none.

    Raises:
        ModelError: its kind or its way of cutting text is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in metadata:
        return None
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise ModelError(f"GGUF tokenizer {kind!r} is not supported; supported: {', '.join(makers)}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    backend, begins = makers[kind](metadata, tokens, types)
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(t, special=special, normalized=False)
            for t, k in zip(tokens, types, strict=True)
            if k == wanted
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)

    def token_id(name: str) -> int | None:
        return metadata.get(f"tokenizer.ggml.{name}_token_id")

    bos, eos = token_id("bos"), token_id("eos")
    _frame(
        backend,
        tokens,
        bos if metadata.get("tokenizer.ggml.add_bos_token", begins) else None,
        (eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None),
    )
    control = {token: i for i, (token, k) in enumerate(zip(tokens, types, strict=True)) if k == _CONTROL}
    ends = [eos, token_id("eot"), token_id("eom"), *(control.get(token) for token in _ENDS)]
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_ids=[i for i in ends if i is not None],
        pad_id=token_id("padding"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _frame(backend: tokenizers.Tokenizer, tokens: Sequence[str], begin: int | None, end: int | None) -> None:
    """Have `encode` put these tokens around a text."""
    around = [(tokens[i], i) for i in (begin, end) if i is not None]
    before = [] if begin is None else [tokens[begin]]
    after = [] if end is None else [tokens[end]]
    if around:
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=around)


def _byte_level(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    cut = metadata.get("tokenizer.ggml.pre", "default")
    if cut not in _CUTS:
        raise ModelError(f"GGUF pre-tokenizer {cut!r} is not supported; supported: {', '.join(_CUTS)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, though no merges lead to it.
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=cut in _BEGIN_BY_DEFAULT))
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _CUTS[cut]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, cut in _BEGIN_BY_DEFAULT


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges_by_score(tokens, metadata["tokenizer.ggml.scores"], types)
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges_by_score(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores highest: the same as merges listed by that score."""
    score = {token: s for token, s, kind in zip(tokens, scores, types, strict=True) if kind in (1, _USER_DEFINED)}
    ranked = sorted(score, key=lambda token: -score[token])
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]

"""Fields of the OpenAI API that this server knows but does not honour: refused, never ignored.

A value that asks for nothing (the default, or a label that changes no output) is accepted; any other is a 400 that
names the field and what to use instead.
"""

from typing import Any

from meshloom.serve.api.errors import APIError

# Labels and hints: they change no output, so any value is fine.
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})

_PENALTY = "use temperature, top_p or min_p to vary the text"
_LOGPROBS = "score text with meshloom.load(...).logits(tokens)"
_TOOLS = "describe the tools in a system message"

# Field -> (values that ask for nothing, what to use instead). None always asks for nothing.
COMMON: dict[str, tuple[tuple, str]] = {
    "presence_penalty": ((0,), _PENALTY),
    "frequency_penalty": ((0,), _PENALTY),
    "repetition_penalty": ((1,), _PENALTY),
    "logit_bias": (({},), "use stop_token_ids to end at a token"),
    "best_of": ((1,), "use n and choose on your side"),
    "echo": ((False,), "the prompt is known to you: prepend it"),
    "min_tokens": ((0,), "use ignore_eos with max_tokens"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "service_tier": (("auto", "default"), "there is one tier"),
}
COMPLETION = COMMON | {
    "suffix": (("",), "put the suffix into the prompt"),
    "logprobs": ((False,), _LOGPROBS),
}
CHAT = COMMON | {
    "logprobs": ((False,), _LOGPROBS),
    "top_logprobs": ((0,), _LOGPROBS),
    "tools": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "parallel_tool_calls": ((True, False), _TOOLS),
    "functions": (([],), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "response_format": (({"type": "text"},), "ask for the format in the prompt"),
    "modalities": ((["text"],), "text is the only modality"),
    "audio": ((), "text is the only modality"),
    "prediction": ((), "leave it out: it changes speed, not text"),
    "reasoning_effort": ((), "ask for it in the prompt"),
    "verbosity": ((), "ask for it in the prompt"),
    "store": ((False,), "keep the answers on your side"),
    "moderation": ((), "moderate on your side"),
    "web_search_options": ((), "put what you found into the prompt"),
}


def drop_unsupported(body: dict[str, Any], unsupported: dict[str, tuple[tuple, str]]) -> dict[str, Any]:
    """The body without labels and without unsupported fields that ask for nothing.

    Raises:
        APIError: one of them asks for something.
    """
    kept = {}
    for name, value in body.items():
        if name in LABELS:
            continue
        if name not in unsupported:
            kept[name] = value
            continue
        harmless, instead = unsupported[name]
        if value is not None and not any(_same(value, default) for default in harmless):
            raise APIError(
                400, f"{name}={value!r} is not supported: {instead}", param=name, code="unsupported_parameter"
            )
    return kept


def _same(value: Any, default: Any) -> bool:
    # 0 == False in Python; in JSON they are different answers to different questions.
    return value == default and isinstance(value, bool) == isinstance(default, bool)

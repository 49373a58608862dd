"""Answers in the shapes of the OpenAI API: whole, or in chunks. Knows text and token counts, no engine and no HTTP."""

import dataclasses
import time
import uuid
from typing import Any

from meshloom.serve.request import FinishReason, Usage


def usage_body(usage: Usage) -> dict[str, int]:
    return dataclasses.asdict(usage) | {"total_tokens": usage.total_tokens}


class TextReply:
    """POST /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str):
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice with which a stream begins, if any."""
        return None

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """A choice of a chunk."""
        return self.choice(index, text, reason)

    def choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        """A choice of a whole answer."""
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return self._head | {"object": self.whole_object, "choices": choices, "usage": usage_body(usage)}

    def chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        counts = {} if usage is None else {"usage": usage_body(usage)}
        return self._head | {"object": self.chunk_object, "choices": choices} | counts


class ChatReply(TextReply):
    """POST /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def choice(self, index: int, text: str, reason: FinishReason | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

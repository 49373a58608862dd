"""Bodies of the OpenAI API that this server honours, field by field; anything else is refused before it gets here.

`/v1/completions` and `/v1/chat/completions` after the public API reference, plus `top_k`, `min_p`, `stop_token_ids`
and `ignore_eos` as vLLM and others spell them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from meshloom.serve.request import SamplingParams

MAX_CHOICES = 128  # choices of one request: n times the prompts


class Body(BaseModel):
    """Strict: no unknown fields, no numbers in strings."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # padding of chunks against eavesdropping: not done


class Sampling(Body):
    """What both endpoints share. Ranges are those of the public API; `SamplingParams` checks the rest."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, max_tokens: int | None, choice: int) -> SamplingParams:
        """Parameters of the `choice`-th of n answers; a given seed makes each of them repeatable, and different."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),  # -1 is how vLLM spells "all"
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else (self.seed + choice + 2**63) % 2**64 - 2**63,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


TokenId = Annotated[int, Field(ge=0)]


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if self.prompt and isinstance(self.prompt[0], int) else list(self.prompt)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One message; its content as text, or as text parts, which are joined.

    The fields that may only be null are those of answers, so that a client can send an answer back as it came.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        # "developer" is what newer clients call "system"; templates know the older word.
        return {"role": "system" if self.role == "developer" else self.role, "content": content} | named


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

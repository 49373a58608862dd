"""What a caller asks for and what comes back: sampling fields, a request in tokens, its deltas and its completion.

Guarantees that every field was checked before it travels further (with the value seen in the message) and that no
prompt text exists past this point. Knows nothing of schedulers, arrays, HTTP or tokenizers.
"""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Literal

from meshloom.core.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_STOP_STRINGS = 16
SEED_LIMIT = 2**63


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Attributes:
        max_tokens: most tokens to generate; None = whatever the model's context leaves.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the most likely tokens whose mass reaches this share (Holtzman et al. 2020); 1 keeps all.
        top_k: keep this many most likely tokens (ties at the edge are all kept); 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one (Nguyen et al. 2024); 0 keeps all.
            Order: temperature, min_p, top_k, then top_p over what is left.
        seed: makes a request's draws repeatable whatever else runs beside it; None draws a fresh one.
        stop: strings (or one) that end the text; they are not part of it.
        stop_token_ids: further tokens that end the text like an end-of-sequence token.
        ignore_eos: keep going past the model's end-of-sequence tokens (benchmarks).
    """

    max_tokens: int | None = 128
    temperature: float | int = 0.0
    top_p: float | int = 1.0
    top_k: int = 0
    min_p: float | int = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | str = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # Callers may write 0 for 0.0, one string for a tuple of one, a list for a tuple: stored in one form.
        for name in ("temperature", "top_p", "min_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1; got {self.max_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError(f"temperature must lie in [0, 100]; got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p must lie in (0, 1]; got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise RequestError(f"top_k must be a number of tokens >= 1, or 0 for all; got {self.top_k}")
        if not 0.0 <= self.min_p <= 1.0:
            raise RequestError(f"min_p must lie in [0, 1]; got {self.min_p}")
        if self.seed is not None and not -SEED_LIMIT <= self.seed < SEED_LIMIT:
            raise RequestError(f"seed must be a 64-bit integer; got {self.seed}")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"at most {MAX_STOP_STRINGS} stop strings; got {len(self.stop)}")
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise RequestError(f"stop strings must be non-empty strings; got {list(self.stop)}")
        if any(token < 0 for token in self.stop_token_ids):
            raise RequestError(f"stop_token_ids must be >= 0; got {list(self.stop_token_ids)}")


@dataclasses.dataclass(frozen=True)
class Draw:
    """The numbers of `SamplingParams` that reach the device, one per row: floats and a seed as int32."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int

    @classmethod
    def of(cls, params: SamplingParams) -> "Draw":
        """Fold a 64-bit seed to 31 bits, or draw a fresh one."""
        seed = secrets.randbits(31) if params.seed is None else (params.seed ^ (params.seed >> 31)) & 0x7FFFFFFF
        return cls(params.temperature, params.top_p, params.top_k, params.min_p, seed)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt in tokens, and how to go on from it. `max_tokens` is settled: prompt and output fit the model."""

    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one step added to one request. The last delta carries `finish_reason`, and `error` when that is "error"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        text: generated text, without stop strings and special tokens.
        token_ids: every generated token, the one that ended the text included.
        finish_reason: "stop" (end-of-sequence, stop token or stop string), "length", or "abort".
        usage: token counts.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage

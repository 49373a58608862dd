"""What is asked of a plan: a training step's batch, or requests to serve and the times that they may take."""

import dataclasses

from meshloom.core.errors import ConfigError, ShardingError


@dataclasses.dataclass(frozen=True)
class TrainWorkload:
    """One optimizer step.

    Attributes:
        batch_tokens: tokens of the whole batch, over all devices and parts.
        sequence_length: tokens per row.
        dtype: of the computation.
        parameter_bytes, optimizer_bytes_per_parameter: master weights, and state beside them (AdamW: two float32).
        gradient_bytes: of one accumulated gradient.
        reduce_every_part: gradients are reduced over `data` after each part, as `train/step.py` does; False: once.
    """

    batch_tokens: int
    sequence_length: int
    dtype: str = "bfloat16"
    parameter_bytes: float | int = 4
    optimizer_bytes_per_parameter: float | int = 8
    gradient_bytes: float | int = 4
    reduce_every_part: bool = True

    def __post_init__(self) -> None:
        if self.sequence_length < 2 or self.batch_tokens < 1:
            raise ConfigError(
                f"a batch has at least one row of two tokens; got batch_tokens={self.batch_tokens}, "
                f"sequence_length={self.sequence_length}"
            )
        if self.batch_tokens % self.sequence_length:
            lower = self.batch_tokens // self.sequence_length * self.sequence_length
            upper = lower + self.sequence_length
            nearest = f"{lower} or {upper}" if lower else f"{upper}"
            raise ShardingError(
                f"batch_tokens={self.batch_tokens} is no whole number of rows of {self.sequence_length} tokens; "
                f"use {nearest}"
            )

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        return self.batch_tokens // self.sequence_length


@dataclasses.dataclass(frozen=True)
class ServeWorkload:
    """Requests of one kind and the times that they may take.

    Attributes:
        input_length, output_length: tokens of a prompt and of its answer.
        concurrency: requests that run at once over all replicas; None: as many as the times allow.
        ttft_s: most seconds to the first token. tpot_s: most seconds per further token.
    """

    input_length: int
    output_length: int
    concurrency: int | None = None
    ttft_s: float | int | None = None
    tpot_s: float | int | None = None

    def __post_init__(self) -> None:
        for name in ("input_length", "output_length", "concurrency", "ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be greater than 0; got {value}")
        if self.input_length < 2:
            raise ConfigError(f"input_length must be at least 2 tokens; got {self.input_length}")

"""What can be set about serving: the engine's sizes, the server, the chat and the benchmark.

The defaults run a small model on a laptop: 32 sequences, 0.5 GiB of cache, five programs. Imports neither jax nor a
web framework, so that a command line can show its help at once.
"""

import dataclasses
from typing import Literal

from meshloom.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine.

    Attributes:
        max_num_seqs: most sequences that advance in one step.
        buckets: token counts of the compiled step programs, ascending; a step is padded to the next one. The last is
            the token budget of a step: larger is faster on prompts and slower for streams that decode meanwhile.
        page_size: tokens per KV page.
        kv_cache_memory: GiB for keys and values of all layers; less is taken when the model cannot use it.
        num_pages: pages outright, instead of `kv_cache_memory`.
        cache_dtype: element type of the cache; "model" is that of the weights. int8 and float8_e4m3fn take half of
            bfloat16's memory, int4 a quarter, and 4 bytes for the scale of each token and kv head: so many more tokens
            fit `kv_cache_memory`. int8 loses least.
        max_model_len: longest prompt + output in tokens; None = the model's context, if the cache holds one such
            sequence, else what the cache holds.
    """

    max_num_seqs: int = 32
    buckets: tuple[int, ...] = (1, 8, 32, 128, 512)
    page_size: int = 16
    kv_cache_memory: float | int = 0.5
    num_pages: int | None = None
    cache_dtype: Literal["model", "float32", "bfloat16", "int8", "float8_e4m3fn", "int4"] = "model"
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache_memory", float(self.kv_cache_memory))
        object.__setattr__(self, "buckets", tuple(self.buckets))
        for name in ("max_num_seqs", "page_size", "num_pages", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; got {value}")
        if not self.buckets or self.buckets[0] < 1 or list(self.buckets) != sorted(set(self.buckets)):
            raise ConfigError(f"buckets must be ascending token counts >= 1; got {self.buckets}")
        if self.buckets[-1] < self.max_num_seqs:
            raise ConfigError(
                f"the largest bucket ({self.buckets[-1]} tokens) must hold one token of each of "
                f"max_num_seqs={self.max_num_seqs} sequences"
            )
        if self.kv_cache_memory <= 0:
            raise ConfigError(f"kv_cache_memory is a size in GiB > 0; got {self.kv_cache_memory}")

    @property
    def max_tokens_per_step(self) -> int:
        return self.buckets[-1]


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """The HTTP server.

    Attributes:
        host: address to listen on; 0.0.0.0 for every interface.
        port: port, or 0 for a free one.
        model_name: what clients call the model; None is the last part of MODEL on the command line, else "meshloom".
        api_key: asked for as a bearer token under /v1; None asks for none.
        drain_seconds: how long running answers may go on after an interrupt.
        engine: sizes of the engine.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key: str | None = None
    drain_seconds: int = 30
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie in 0..65535; got {self.port}")
        if self.drain_seconds < 0:
            raise ConfigError(f"drain_seconds must be >= 0; got {self.drain_seconds}")
        if self.model_name == "":
            raise ConfigError("model_name must not be empty")
        if self.api_key == "":
            raise ConfigError("api_key must not be empty; leave it out to ask for none")


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A chat in the terminal.

    Attributes:
        system: system message; None leaves it to the model's template.
        max_tokens: longest answer, in tokens; less when the context is nearly full.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the most likely tokens whose mass reaches this share; 1 keeps all.
        seed: makes answers repeatable; None draws a fresh one.
        kv_cache_memory: GiB of cache for the one conversation.
    """

    system: str | None = None
    max_tokens: int = 512
    temperature: float | int = 0.7
    top_p: float | int = 0.9
    seed: int | None = None
    kv_cache_memory: float | int = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1; got {self.max_tokens}")

    @property
    def engine(self) -> EngineConfig:
        """One sequence at a time needs few programs."""
        return EngineConfig(max_num_seqs=1, buckets=(1, 32, 256), kv_cache_memory=self.kv_cache_memory)


@dataclasses.dataclass(frozen=True)
class BenchServeConfig:
    """The serving benchmark.

    Attributes:
        model: what to load, as for `meshloom serve`.
        offline: call the engine in this process; the only way yet.
        requests: prompts, submitted at once; 1 measures a single stream.
        input_len: tokens per prompt.
        output_len: tokens per answer.
        seed: of the random prompts.
        engine: sizes of the engine.
    """

    model: str = "smollm2"
    offline: bool = True
    requests: int = 32
    input_len: int = 128
    output_len: int = 64
    seed: int = 0
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        for name in ("requests", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.offline:
            raise ConfigError("bench serve measures the engine in this process: --offline is the only way yet")

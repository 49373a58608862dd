"""What a training run is: one frozen configuration, whose defaults run on a laptop and whose fields are CLI flags.

Imports neither JAX nor Flax, so that `meshloom train --help` answers at once.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from meshloom.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """Sizes of a Llama-style decoder to train from scratch; used when no model is named.

    Attributes:
        d_model: width of the residual stream, in elements.
        n_layers: depth, in layers.
        n_heads: query heads per layer.
        n_kv_heads: key and value heads per layer; divides n_heads.
        head_dim: elements per head.
        d_ff: inner width of the gated MLP, in elements.
        tie_embeddings: unembed with the embedding table.
    """

    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 32
    d_ff: int = 768
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ConfigError(f"architecture.{name} must be at least 1; got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"architecture.n_kv_heads={self.n_kv_heads} must divide architecture.n_heads={self.n_heads}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        data: "stdlib" (the source of this Python's standard library), a folder or file of .txt, .md, .py or .jsonl
            (field "text"), or a Hugging Face dataset id.
        model: a preset (fresh weights), or a model whose weights to start from; None trains `architecture` afresh.
        architecture: sizes of the model when `model` is None.
        scan_layers: stack the layers and scan over them, so that compile time does not grow with depth.
        remat: what the backward pass recomputes to save memory: none, full (all), dots (all but matrix products).
        tokenizer: "auto" is that of the model, or one trained on the data if the model has none; "train"; or a folder.
        vocab_size: ids of a trained tokenizer, and of the model when `model` is None.
        sequence_length: tokens per row; documents are packed into rows and never see each other.
        batch_size: rows per optimizer step.
        accumulation: parts that a batch is computed in, one after the other; memory falls, the result stays.
        steps: optimizer steps.
        learning_rate: peak, per step.
        warmup_steps: steps of linear rise to the peak; None is a tenth of all steps, at most 100.
        schedule: after the warm-up, a cosine down to `final_lr_fraction` of the peak, or constant.
        final_lr_fraction: learning rate of the last step, as a fraction of the peak.
        weight_decay: decoupled decay (AdamW) of matrices; norms and biases do not decay.
        clip_norm: largest global norm of the gradient.
        beta1: decay of the mean of gradients, per step.
        beta2: decay of the mean of squared gradients, per step.
        dtype: type of the computation; weights and optimizer stay float32. auto is bfloat16.
        seed: of the weights and the data order.
        devices: "local" is what this machine has; "cpu:8" simulates 8 devices.
        mesh: axis sizes, as in "fsdp=4,tensor=2"; "auto" is what the planner predicts to be fastest.
        plan: file of `meshloom plan --out`, which says model, devices, mesh, remat, batch_size, accumulation and
            sequence_length; none of them may then be set to something else.
        executable: file of `meshloom plan --executable`, the step compiled before; refused unless it is this run's step
            for these devices. It can run code: load no file that you do not trust.
        run_dir: folder of the run; where it holds checkpoints, the run goes on from the newest.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        keep: newest checkpoints kept.
        log_every: steps between lines of metrics.jsonl.
    """

    data: str = "stdlib"
    model: str | None = None
    architecture: ArchitectureConfig = ArchitectureConfig()
    scan_layers: bool = True
    remat: Literal["none", "full", "dots"] = "none"
    tokenizer: str = "auto"
    vocab_size: int = 4096
    sequence_length: int = 256
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 300
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    devices: str = "local"
    mesh: str = "auto"
    plan: pathlib.Path | None = None
    executable: pathlib.Path | None = None
    run_dir: pathlib.Path = pathlib.Path("run")
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 1

    def __post_init__(self) -> None:
        counts = ("sequence_length", "batch_size", "accumulation", "steps", "checkpoint_every", "keep", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.vocab_size < 257:
            raise ConfigError(f"vocab_size must be at least 257 (256 bytes and the end of text); got {self.vocab_size}")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} rows cannot be computed in accumulation={self.accumulation} equal parts"
            )
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number; got {value}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"weight_decay must be 0 or more; got {self.weight_decay}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        if not 0 <= self.final_lr_fraction <= 1:
            raise ConfigError(f"final_lr_fraction must lie in [0, 1]; got {self.final_lr_fraction}")
        if self.warmup < 0 or (self.schedule == "cosine" and self.warmup > self.steps):
            raise ConfigError(f"warmup_steps must lie in 0..steps={self.steps}; got {self.warmup}")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"seed must lie in 0..2147483647; got {self.seed}")

    @property
    def warmup(self) -> int:
        """Steps of linear rise to the peak."""
        return min(100, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


# What may change between the parts of a run: where and how it is kept, and the mesh (another mesh adds in another
# order, so losses agree to rounding instead of bitwise). `dtype` is compared as what it stands for on the devices.
_FREE = {"checkpoint_every", "keep", "log_every", "run_dir", "devices", "mesh", "dtype", "executable"}


def continuity_errors(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields in which a run that goes on would not be the run that began, as "name: before -> now".

    Args:
        before, now: two `TrainConfig`s as plain dictionaries.
    """
    # With a cosine, or a warm-up that is a tenth of the steps, their number bends the learning rate of every step.
    fixed_rate = now["schedule"] == "constant" and now["warmup_steps"] is not None
    free = _FREE | ({"steps"} if fixed_rate else set())
    flat_before, flat_now = _flat(before), _flat(now)
    names = [name for name in flat_before | flat_now if name.split(".")[0] not in free]
    changed = [name for name in names if flat_before.get(name) != flat_now.get(name)]
    return [f"{name}: {flat_before.get(name)} -> {flat_now.get(name)}" for name in changed]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return result

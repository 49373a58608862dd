"""What a training run is: `TrainConfig`, whose defaults train a small model on a laptop in minutes.

Imports neither JAX nor Flax, so that `meshloom train --help` is instant. Values are checked here as far as they can be
without data, model or devices.
"""

import dataclasses
import pathlib
from typing import Any, Literal

from meshloom.core.config import to_dict
from meshloom.core.errors import ConfigError

# What may differ when a run goes on: none of it changes the data, the model or the update of any step.
FREE_TO_CHANGE = frozenset({"run", "devices", "mesh", "checkpoint_every", "keep", "log_every", "heldout_batches"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes that replace those of a preset; None keeps the preset's.

    Attributes:
        d_model: width of the residual stream, in elements.
        n_layers: number of layers.
        n_heads: number of query heads.
        n_kv_heads: number of key/value heads; divides n_heads.
        head_dim: elements per head.
        d_ff: inner width of the MLP, in elements.
    """

    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None

    def given(self) -> dict[str, int]:
        """The sizes that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Started again with the same folder, it goes on where it stopped.

    Attributes:
        data: "stdlib" (the source of this Python's standard library), a folder of .txt, .md, .py and .jsonl files, one
            such file, or a Hugging Face data set as "owner/name" or "owner/name:subset". JSON lines need a "text".
        model: a preset, trained from fresh weights, or anything with weights that `meshloom serve` takes, trained on.
        sizes: sizes that replace those of a preset.
        scan_layers: stack the layers and scan over them, so that compile time does not grow with depth.
        remat: what the backward pass recomputes to save memory: none, full (all), dots (all but matrix products).
        tokenizer: "auto" is the model's own if it has weights and else "train": a byte-level BPE learned from the data.
            Or a folder, Hugging Face id or model whose tokenizer is taken.
        vocab_size: tokens of a tokenizer that is trained; at least 257.
        run: folder of the run: checkpoints, metrics.jsonl, loss.png, tokenizer, meshloom.json.
        sequence_length: tokens per packed row.
        batch_size: rows per optimizer step, over all devices and accumulation steps.
        accumulation: micro-batches that one optimizer step adds up; divides batch_size.
        steps: optimizer steps of the whole run.
        learning_rate: peak learning rate.
        warmup_steps: steps over which the learning rate rises linearly to its peak; None is a tenth of all.
        schedule: what follows the warm-up: a cosine down to final_fraction, or the constant peak.
        final_fraction: learning rate at the end of the cosine, as a fraction of the peak.
        weight_decay: AdamW's decoupled decay per unit of learning rate; not on norms and biases.
        clip_norm: gradients with a larger global norm are scaled down to it.
        betas: AdamW's decay rates of the first and second moment.
        epsilon: AdamW's addend to the denominator.
        dtype: of the computation, over float32 master weights; auto is float32 on the CPU and bfloat16 elsewhere.
        scan_layers: compile one layer and scan over the stack (short compile), or unroll all layers.
        remat: what the backward pass computes again to save memory: nothing, whole layers, or all but matrix products.
        seed: of the fresh weights and of the order of the data.
        devices: "local" is what this machine has; "cpu:8" simulates 8 devices.
        mesh: axis sizes, as in "fsdp=4,tensor=2"; "auto" gives fsdp as many devices as divide the micro-batch and
            tensor the rest.
        checkpoint_every: steps between checkpoints; there is one at the end too.
        keep: newest checkpoints that stay on disk.
        log_every: steps between lines of metrics.jsonl.
        heldout_every: steps between measurements of the loss on held-out text: every 50th document, which is then not
            trained on. 0 trains on everything.
        heldout_batches: batches of one such measurement, at most.
    """

    data: str = "stdlib"
    model: str = "tiny"
    sizes: ModelSizes = ModelSizes()
    scan_layers: bool = True
    remat: Literal["none", "full", "dots"] = "none"
    tokenizer: str = "auto"
    vocab_size: int = 8192
    run: pathlib.Path = pathlib.Path("runs/train")
    sequence_length: int = 256
    batch_size: int = 8
    accumulation: int = 1
    steps: int = 300
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots"] = "none"
    seed: int = 0
    devices: str = "local"
    mesh: str = "auto"
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 1
    heldout_every: int = 0
    heldout_batches: int = 8

    def __post_init__(self):
        positive = ("batch_size", "accumulation", "steps", "checkpoint_every", "keep", "log_every", "heldout_batches")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("weight_decay", "heldout_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm", "epsilon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive; got {getattr(self, name)}")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length must be at least 2 tokens; got {self.sequence_length}")
        if self.vocab_size < 257:
            raise ConfigError(f"vocab_size must be at least 257: 256 bytes and the end of text; got {self.vocab_size}")
        if self.batch_size % self.accumulation:
            raise ConfigError(f"accumulation={self.accumulation} must divide batch_size={self.batch_size}")
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup_steps must lie in 0..{self.steps - 1} with steps={self.steps}; got {self.warmup}")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction must lie in [0, 1]; got {self.final_fraction}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1); got {self.betas}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0..{2**32 - 1}; got {self.seed}")

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises."""
        return self.steps // 10 if self.warmup_steps is None else self.warmup_steps

    @property
    def micro_batch(self) -> int:
        """Rows of one micro-batch, over all devices."""
        return self.batch_size // self.accumulation

    def breaks_continuity_with(self, recorded: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys whose change would make this another run: name -> (recorded value, value now).

        `recorded` is the configuration, as plain data, with which the run began. More steps are a longer run only when
        the schedule does not depend on their number.
        """
        now = to_dict(self)
        free = FREE_TO_CHANGE | ({"steps"} if self.schedule == "constant" else set())
        changed = {}
        for name in (*now, *(recorded.keys() - now.keys())):
            before, after = recorded.get(name), now.get(name)
            if name == "heldout_every":  # only whether text is held out changes what is trained on
                before, after = bool(before), bool(after)
            if name not in free and before != after:
                changed[name] = (recorded.get(name), now.get(name))
        return changed

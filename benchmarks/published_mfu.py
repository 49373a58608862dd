"""Predicted next to published utilisation of training runs: `python benchmarks/published_mfu.py`.

`--fit` prints, per chip, the one efficiency constant (`Chip.efficiency`) that makes the median error least. Each row
takes the published parallelism, batch and remat as they are; pipeline stages are priced here, as an explicit input:
a stage does its share of the layers, and P stages with M micro-batches and v chunks stand idle (P - 1) / (v M) of that.

Runs count FLOPs in different ways, so each row says how: `attention` "full" or "causal", and `recompute` if repeated
work counts as done.
"""

import argparse
import dataclasses
import functools
import statistics

import jax.numpy as jnp

from meshloom.core.hardware import CHIPS, Chip
from meshloom.core.topology import parse_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.sharding.planner import Traced, price_mesh, trace_model
from meshloom.sharding.workload import TrainWorkload


def maxtext(scale: int) -> DecoderConfig:
    """MaxText's model of `scale` billion parameters: heads and MLP, width, then depth double in turn."""
    base, rest = divmod(scale.bit_length() - 1, 3)
    wide, embed = 2 ** (base + (rest > 0)), 2 ** (base + (rest > 1))
    return _decoder(2048 * embed, 16 * 2**base, 16 * wide, 128, 7168 * wide, 32_000, gated=True)


def gpt(d_model: int, n_layers: int, n_heads: int) -> DecoderConfig:
    """A GPT-3-like model, as Megatron trains them."""
    return _decoder(d_model, n_layers, n_heads, d_model // n_heads, 4 * d_model, 51_200, gated=False)


def _decoder(d_model: int, layers: int, heads: int, head_dim: int, d_ff: int, vocab: int, *, gated: bool):
    sizes = {"d_model": d_model, "n_layers": layers, "n_heads": heads, "n_kv_heads": heads, "head_dim": head_dim}
    return DecoderConfig(vocab_size=vocab, d_ff=d_ff, gated=gated, context=8192, tie_embeddings=False, **sizes)


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run. `devices` are those of one pipeline stage; `rows` those of one replica's whole batch.

    `note`: what is assumed because the publication does not say it.
    """

    name: str
    model: DecoderConfig
    devices: str
    mesh: dict[str, int]
    rows: int
    length: int
    remat: str
    published: float
    attention: str = "full"
    microbatch: int | None = None
    stages: int = 1
    chunks: int = 1
    recompute: bool = False
    note: str = ""


ROWS = (
    Row("MaxText 32B, v5p-128", maxtext(32), "v5p:4x4x4", {"fsdp": 16, "tensor": 4}, 448, 2048, "dots", 0.7147),
    Row("MaxText 128B, v5p-256", maxtext(128), "v5p:4x4x8", {"fsdp": 16, "tensor": 8}, 128, 2048, "dots", 0.6868),
    Row("MaxText 512B, v5p-1024", maxtext(512), "v5p:8x8x8", {"fsdp": 64, "tensor": 8}, 1024, 2048, "full", 0.6399),
    Row(
        "MaxText 1024B, v5p-4096",
        maxtext(1024),
        "v5p:8x16x16",
        {"data": 16, "fsdp": 16, "tensor": 8},
        4096,
        2048,
        "full",
        0.648,
    ),
    Row("MaxText Llama2-70B, v5p-128", PRESETS["llama2-70b"], "v5p:4x4x4", {"fsdp": 64}, 256, 4096, "dots", 0.654),
    Row("MaxText 16B, v5e-256", maxtext(16), "v5e:16x16", {"fsdp": 256}, 1536, 2048, "full", 0.611),
    Row("MaxText 32B, v5e-256", maxtext(32), "v5e:16x16", {"fsdp": 256}, 1024, 2048, "full", 0.6686),
    Row("MaxText 64B, v5e-256", maxtext(64), "v5e:16x16", {"fsdp": 256}, 512, 2048, "full", 0.599),
    Row("MaxText 128B, v5e-256", maxtext(128), "v5e:16x16", {"fsdp": 16, "tensor": 16}, 256, 2048, "dots", 0.5606),
    Row(
        "MaxText 16B, 32 x v5e-256",
        maxtext(16),
        "32xv5e:16x16",
        {"data": 32, "fsdp": 256},
        49_152,
        2048,
        "full",
        0.5465,
    ),
    Row(
        "MaxText 128B, 32 x v5e-256",
        maxtext(128),
        "32xv5e:16x16",
        {"data": 32, "fsdp": 16, "tensor": 16},
        8192,
        2048,
        "dots",
        0.4625,
    ),
    Row(
        "MaxText Llama3.1-8B, v6e-256",
        PRESETS["llama3-8b"],
        "v6e:16x16",
        {"fsdp": 256},
        768,
        8192,
        "full",
        0.455,
        note="3 rows per device, full remat",
    ),
    Row(
        "MaxText Llama3.1-70B, v6e-256",
        PRESETS["llama3-70b"],
        "v6e:16x16",
        {"fsdp": 256},
        512,
        8192,
        "full",
        0.503,
    ),
    Row(
        "MaxText Llama3.1-405B, 2 x v6e-256",
        PRESETS["llama3-405b"],
        "2xv6e:16x16",
        {"fsdp": 128, "tensor": 4},
        512,
        8192,
        "full",
        0.386,
        note="saved arrays are offloaded there; priced as full remat",
    ),
    Row(
        "MaxText Mixtral-8x7B, v6e-256",
        PRESETS["mixtral-8x7b"],
        "v6e:16x16",
        {"fsdp": 256},
        3072,
        4096,
        "full",
        0.35,
    ),
    Row(
        "Megatron-LM 1T, 3,072 A100",
        gpt(25_600, 128, 160),
        "a100:6x8",
        {"data": 6, "tensor": 8},
        3072,
        2048,
        "full",
        0.52,
        microbatch=1,
        stages=64,
        recompute=True,
    ),
    Row(
        "MegaScale 175B, 12,288 A100",
        gpt(12_288, 96, 96),
        "a100:192x8",
        {"data": 192, "tensor": 8},
        6144,
        2048,
        "dots",
        0.552,
        microbatch=1,
        stages=8,
        chunks=6,
    ),
    Row(
        "Frontier 22B, MI250X",
        gpt(6144, 48, 48),
        "mi250x:4x8",
        {"data": 16, "tensor": 2},
        2048,
        2048,
        "full",
        0.384,
        microbatch=1,
        stages=8,
        recompute=True,
        note="tensor=2, 8 stages, 128 micro-batches",
    ),
    Row(
        "Frontier 175B, 1,024 MI250X",
        gpt(12_288, 96, 96),
        "mi250x:8x8",
        {"data": 16, "tensor": 4},
        10_240,
        2048,
        "full",
        0.361,
        microbatch=1,
        stages=16,
        recompute=True,
        note="640 micro-batches",
    ),
    Row(
        "Frontier 1T, 3,072 MI250X",
        gpt(25_600, 128, 160),
        "mi250x:6x8",
        {"data": 6, "tensor": 8},
        9600,
        2048,
        "full",
        0.32,
        microbatch=1,
        stages=64,
        recompute=True,
        note="1,600 micro-batches",
    ),
)


@functools.cache
def traced(model: DecoderConfig, length: int, remat: str) -> Traced:
    """One trace per model and policy."""

    def module_of(policy: str):
        return abstract_module(dataclasses.replace(model, scan_layers=True, remat=policy), jnp.float32)

    return trace_model(module_of, TrainWorkload(length, length), (remat,))


def predict(row: Row, chip: Chip) -> float:
    """Utilisation of one row, counted as the publication counts."""
    work = traced(row.model, row.length, row.remat)
    devices = parse_devices(row.devices)
    workload = TrainWorkload(row.rows * row.length, row.length, reduce_every_part=False)
    mesh = {axis: row.mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    candidates = list(price_mesh(work, devices, chip, mesh, workload, (row.remat,)))
    per_part = row.microbatch or max(each.microbatch for each in candidates)
    chosen = next(each for each in candidates if each.microbatch == per_part)
    seconds = chosen.step_time_s / row.stages * (1 + (row.stages - 1) / (row.chunks * chosen.parts))
    products = sum(amount for (group, _), amount in work.forward.flops.items() if group != "attention")
    model = row.model
    scores = 4 * model.n_layers * model.n_heads * model.head_dim * row.length**2 * work.forward.rows
    forward = products + scores * (1 if row.attention == "full" else 0.5)
    done = forward * (4 if row.recompute else 3) / work.forward.rows * row.rows
    return done / (seconds * chip.flops["bfloat16"] * devices.count * row.stages)


def fit(rows: list[Row], chip: Chip) -> float:
    """The efficiency, in hundredths, with the least median error over a chip's rows."""

    def error(hundredths: int) -> float:
        scaled = dataclasses.replace(chip, efficiency=hundredths / 100)
        return statistics.median(abs(predict(row, scaled) / row.published - 1) for row in rows)

    return min(range(20, 100), key=error) / 100


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="print the best constant of each chip")
    options = parser.parse_args()
    by_chip: dict[str, list[Row]] = {}
    for row in ROWS:
        by_chip.setdefault(parse_devices(row.devices).platform, []).append(row)
    errors = []
    print("| run | published | predicted | error | assumed |\n|---|---|---|---|---|")
    for name, rows in by_chip.items():
        chip = CHIPS[name]
        if options.fit:
            chip = dataclasses.replace(chip, efficiency=fit(rows, chip))
        for row in rows:
            predicted = predict(row, chip)
            errors.append(abs(predicted / row.published - 1))
            miss = " (miss)" if errors[-1] > 0.15 else ""
            print(f"| {row.name} | {row.published:.1%} | {predicted:.1%} | {errors[-1]:.1%}{miss} | {row.note} |")
        if options.fit:
            print(f"| efficiency of {name}: {chip.efficiency} | | | | |")
    print(f"\nmedian error {statistics.median(errors):.1%} over {len(errors)} rows")


if __name__ == "__main__":
    main()

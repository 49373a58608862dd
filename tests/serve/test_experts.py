"""A mixture of experts served over devices: each keeps its own experts, and plans price what then runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from meshloom.core.program_report import compile_and_report
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.serve.plan import lowered_steps, replica_axes, search
from meshloom.sharding.workload import ServeWorkload

CONFIG = DecoderConfig(
    vocab_size=64,
    d_model=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    d_ff=64,
    tie_embeddings=False,
    moe=MoEConfig(8, 2, 32),
)
WORKLOAD = ServeWorkload(16, 8)


@functools.cache
def candidates(config: DecoderConfig, devices: str, workload: ServeWorkload):
    module = abstract_module(dataclasses.replace(config, scan_layers=True), jnp.bfloat16)
    return search(module, parse_devices(devices), workload, limit=10_000)


def planned(config, devices, workload, axes, batch, weights):
    wanted = axes, batch, weights, "bfloat16"
    (found,) = [
        each
        for each in candidates(config, devices, workload)
        if (replica_axes(each.mesh), each.batch, each.weight_dtype, each.kv_dtype) == wanted
    ]
    return found


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_step_sums_what_the_plan_says_and_gathers_no_expert(weights):
    axes = {"expert": 4}
    found = planned(CONFIG, "v5e:2x2", WORKLOAD, axes, 4, weights)
    mesh = make_mesh(axes, jax.devices()[:4])
    steps = lowered_steps(CONFIG, mesh, found, WORKLOAD)
    for name in ("decode", "prefill"):
        _, report = compile_and_report(steps[name], axes)
        predicted = found.predicted_bytes(name)
        # CPUs add up bfloat16 in float32.
        assert report.bytes_by_kind == {kind: 2 * amount for kind, amount in predicted.items()}
        assert list(predicted) == ["all_reduce"]


def test_no_expert_is_gathered_beside_split_heads():
    axes = {"expert": 2, "tensor": 2}
    found = planned(CONFIG, "v5e:2x2", WORKLOAD, axes, 4, "bfloat16")
    decode = lowered_steps(CONFIG, make_mesh(axes, jax.devices()[:4]), found, WORKLOAD)["decode"]
    _, report = compile_and_report(decode, axes)
    one_layer = 3 * CONFIG.moe.n_experts * CONFIG.moe.d_ff * CONFIG.d_model * 2
    assert report.bytes_by_kind["all_gather"] < one_layer / 10  # logits, for the sampler
    assert not any("expert" in each.axes for each in report.collectives if each.kind == "all_gather")


def test_a_step_of_few_sequences_reads_few_experts():
    """Of Qwen3-30B-A3B's 128 experts in a layer one sequence reads 8, and 128 sequences nearly all."""
    workload = ServeWorkload(256, 64)

    def bytes_read(batch: int) -> float:
        step = planned(PRESETS["qwen3-30b-a3b"], "v5e:2x4", workload, {"expert": 8}, batch, "bfloat16").decode
        return next(group.bytes for group in step.groups if group.name == "weights")

    config = PRESETS["qwen3-30b-a3b"]
    experts = 3 * config.n_layers * config.moe.n_experts * config.moe.d_ff * config.d_model * 2 / 8
    idle = bytes_read(128) - bytes_read(1)
    assert idle == pytest.approx(experts * (120 / 128 - (120 / 128) ** 128))

"""Against experts: the derived layout beside the one that people write by hand, in the words of the real compilers.

The hand-written one is MaxText's logical axis rules for fully sharded, expert and tensor parallelism: `embed` over
fsdp and expert, but for that of experts (`embed_no_exp`), over fsdp; `heads`, `kv_heads`, `mlp` and `vocab` over
tensor; `expert` over expert; vectors and stacks whole; `activation_batch` over data, fsdp and expert, as batches lie in
every layout of ours. Both go through the same training step, so that only the layout differs.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.program_report import OutOfMemoryError, compile_and_report
from meshloom.core.topology import abstract_mesh, make_mesh, parse_devices
from meshloom.models.config import MoEConfig
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.sharding import Layout, derive
from meshloom.sharding.planner import plan_training
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig
from meshloom.train.optimizer import make_optimizer, make_schedule
from meshloom.train.step import abstract_batch, abstract_weights, lower_step, make_step
from tests.compilers import needs_cuda, needs_tpu

# Last part of a parameter's path -> logical axes of its dimensions without the stack of layers. Weights are [out, in].
LOGICAL = {
    "embed": ("vocab", "embed"),
    "unembed": ("vocab", "embed"),
    "q": ("heads", "embed"),
    "k": ("kv_heads", "embed"),
    "v": ("kv_heads", "embed"),
    "out": ("embed", "heads"),
    "gate": ("mlp", "embed"),
    "up": ("mlp", "embed"),
    "down": ("embed", "mlp"),
    "router": (None, "embed"),
}
TENSOR = ("heads", "kv_heads", "mlp", "vocab")

MODELS = {
    "llama3-8b": {"v5e:8x8": "fsdp=64", "v5p:4x4x4": "fsdp=64", "h100:8": "fsdp=8"},
    "llama3-70b": {"v5e:8x8": "fsdp=16,tensor=4", "v5p:4x4x4": "fsdp=16,tensor=4", "h100:8": "fsdp=2,tensor=4"},
    "mixtral-8x7b": {"v5e:8x8": "fsdp=8,expert=8", "v5p:4x4x4": "fsdp=16,expert=4", "h100:8": "fsdp=2,expert=4"},
}


@functools.cache
def module(name: str, **sizes: Any):
    return abstract_module(dataclasses.replace(PRESETS[name], scan_layers=True, remat="full", **sizes), jnp.float32)


def by_hand(layout: Layout) -> Layout:
    """The same parameters on the same mesh, split by the table above."""

    def relaid(row):
        stacked = row.name.startswith("layers.scanned")
        logical = LOGICAL.get(row.name.split(".")[-2], ())
        of_experts = len(row.shape) == 3 + stacked  # [experts, out, in]
        rules = dict.fromkeys(TENSOR, (("tensor",), "pair")) | {"expert": (("expert",), "pair")}
        rules["embed"] = (("fsdp",) if of_experts else ("fsdp", "expert")), "store"
        names = logical if len(row.shape) > 1 + stacked else ()
        names = (None,) * stacked + ("expert",) * of_experts + names
        names += (None,) * (len(row.shape) - len(names))
        choices, ways = [], 1
        for choice, name in zip(row.choices, names, strict=True):
            axes, rule = rules.get(name, ((), None))
            axes = tuple(axis for axis in axes if layout.mesh.shape.get(axis, 1) > 1)
            choices.append(dataclasses.replace(choice, axes=axes, rule=rule if axes else None))
            ways *= math.prod(layout.mesh.shape[axis] for axis in axes)
        return dataclasses.replace(row, choices=tuple(choices), bytes_per_device=row.bytes_total // ways)

    return dataclasses.replace(layout, rows=tuple(map(relaid, layout.rows)))


@pytest.mark.parametrize("model", ["llama3-8b", "llama3-70b"])
@pytest.mark.parametrize("mesh", ["fsdp=16,tensor=4", "fsdp=8,tensor=8", "data=4,fsdp=8,tensor=2"])
def test_with_a_tensor_axis_the_derived_layout_is_the_experts(model, mesh):
    layout = derive(module(model), abstract_mesh(mesh, 64), jax.ShapeDtypeStruct((64, 4096), jnp.int32))
    hand = by_hand(layout)
    assert {row.name: row.spec for row in layout.rows} == {row.name: row.spec for row in hand.rows}


def test_no_device_holds_more_of_mixtral_than_by_hand():
    for mesh in ("fsdp=8,expert=8", "fsdp=16,tensor=4", "fsdp=64"):
        layout = derive(module("mixtral-8x7b"), abstract_mesh(mesh, 64), jax.ShapeDtypeStruct((64, 4096), jnp.int32))
        assert layout.bytes_per_device <= by_hand(layout).bytes_per_device
        experts = [row for row in layout.rows if row.name.endswith(("gate.weight", "up.weight", "down.weight"))]
        if "expert" in mesh:
            assert all(row.spec[1] == "expert" for row in experts)


def figures(model: str, target: str, mesh: str, length: int, hand: bool, **sizes: Any) -> tuple[int, float | None]:
    """Peak memory and bytes sent per device of one training step, a row per device; no bytes where it does not fit."""
    where = parse_devices(target)
    abstract = module(model, **sizes)
    run = TrainConfig()
    optimizer = make_optimizer(run, abstract)
    rows = where.count
    layout = derive(abstract, make_mesh(mesh, target_devices(where)), jax.ShapeDtypeStruct((rows, length), jnp.int32))
    layout = by_hand(layout) if hand else layout
    step = make_step(abstract, optimizer, make_schedule(run), dtype=jnp.bfloat16, layout=layout)
    rows = layout.batch_ways
    lowered = lower_step(
        step,
        abstract_weights(abstract, optimizer, layout),
        abstract_batch(layout, accumulation=1, rows=rows, length=length),
        layout,
    )
    try:
        _, report = compile_and_report(lowered, dict(layout.mesh.shape), compiler_options(where))
    except OutOfMemoryError as error:
        return error.needed_bytes, None
    return report.peak_bytes, report.sent_bytes


def compare(model: str, target: str, mesh: str, length: int, **sizes: Any) -> None:
    ours = figures(model, target, mesh, length, hand=False, **sizes)
    hand = figures(model, target, mesh, length, hand=True, **sizes)
    print(
        f"\n{model} {target} {mesh}: memory {ours[0] / 2**30:.3f} of {hand[0] / 2**30:.3f} GiB by hand, "
        + (
            "does not fit"
            if ours[1] is None or hand[1] is None
            else f"sent {ours[1] / 1e9:.3f} of {hand[1] / 1e9:.3f} GB"
        )
    )
    assert ours[0] <= hand[0] * 1.001 + 2**17  # XLA's heap: a toy model of 36 MiB differs by 95 kB
    if ours[1] is not None and hand[1] is not None:
        assert ours[1] <= hand[1] * 1.001


needs = {"v": needs_tpu, "h": needs_cuda}


@needs["v"]
@pytest.mark.parametrize("mesh", [pytest.param("fsdp=4", marks=pytest.mark.slow), "fsdp=2,tensor=2"])
def test_a_small_llama_takes_no_more_than_by_hand(mesh):
    sizes = {"n_layers": 2, "d_model": 512, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128, "d_ff": 1408}
    compare("llama3-8b", "v5e:2x2", mesh, 512, vocab_size=4096, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "target", "mesh"),
    [
        pytest.param(model, target, mesh, marks=needs[target[0]])
        for model, meshes in MODELS.items()
        for target, mesh in meshes.items()
    ],
)
def test_the_derived_layout_takes_no_more_than_the_experts(model, target, mesh):
    compare(model, target, mesh, 4096)


@needs_tpu
@pytest.mark.slow
def test_a_mixture_of_experts_moves_what_is_predicted():
    """Weights are gathered as is said; rows of experts and their sums send what is said, by permutations here. XLA sums
    some small gradients whole."""
    sizes = {"n_layers": 2, "d_model": 512, "n_heads": 4, "n_kv_heads": 2, "head_dim": 128, "vocab_size": 4096}
    sizes |= {"d_ff": 1024, "moe": MoEConfig(n_experts=8, top_k=2, d_ff=1024)}
    mesh, length, where = "fsdp=4,expert=2", 512, parse_devices("v5e:2x4")
    workload = TrainWorkload(batch_tokens=8 * length, sequence_length=length)

    def module_of(remat: str):
        return abstract_module(
            dataclasses.replace(PRESETS["mixtral-8x7b"], scan_layers=True, remat=remat, **sizes), jnp.float32
        )

    (planned,) = [
        each for each in plan_training(module_of, where, workload, mesh=mesh, remats=["full"]) if each.parts == 1
    ]
    run, abstract = TrainConfig(), module_of("full")
    optimizer = make_optimizer(run, abstract)
    layout = derive(abstract, make_mesh(mesh, target_devices(where)), jax.ShapeDtypeStruct((8, length), jnp.int32))
    step = make_step(abstract, optimizer, make_schedule(run), dtype=jnp.bfloat16, layout=layout)
    lowered = lower_step(
        step,
        abstract_weights(abstract, optimizer, layout),
        abstract_batch(layout, accumulation=1, rows=8, length=length),
        layout,
    )
    _, report = compile_and_report(lowered, dict(layout.mesh.shape), compiler_options(where))
    of_experts = [each for each in planned.breakdown.collectives if each.axis == "expert"]
    predicted, compiled = planned.breakdown.bytes_by_kind, report.bytes_by_kind
    moved = sum(each.bytes for each in report.collectives if each.axes != ("expert",))
    assert moved == pytest.approx(sum(predicted.values()) - sum(each.bytes for each in of_experts), rel=0.1)
    rows = sum(each.bytes for each in of_experts if each.kind == "all_gather")
    assert compiled["all_gather"] == pytest.approx(predicted["all_gather"] - rows, rel=0.1)
    share = {"all_gather": 1 / 2, "reduce_scatter": 1, "all_reduce": 1}  # of its result, that one of two devices sends
    said = sum(each.bytes * share[each.kind] for each in of_experts)
    found = [each for each in report.collectives if each.axes == ("expert",)]
    print(f"gathered {predicted['all_gather'] - rows:,.0f} -> {compiled['all_gather']:,.0f} bytes of weights")
    print(f"sent {said:,.0f} -> {sum(each.sent for each in found):,.0f} bytes of rows and sums of experts")
    assert sum(each.sent for each in found) == pytest.approx(said, rel=0.01)
    assert {each.kind for each in found} >= {"collective_permute"}


def test_the_hand_written_specs_are_those_of_maxtext():
    layout = derive(
        module("llama3-8b"), abstract_mesh("fsdp=16,tensor=4", 64), jax.ShapeDtypeStruct((64, 128), jnp.int32)
    )
    specs = {row.name: row.spec for row in by_hand(layout).rows}
    assert specs["layers.scanned.0.mlp.down.weight"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs["embed.weight"] == PartitionSpec("tensor", "fsdp")
    assert specs["final_norm.weight"] == PartitionSpec(None)

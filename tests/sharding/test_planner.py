"""Plans: what is searched, what fits, what moves when devices and batches grow, and what is refused."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.topology import parse_devices
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.sharding.charts import cost_table, save_chart
from meshloom.sharding.cheapest import RequestKind, Slo, cheapest, solve
from meshloom.sharding.planner import meshes, plan_training
from meshloom.sharding.serving import plan_serving
from meshloom.sharding.workload import ServeWorkload, TrainWorkload


@functools.cache
def module(name: str, remat: str = "none") -> nnx.Module:
    return abstract_module(dataclasses.replace(PRESETS[name], scan_layers=True, remat=remat), jnp.float32)


def plan(name: str, devices: str, tokens: int, length: int, **options):
    workload = TrainWorkload(tokens, length)
    return plan_training(functools.partial(module, name), parse_devices(devices), workload, **options)


def test_llama_405b_gets_a_plan_that_fits_1024_v5p():
    best = plan("llama3-405b", "v5p:8x8x16", 2**23, 8192)[0]
    assert best.fits
    assert math.prod(best.mesh.values()) == 1024
    assert best.microbatch * best.parts * best.mesh["data"] * best.mesh["fsdp"] == 1024
    assert 0 < best.mfu < 1


@given(st.integers(1, 96))
def test_every_mesh_uses_every_device_once(count):
    found = [tuple(mesh.items()) for mesh in meshes(count, experts=True)]
    assert len(set(found)) == len(found)
    assert all(math.prod(dict(mesh).values()) == count for mesh in found)


def test_1024_devices_have_66_meshes_and_286_with_experts():
    assert len(list(meshes(1024, experts=False))) == 66
    assert len(list(meshes(1024, experts=True))) == 286


def test_rows_are_cut_while_a_device_keeps_two_whole_chunks_of_enough_tokens():
    def contexts(length: int) -> set[int]:
        return {mesh["context"] for mesh in meshes(16, experts=False, length=length)}

    assert contexts(1024) == {1}
    assert contexts(4096) == {1, 2, 4}
    assert contexts(2**20) == {1, 2, 4, 8, 16}
    assert contexts(4098) == {1}


def test_one_row_on_many_devices_is_a_ring():
    best = plan("llama3-8b", "v5p:2x2x4", 2**17, 2**17)[0]
    assert best.fits
    assert best.mesh["context"] > 1
    assert best.mesh["data"] == best.mesh["fsdp"] == 1


def test_a_ring_sends_keys_and_values_once_a_pass_and_their_gradients_back():
    """Llama-3-8B, a row of 32,768 tokens a device: 2 x 8 heads x 128 numbers of bfloat16 a token, 32 layers."""
    (best, *_) = plan("llama3-8b", "v5p:2x2x4", 2**17, 2**15, mesh="fsdp=4,context=4", remats=("full",))
    held = 2**15 // 4 * 2 * 8 * 128 * 2
    assert best.breakdown.bytes_by_kind["collective_permute"] == 32 * held * (3 * 3 + 4 * 2)
    gradients = {each.axis: each.bytes for each in best.breakdown.collectives if each.purpose == "gradients"}
    norms, looked_up = 65 * 4096, 128_256 * 4096
    assert gradients["fsdp+context"] == (8_030_261_248 - norms - looked_up) * 2 / 16
    assert gradients["fsdp"] == gradients["context"] == norms * 2


def test_a_model_that_fsdp_alone_cannot_hold_is_stored_over_context_as_well():
    """Rows of 131,072 tokens, one for each 8 chips of 15.75 GiB."""
    best = plan("llama3-8b", "v5e:8x8", 2**20, 2**17)[0]
    assert best.fits
    assert best.mesh["context"] > 1


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_more_rows_at_once_take_more_memory_and_recomputation_less(fsdp, microbatch):
    mesh = {"fsdp": fsdp}
    found = plan("tiny", f"h100:{fsdp}", 8 * fsdp * 256, 256, mesh=mesh, limit=100)
    memory = {(each.remat, each.microbatch): each.memory.total for each in found}
    assert memory["none", microbatch] < memory["none", 2 * microbatch]
    assert memory["full", microbatch] <= memory["dots", microbatch] <= memory["none", microbatch]


def test_json_has_the_documented_keys():
    entry = plan("tiny", "h100:8", 2**15, 256)[0].to_json()
    assert {"mesh", "remat", "microbatch", "step_time_s", "mfu", "hbm_bytes", "fits"} <= entry.keys()
    assert all(amounts.keys() == {"predicted_bytes", "compiled_bytes"} for amounts in entry["collectives"].values())


def test_a_batch_that_divides_nowhere_is_refused_with_one_that_does():
    with pytest.raises(ShardingError, match="use 256 or 512"):
        TrainWorkload(300, 256)
    with pytest.raises(ShardingError, match="use a batch of"):
        plan("tiny", "h100:8", 3 * 256, 256, mesh={"fsdp": 8})
    with pytest.raises(ShardingError, match="needs 4 devices; there are 8"):
        plan("tiny", "h100:8", 2**15, 256, mesh={"fsdp": 4})


def test_serving_meets_its_targets_or_says_so():
    best = plan_serving(module("llama3-8b"), parse_devices("h100:8"), ServeWorkload(512, 128, ttft_s=1, tpot_s=0.05))[0]
    assert best.fits
    assert best.meets_targets
    assert best.tpot_s <= 0.05
    never = plan_serving(module("llama3-8b"), parse_devices("h100:8"), ServeWorkload(512, 128, tpot_s=1e-6))
    assert not any(each.meets_targets for each in never)


def test_a_model_larger_than_the_devices_is_refused():
    with pytest.raises(ShardingError, match="use more devices"):
        plan_serving(module("llama3-405b"), parse_devices("v5e:2x2"), ServeWorkload(512, 128))


def test_mixed_types_are_cheapest_when_each_is_best_at_something():
    # Offer a serves kind 0 well, b kind 1; one of each costs 3, two of either alone cannot do both for less.
    bought = solve(np.array([[10.0, 1.0], [1.0, 10.0]]), np.array([10.0, 10.0]), np.array([1.0, 2.0]), ["a", "b"])
    assert bought.counts == {"a": 1, "b": 1}
    assert bought.cost_per_hour == 3


def test_a_purchase_serves_every_kind_in_full():
    mix = [RequestKind(512, 128, 20), RequestKind(2048, 128, 5)]
    bought = cheapest(module("llama3-8b"), mix, Slo(2, 0.1), ["v5e:2x4", "h100:1"], {"v5e": 1.2, "h100": 8})
    assert bought.cost_per_hour > 0
    assert all(sum(share.values()) == pytest.approx(1) for share in bought.shares)
    with pytest.raises(ConfigError, match="unknown chip"):
        cheapest(module("llama3-8b"), mix, Slo(2, 0.1), ["v9:2x4"])


def test_the_table_and_the_picture_show_a_plan(tmp_path):
    found = plan("tiny", "h100:8", 2**15, 256, limit=3)
    assert cost_table(found[0]).row_count > 5
    save_chart(found, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")

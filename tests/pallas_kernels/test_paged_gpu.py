"""The GPU's kernel over pages means what the reference says: simulated with races, compiled and chosen for Hopper."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import KVPages, paged_attention
from meshloom.pallas_kernels.attention import PAGED_ATTENTION
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_cases import PagedCase
from meshloom.pallas_kernels.attention.paged_mosaic_gpu import paged_attention_hopper
from meshloom.pallas_kernels.attention.reference import paged_attention_reference
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import Target, explain
from tests.compilers import needs_cuda
from tests.pallas_kernels.simulated_gpu import simulated_gpu

HOPPER = Target("gpu", "NVIDIA H100 80GB HBM3")
# What no token was written to is NaN: a kernel that reads it shows.
OF_ITS_SIZES = {"head_dim": 128, "page_size": 16, "element": "bfloat16", "dtype": "bfloat16", "unwritten": float("nan")}
QUICK = PagedCase((5, 70), (1, 9), heads=2, kv_heads=1, padding=1, **OF_ITS_SIZES)
CASES = {
    "decode": (PagedCase((5, 130, 64), (1, 1, 1), padding=0, **OF_ITS_SIZES), {}),
    "decode_in_splits": (PagedCase((900, 3), (1, 1), heads=2, kv_heads=1, padding=0, **OF_ITS_SIZES), {"window": 700}),
    "mixed": (PagedCase((5, 40, 130, 70), (1, 40, 1, 9), **OF_ITS_SIZES), {"window": 33, "soft_cap": 3.0}),
    "two_warpgroups": (PagedCase((200, 3), (150, 3), heads=3, kv_heads=1, **OF_ITS_SIZES), {"sinks": True}),
    "pages_longer_than_a_block": (PagedCase((300,), (2,), **OF_ITS_SIZES | {"page_size": 128}), {}),
    "no_rows_in_any": (PagedCase((3,), (0,), **OF_ITS_SIZES), {}),
}


def assert_right(case: PagedCase, sinks: bool = False, **options) -> np.ndarray:
    """The kernel's rows are those of the reference, which computes in float32, and zeros behind."""
    q, k, v, pages, ragged = case.step()
    pages = jax.jit(KVPages.write)(pages, k, v, ragged)
    scoring = PagedScoring(case.head_dim**-0.5, **options)
    values = jnp.linspace(-2, 2, case.heads) if sinks else None
    exact = jax.jit(lambda q, pages: paged_attention_reference(q, pages, ragged, scoring, values))
    with simulated_gpu():
        run = jax.jit(lambda q, pages, ragged: paged_attention_hopper(q, pages, ragged, scoring, values))
        got = np.asarray(run(q, pages, ragged), np.float32)
    rows = sum(case.counts)
    # Weights and results are rounded to 8 bits: one part in 256 each, of values up to about 3.
    np.testing.assert_allclose(got[:rows], exact(q.astype(jnp.float32), pages)[:rows], atol=2 * 3 / 256)
    assert np.all(got[rows:] == 0)
    return got


def test_decode_and_prefill_in_one_step_equal_the_reference_and_nothing_races():
    assert_right(QUICK, window=40, soft_cap=3.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_equals_the_reference_and_nothing_races(name):
    case, options = CASES[name]
    assert_right(case, **options)


@pytest.mark.slow
def test_twice_the_same_bits():
    case, options = CASES["decode_in_splits"]
    np.testing.assert_array_equal(assert_right(case, **options), assert_right(case, **options))


def test_the_table_says_why_not():
    spec = PagedSpec((64, 32, 128), 8, (512, 1, 128, 128), "bfloat16", 64, 128, "bfloat16", None, False)

    def reason(target=HOPPER, **changes):
        table = explain(PAGED_ATTENTION, dataclasses.replace(spec, **changes), target)
        return next(row.reason for row in table if row.name == "mosaic_gpu")

    assert reason() is None
    assert "wgmma, which Hopper has and NVIDIA A100-SXM4-80GB has not" in reason(Target("gpu", "NVIDIA A100-SXM4-80GB"))
    assert "it runs on Hopper GPUs, not on tpu" in reason(Target("tpu", "TPU v6 lite"))
    assert "got bfloat16 and a cache in int8" in reason(element="int8")
    assert "got float32 and a cache in bfloat16" in reason(dtype="float32")
    assert "head sizes are 64 and 128" in reason(q_shape=(64, 32, 80), pages_shape=(512, 1, 128, 80))
    assert "pages of 4 tokens" in reason(pages_shape=(512, 1, 32, 128))
    assert "pages of 48 tokens" in reason(pages_shape=(512, 1, 384, 128))
    assert "128 query heads read one kv head" in reason(q_shape=(64, 1024, 128))
    assert "a bias by distance" in reason(distance_bias=True)
    assert "in 2 shard(s), for 1 device(s)" in reason(pages_shape=(512, 2, 64, 128))


def compiled_for(chip: str, axes: str, case: PagedCase, **options):
    """`paged_attention`, which writes the step's rows first, with the cache donated."""
    where = parse_devices(chip)
    mesh = make_mesh(axes, target_devices(where))
    heads = jax.P(None, "tensor") if "tensor" in axes else jax.P()

    def placed(x):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.NamedSharding(mesh, heads if x.ndim > 2 else jax.P())
        )

    def step(q, k, v, pages, ragged):
        return paged_attention(q, k, v, pages, ragged, **options)

    arguments = jax.tree.map(placed, jax.eval_shape(case.step))
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=3).lower(*arguments).compile(compiler_options(where))


LONG = {"heads": 32, "kv_heads": 8, **OF_ITS_SIZES}


@needs_cuda
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (PagedCase((100,) * 32, (1,) * 32, padding=0, **LONG), {}),
        (PagedCase((1000,) * 2, (1,) * 2, padding=0, **LONG), {"window": 2000}),
        (PagedCase((200, 300, 100), (1, 300, 1), **LONG), {"soft_cap": 30.0}),
    ],
    ids=["decode", "splits", "mixed"],
)
def test_hopper_compiles_it_nothing_spills_and_the_cache_is_not_copied(case, options, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled = compiled_for("h100:1", "fsdp=1", case, **options)
    (report,) = [each.read_text(errors="replace") for each in tmp_path.glob("*.ptxas")]
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert "serialized" not in report
    pages = ",".join(map(str, jax.eval_shape(case.step)[3].k.shape))
    assert re.search(rf"bf16\[{pages}\]\S* parameter", compiled.as_text())
    assert not re.search(rf"bf16\[{pages}\]\S* (copy|transpose)\(", compiled.as_text())


@needs_cuda
def test_on_a_mesh_every_device_has_its_heads():
    case = PagedCase((100,) * 32, (1,) * 32, padding=0, shards=2, **LONG)
    text = compiled_for("h100:2", "tensor=2", case).as_text()
    assert "paged_attention" in text
    assert "bf16[32,4,8,128]" in text  # half of the kv heads, four query heads of each and as many to fill up


@needs_cuda
def test_ampere_takes_xla():
    text = compiled_for("a100:1", "fsdp=1", PagedCase((100,) * 4, (1,) * 4, padding=0, **LONG)).as_text()
    assert "mosaic_gpu" not in text

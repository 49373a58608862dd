"""The GPU's grouped products mean what the reference says: simulated with races, compiled and chosen for Hopper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import grouped_matmul, routed_experts
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.cases import GROUPED_CASES, GroupedCase
from meshloom.pallas_kernels.matmul.grouped import GROUPED_MATMUL, GroupedSpec
from meshloom.pallas_kernels.matmul.grouped import mosaic_gpu as kernel
from meshloom.pallas_kernels.matmul.grouped.reference import REFERENCE
from tests.compilers import needs_cuda
from tests.pallas_kernels.simulated_gpu import simulated_gpu

HOPPER = Target("gpu", "NVIDIA H100 80GB HBM3")


def of_its_sizes(case: GroupedCase) -> GroupedCase:
    sides = {"contracted": 64 * -(-case.contracted // 64), "columns": 64 * -(-case.columns // 64)}
    return dataclasses.replace(case, dtype="bfloat16", **sides)


QUICK = GroupedCase("quick", (70, 0, 3), rows=90, contracted=64, columns=64, dtype="bfloat16")
SLOW = (
    GroupedCase("wide", (100, 3, 0, 25, 130), rows=270, contracted=128, columns=320, dtype="bfloat16"),
    GroupedCase("wide_plain", (1, 140), rows=141, contracted=320, columns=192, dtype="float16", transposed=False),
    *(of_its_sizes(case) for case in GROUPED_CASES if not case.quantized and case.columns < 1000),
)


def arrays_of(case: GroupedCase) -> tuple:
    """x, w, group sizes and the gradient of the result. Rows of no group are NaN, which must not be read."""
    x, w, sizes = case.arrays()
    used = jnp.arange(case.rows)[:, None] < jnp.sum(sizes)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.columns)), case.dtype)
    return jnp.where(used, x, jnp.nan), w, sizes, jnp.where(used, dy, jnp.nan)


def assert_product(case: GroupedCase) -> np.ndarray:
    """The kernel's rows are the reference's, whose float32 sums are rounded once."""
    x, w, sizes, _ = arrays_of(case)
    with simulated_gpu():
        run = jax.jit(lambda x, w, sizes: kernel.product(x, w, sizes, case.transposed, HOPPER))
        got = np.asarray(run(x, w, sizes), np.float32)
    want = np.asarray(REFERENCE.product(x, w, sizes, case.transposed, HOPPER), np.float32)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-3)
    return got


def assert_outer(case: GroupedCase) -> np.ndarray:
    x, w, sizes, dy = arrays_of(case)
    a, b = (dy, x) if case.transposed else (x, dy)
    with simulated_gpu():
        run = jax.jit(lambda a, b, sizes: kernel.outer(a, b, sizes, w.dtype, HOPPER))
        got = np.asarray(run(a, b, sizes), np.float32)
    want = np.asarray(REFERENCE.outer(a, b, sizes, w.dtype, HOPPER), np.float32)
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-3)
    return got


@pytest.mark.parametrize("check", [assert_product, assert_outer])
def test_both_products_equal_the_references_and_nothing_races(check):
    check(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
@pytest.mark.parametrize("check", [assert_product, assert_outer])
def test_every_case_equals_the_reference_and_nothing_races(case, check):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("check", [assert_product, assert_outer])
def test_twice_the_same_bits(check):
    np.testing.assert_array_equal(check(SLOW[0]), check(SLOW[0]))


def test_the_table_says_why_not():
    spec = GroupedSpec(512, 8, 1024, 2048, "bfloat16", "bfloat16", True, False)

    def reason(target=HOPPER, **changes):
        table = explain(GROUPED_MATMUL, dataclasses.replace(spec, **changes), target)
        return next(row.reason for row in table if row.name == "mosaic_gpu")

    assert reason() is None
    assert "wgmma, which Hopper has and NVIDIA A100-SXM4-80GB has not" in reason(Target("gpu", "NVIDIA A100-SXM4-80GB"))
    assert "it runs on Hopper GPUs, not on tpu" in reason(Target("tpu", "TPU v6 lite"))
    assert "inside shard_map" in reason(spread=True)
    assert "got bfloat16 and int8" in reason(weight="int8")
    assert "got float32 and float32" in reason(x="float32", weight="float32")
    assert "nothing to multiply" in reason(rows=0)
    assert "sides of 1000 and 2048 are no multiples of 64" in reason(contracted=1000)


def compiled_for(chip: str, transposed: bool) -> str:
    """`grouped_matmul` with both gradients."""
    where = parse_devices(chip)
    whole = jax.NamedSharding(make_mesh("fsdp=1", target_devices(where)), jax.P())

    def abstract(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def both(x, w, sizes):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, transposed=transposed), x, w)
        return out, pull(out)

    sides = (512, 192) if transposed else (192, 512)
    arguments = abstract(500, 192), abstract(8, *sides), abstract(8, dtype=jnp.int32)
    with jax.set_mesh(whole.mesh):
        return jax.jit(both).lower(*arguments).compile(compiler_options(where)).as_text()


@needs_cuda
@pytest.mark.parametrize("transposed", [True, False])
def test_hopper_compiles_it_nothing_spills_and_no_product_waits_for_another(transposed, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    text = compiled_for("h100:1", transposed)
    assert "grouped_matmul" in text
    assert "grouped_outer" in text
    reports = [each.read_text(errors="replace") for each in tmp_path.glob("*.ptxas")]
    assert len(reports) == 3
    for report in reports:
        assert "0 bytes spill stores, 0 bytes spill loads" in report
        assert "serialized" not in report


@needs_cuda
def test_experts_over_a_mesh_take_the_kernel_with_both_gradients():
    where = parse_devices("h100:4")
    mesh = make_mesh("expert=2,tensor=2", target_devices(where))

    def abstract(*shape, spec=(), dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    def loss(x, weights, gate, up, down, chosen):
        return jnp.sum(routed_experts(x, weights, chosen, gate, up, down, activation=jax.nn.silu).astype(jnp.float32))

    up, down = abstract(8, 256, 128, spec=("expert", "tensor")), abstract(8, 128, 256, spec=("expert", None, "tensor"))
    arguments = abstract(64, 128), abstract(64, 2, dtype=jnp.float32), up, up, down, abstract(64, 2, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4))).lower(*arguments)
        text = lowered.compile(compiler_options(where)).as_text()
    assert "grouped_matmul" in text
    assert "grouped_outer" in text


@needs_cuda
def test_ampere_takes_xla():
    assert "mosaic_gpu" not in compiled_for("a100:1", True)

"""A product with paged adapters gives each row its own adapter and nothing of another's, in values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from meshloom.core.ahead import target_devices
from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import LoraPages, lora_matmul
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.cases import LORA_CASES, LoraCase
from meshloom.pallas_kernels.matmul.lora import LORA_MATMUL, LoraSpec, mosaic_tpu
from tests.compilers import needs_tpu


def named(name: str) -> LoraCase:
    return next(case for case in LORA_CASES if case.name == name)


@functools.partial(jax.jit, static_argnames="implementation")
def run(x, a, b, lora, adapters, weight, implementation):
    """The product, and the gradients of a weighted sum of it by x and both kinds of pages, float32."""

    def product(x, a, b):
        pages = LoraPages(a, b, lora.table, lora.ranks, lora.scales)
        return lora_matmul(x, pages, adapters, implementation=implementation)

    out, pull = jax.vjp(product, x, a, b)
    return [each.astype(jnp.float32) for each in (out, *pull(weight.astype(out.dtype)))]


def weight_of(case: LoraCase) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.columns)), case.dtype)


def values_and_gradients(case: LoraCase, implementation: str, dtype=None) -> list[np.ndarray]:
    x, lora, adapters = case.arrays()
    x, a, b = (each.astype(dtype or each.dtype) for each in (x, lora.a, lora.b))
    return [np.asarray(each) for each in run(x, a, b, lora, adapters, weight_of(case), implementation)]


@jax.jit
def naive(x, lora, adapters, weight):
    """The same in the dtype of x, row by row, with a copy of each row's own matrices."""
    count, most_rank = lora.table.shape
    there = (adapters >= 0) & (adapters < count)
    at = jnp.where(there, adapters, 0)
    owned = there[:, None] & (jnp.arange(most_rank) < lora.ranks[at][:, None])
    ids = jnp.where(owned, lora.table[at], 0)

    def product(x, a, b):
        own_a, own_b = (jnp.where(owned[..., None], each[ids], 0) for each in (a, b))
        narrow = jnp.einsum("mk,mrk->mr", x, own_a) * lora.scales[at][:, None].astype(x.dtype)
        return jnp.einsum("mr,mrn->mn", narrow, own_b)

    out, pull = jax.vjp(product, x, lora.a, lora.b)
    return [each.astype(jnp.float32) for each in (out, *pull(weight))]


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_errors_are_at_most_twice_those_of_a_naive_product(case):
    exact = values_and_gradients(case, "reference", jnp.float32)
    got = values_and_gradients(case, "by_adapter")
    for one, two, low in zip(exact, got, naive(*case.arrays(), weight_of(case)), strict=True):
        assert np.isfinite(two).all()
        assert np.abs(two - one).max() <= 2 * np.abs(low - one).max() + 1e-5 * (1 + np.abs(one).max())


def test_one_adapter_is_the_plain_low_rank_product():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 10), (3, 10), (12, 3)))
    lora = LoraPages.empty(5, 10, 12, adapters=2, most_rank=4).load(1, jnp.array([4, 0, 2]), a, b, alpha=6)
    out = lora_matmul(x, lora, jnp.ones(6, jnp.int32))
    np.testing.assert_allclose(out, 2 * x @ a.T @ b.T, rtol=1e-5, atol=1e-4)
    assert not np.any(lora_matmul(x, lora, jnp.zeros(6, jnp.int32)))


@pytest.mark.parametrize("implementation", ["reference", "by_adapter"])
def test_rows_without_an_adapter_are_zero_whatever_they_hold(implementation):
    case = named("some_rows_have_none")
    x, lora, adapters = case.arrays()
    x = jnp.where((adapters >= 0)[:, None], x, jnp.nan)
    out = np.asarray(lora_matmul(x, lora, adapters, implementation=implementation))
    assert not np.any(out[np.asarray(adapters) < 0])
    assert np.all(np.any(out[np.asarray(adapters) >= 0], axis=1))


def test_pages_of_adapters_that_no_row_uses_get_no_gradient():
    case = named("more_adapters_than_rows")
    _, lora, adapters = case.arrays()
    _, _, da, db = values_and_gradients(case, "by_adapter")
    used = np.unique(np.asarray(lora.table)[[a for a in np.unique(adapters) if a >= 0]])
    others = np.setdiff1d(np.arange(case.pages), used)
    for gradient in (da, db):
        assert np.all(np.any(gradient[used], axis=1))
        assert not np.any(gradient[others])


def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_pages_lie():
    case = named("ranks_differ")
    x, lora, adapters = case.arrays()
    whole = np.asarray(lora_matmul(x, lora, adapters))
    order = np.random.default_rng(3).permutation(case.rows)
    np.testing.assert_array_equal(lora_matmul(x[order], lora, adapters[order]), whole[order])
    moved = np.random.default_rng(4).permutation(case.pages)
    back = jnp.asarray(np.argsort(moved), jnp.int32)
    table = jnp.where(lora.table >= 0, back[lora.table], lora.table)
    elsewhere = LoraPages(lora.a[moved], lora.b[moved], table, lora.ranks, lora.scales)
    np.testing.assert_array_equal(lora_matmul(x, elsewhere, adapters), whole)


@settings(max_examples=12, deadline=None)
@given(adapters=st.lists(st.integers(-2, 5), min_size=9, max_size=9), rank=st.integers(1, 6))
def test_any_adapters(adapters, rank):
    case = LoraCase("any", (6, rank, 1, 2), tuple(adapters), rows=9)
    one, two = (values_and_gradients(case, name) for name in ("reference", "by_adapter"))
    for exact, got in zip(one, two, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


# -- the kernel for TPUs --


def of_lanes(case: LoraCase) -> LoraCase:
    """The same with features that fill whole registers, so that the kernel takes them."""
    return dataclasses.replace(case, contracted=128, columns=384)


# Tiles that adapters share, and one adapter over several.
SHARED = LoraCase("tiles_shared", (3, 8, 0, 5), (0,) * 13 + (1,) * 40 + (3, -1, 2), rows=56)
KERNEL_CASES = [
    *(pytest.param(of_lanes(case), marks=pytest.mark.slow, id=f"{case.name}-{case.dtype}") for case in LORA_CASES),
    pytest.param(of_lanes(dataclasses.replace(SHARED, dtype="float32")), marks=pytest.mark.slow, id="float32"),
    pytest.param(of_lanes(dataclasses.replace(SHARED, dtype="bfloat16")), id="bfloat16"),
]


# Pages that nobody owns hold NaN, and so does fast memory until it is written.
SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_kernel_reads_no_other_page_races_nothing_and_gives_the_same_twice(case, on_a_tpu, monkeypatch):
    x, lora, adapters = case.arrays()
    if case.dtype == "bfloat16":
        monkeypatch.setattr(mosaic_tpu, "_pools", in_words)
    with pltpu.force_tpu_interpret_mode(SIMULATED):
        got, again = (np.asarray(lora_matmul(x, lora, adapters, implementation="mosaic_tpu")) for _ in range(2))
    np.testing.assert_array_equal(got, again)
    exact = np.asarray(lora_matmul(*of_float32(x, lora), adapters, implementation="reference"))
    low = np.asarray(naive(x, lora, adapters, weight_of(case))[0])
    got = got.astype(np.float32)
    assert np.isfinite(got).all()
    assert np.abs(got - exact).max() <= 2 * np.abs(low - exact).max() + 1e-5 * (1 + np.abs(exact).max())


def in_words(lora):
    """Pools of bfloat16 as a TPU holds them: word i of a column has page 2 i in its lower half, and the next above."""
    return [
        jax.lax.bitcast_convert_type(pool.reshape(-1, 2, pool.shape[1]).swapaxes(1, 2), jnp.uint32)
        for pool in (lora.a, lora.b)
    ]


def of_float32(x, lora):
    a, b = (each.astype(jnp.float32) for each in (lora.a, lora.b))
    return x.astype(jnp.float32), LoraPages(a, b, lora.table, lora.ranks, lora.scales)


def test_the_kernels_gradients_are_those_of_the_reference(on_a_tpu):
    case = of_lanes(named("some_rows_have_none"))
    with pltpu.force_tpu_interpret_mode(SIMULATED):
        ours = values_and_gradients(case, "mosaic_tpu")
    for one, two in zip(ours, values_and_gradients(case, "reference"), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * (1 + np.abs(two).max()))


@pytest.fixture
def on_a_tpu():
    """A mesh of one TPU in scope, which a simulation needs to know."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    tpu = jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=tpu)):
        yield


@needs_tpu
@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_the_kernel_compiles_and_copies_no_page_in_main_memory(chip):
    mesh = make_mesh({"fsdp": 1}, target_devices(parse_devices(chip))[:1])
    whole = jax.NamedSharding(mesh, jax.P())
    case = LoraCase("served", (256, 512), (0, 1), rows=48, contracted=1024, columns=2048, pages=2048, dtype="bfloat16")
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), case.arrays())
    with jax.set_mesh(mesh):
        compiled = jax.jit(lora_matmul).lower(*placed).compile()
    assert "lora_matmul" in compiled.as_text()
    assert "tpu_custom_call" in compiled.as_text()
    # Rows in two orders and lists: less than half of what the pages of the two adapters take.
    assert compiled.memory_analysis().temp_size_in_bytes < (256 + 512) * (1024 + 2048) * 2 / 2


def test_the_table_says_why():
    spec = LoraSpec(32, 4096, 4096, 8, 16, 1024, "bfloat16", "bfloat16", spread=False)
    tpu = Target("tpu", "TPU v5 lite")
    empty = dataclasses.replace(spec, rows=0)
    choices = explain(LORA_MATMUL, empty, tpu)
    assert [(row.name, row.reason is None) for row in choices] == [
        ("mosaic_tpu", False),
        ("by_adapter", False),
        ("reference", True),
    ]
    assert mosaic_tpu.why_not(spec, tpu) is None
    assert mosaic_tpu.why_not(spec, Target("cpu", "cpu")) == "it runs on TPUs, not on cpu"
    for change, reason in (
        ({"rows": 0}, "there is nothing to multiply"),
        ({"spread": True}, "XLA cannot spread a kernel over devices; call it inside shard_map"),
        ({"columns": 100}, "it takes features in 128s, not 4096 to 100"),
        ({"pages": 1023}, "pages in bfloat16 are copied in pairs; here are 1023"),
        ({"pages_dtype": "float32"}, "the pages of the same dtype; got bfloat16 and float32"),
        ({"most_rank": 4096}, "8 rows and the pages of two adapters take more than 40 MiB of fast memory"),
    ):
        assert reason in str(mosaic_tpu.why_not(dataclasses.replace(spec, **change), tpu))


def test_what_does_not_fit_is_named():
    x, lora, adapters = named("one_adapter").arrays()
    with pytest.raises(MeshloomError, match="rows of x have 5 numbers, pages of a 20"):
        lora_matmul(x[:, :5], lora, adapters)
    with pytest.raises(MeshloomError, match="2 adapters for 24 rows"):
        LoraSpec.of(x, lora, adapters[:2])
    a, b = jnp.zeros((5, 20)), jnp.zeros((28, 5))
    with pytest.raises(MeshloomError, match="rank 5; there is room for 1 to 4"):
        lora.load(0, jnp.arange(5), a, b, alpha=1)
    with pytest.raises(MeshloomError, match=r"a and b are \(2, 19\) and \(28, 2\), not \(2, 20\) and \(28, 2\)"):
        lora.load(0, jnp.arange(2), a[:2, :19], b[:, :2], alpha=1)

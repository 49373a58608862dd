"""Every implementation of `grouped_matmul` means what the float32 reference says, in values and gradients."""

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
from meshloom.pallas_kernels import grouped_matmul, quantize
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.cases import GROUPED_CASES, GroupedCase
from meshloom.pallas_kernels.matmul.grouped import GROUPED_MATMUL, GroupedStatic, apply, tiles
from meshloom.pallas_kernels.matmul.grouped.mosaic_tpu import MOSAIC_TPU
from meshloom.pallas_kernels.matmul.grouped.reference import REFERENCE
from meshloom.pallas_kernels.matmul.grouped.schedule import visits
from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec, Kernel
from meshloom.pallas_kernels.matmul.grouped.xla import LOOP, RAGGED
from tests.compilers import needs_tpu

TPU = Target("tpu", "TPU v5 lite")


def interpreted(interpret) -> Kernel:
    """The TPU's kernels, run without one."""
    return Kernel(*(functools.partial(each, interpret=interpret) for each in (MOSAIC_TPU.product, MOSAIC_TPU.outer)))


KERNELS = {"xla": RAGGED, "loop": LOOP, "mosaic_tpu": interpreted(True)}
SIMULATED = interpreted(
    pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
)


def named(name: str) -> GroupedCase:
    return next(case for case in GROUPED_CASES if case.name == name)


def values_and_gradients(case: GroupedCase, kernel: Kernel, dtype=None) -> list[np.ndarray]:
    """The product and the gradients of a weighted sum of it by x and, unless they are quantized, the weights."""
    x, w, sizes = case.arrays()
    if dtype is not None:
        x, w = x.astype(dtype), w[...].astype(dtype)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.columns)), x.dtype)
    outs = _run(GroupedStatic(kernel, case.transposed, TPU), x, w, sizes, weight)
    return [np.asarray(each, np.float32) for each in outs]


@functools.partial(jax.jit, static_argnums=0)
def _run(static, x, w, sizes, weight):
    if isinstance(w, jax.Array):
        out, pull = jax.vjp(lambda x, w: apply(static, x, w, sizes), x, w)
    else:
        out, pull = jax.vjp(lambda x: apply(static, x, w, sizes), x)
    return out, *pull(weight.astype(out.dtype))


def naive(case: GroupedCase) -> list[np.ndarray]:
    """The same in the case's dtype, as plain products of whole arrays that are masked."""
    x, w, _ = case.arrays()
    w = w[...]
    group = np.repeat(np.arange(len(case.sizes)), case.sizes)[: case.rows]
    hot = jnp.asarray(np.eye(len(case.sizes))[np.pad(group, (0, case.rows - len(group)))], x.dtype)
    hot = hot.at[len(group) :].set(0)

    def forward(x, w):
        return jnp.einsum("me,mek->mk", hot, jnp.einsum("mk,enk->men" if case.transposed else "mk,ekn->men", x, w))

    out, pull = jax.vjp(forward, x, w)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), x.dtype)
    return [np.asarray(each, np.float32) for each in (out, *pull(weight))]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", GROUPED_CASES, ids=lambda case: case.name)
def test_errors_are_at_most_twice_those_of_a_naive_product(case, kernel):
    exact = values_and_gradients(case, REFERENCE, jnp.float32)
    got = values_and_gradients(case, KERNELS[kernel])
    for one, two, low in zip(exact, got, naive(case), strict=False):
        assert np.abs(two - one).max() <= 2 * np.abs(low - one).max() + 1e-5 * (1 + np.abs(one).max())


def test_a_row_in_the_wrong_group_is_seen():
    case, shifted = named("even"), GroupedCase("shifted", (15, 17, 16))
    one, two = (values_and_gradients(each, KERNELS["loop"]) for each in (case, shifted))
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_too_long_for_fast_memory_are_multiplied_part_by_part(quantized, monkeypatch):
    monkeypatch.setattr(tiles, "BUDGET", 500_000)
    case = GroupedCase("parts", (40, 0, 30), rows=100, contracted=384, columns=128, quantized=quantized)
    x, w, sizes = case.arrays()
    assert tiles.product_tiles(GroupedSpec.of(x, w, sizes, True)).contracted < case.contracted
    exact = REFERENCE.product(x, w, sizes, True, TPU)
    np.testing.assert_allclose(SIMULATED.product(x, w, sizes, True, TPU), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [KERNELS["mosaic_tpu"], SIMULATED], ids=["interpreted", "simulated"])
def test_long_rows_are_multiplied_chunk_by_chunk(kernel, monkeypatch):
    monkeypatch.setattr(tiles, "STRAIGHT", 128 * 128)
    case = GroupedCase("chunks", (40, 0, 30), rows=300, contracted=384, columns=128)  # and tiles that no group has
    x, w, sizes = case.arrays()
    assert tiles.product_tiles(GroupedSpec.of(x, w, sizes, True)).chunk == 128
    exact = REFERENCE.product(x, w, sizes, True, TPU)
    np.testing.assert_allclose(kernel.product(x, w, sizes, True, TPU), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_sizes", [(10, 0, 7), (0, 0, 0)])
def test_rows_past_the_last_group_cost_nothing_where_nobody_reads_them(group_sizes, monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", (16,))
    case = GroupedCase("rest", group_sizes, rows=64, contracted=24, columns=128)
    x, w, sizes = case.arrays()
    simulated = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
    got = MOSAIC_TPU.own_rows(x, w, sizes, True, TPU, simulated)
    rows = sum(group_sizes)
    np.testing.assert_allclose(got[:rows], REFERENCE.product(x, w, sizes, True, TPU)[:rows], rtol=1e-4, atol=1e-4)
    assert np.isnan(got[max(rows + 15, 16) // 16 * 16 :]).all()  # not written


@pytest.mark.parametrize("name", ["tiles_shared_by_groups", "quantized", "rows_past_the_last"])
def test_kernels_race_with_nothing_and_read_only_what_was_written(name):
    case = named(name)
    exact, got = values_and_gradients(case, REFERENCE), values_and_gradients(case, SIMULATED)
    for one, two in zip(exact, got, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_past_the_last_group_are_zero_and_give_no_gradient_whatever_they_hold(kernel):
    case = named("rows_past_the_last")
    x, w, sizes = case.arrays()
    counted = (jnp.arange(case.rows) < sum(case.sizes))[:, None]
    weight = jnp.where(counted, jnp.ones((case.rows, case.columns)), jnp.nan)
    x = jnp.where(counted, x, jnp.nan)
    out, dx, dw = _run(GroupedStatic(KERNELS[kernel], case.transposed, TPU), x, w, sizes, weight)
    for rows in (out, dx):
        assert np.isfinite(rows[: sum(case.sizes)]).all()
        assert not np.any(rows[sum(case.sizes) :])
    assert np.isfinite(dw).all()
    assert not np.any(dw[1])  # the empty group


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_call_repeats_bit_by_bit(kernel):
    case = named("rows_past_the_last")
    once, again = (values_and_gradients(case, KERNELS[kernel]) for _ in range(2))
    for one, two in zip(once, again, strict=True):
        np.testing.assert_array_equal(one, two)


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=4, max_size=4), transposed=st.booleans())
def test_any_group_sizes(sizes, transposed):
    case = GroupedCase("any", tuple(sizes), rows=140, contracted=8, columns=16, transposed=transposed)
    x, w, group_sizes = case.arrays()
    dy = jnp.asarray(np.random.default_rng(2).normal(size=(140, 16)), jnp.float32)
    exact = REFERENCE.product(x, w, group_sizes, transposed, TPU)
    exact_outer = REFERENCE.outer(x, dy, group_sizes, jnp.float32, TPU)
    for product, outer in PRODUCTS.values():
        np.testing.assert_allclose(product(x, w, group_sizes, transposed), exact, atol=1e-5)
        np.testing.assert_allclose(outer(x, dy, group_sizes), exact_outer, atol=1e-4)


def _compiled(kernel: Kernel):
    product = jax.jit(lambda *arrays, t: kernel.product(*arrays, t, TPU), static_argnames="t")
    return (
        lambda x, w, sizes, t: product(x, w, sizes, t=t),
        jax.jit(lambda a, b, sizes: kernel.outer(a, b, sizes, jnp.float32, TPU)),
    )


PRODUCTS = {name: _compiled(kernel) for name, kernel in KERNELS.items()}


planned = jax.jit(visits, static_argnums=(1, 2), static_argnames=("groups_all", "rest"))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=5, max_size=5),
    shape=st.sampled_from([(1, 8), (20, 8), (700, 128)]),
    groups_all=st.booleans(),
    rest=st.booleans(),
)
def test_every_row_is_visited_once_by_its_own_group(sizes, shape, groups_all, rest):
    rows, tile = shape
    plan = planned(jnp.asarray(sizes, jnp.int32), rows, tile, groups_all=groups_all, rest=rest)
    plan, count = jax.tree.map(np.asarray, plan)
    groups = plan.group
    seen = np.zeros((rows, len(sizes) + 1), int)
    for group, at in zip(groups[:count], plan.tile[:count], strict=True):
        first, end = max(int(plan.first[group]), at * tile), min(int(plan.end[group]), (at + 1) * tile)
        assert 0 <= at * tile < rows
        seen[first:end, group] += 1
    owner = np.pad(np.repeat(np.arange(len(sizes)), sizes), (0, rows), constant_values=len(sizes))[:rows]
    expected = np.eye(len(sizes) + 1, dtype=int)[owner]
    if groups_all or not rest:
        expected[:, -1] = 0
    if groups_all:
        assert set(range(len(sizes))) == set(groups[:count])
    np.testing.assert_array_equal(seen, expected)
    assert np.all(np.diff(groups[:count]) >= 0)


@needs_tpu
@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:2x1x1", "v6e:1x1", "tpu7x:2x2x1"])
@pytest.mark.parametrize("quantized", [False, True], ids=["bfloat16", "int8"])
def test_tpus_compile_it_with_both_gradients(chip, quantized):
    mesh = jax.sharding.Mesh(np.array(target_devices(parse_devices(chip))[:1]), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    x, sizes = abstract((300, 256), jnp.bfloat16), abstract((3,), jnp.int32)
    w = abstract((3, 384, 256), jnp.bfloat16)
    if quantized:
        w = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype), jax.eval_shape(quantize, w))

    def both(x, w, sizes):
        differentiable = (x,) if quantized else (x, w)
        out, pull = jax.vjp(lambda x, w=w: grouped_matmul(x, w, sizes, transposed=True), *differentiable)
        return out, pull(out)

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(x, w, sizes).compile().as_text()
    assert text.count("tpu_custom_call") == (2 if quantized else 3)


def test_the_table_says_why():
    spec = GroupedSpec(64, 4, 32, 32, "bfloat16", "bfloat16", transposed=True, spread=False)
    reasons = {row.name: row.reason for row in explain(GROUPED_MATMUL, spec, Target("cpu"))}
    assert reasons["mosaic_tpu"] == "it runs on TPUs, not on cpu"
    assert reasons["loop"] is None
    reasons = {row.name: row.reason for row in explain(GROUPED_MATMUL, spec, Target())}
    assert "CPUs" in reasons["loop"]
    assert reasons["xla"] is None


def test_arrays_over_devices_are_left_to_xla():
    x, w, sizes = named("even").arrays()
    with jax.set_mesh(make_mesh("fsdp=8")):
        spec = GroupedSpec.of(x, w, sizes, transposed=True)
    for platform in ("cpu", "tpu"):
        choices = explain(GROUPED_MATMUL, spec, Target(platform))
        assert next(row.name for row in choices if row.reason is None) == "xla"


@pytest.mark.parametrize(("kind", "rows"), [("TPU v5 lite", 128), ("TPU v6 lite", 256)])
@pytest.mark.parametrize("sizes", [(2048, 1408), (4096, 14336), (14336, 4096), (2880, 2880)])
def test_tiles_are_no_taller_than_the_multiplier_and_cut_what_they_hold_into_whole_parts(
    sizes, kind, rows, monkeypatch
):
    monkeypatch.setattr(Target, "of_mesh", lambda: Target("tpu", kind))
    chosen = tiles.product_tiles(GroupedSpec(4096, 8, *sizes, "bfloat16", "bfloat16", transposed=True, spread=False))
    assert chosen.rows == rows
    assert tiles.outer_tiles(4096, 8, *sizes, jnp.bfloat16).rows == rows
    assert sizes[0] % chosen.contracted == 0
    assert chosen.contracted % chosen.chunk == 0
    assert chosen.columns % tiles.LANES == 0 or chosen.columns == sizes[1]


def test_what_does_not_fit_is_named():
    x, w, sizes = named("even").arrays()
    with pytest.raises(MeshloomError, match="rows of x have 24 numbers, the middle dimension of the weights 40"):
        grouped_matmul(x, w, sizes)
    with pytest.raises(MeshloomError, match="2 group sizes for 3 weights"):
        GroupedSpec.of(x, w, sizes[:2], True)
    with pytest.raises(MeshloomError, match="'mosaic_tpu' cannot run this call: it runs on TPUs"):
        grouped_matmul(x, w, sizes, transposed=True, implementation="mosaic_tpu")

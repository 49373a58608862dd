"""Element by element over the rows that are there: simulated with memory that begins as NaN; what is left to XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.experts import rowwise
from meshloom.pallas_kernels.matmul.experts.rowwise import MAP_ROWS, RowwiseSpec, map_rows, tiled

SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
SIZE = 256
V6E = Target("tpu", "TPU v6 lite")


def function(x, y, weight):
    inner = jax.nn.silu(x) * y
    return (inner, inner * weight), (inner * y,)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(rowwise, "_ROWS", 16)
    monkeypatch.setattr(rowwise, "_COLUMNS", 128)


@pytest.mark.parametrize("count", [0, 5, 16, 33, 40])
@pytest.mark.parametrize(("dtype", "in_place"), [(jnp.float32, False), (jnp.bfloat16, False), (jnp.float32, True)])
def test_rows_that_are_there_are_those_of_xla_whatever_the_others_hold(count, dtype, in_place, small_blocks):
    rng, rows = np.random.default_rng(count), 48 if in_place else 40  # the simulator pads memory that it shares
    arrays = [jnp.asarray(rng.normal(size=(rows, size)), dtype) for size in (SIZE, SIZE, 1)]
    exact = function(*(each.astype(jnp.float32) for each in arrays))
    arrays = [each.at[count:].set(jnp.nan) for each in arrays]
    run = jax.jit(functools.partial(tiled, function, in_place=in_place, interpret=SIMULATED))
    got, (sums,) = run(jnp.int32(count), *arrays)
    for mine, theirs in zip(got, exact[0], strict=True):
        assert mine.dtype == dtype
        np.testing.assert_allclose(
            mine[:count], theirs[:count], rtol=1e-6 if dtype == jnp.float32 else 1 / 256, atol=1e-6
        )
    np.testing.assert_allclose(sums[:count], exact[1][0].sum(1)[:count], rtol=1e-5, atol=1e-4)
    # Blocks behind are not written.
    assert jnp.isnan(got[0][-(-max(count, 1) // 16) * 16 :]).all()


def test_without_a_tpu_it_is_what_the_function_makes_of_all_rows():
    arrays = [jnp.linspace(-1, 1, 6 * size).reshape(6, size) for size in (8, 8, 1)]
    (inner, weighed), (sums,) = map_rows(function, jnp.int32(6), *arrays)
    expected, (summand,) = function(*arrays)
    np.testing.assert_array_equal(inner, expected[0])
    np.testing.assert_array_equal(weighed, expected[1])
    np.testing.assert_allclose(sums, summand.sum(1), rtol=1e-6)


def test_what_a_tpu_leaves_to_xla_is_said(monkeypatch):
    def reason(columns: int, unknown: str | None = None, target: Target = V6E, rows=512, spread=False) -> str | None:
        return explain(MAP_ROWS, RowwiseSpec(rows, columns, unknown, spread), target)[0].reason

    assert reason(14336) is None
    assert reason(96) is None
    assert reason(1500) == "1500 columns are no multiple of 128"
    assert reason(768, rows=64) == "there are 64 rows: XLA takes no longer"
    assert "inside shard_map" in reason(768, spread=True)
    assert reason(768, "erf") == "Mosaic may not have erf"
    assert reason(768, target=Target("cpu", "cpu")) == "it runs on TPUs, not on cpu"

    asked = []
    monkeypatch.setattr(rowwise, "select", lambda name, table, spec, target: asked.append(spec) or MAP_ROWS[1])
    x = jnp.ones((2, 8))
    for activation in (jax.nn.silu, jax.nn.relu, jax.nn.gelu, functools.partial(jax.nn.gelu, approximate=False)):
        map_rows(lambda x, activation=activation: ((activation(x),), ()), jnp.int32(2), x)
    assert [spec.unknown for spec in asked[:3]] == [None] * 3
    assert asked[3].unknown is not None

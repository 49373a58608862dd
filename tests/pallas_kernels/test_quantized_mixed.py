"""Rows of int4 with their outliers in int8 (W4Ax) lose little more than rows of int8, far less than rows of int4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels import mixed_matmul, quantize, quantize_mixed, quantized_matmul
from meshloom.pallas_kernels.matmul.quantized.mixed import MixedWeight, round_mixed

product = jax.jit(mixed_matmul, static_argnames="implementation")


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_outliers(rows: int, size: int = 512, count: int = 9, seed: int = 0) -> jax.Array:
    """Rows of which some channels, the same in all rows, are 50 times larger."""
    channels = np.random.default_rng(7).permutation(size)[:count]
    return normal(rows, size, seed=seed).at[:, channels].multiply(50.0)


def error(got: jax.Array, exact: jax.Array) -> float:
    return float(jnp.linalg.norm(got - exact) / jnp.linalg.norm(exact))


def test_outliers_cost_little_more_than_with_int8_rows_and_far_less_than_with_int4():
    """With damped weights of outlier channels, as trained models have them; without, only weights would matter."""
    x, w = with_outliers(64), normal(96, 512, seed=1)
    outlier = jnp.max(jnp.abs(x), axis=0) > 20
    w = jnp.where(outlier, 0.05 * w, w)
    exact = x @ w.T
    mixed = quantize_mixed(w, with_outliers(32, seed=5))
    assert mixed.outlier_blocks == 1
    w4ax = error(product(x, mixed), exact)
    w4a8 = error(quantized_matmul(x, quantize(w, "int4_128"), activations="int8"), exact)
    in_place = MixedWeight(quantize(w, "int4_128"), jnp.arange(512), 0)
    w4a4 = error(product(x, in_place), exact)
    assert w4ax < 1.25 * w4a8
    assert w4ax < 0.5 * w4a4


@settings(max_examples=3, deadline=None)
@given(rows=st.sampled_from([0, 1, 7]), blocks=st.integers(1, 3), out=st.sampled_from([1, 24]), data=st.data())
def test_xla_means_what_the_reference_says(rows, blocks, out, data):
    outliers = data.draw(st.integers(0, blocks))
    x, w = with_outliers(rows, 128 * blocks), normal(out, 128 * blocks, seed=1)
    mixed = quantize_mixed(w, with_outliers(4, 128 * blocks), outlier_blocks=outliers)
    got, exact = (product(x, mixed, implementation=name) for name in ("xla", "reference"))
    assert got.shape == (rows, out)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(got, product(x, mixed, implementation="xla"))


def test_only_blocks_with_outliers_use_more_than_four_bits():
    rounded = round_mixed(with_outliers(5), 1)
    assert np.abs(rounded.values[:, :128]).max() == 127
    assert np.abs(rounded.values[:, 128:]).max() == 7
    assert rounded.scales.shape == (5, 4)


def test_rows_do_not_see_each_other_and_zeros_stay_zeros():
    mixed = quantize_mixed(normal(24, 256, seed=1), with_outliers(8, 256))
    x = with_outliers(4, 256).at[2].set(0)
    got = product(x, mixed)
    np.testing.assert_array_equal(got[2], np.zeros(24))
    np.testing.assert_array_equal(product(x.at[1:].multiply(1e3), mixed)[0], got[0])


def test_gradients_of_rows_go_through_the_numbers_of_the_weight():
    mixed = quantize_mixed(normal(24, 256, seed=1), with_outliers(8, 256))
    x, dy = with_outliers(4, 256), normal(4, 24, seed=3)
    (dx,) = jax.jit(lambda x, w, dy: jax.vjp(lambda x: mixed_matmul(x, w), x)[1](dy))(x, mixed, dy)
    numbers = np.empty((24, 256), np.float32)
    numbers[:, np.asarray(mixed.order)] = mixed.weight[...]
    np.testing.assert_allclose(dx, dy @ numbers, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_named():
    w, sample = normal(8, 256), with_outliers(4, 256)
    with pytest.raises(MeshloomError, match="no multiple of 128"):
        quantize_mixed(w[:, :200], sample[:, :200])
    with pytest.raises(MeshloomError, match="3 outlier blocks of 2"):
        quantize_mixed(w, sample, outlier_blocks=3)
    with pytest.raises(MeshloomError, match="the sample has no rows"):
        quantize_mixed(w, sample[:0])
    with pytest.raises(MeshloomError, match="rows of x have 128 numbers, rows of w 256"):
        mixed_matmul(normal(2, 128), quantize_mixed(w, sample))

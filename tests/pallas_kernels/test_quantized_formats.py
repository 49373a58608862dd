"""Every format of quantized weights keeps numbers within its bound, and says what it does not take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels import QArray, quantize
from meshloom.pallas_kernels.matmul.qarray import expand
from meshloom.pallas_kernels.matmul.quantized.formats import FORMATS

there_and_back = jax.jit(lambda x, format: quantize(x, format)[...], static_argnums=1)
to = jax.jit(quantize, static_argnums=1)
numbers = jax.jit(lambda w, index=...: w[index])


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def largest_error(x: np.ndarray, format: str) -> np.ndarray:
    """What rounding may move each number by, from the definition of the format: half a step where the number lies."""
    rows, columns = FORMATS[format].rows or x.shape[0], FORMATS[format].columns or x.shape[1]
    blocks = np.abs(x).reshape(x.shape[0] // rows, rows, -1, columns)
    of_block = np.broadcast_to(blocks.max((1, 3), keepdims=True), blocks.shape).reshape(x.shape)
    if format.startswith("int"):
        return of_block / (2 * FORMATS[format].largest)
    if format.startswith("fp8"):  # three digits after the point, down to 2**-6, and steps of 2**-9 below
        return np.maximum(np.abs(x) / 16, of_block / 448 / 2**10)
    if format == "mxfp4":  # steps of up to 2 where the largest is 6, and scales up to twice too large
        return of_block / 4
    # A scale is rounded to 3 digits, or to 2**-10 of the largest block's where it is small.
    return of_block / 6 * (17 / 16) + np.abs(x).max() / 448 / 2**10 * 6


@settings(max_examples=20, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    rows=st.sampled_from([1, 3]),
    blocks=st.integers(1, 2),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    spread=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_numbers_move_by_half_a_step_at_most(format, rows, blocks, scale, spread, seed):
    shape = (rows * (FORMATS[format].rows or 1), blocks * (FORMATS[format].columns or 24))
    x = scale * normal(*shape, seed=seed) * jnp.exp(spread * normal(shape[0], 1, seed=seed + 1))
    error = np.abs(np.float64(there_and_back(x, format)) - np.float64(x))
    assert np.all(error <= largest_error(np.float64(x), format) * (1 + 1e-4))


@pytest.mark.parametrize("format", FORMATS)
def test_scales_have_the_rank_of_values_and_divide_them(format):
    x = jax.ShapeDtypeStruct((3, 256, 256), jnp.bfloat16)
    w = jax.eval_shape(lambda x: quantize(x, format), x)
    assert w.shape == x.shape
    assert w.scales.ndim == w.values.ndim
    assert w.block == (FORMATS[format].rows or 256, FORMATS[format].columns or 256)
    assert jax.eval_shape(lambda w: w[0], w).dtype == jnp.bfloat16


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_quantized_matrix_by_matrix(format):
    x = normal(3, 128, 128)
    stack = to(x, format)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        assert isinstance(one, QArray)
        np.testing.assert_array_equal(numbers(one), there_and_back(x[i], format))
        np.testing.assert_array_equal(numbers(stack, i), numbers(one))


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_read_by_their_positions(format):
    w = to(normal(256, 128), format)
    positions = jnp.asarray([[0, 130], [255, 0]])
    everything = np.asarray(numbers(w))
    np.testing.assert_array_equal(numbers(w, positions), everything[positions])
    np.testing.assert_array_equal(numbers(w, -1), everything[-1])


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_empty_matrices_stay_what_they_are(format):
    assert not np.any(there_and_back(jnp.zeros((128, 128)), format))
    assert there_and_back(jnp.zeros((0, 128)), format).shape == (0, 128)
    half = jnp.zeros((128, 128)).at[:, ::2].set(1.0)
    np.testing.assert_array_equal(there_and_back(half, format)[:, 1::2], 0)


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_format_has_is_kept_exactly(format):
    w = to(normal(128, 128), format)
    np.testing.assert_allclose(there_and_back(numbers(w), format), numbers(w), rtol=1e-6)


@pytest.mark.parametrize("format", ["int8", "int4_32", "fp8", "mxfp4", "nvfp4"])
def test_chance_rounds_to_neighbours_with_the_number_as_the_mean(format):
    x = normal(32, 64)
    draw = jax.jit(jax.vmap(lambda key: quantize(x, format, key=key)[...]))
    draws = np.float64(draw(jax.random.split(jax.random.key(0), 400)))
    again = np.float64(draw(jax.random.split(jax.random.key(0), 400)))
    np.testing.assert_array_equal(draws, again)
    # A draw moves a number by less than a step; the mean of 400 by 5 deviations of at most half a step / 20.
    step = 2 * largest_error(np.float64(x), format)
    assert np.all(np.abs(draws - x) <= step * (1 + 1e-4))
    cut = np.abs(x) >= 0.99 * np.abs(draws).max(0)  # nvfp4 cuts off what a scale that was rounded down does not reach
    assert np.all((np.abs(draws.mean(0) - x) <= step / 8) | cut)
    assert len(np.unique(draws[:, 3, 5])) == 2


def test_a_block_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(MeshloomError, match=r"each 128 numbers of a row, and 96 is no .* int4_32, fp8, fp8_row,"):
        quantize(normal(128, 96), "int4_128")
    with pytest.raises(MeshloomError, match="fp8_block has a scale for each 128 rows, and 64 is no multiple"):
        quantize(normal(64, 128), "fp8_block")
    with pytest.raises(MeshloomError, match="no format 'int3'; there are int8, int4_32"):
        quantize(normal(4, 4), "int3")


@pytest.mark.parametrize("format", ["int8", "fp8_block", "nvfp4"])
def test_a_quantized_matrix_passes_through_scan_and_donation(format):
    stack = to(normal(3, 128, 128), format)
    expected = np.asarray(numbers(stack))

    @functools.partial(jax.jit, donate_argnums=0)
    def through(stack):
        return jax.lax.scan(lambda carry, w: (carry, w), 0, stack)[1]

    np.testing.assert_array_equal(numbers(through(stack)), expected)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_expand_repeats_each_scale_over_its_block(sizes):
    few, many = tuple(a for a, _ in sizes), tuple(a * b for a, b in sizes)
    scales = np.arange(np.prod(few), dtype=np.float32).reshape(few)
    expected = scales
    for axis, (_, times) in enumerate(sizes):
        expected = np.repeat(expected, times, axis)
    np.testing.assert_array_equal(np.broadcast_to(expand(jnp.asarray(scales), many), many), expected)

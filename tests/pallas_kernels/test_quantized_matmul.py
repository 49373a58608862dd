"""A product with quantized weights means what the reference says, and loses only what its rounding must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels import QArray, matmul, quantize, quantized_matmul
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul import LONGEST_SUM, QUANTIZED_MATMUL, MatmulSpec

# What rounding one factor to 8 or 16 bits may do to a product, relative to |x| |w|: half a step of the largest entry.
HALF_STEP = {"int8": 0.5 / 127, "int16": 0.5 / 32639}


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33])
def test_xla_equals_reference(rows, activations):
    x, w = normal(rows, 96), quantize(normal(40, 96, seed=1))
    results = [quantized_matmul(x, w, activations=activations, implementation=name) for name in ("reference", "xla")]
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), size=st.integers(1, 70), out=st.integers(1, 17), scale=st.sampled_from([1e-20, 1.0, 1e20])
)
def test_error_is_that_of_rounding(rows, size, out, scale):
    x, w = scale * normal(rows, size), normal(out, size, seed=1)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    (largest_x, total_x), (largest_w, total_w) = (
        (np.abs(a).max(-1), np.abs(a).sum(-1)) for a in map(np.float64, (x, w))
    )
    for activations, half in HALF_STEP.items():
        got = np.asarray(quantized_matmul(x, quantize(w), activations=activations), np.float64)
        of_weights = HALF_STEP["int8"] * np.outer(total_x, largest_w)
        of_rows = half * np.outer(largest_x, total_w + size * HALF_STEP["int8"] * largest_w)
        slack = 1e-5 * np.outer(total_x, largest_w)
        assert np.all(np.abs(got - exact) <= of_weights + of_rows + slack)


def test_a_row_does_not_depend_on_its_neighbours():
    x, w = normal(37, 64), quantize(normal(24, 64, seed=1))
    product = jax.jit(quantized_matmul)
    together = np.asarray(product(x, w))
    for row in (0, 5, 36):
        np.testing.assert_array_equal(np.asarray(product(x[row : row + 1], w))[0], together[row])


def test_zeros_stay_zeros():
    w = quantize(jnp.zeros((3, 8)))
    np.testing.assert_array_equal(w[jnp.arange(3)], np.zeros((3, 8)))
    np.testing.assert_array_equal(quantized_matmul(jnp.zeros((2, 8)), w), np.zeros((2, 3)))


def test_extreme_activations_do_not_overflow_their_bytes():
    x = jnp.asarray([[1.0, -1.0, 1.0, -1.0], [127.5 / 32639, 1.0, -128.5 / 32639, 0.0]])
    w = quantize(jnp.eye(4))
    np.testing.assert_allclose(quantized_matmul(x, w), x, atol=0.5 / 32639 + 1e-6)


def test_quantized_rows_are_within_half_a_step():
    w = normal(9, 50)
    bound = np.abs(np.asarray(w)).max(-1, keepdims=True) / 254
    assert np.all(np.abs(np.asarray(quantize(w)[:]) - np.asarray(w)) <= bound * (1 + 1e-5))


def test_a_stack_is_quantized_matrix_by_matrix():
    w = normal(3, 5, 16)
    stack = quantize(w)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        assert isinstance(one, QArray)
        np.testing.assert_array_equal(one.values, quantize(w[i]).values)


def test_matmul_takes_either_kind_and_the_dtype_that_is_asked_for():
    x, w = normal(2, 16, dtype=jnp.bfloat16), normal(4, 16, seed=1, dtype=jnp.bfloat16)
    assert matmul(x, w).dtype == matmul(x, quantize(w)).dtype == jnp.bfloat16
    assert matmul(x, w, out_dtype=jnp.float32).dtype == matmul(x, quantize(w), out_dtype=jnp.float32).dtype
    assert quantize(w)[jnp.arange(2)].dtype == jnp.bfloat16


def test_sizes_that_differ_are_named():
    with pytest.raises(MeshloomError, match="rows of x have 8 numbers, rows of w 16"):
        quantized_matmul(normal(1, 8), quantize(normal(4, 16)))


def test_sums_that_could_overflow_are_left_to_the_reference():
    choices = explain(QUANTIZED_MATMUL, MatmulSpec((1, LONGEST_SUM + 1), (1, LONGEST_SUM + 1)), Target())
    assert [(choice.name, choice.reason is None) for choice in choices] == [("xla", False), ("reference", True)]

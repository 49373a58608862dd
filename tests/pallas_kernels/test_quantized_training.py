"""Training through rounded products: gradients of the product without rounding, on the fast path of the CPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh
from meshloom.pallas_kernels import quantize, quantized_matmul, quantized_training_matmul
from meshloom.pallas_kernels.matmul.quantized.training import transposed

FORMATS = ("int8", "fp8", "fp8_row", "fp8_block")


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(product, x, w, dy):
    out, pull = jax.vjp(product, x, w)
    return out, *pull(dy.astype(out.dtype))


def plain(x, w):
    return jnp.einsum("...i,oi->...o", x, w)


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_rounded_and_gradients_are_not(format):
    x, w, dy = normal(3, 5, 128), normal(128, 128, seed=1), normal(3, 5, 128, seed=2)
    product = functools.partial(quantized_training_matmul, format=format)
    got, exact = values_and_gradients(product, x, w, dy), values_and_gradients(plain, x, w, dy)
    rounded = quantized_matmul(x, quantize(w, format), activations="int8" if format == "int8" else "fp8")
    np.testing.assert_allclose(got[0], rounded, rtol=1e-5, atol=1e-4)
    assert 1e-3 < np.abs(got[0] - exact[0]).max() < 3
    for one, two in zip(got[1:], exact[1:], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [(0,), (1,), (2, 35)])
def test_bfloat16_gradients_err_at_most_twice_as_a_plain_product(rows):
    x, w = normal(*rows, 96, dtype=jnp.bfloat16), normal(40, 96, seed=1, dtype=jnp.bfloat16)
    dy = normal(*rows, 40, seed=2, dtype=jnp.bfloat16)
    with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
        got = values_and_gradients(quantized_training_matmul, x, w, dy)
    naive = values_and_gradients(plain, x, w, dy)
    exact = values_and_gradients(plain, *(each.astype(jnp.float32) for each in (x, w, dy)))
    for one, two, low in zip(exact[1:], got[1:], naive[1:], strict=True):
        assert two.dtype == jnp.bfloat16
        assert np.abs(two - one).max(initial=0) <= 2 * np.abs(low - one).max(initial=0) + 1e-6


def test_no_operand_of_the_backward_products_becomes_float32_on_a_cpu():
    x, w = normal(64, 96, dtype=jnp.bfloat16), normal(128, 96, seed=1, dtype=jnp.bfloat16)
    dy = normal(64, 128, seed=2, dtype=jnp.bfloat16)
    widened = re.compile(r"= f32\[\d+,\d+\]\S* convert\(")

    def backward(product):
        with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
            pull = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy))
            return widened.findall(pull.lower(x, w, dy).compile().as_text())

    assert not backward(quantized_training_matmul)
    assert len(backward(plain)) >= 1  # what XLA does by itself; if it no longer does, `transposed` can go


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 70), st.integers(1, 70))
def test_transposed_pads_to_whole_tiles(rows, columns):
    a = normal(rows, columns)
    got = np.asarray(transposed(a))
    assert got.shape[0] % 32 == got.shape[1] % 32 == 0
    np.testing.assert_array_equal(got[:columns, :rows], a.T)
    assert np.count_nonzero(got) == np.count_nonzero(a)


def test_chance_has_the_exact_product_as_its_mean_and_repeats_with_its_key():
    x, w = normal(2, 64), normal(8, 64, seed=1)
    x = quantize(x)[...]  # so that the rounding of rows adds nothing

    @jax.jit
    def draw(key):
        return quantized_training_matmul(x, w, rounding="stochastic", key=key)

    draws = np.stack([draw(key) for key in jax.random.split(jax.random.key(0), 200)])
    np.testing.assert_array_equal(draws[3], draw(jax.random.split(jax.random.key(0), 200)[3]))
    nearest = np.asarray(quantized_training_matmul(x, w))
    exact = np.asarray(plain(x, w))
    assert np.abs(draws.mean(0) - exact).mean() < 0.4 * np.abs(nearest - exact).mean()


@pytest.mark.parametrize(("format", "rounding"), [("int8", "stochastic"), ("fp8_row", "nearest")])
def test_a_model_trains_nearly_as_well_as_in_float32(format, rounding):
    x, hidden = normal(64, 32), normal(16, 32, seed=1)
    target = jnp.tanh(x @ hidden.T)

    def train(product):
        def loss(w, key):
            return jnp.mean((jnp.tanh(product(x, w, key)) - target) ** 2)

        @jax.jit
        def step(w, key):
            return w - 3.0 * jax.grad(loss)(w, key)

        w = jnp.zeros((16, 32))
        for key in jax.random.split(jax.random.key(0), 150):
            w = step(w, key)
        return float(jnp.mean((jnp.tanh(x @ w.T) - target) ** 2))

    def rounded(x, w, key):
        key = key if rounding == "stochastic" else None
        return quantized_training_matmul(x, w, format, rounding=rounding, key=key)

    start = float(jnp.mean(target**2))
    assert train(lambda x, w, key: plain(x, w)) < 0.05 * start
    assert train(rounded) < 0.06 * start


def test_what_does_not_fit_is_named():
    x, w = normal(2, 64), normal(8, 64, seed=1)
    with pytest.raises(MeshloomError, match="'stochastic' needs a key"):
        quantized_training_matmul(x, w, rounding="stochastic")
    with pytest.raises(MeshloomError, match="'nearest' takes no key"):
        quantized_training_matmul(x, w, key=jax.random.key(0))
    with pytest.raises(MeshloomError, match="fp8_block has a scale for each 128 rows"):
        quantized_training_matmul(x, w, "fp8_block")

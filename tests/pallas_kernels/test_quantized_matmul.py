"""A product with quantized weights means what the reference says, and loses only what its rounding must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom import pallas_kernels
from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh
from meshloom.pallas_kernels import matmul, quantized_matmul
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.cases import QUANTIZED_CASES
from meshloom.pallas_kernels.matmul.quantized import QUANTIZED_MATMUL, MatmulSpec
from meshloom.pallas_kernels.matmul.quantized.spec import round_rows
from meshloom.pallas_kernels.matmul.quantized.xla import LONGEST_SUM

# What rounding one factor to 8 or 16 bits may do to a product, relative to |x| |w|: half a step of the largest entry.
HALF_STEP = {"int8": 0.5 / 127, "int16": 0.5 / 32639}
quantize = jax.jit(pallas_kernels.quantize, static_argnums=1)
product = jax.jit(quantized_matmul, static_argnames=("activations", "out_dtype", "implementation"))


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=2)
def exact_got_and_naive(x, w, activations):
    """By the reference, by the default implementation, and as a plain product of the same numbers in x's dtype."""
    exact = quantized_matmul(x, w, activations=activations, out_dtype=jnp.float32, implementation="reference")
    got = quantized_matmul(x, w, activations=activations, out_dtype=jnp.float32, implementation="xla")
    rows = x if activations == "float" else round_rows(x, activations, w.block[1])[...]
    return exact, got, jnp.einsum("ri,oi->ro", rows.astype(x.dtype), w[...])


@pytest.mark.parametrize("case", QUANTIZED_CASES, ids=lambda case: case.name)
def test_errors_are_at_most_twice_those_of_a_naive_product(case):
    x, w = case.arrays()
    exact, got, naive = (np.asarray(each, np.float32) for each in exact_got_and_naive(x, w, case.activations))
    slack = 2e-6 * np.abs(np.asarray(x, np.float32)).sum(-1, keepdims=True) * np.abs(w[...]).max(initial=0.0)
    assert np.all(np.abs(got - exact) <= 2 * np.abs(naive - exact).max(initial=0.0) + slack)
    # Again, bit by bit, and with other rows that are a thousand times larger.
    np.testing.assert_array_equal(exact_got_and_naive(x, w, case.activations)[1], got)
    shouted = exact_got_and_naive(x.at[1:].multiply(1e3), w, case.activations)[1]
    np.testing.assert_array_equal(shouted[:1], got[:1])


@pytest.mark.parametrize("name", ["w8a16", "w4a8_groups_of_32", "w8a16_in_integers", "fp8_blocks", "nvfp4"])
def test_gradients_of_rows_go_through_the_numbers_of_a_frozen_weight(name):
    case = next(case for case in QUANTIZED_CASES if case.name == name)
    x, w = case.arrays()
    dy = normal(case.rows, case.columns, seed=3)
    pull = jax.jit(
        lambda x, w, dy: jax.vjp(
            lambda x: quantized_matmul(x, w, activations=case.activations, out_dtype=jnp.float32), x
        )[1](dy)
    )
    (dx,) = pull(x, w, dy)
    assert dx.dtype == x.dtype
    exact = np.float64(dy) @ np.float64(w[...])
    assert np.abs(dx - exact).max() <= (0.02 if case.dtype == "bfloat16" else 1e-4) * np.abs(exact).max()


def test_adapters_train_on_a_frozen_int4_weight():
    w, x = quantize(normal(32, 64), "int4_32"), normal(16, 64, seed=1)
    target = x @ (w[...] + 0.3 * normal(32, 2, seed=2) @ normal(2, 64, seed=3)).T

    @jax.jit
    def step(lora):
        def loss(lora):
            hidden = quantized_matmul(jnp.tanh(x + x @ lora["in"]), w) + (x @ lora["a"]) @ lora["b"]
            return jnp.mean((hidden - target) ** 2)

        value, gradients = jax.value_and_grad(loss)(lora)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, lora, gradients)

    lora = {"in": jnp.zeros((64, 64)), "a": 0.1 * normal(64, 4, seed=4), "b": jnp.zeros((4, 32))}
    first, lora = step(lora)
    for _ in range(60):
        last, lora = step(lora)
    assert last < 0.5 * first


@functools.partial(jax.jit, static_argnums=(2, 3))
def of_floats(x, w, format, activations):
    return quantized_matmul(x, quantize(w, format), activations=activations)


@settings(max_examples=6, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 9]),
    groups=st.integers(1, 3),
    out=st.sampled_from([1, 17]),
    format=st.sampled_from(["int8", "int4_32"]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_error_is_that_of_rounding(rows, groups, out, format, scale):
    size = 23 * groups if format == "int8" else 32 * groups
    x, w = jnp.float32(scale) * normal(rows, size), normal(out, size, seed=1)
    of_weight = HALF_STEP["int8"] if format == "int8" else 0.5 / 7
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    (largest_x, total_x), (largest_w, total_w) = (
        (np.abs(a).max(-1), np.abs(a).sum(-1)) for a in map(np.float64, (x, w))
    )
    for activations, half in HALF_STEP.items():
        got = np.asarray(of_floats(x, w, format, activations), np.float64)
        of_weights = of_weight * np.outer(total_x, largest_w)
        of_rows = half * np.outer(largest_x, total_w + size * of_weight * largest_w)
        slack = 1e-5 * np.outer(total_x, largest_w)
        assert np.all(np.abs(got - exact) <= of_weights + of_rows + slack)


def test_a_row_does_not_depend_on_its_neighbours():
    x, w = normal(37, 64), quantize(normal(24, 64, seed=1))
    together = np.asarray(product(x, w))
    for row in (0, 5, 36):
        np.testing.assert_array_equal(np.asarray(product(x[row : row + 1], w))[0], together[row])


def test_zeros_stay_zeros():
    w = quantize(jnp.zeros((3, 8)))
    np.testing.assert_array_equal(w[jnp.arange(3)], np.zeros((3, 8)))
    np.testing.assert_array_equal(product(jnp.zeros((2, 8)), w), np.zeros((2, 3)))


def test_extreme_activations_do_not_overflow_their_bytes():
    x = jnp.asarray([[1.0, -1.0, 1.0, -1.0], [127.5 / 32639, 1.0, -128.5 / 32639, 0.0]])
    w = quantize(jnp.eye(4))
    np.testing.assert_allclose(product(x, w), x, atol=0.5 / 32639 + 1e-6)


def test_matmul_takes_either_kind_and_the_dtype_that_is_asked_for():
    x, w = normal(2, 16, dtype=jnp.bfloat16), normal(4, 16, seed=1, dtype=jnp.bfloat16)
    assert matmul(x, w).dtype == matmul(x, quantize(w)).dtype == jnp.bfloat16
    assert matmul(x, w, out_dtype=jnp.float32).dtype == matmul(x, quantize(w), out_dtype=jnp.float32).dtype
    assert quantize(w)[jnp.arange(2)].dtype == jnp.bfloat16


def test_sizes_that_differ_are_named():
    with pytest.raises(MeshloomError, match="rows of x have 8 numbers, rows of w 16"):
        quantized_matmul(normal(1, 8), quantize(normal(4, 16)))


def test_formats_that_do_not_go_together_are_named():
    with pytest.raises(MeshloomError, match=r"rows in 'fp8' do not go with weights in int8 .* int16, int8, float do"):
        quantized_matmul(normal(1, 16), quantize(normal(4, 16)), activations="fp8")
    with pytest.raises(MeshloomError, match=r"one matrix \[O, I\]; got the shape \(2, 4, 16\)"):
        quantized_matmul(normal(1, 16), quantize(normal(2, 4, 16)))


def test_integer_weights_keep_float_rows_on_tpus_and_16_bits_elsewhere():
    x, w = normal(1, 32), quantize(normal(4, 32), "int4_32")
    assert MatmulSpec.of(x, w, None, Target("tpu")).activations == "float"
    assert MatmulSpec.of(x, w, None, Target("cpu")).activations == "int16"
    assert MatmulSpec.of(x, quantize(normal(4, 32)), None, Target("tpu")).activations == "float"


def test_sums_that_could_overflow_are_left_to_the_reference():
    spec = MatmulSpec((1, LONGEST_SUM + 1), (1, LONGEST_SUM + 1), block=(1, LONGEST_SUM + 1))
    reasons = {choice.name: choice.reason for choice in explain(QUANTIZED_MATMUL, spec, Target())}
    assert "int32 overflows" in reasons["xla"]
    assert reasons["reference"] is None


def test_groups_of_weights_that_are_spread_are_not_gathered_one_by_one():
    x, w = normal(8, 256), quantize(normal(64, 256, seed=1), "int4_128")
    exact = product(x, w, activations="int8")
    with jax.set_mesh(make_mesh("tensor=8")):
        spec = MatmulSpec.of(x, w, "int8", Target("cpu"))
        chosen = next(row.name for row in explain(QUANTIZED_MATMUL, spec, Target("cpu")) if row.reason is None)
        spread = product(x, w, activations="int8")
    assert chosen == "reference"
    np.testing.assert_allclose(spread, exact, rtol=1e-5, atol=1e-4)

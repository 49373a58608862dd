"""The largest arrays of a compiled program are found, with the line of the model that makes them."""

import jax
import jax.numpy as jnp

from meshloom.core.buffers import largest_buffers, module_path, peak_bytes
from meshloom.core.program_report import compile_and_report

WIDTH, LAYERS, ROWS = 256, 6, 512


def report_of(function, *shapes):
    return compile_and_report(jax.jit(function).lower(*shapes), {"data": 1})[1]


def test_what_a_scan_saves_for_backward_is_found_with_its_line():
    def loss(x, w):
        def layer(x, w):
            with jax.named_scope("mlp"):
                return jnp.sin(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    shapes = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32), jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
    report = report_of(jax.grad(loss, argnums=1), *shapes)
    saved = LAYERS * ROWS * WIDTH * 4
    largest = [each for each in largest_buffers(report.module) if each.bytes == saved]
    # The inputs of every layer, for the gradient of its weight, and the cosine of every product.
    assert len(largest) == 2
    assert any("mlp" in each.operation and __file__ in each.source for each in largest)
    assert 0.7 < peak_bytes(report.module) / report.temporary_bytes < 1.3


def test_arrays_that_die_before_the_peak_are_not_in_it():
    def chain(x, w):
        for _ in range(8):
            x = jnp.sort(x @ w)  # a sort is never fused with the product
        return x

    square = jax.ShapeDtypeStruct((ROWS, ROWS), jnp.float32)
    report = report_of(chain, square, square)
    assert peak_bytes(report.module) <= 3 * ROWS * ROWS * 4


def test_only_scopes_of_the_model_are_in_a_path():
    operation = "jit(step)/while/body/eval_jaxpr/transpose(jvp(layers))/checkpoint/mlp/dot_general"
    assert module_path(operation) == "backward of layers/mlp/dot_general"
    assert module_path("jit(step)/jvp(unembed)/dot_general") == "unembed/dot_general"

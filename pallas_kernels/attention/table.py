"""The implementations of attention in order of preference, and both passes of one as a differentiable function."""

import functools

import jax

from meshloom.pallas_kernels.attention import (
    chunked,
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_tpu,
    mosaic_tpu_backward,
    reference,
    spread,
)
from meshloom.pallas_kernels.attention.kernel import Kernel, Scoring, row_products, sinks_gradient, with_sinks
from meshloom.pallas_kernels.attention.spec import Mask
from meshloom.pallas_kernels.dispatch import Implementation, as_one

ATTENTION = (
    Implementation(
        "mosaic_tpu",
        Kernel(mosaic_tpu.forward, mosaic_tpu_backward.backward, by_xla=False),
        lambda spec, target: mosaic_tpu.why_not(spec, target) or mosaic_tpu_backward.why_not(spread.of_a_device(spec)),
    ),
    Implementation(
        "mosaic_gpu",
        Kernel(mosaic_gpu.forward, mosaic_gpu_backward.backward, by_xla=False),
        mosaic_gpu.why_not,
    ),
    Implementation("chunked", Kernel(chunked.forward, chunked.backward), lambda spec, target: None),
    Implementation("reference", Kernel(reference.forward, reference.backward), lambda spec, target: None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(kernel: Kernel, scoring: Scoring, q, k, v, bias, sinks, mask: Mask):
    """The rows of `kernel`, with the sinks; differentiable in q, k, v, bias and sinks."""
    return _attend_fwd(kernel, scoring, q, k, v, bias, sinks, mask)[0]


def _attend_fwd(kernel: Kernel, scoring: Scoring, q, k, v, bias, sinks, mask: Mask):
    def attention(q, k, v, mask, bias):
        return kernel.forward(q, k, v, bias, mask, scoring, q.dtype)

    out, lse = as_one(attention, q, k, v, mask, bias)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return out, (q, k, v, bias, sinks, mask, out, lse)


def _attend_bwd(kernel: Kernel, scoring: Scoring, residuals, d_out):
    q, k, v, bias, sinks, mask, out, lse = residuals
    delta = row_products(out, d_out)
    dq, dk, dv, d_bias = kernel.backward(q, k, v, bias, mask, scoring, lse, delta, d_out, q.dtype)
    d_bias = None if bias is None else d_bias.astype(bias.dtype)
    d_sinks = None if sinks is None else sinks_gradient(sinks, lse, delta)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_bias, d_sinks, None


attend.defvjp(_attend_fwd, _attend_bwd)

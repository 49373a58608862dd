"""Products with quantized weights: one function for all formats, several implementations behind it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.qarray import QArray, expand
from meshloom.pallas_kernels.matmul.quantized.formats import FORMATS, quantize
from meshloom.pallas_kernels.matmul.quantized.mosaic_gpu import hopper_product_why_not, quantized_matmul_hopper
from meshloom.pallas_kernels.matmul.quantized.mosaic_tpu import mosaic_why_not, quantized_matmul_mosaic
from meshloom.pallas_kernels.matmul.quantized.reference import quantized_matmul_reference
from meshloom.pallas_kernels.matmul.quantized.spec import Activations, MatmulSpec
from meshloom.pallas_kernels.matmul.quantized.xla import quantized_matmul_xla, xla_why_not

__all__ = ["FORMATS", "QUANTIZED_MATMUL", "MatmulSpec", "quantize", "quantized_matmul"]

QUANTIZED_MATMUL = (
    Implementation("mosaic_tpu", quantized_matmul_mosaic, mosaic_why_not),
    Implementation("mosaic_gpu", quantized_matmul_hopper, hopper_product_why_not),
    Implementation("xla", quantized_matmul_xla, xla_why_not),
    Implementation("reference", quantized_matmul_reference, lambda spec, target: None),
)


@jax.named_scope("quantized_matmul")
def quantized_matmul(
    x: Float[Array, "*rows I"],
    w: QArray,
    *,
    activations: Activations | None = None,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "*rows O"]:
    """x W^T in small numbers; every row of x is rounded with scales of its own, its result independent of other rows.

    Differentiable in x, as if rows were not rounded: dx = dy W, with the numbers that w stands for. w is frozen.

    Args:
        w: `[O, I]` in any format of `quantize`.
        activations: what x is rounded to. "float" leaves it as it is; "int16" and "int8", with a scale per row, go with
            integer weights; "fp8" with float8 weights, its scales as far along a row as theirs; "mxfp4" and "nvfp4"
            with weights of that format. int16 loses next to nothing and takes up to twice as long as int8, whose loss
            shows where a row has outliers: on SmolLM2 the mean KL divergence from the float32 model is 0.005 with int16
            and 0.015 with int8 (benchmarks/int8_weights.py). None is "int16" with integer weights on a CPU, whose
            bfloat16 products of few rows are slow, and "float" otherwise.
        out_dtype: of the result; None is that of x.
        implementation: by name, for tests and benches; None chooses.
    Sources: Dettmers et al. 2022, LLM.int8(), section 2.1 (a scale per row of x and per row of w); DeepSeek-V3 report
        2024, section 3.3.2 (1 x 128 by 128 x 128 blocks in float8).
    Raises MeshloomError when the sizes of x and w differ, or the format of w does not go with `activations`.
    """
    target = Target.of_mesh()
    spec = MatmulSpec.of(x, w, activations, target)
    chosen = select("quantized_matmul", QUANTIZED_MATMUL, spec, target, implementation)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return apply(Static(chosen.run, spec.activations, spec.dtype, str(out_dtype)), x, w)


@dataclasses.dataclass(frozen=True)
class Static:
    """What shapes the program besides the arrays; `dtype` is that of x, `activations` what `run` is told of them."""

    run: Callable[..., Any]
    activations: str | int
    dtype: str
    out_dtype: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(static: Static, x: Float[Array, "*rows I"], w: QArray) -> Float[Array, "*rows O"]:
    """The product of one implementation, with its gradient."""
    return static.run(x, w, activations=static.activations).astype(static.out_dtype)


def _fwd(static: Static, x, w):
    return apply(static, x, w), w


def _bwd(static: Static, w: QArray, dy):
    """The product is one that XLA's CPU backend has a fast path for in bfloat16: neither side is transposed."""
    dtype = jnp.dtype(static.dtype)
    if w.scales.shape[1] == 1 and w.tensor_scale is None:
        dy, weight = dy * expand(w.scales, (w.shape[0], 1))[:, 0], w.values
    else:
        weight = w[...]
    dx = jnp.einsum("...o,oi->...i", dy.astype(dtype), weight.astype(dtype), preferred_element_type=jnp.float32)
    return dx.astype(dtype), None


apply.defvjp(_fwd, _bwd)

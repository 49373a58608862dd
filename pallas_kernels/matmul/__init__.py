"""Products with weights, plain or quantized."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.qarray import QArray, quantize
from meshloom.pallas_kernels.matmul.reference import quantized_matmul_reference
from meshloom.pallas_kernels.matmul.xla import quantized_matmul_xla

__all__ = ["QArray", "matmul", "quantize", "quantized_matmul"]

LONGEST_SUM = (2**31 - 1) // 128**2  # int32 holds the sum of this many products of two int8


@dataclasses.dataclass(frozen=True)
class MatmulSpec:
    """What the choice of an implementation may look at: shapes of x `[..., I]` and of the weight `[O, I]`."""

    x: tuple[int, ...]
    w: tuple[int, ...]


def _xla_why_not(spec: MatmulSpec, target: Target) -> str | None:
    return f"int32 overflows on more than {LONGEST_SUM} products" if spec.x[-1] > LONGEST_SUM else None


QUANTIZED_MATMUL = (
    Implementation("xla", quantized_matmul_xla, _xla_why_not),
    Implementation("reference", quantized_matmul_reference, lambda spec, target: None),
)


def quantized_matmul(
    x: Float[Array, "*rows I"],
    w: QArray,
    *,
    activations: Literal["int16", "int8"] = "int16",
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "*rows O"]:
    """x W^T in integers; every row of x is rounded with a scale of its own, its result independent of other rows.

    Args:
        w: `[O, I]`, int8 with a scale per row.
        activations: what x is rounded to. int16 loses next to nothing and takes up to twice as long as int8, whose
            loss shows where a row has outliers: on SmolLM2 the mean KL divergence from the float32 model is 0.005 with
            int16 and 0.015 with int8 (benchmarks/int8_weights.py).
        out_dtype: of the result; None is that of x.
        implementation: "xla" or "reference" for tests and benches; None chooses.
    Source: Dettmers et al. 2022, LLM.int8(), section 2.1 (vector-wise quantization).
    Raises MeshloomError when the sizes of x and w differ.
    """
    if x.shape[-1] != w.shape[-1]:
        raise MeshloomError(f"quantized_matmul: rows of x have {x.shape[-1]} numbers, rows of w {w.shape[-1]}")
    spec = MatmulSpec(x.shape, w.shape)
    chosen = select("quantized_matmul", QUANTIZED_MATMUL, spec, Target.of_mesh(), implementation)
    return chosen.run(x, w, activations=activations).astype(x.dtype if out_dtype is None else out_dtype)


def matmul(x: Float[Array, "*rows I"], w: Float[Array, "O I"] | QArray, *, out_dtype=None) -> Float[Array, "*rows O"]:
    """x W^T for a weight of either kind; accumulated and returned in `out_dtype`, None being the dtype of x."""
    if isinstance(w, QArray):
        return quantized_matmul(x, w, out_dtype=out_dtype)
    return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=out_dtype)

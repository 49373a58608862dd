"""Products with weights, plain or quantized."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized import quantize, quantized_matmul

__all__ = ["QArray", "matmul", "quantize", "quantized_matmul"]


def matmul(x: Float[Array, "*rows I"], w: Float[Array, "O I"] | QArray, *, out_dtype=None) -> Float[Array, "*rows O"]:
    """x W^T for a weight of either kind; accumulated and returned in `out_dtype`, None being the dtype of x."""
    if isinstance(w, QArray):
        return quantized_matmul(x, w, out_dtype=out_dtype)
    return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=out_dtype)

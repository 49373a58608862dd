"""What a quantized product means, in plain jnp."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.matmul.qarray import INT8, INT16, QArray, round_rows


def quantized_matmul_reference(x: Float[Array, "*rows I"], w: QArray, *, activations: str) -> Float[Array, "*rows O"]:
    """x rounded row by row, times w, with the integer sums taken exactly as far as float32 and int32 hold them."""
    values, scales = round_rows(x, INT16 if activations == "int16" else INT8)
    products = values.astype(jnp.float32)[..., None, :] * w.values.astype(jnp.float32)
    return jnp.sum(products, axis=-1) * scales * w.scales[..., 0]

"""What a quantized product means, in plain jnp."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized.spec import round_rows


def quantized_matmul_reference(x: Float[Array, "*rows I"], w: QArray, *, activations: str) -> Float[Array, "*rows O"]:
    """The numbers that the rounded rows stand for, times those of w, in float32."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if activations != "float":
        rows = round_rows(rows, activations, w.block[1])[...]
    weight = QArray(w.values, w.scales, jnp.float32, w.tensor_scale)[...]
    out = jnp.einsum("ri,oi->ro", rows, weight, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(*x.shape[:-1], w.shape[0])

"""The quantized product as XLA compiles it: int8 x int8 -> int32 between two roundings.

16-bit activations are two int8 products in one: the high bytes are rows of their own below which the low bytes stand.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.matmul.qarray import INT8, INT16, QArray, round_rows

# XLA's CPU backend runs an int8 product of 1 to 3 rows as a scalar loop: 49152 x 576 takes 37 ms at one row and 2.4 ms
# at four to eight.
LEAST_ROWS = 4


def quantized_matmul_xla(x: Float[Array, "*rows I"], w: QArray, *, activations: str) -> Float[Array, "*rows O"]:
    """As the reference, but for the order of float32 additions: integer sums are exact in any."""
    x_RI = x.reshape(-1, x.shape[-1])
    if activations == "int16":
        values, scales = round_rows(x_RI, INT16)
        high = (values + 128) >> 8
        high_sums, low_sums = jnp.split(_product(jnp.concatenate([high, values - (high << 8)]), w.values), 2)
        sums = 256 * high_sums + low_sums
    else:
        values, scales = round_rows(x_RI, INT8)
        sums = _product(values, w.values)
    return (sums * scales * w.scales[:, 0]).reshape(*x.shape[:-1], -1)


def _product(x: Int[Array, "R I"], w: Int[Array, "O I"]) -> Float[Array, "R O"]:
    """Exact sums of products of numbers that fit int8, rounded once to float32."""
    rows = x.shape[0]
    padded = jnp.pad(x.astype(jnp.int8), ((0, max(0, LEAST_ROWS - rows)), (0, 0)))
    sums = jax.lax.dot_general(padded, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums[:rows].astype(jnp.float32)

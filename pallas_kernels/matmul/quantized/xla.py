"""The quantized product as XLA compiles it, on any backend.

Integers are multiplied as int8 x int8 -> int32 between two roundings; 16-bit rows are two int8 products in one: the
high bytes are rows of their own below which the low bytes stand. Float8 values are multiplied as bfloat16 numbers.
Where scales run along the rows, the products of each group are summed apart and scaled. Rows that stay as they are
multiply the weights' numbers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.qarray import QArray, expand
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec, round_rows

LONGEST_SUM = (2**31 - 1) // 128**2  # int32 holds the sum of this many products of two int8
# XLA's CPU backend runs an int8 product of 1 to 3 rows as a scalar loop: 49152 x 576 takes 37 ms at one row and 2.4 ms
# at four to eight. bfloat16 products do the same: 4096 x 4096 takes 30 ms at one row and 6 at eight.
LEAST_ROWS = 4


def xla_why_not(spec: MatmulSpec, target: Target) -> str | None:
    """Sums that int32 or the layout of a mesh does not hold."""
    longest = spec.w[1] // spec.groups if spec.groups else 0
    if spec.activations in ("int8", "int16") and longest > LONGEST_SUM:
        return f"int32 overflows on more than {LONGEST_SUM} products"
    if spec.activations in ("int8", "int16", "fp8") and spec.groups > 1 and spec.spread:
        return "summing group by group would gather weights that are spread over devices"
    return None


def quantized_matmul_xla(x: Float[Array, "*rows I"], w: QArray, *, activations: str) -> Float[Array, "*rows O"]:
    """As the reference, but for the order of float32 additions; integer sums are exact in any."""
    rows = x.reshape(-1, x.shape[-1])
    if activations == "float":
        out = _unrounded(rows, w)
    elif activations in ("mxfp4", "nvfp4"):
        out = _block_scaled(round_rows(rows, activations, w.block[1]), w)
    else:
        out = _rounded(rows, w, activations)
    return out.reshape(*x.shape[:-1], w.shape[0])


def _unrounded(x: Float[Array, "R I"], w: QArray) -> Float[Array, "R O"]:
    """Scales of rows are applied to the sums, so that the weight's values are multiplied as they are, in x's dtype."""
    if w.scales.shape[1] > 1 or w.tensor_scale is not None:
        return _float_product(x, w[...].astype(x.dtype))
    return _float_product(x, w.values.astype(x.dtype)) * expand(w.scales, (w.shape[0], 1))[:, 0]


def _block_scaled(x: QArray, w: QArray) -> Float[Array, "R O"]:
    """XLA's own product of block-scaled operands, which GPUs from Blackwell on have in hardware."""
    out = jax.nn.scaled_matmul(x.values[None], w.values[None], x.scales[None], w.scales[None])[0]
    return out if w.tensor_scale is None else out * x.tensor_scale * w.tensor_scale


def _rounded(x: Float[Array, "R I"], w: QArray, activations: str) -> Float[Array, "R O"]:
    rounded = round_rows(x, activations, w.block[1])
    rows, groups = x.shape[0], w.scales.shape[1]
    values = _halves(rounded.values) if activations == "int16" else rounded.values

    def product(x, w):
        if activations == "fp8":
            return _float_product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
        sums = integer_product(x, w)
        return 256 * sums[:rows] + sums[rows:] if activations == "int16" else sums

    if groups == 1:
        return product(values, w.values) * rounded.scales * expand(w.scales, (w.shape[0], 1))[:, 0]
    return by_group(values, jnp.broadcast_to(rounded.scales, (rows, groups)), w, product)


def by_group(
    values: Array, scales: Float[Array, "R G"], w: QArray, product: Callable[[Array, Array], Array]
) -> Float[Array, "R O"]:
    """The sum over groups of `product` of the group's columns of `values` and of w, with the scales of both."""
    (rows, groups), (columns, width) = scales.shape, (w.shape[0], w.block[1])

    def add(total, group):
        at, x, x_scale, w_scale = group
        own = jax.lax.dynamic_slice_in_dim(w.values, at * width, width, 1)
        return total + product(x, own) * x_scale[:, None] * w_scale, None

    apart = values.reshape(-1, groups, width).swapaxes(0, 1)
    over = (jnp.arange(groups), apart, scales.T, expand(w.scales, (columns, groups)).T)
    return jax.lax.scan(add, jnp.zeros((rows, columns)), over)[0]


def _halves(values: Int[Array, "R I"]) -> Int[Array, "R+R I"]:
    """High bytes, and below them the low bytes, signed."""
    high = (values + 128) >> 8
    return jnp.concatenate([high, values - (high << 8)])


def integer_product(x: Int[Array, "R I"], w: Int[Array, "O I"]) -> Float[Array, "R O"]:
    """Exact sums of products of numbers that fit int8, rounded once to float32."""
    contracted = (((1,), (1,)), ((), ()))
    sums = jax.lax.dot_general(
        _padded(x.astype(jnp.int8)), w.astype(jnp.int8), contracted, preferred_element_type=jnp.int32
    )
    return sums[: x.shape[0]].astype(jnp.float32)


def _float_product(x: Float[Array, "R I"], w: Float[Array, "O I"]) -> Float[Array, "R O"]:
    """Float32 sums of products in the dtype of both."""
    rows = x if x.dtype == jnp.float32 else _padded(x)
    return jnp.einsum("ri,oi->ro", rows, w, preferred_element_type=jnp.float32)[: x.shape[0]]


def _padded(x: Array) -> Array:
    return jnp.pad(x, ((0, max(0, LEAST_ROWS - x.shape[0])), (0, 0)))

"""The formats of quantized weights, and how numbers are rounded to them.

A format is a type of small numbers and the block of a matrix that shares a scale. Every block's largest entry becomes
the format's largest number (or less than twice smaller, where scales are powers of two), so that nothing is cut off.

Sources: int8 and int4 symmetric, Dettmers et al. 2022 (LLM.int8()) and Frantar et al. 2023 (GPTQ, groups); float8 in
128 x 128 blocks, DeepSeek-V3 report 2024, section 3.3; MXFP4, OCP Microscaling Formats v1.0 (with scales rounded up, so
that no number saturates); NVFP4, NVIDIA 2025: float8 scales for 16 numbers below one float32 scale.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.matmul.qarray import QArray, expand

INT8 = 127  # largest value used; -128 is left out, so that negation is exact
INT4 = 7
INT16 = 127 * 256 + 127  # largest value of which both bytes, the low one signed, fit int8
_LARGEST_SCALE = 448.0  # of float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Format:
    """How a matrix is quantized.

    Attributes:
        values, scales: dtypes. Scales of float8_e4m3fn have a float32 scale for the whole matrix above them.
        largest: the value that the largest entry of a block becomes.
        rows, columns: that share a scale; None is all of the matrix.
        mantissa, least_exponent: of a floating-point `values`: digits after the point, and the exponent below which
            numbers lie evenly; None for integers.
    """

    name: str
    values: str
    scales: str
    largest: float | int
    rows: int | None
    columns: int | None
    mantissa: int | None = None
    least_exponent: int = 0


_E4M3 = {"mantissa": 3, "least_exponent": -6}
_E2M1 = {"mantissa": 1, "least_exponent": 0}
FORMATS = {
    each.name: each
    for each in (
        Format("int8", "int8", "float32", INT8, 1, None),
        Format("int4_32", "int4", "float32", INT4, 1, 32),
        Format("int4_64", "int4", "float32", INT4, 1, 64),
        Format("int4_128", "int4", "float32", INT4, 1, 128),
        Format("fp8", "float8_e4m3fn", "float32", 448.0, None, None, **_E4M3),
        Format("fp8_row", "float8_e4m3fn", "float32", 448.0, 1, None, **_E4M3),
        Format("fp8_block", "float8_e4m3fn", "float32", 448.0, 128, 128, **_E4M3),
        Format("mxfp4", "float4_e2m1fn", "float8_e8m0fnu", 6.0, 1, 32, **_E2M1),
        Format("nvfp4", "float4_e2m1fn", "float8_e4m3fn", 6.0, 1, 16, **_E2M1),
    )
}


def quantize(x: Float[Array, "*stack O I"], format: str = "int8", *, key: Any = None) -> QArray:
    """A matrix, or each of a stack, in small numbers. Blocks of zeros stay zeros.

    Args:
        format: "int8", a scale per row: |x - quantize(x)| <= max |row| / 254. "int4_32", "int4_64", "int4_128": a scale
            for that many numbers of a row, max |group| / 14. "fp8", "fp8_row", "fp8_block": float8_e4m3fn with one
            scale, one per row, or one per 128 x 128; |x| / 16. "mxfp4", "nvfp4": blocks of 32 and 16 numbers of a row;
            about max |block| / 4 and max |block| / 6.
        key: of jax.random; rounds up or down by chance, with x as the mean, instead of to the nearest.
    Raises MeshloomError for an unknown format, and when a block does not divide the matrix.
    """
    if format not in FORMATS:
        raise MeshloomError(f"quantize: no format {format!r}; there are {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    for size, block, side in ((x.shape[-2], chosen.rows, "rows"), (x.shape[-1], chosen.columns, "numbers of a row")):
        if block is not None and size % block:
            others = [name for name, each in FORMATS.items() if _divides(each, *x.shape[-2:])]
            raise MeshloomError(
                f"quantize: {format} has a scale for each {block} {side}, and {size} is no multiple of {block}; "
                f"formats for {x.shape[-2]} x {x.shape[-1]}: {', '.join(others)}"
            )
    return round_to(x, chosen, key)


def _divides(format: Format, rows: int, columns: int) -> bool:
    return rows % (format.rows or 1) == 0 and columns % (format.columns or 1) == 0


def round_to(x: Float[Array, "*stack O I"], format: Format, key: Any = None) -> QArray:
    """As `quantize`, to a format whose blocks divide the matrix."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    rows, columns = format.rows or x.shape[-2], format.columns or x.shape[-1]
    down, across = x.shape[-2] // max(rows, 1), x.shape[-1] // max(columns, 1)
    if rows == across == 1:
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0)
    else:
        blocks = jnp.abs(x).reshape(*x.shape[:-2], down, rows, across, columns)
        largest = jnp.max(blocks, axis=(-3, -1), initial=0.0)
    exact = largest / format.largest
    tensor_scale = None
    if format.scales == "float8_e8m0fnu":
        exact = _power_of_two_above(exact)
    elif format.scales == "float8_e4m3fn":
        tensor_scale = jnp.max(exact, axis=(-2, -1), keepdims=True, initial=0.0) / _LARGEST_SCALE
        exact = exact / jnp.where(tensor_scale > 0, tensor_scale, 1.0)
    scales = _kept(exact.astype(format.scales), format)
    whole = scales.astype(jnp.float32) * (1.0 if tensor_scale is None else tensor_scale)
    values = x / expand(jnp.where(whole > 0, whole, 1.0), x.shape)
    values = jnp.clip(_rounded(values, format, key), -format.largest, format.largest)
    return QArray(_kept(values.astype(format.values), format), scales, dtype, tensor_scale)


def _power_of_two_above(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The least power of two that is not smaller, of those that float8_e8m0fnu and float32 both hold; 1 for 0."""
    fraction, exponent = jnp.frexp(x)
    exponent = jnp.where(fraction == 0.5, exponent - 1, exponent)
    return jnp.where(x > 0, jnp.ldexp(1.0, jnp.clip(exponent, -126, 127)), 1.0)


def _rounded(values: Float[Array, "..."], format: Format, key: Any) -> Float[Array, "..."]:
    """To what the format has, by chance if there is a key; else integers, and numbers that a cast will round."""
    if key is None:
        return values if format.mantissa is not None else jnp.round(values)
    step: Any = 1.0
    if format.mantissa is not None:
        exponent = jnp.maximum(jnp.frexp(values)[1] - 1, format.least_exponent)
        step = jnp.ldexp(1.0, exponent - format.mantissa)
    return jnp.floor(values / step + jax.random.uniform(key, values.shape)) * step


def _kept(x: Array, format: Format) -> Array:
    """XLA takes float32 -> float8 -> float32 for a rounding it may leave out, unless something stands between."""
    return jax.lax.optimization_barrier(x) if format.mantissa is not None else x

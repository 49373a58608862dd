"""Quantized weights: small integers and the scales that turn them back into numbers.

A `QArray` is a pytree of two arrays of the same rank, so that it passes through jit, scan, donation and sharding as any
weight does, and a slice of a stack of them is one of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

INT8 = 127  # largest value used; -128 is left out, so that negation is exact
INT16 = 127 * 256 + 127  # largest value of which both bytes, the low one signed, fit int8


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True)
class QArray:
    """The matrix values * scales, or a stack of them.

    Attributes:
        values: int8 `[..., O, I]`.
        scales: float32 `[..., O, 1]`.
        dtype: floating-point type of the numbers it stands for.
    """

    values: Any  # arrays, or what a pytree may hold in their place: a sharding, a ShapeDtypeStruct
    scales: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, index: Any) -> Float[Array, "*rows I"]:
        """Rows, as numbers."""
        return (self.values[index].astype(jnp.float32) * self.scales[index]).astype(self.dtype)


def quantize(x: Float[Array, "*stack O I"]) -> QArray:
    """Symmetric int8 with a scale per row: |x - quantize(x)| <= max |row| / 254, and a row of zeros stays one."""
    values, scales = round_rows(x, INT8)
    return QArray(values.astype(jnp.int8), scales, x.dtype)


def round_rows(x: Float[Array, "*rows I"], largest: int) -> tuple[Int[Array, "*rows I"], Float[Array, "*rows 1"]]:
    """int32 values of at most `largest`, and float32 scales, one per row. A row's result depends on that row alone."""
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / largest
    return jnp.round(x / jnp.where(scales > 0, scales, 1.0)).astype(jnp.int32), scales

"""Quantized weights: small numbers and the scales that turn them back.

A `QArray` is a pytree of arrays of the same rank, so that it passes through jit, scan, donation and sharding as any
weight does, and a slice of a stack of them is one of them. What a scale covers follows from the shapes alone: each
dimension of the scales divides that of the values.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scales", "tensor_scale"), meta_fields=("dtype",)
)
@dataclasses.dataclass(frozen=True)
class QArray:
    """The matrix values * scales * tensor_scale, or a stack of them.

    Attributes:
        values: `[..., O, I]`, int8, int4, float8 or float4.
        scales: `[..., O / rows, I / columns]`, one for each block of rows x columns values (`block`); float32, or a
            float8 of which `tensor_scale` makes a number.
        dtype: floating-point type of the numbers it stands for.
        tensor_scale: float32 `[..., 1, 1]`, or None for 1.
    """

    values: Any  # arrays, or what a pytree may hold in their place: a sharding, a ShapeDtypeStruct
    scales: Any
    dtype: Any
    tensor_scale: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        (rows, columns), (down, across) = self.values.shape[-2:], self.scales.shape[-2:]
        return rows // max(down, 1), columns // max(across, 1)

    def __getitem__(self, index: Any) -> Float[Array, "*rows I"]:
        """Rows as numbers, by their position (or positions, or all with `...`); of a stack, whole matrices."""

        def at(part):
            if index is Ellipsis or isinstance(index, slice) or part.shape[0] == self.values.shape[0]:
                return part[index]
            return part[index // (self.values.shape[0] // part.shape[0])]

        values, scales = at(self.values).astype(jnp.float32), at(self.scales).astype(jnp.float32)
        if self.tensor_scale is not None:
            scales = scales * at(self.tensor_scale)
        return (values * expand(scales, values.shape)).astype(self.dtype)


def expand(scales: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The scale of each value of an array of `shape`, or what broadcasts to it."""
    if all(few in (1, many) for few, many in zip(scales.shape, shape, strict=True)):
        return scales
    apart = [part for few, many in zip(scales.shape, shape, strict=True) for part in (few, many // max(few, 1))]
    alone = [part for few in scales.shape for part in (few, 1)]
    return jnp.broadcast_to(scales.reshape(alone), apart).reshape(shape)

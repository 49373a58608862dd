"""What a grouped product means, group by group, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.grouped.spec import Kernel, bounds, in_rows

_EXACT = jax.lax.Precision.HIGHEST


def product(
    x: Float[Array, "M K"], w: Any, group_sizes: Int[Array, "E"], transposed: bool, target: Target
) -> Float[Array, "M N"]:
    """Every row times the weight of its group."""
    rows = x.shape[0]
    out = jnp.zeros((rows, w.shape[1 if transposed else 2]))
    for group, (first, end) in enumerate(zip(*bounds(group_sizes, rows), strict=True)):
        weight = w[group].astype(jnp.float32)
        y = jnp.dot(x.astype(jnp.float32), weight.T if transposed else weight, precision=_EXACT)
        out = jnp.where(in_rows(first, end, rows), y, out)
    return out.astype(jnp.result_type(x, w.dtype))


def outer(
    a: Float[Array, "M A"], b: Float[Array, "M B"], group_sizes: Int[Array, "E"], dtype: Any, target: Target
) -> Float[Array, "E A B"]:
    """a^T b over the rows of each group."""
    rows, sums = a.shape[0], []
    for first, end in zip(*bounds(group_sizes, rows), strict=True):
        own_a, own_b = (jnp.where(in_rows(first, end, rows), each.astype(jnp.float32), 0.0) for each in (a, b))
        sums.append(jnp.dot(own_a.T, own_b, precision=_EXACT))
    return jnp.stack(sums).astype(dtype)


REFERENCE = Kernel(product, outer)

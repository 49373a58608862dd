"""Training with products in small numbers: weights and rows are rounded on the way forward, gradients are not.

The gradient is that of the product without rounding ("straight-through"), so that the weights that are trained stay
floats and gather steps that are smaller than one step of the format.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.quantized import quantized_matmul
from meshloom.pallas_kernels.matmul.quantized.formats import quantize

# What rows are rounded to when the weights are in a format.
_ROWS = {"int8": "int8", "fp8": "fp8", "fp8_row": "fp8", "fp8_block": "fp8"}
# Rows and columns that are transposed as a unit.
TILE = 32


@jax.named_scope("quantized_training_matmul")
def quantized_training_matmul(
    x: Float[Array, "*rows I"],
    w: Float[Array, "O I"],
    format: Literal["int8", "fp8", "fp8_row", "fp8_block"] = "int8",
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    key: Any = None,
) -> Float[Array, "*rows O"]:
    """x W^T with both rounded on the way, in the dtype of x; differentiable in x and w as if nothing were rounded.

    Args:
        format: of the weights, as in `quantize`; rows are rounded to int8 or float8 with scales of their own.
        rounding: "stochastic" rounds the weights up or down by chance, with their values as the mean, so that sums over
            steps see what lies between two steps of the format. Rows are rounded to the nearest.
        key: of jax.random, for "stochastic"; another one for each product and step.
    Sources: Bengio et al. 2013, section 4 (straight-through); Gupta et al. 2015 (stochastic rounding); DeepSeek-V3
        report 2024, section 3.3 (fp8_block).
    Raises MeshloomError for another format or rounding, a key that is missing or unused, and as `quantize` does.
    """
    if format not in _ROWS:
        raise MeshloomError(f"quantized_training_matmul: no training in {format!r}; in {', '.join(_ROWS)}")
    if rounding not in ("nearest", "stochastic"):
        raise MeshloomError(f"quantized_training_matmul: rounding is 'nearest' or 'stochastic'; got {rounding!r}")
    if (key is None) == (rounding == "stochastic"):
        needed = "needs a key" if key is None else "takes no key"
        raise MeshloomError(f"quantized_training_matmul: rounding {rounding!r} {needed}")
    return _apply(_Static(format, Target.of_mesh().platform == "cpu"), x, w, key)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What shapes the program besides the arrays."""

    format: str
    on_cpu: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(static: _Static, x, w, key):
    return quantized_matmul(x, quantize(w, static.format, key=key), activations=_ROWS[static.format])


def _fwd(static: _Static, x, w, key):
    return _apply(static, x, w, key), (x, w)


def _bwd(static: _Static, residuals, dy):
    x, w = residuals
    dtype = x.dtype
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.astype(dtype).reshape(-1, w.shape[0])
    dx = jnp.einsum("ro,oi->ri", dy_rows, w.astype(dtype), preferred_element_type=jnp.float32)
    if static.on_cpu and dtype == jnp.bfloat16:
        rows = jnp.pad(rows, ((0, -rows.shape[0] % TILE), (0, 0)))
        dw = jnp.einsum("or,ri->oi", transposed(dy_rows), rows, preferred_element_type=jnp.float32)[: w.shape[0]]
    else:
        dw = jnp.einsum("ro,ri->oi", dy_rows, rows, preferred_element_type=jnp.float32)
    return dx.astype(dtype).reshape(x.shape), dw.astype(w.dtype), None


_apply.defvjp(_fwd, _bwd)


def transposed(a: Float[Array, "R O"]) -> Float[Array, "O2 R2"]:
    """The transpose in memory, with both sides padded with zeros to multiples of 32.

    XLA's CPU backend makes of a plain transpose another layout of the same array, and multiplies that in float32: 2,048
    rows, 1,024 x 2,816, bfloat16, take 205 ms then, and 97 ms when tiles were transposed before (83 ms forward).
    """
    down, across = (-(-size // TILE) for size in a.shape)
    a = jnp.pad(a, [(0, TILE * tiles - size) for tiles, size in zip((down, across), a.shape, strict=True)])
    tiles = a.reshape(down, TILE, across, TILE).transpose(2, 3, 0, 1)
    return jax.lax.optimization_barrier(tiles.reshape(across * TILE, down * TILE))

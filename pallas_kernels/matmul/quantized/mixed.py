"""W4Ax: int4 weights by rows of which most channels are int4 too, and the few with outliers int8.

Channels of x are put in an order, once, from a sample: those with the largest entries first. Blocks of 128 channels
have a scale of their own in each row; the first blocks, which hold all outliers, are rounded to int8, others to int4.
Weights are stored in that order, so that an outlier neither spoils the scale of other channels nor is cut.

Source: Liu et al. 2024, COMET, section 3 (fine-grained mixed-precision quantization, FMPQ).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized import MatmulSpec, Static, apply
from meshloom.pallas_kernels.matmul.quantized.formats import FORMATS, INT4, quantize, round_to
from meshloom.pallas_kernels.matmul.quantized.xla import by_group, integer_product, xla_why_not

BLOCK = 128
# A channel is an outlier from this many times the median channel's largest entry on.
OUTLIER = 6.0
_INT8 = dataclasses.replace(FORMATS["int8"], columns=BLOCK)
_INT4 = dataclasses.replace(_INT8, name="int4", largest=INT4)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight", "order"), meta_fields=("outlier_blocks",))
@dataclasses.dataclass(frozen=True)
class MixedWeight:
    """An int4 weight for rows of mixed precision.

    Attributes:
        weight: `[O, I]`, "int4_128", its channels in the order of `order`.
        order: int32 `[I]`, the channel of x at each position.
        outlier_blocks: how many of the first blocks of 128 channels are int8.
    """

    weight: QArray
    order: Any
    outlier_blocks: int


def quantize_mixed(
    w: Float[Array, "O I"], sample: Float[Array, "R I"], *, outlier_blocks: int | None = None
) -> MixedWeight:
    """A weight in int4, ordered for rows such as those of a sample.

    Args:
        sample: some rows that the weight will meet; not traced, since they decide on shapes.
        outlier_blocks: None is as many as hold the channels whose largest entry is more than 6 times the median
            channel's.
    Raises MeshloomError when I is no multiple of 128, the sample is empty, or there are fewer blocks than asked for.
    """
    if sample.shape[0] == 0:
        raise MeshloomError("quantize_mixed: the sample has no rows; it takes some that the weight will meet")
    weight_blocks = w.shape[1] // BLOCK
    largest = jnp.max(jnp.abs(sample.astype(jnp.float32)), axis=0)
    if outlier_blocks is None:
        outlier_blocks = -(-int(jnp.sum(largest > OUTLIER * jnp.median(largest))) // BLOCK)
    if not 0 <= outlier_blocks <= weight_blocks:
        raise MeshloomError(f"quantize_mixed: {outlier_blocks} outlier blocks of {weight_blocks}")
    order = jnp.argsort(-largest, stable=True).astype(jnp.int32)
    return MixedWeight(quantize(w[:, order], "int4_128"), order, outlier_blocks)


def mixed_matmul(
    x: Float[Array, "*rows I"], w: MixedWeight, *, out_dtype=None, implementation: str | None = None
) -> Float[Array, "*rows O"]:
    """x W^T with rows in int4 and, in the blocks with outliers, int8; a row's result depends on that row alone.

    Differentiable in x as if rows were not rounded; w is frozen.

    Args:
        out_dtype: of the result; None is that of x.
        implementation: "xla" or "reference", for tests and benches; None chooses.
    Raises MeshloomError when the sizes of x and w differ.
    """
    target = Target.of_mesh()
    spec = MatmulSpec.of(x, w.weight, "int8", target)
    chosen = select("mixed_matmul", MIXED_MATMUL, spec, target, implementation)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    ordered = jnp.take(x, w.order, axis=-1)
    return apply(Static(chosen.run, w.outlier_blocks, spec.dtype, str(out_dtype)), ordered, w.weight)


def round_mixed(x: Float[Array, "R I"], outlier_blocks: int) -> QArray:
    """Rows in int8 numbers, with a scale for each 128: up to 127 in the first blocks, up to 7 in the others."""
    split = outlier_blocks * BLOCK
    each_row = x[:, None, :]  # a stack of matrices of one row
    parts = round_to(each_row[..., :split], _INT8), round_to(each_row[..., split:], _INT4)
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, axis=-1)[:, 0], *parts)


def mixed_matmul_reference(x: Float[Array, "*rows I"], w: QArray, *, activations: int) -> Float[Array, "*rows O"]:
    """The numbers that the rounded rows stand for, times those of w, in float32; `activations` int8 blocks."""
    rows = round_mixed(x.reshape(-1, x.shape[-1]).astype(jnp.float32), activations)[...]
    weight = QArray(w.values, w.scales, jnp.float32)[...]
    out = jnp.einsum("ri,oi->ro", rows, weight, precision=jax.lax.Precision.HIGHEST)
    return out.reshape(*x.shape[:-1], w.shape[0])


def mixed_matmul_xla(x: Float[Array, "*rows I"], w: QArray, *, activations: int) -> Float[Array, "*rows O"]:
    """As the reference, block by block in exact integer sums; `activations` int8 blocks."""
    rows = round_mixed(x.reshape(-1, x.shape[-1]), activations)
    out = by_group(rows.values, rows.scales, w, integer_product)
    return out.reshape(*x.shape[:-1], w.shape[0])


MIXED_MATMUL = (
    Implementation("xla", mixed_matmul_xla, xla_why_not),
    Implementation("reference", mixed_matmul_reference, lambda spec, target: None),
)

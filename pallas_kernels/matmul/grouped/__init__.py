"""Rows sorted by group, each times the weight of its group: one function, several implementations behind it."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.grouped.mosaic_gpu import MOSAIC_GPU, hopper_grouped_why_not
from meshloom.pallas_kernels.matmul.grouped.mosaic_tpu import MOSAIC_TPU, mosaic_why_not
from meshloom.pallas_kernels.matmul.grouped.reference import REFERENCE
from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec, Kernel
from meshloom.pallas_kernels.matmul.grouped.xla import LOOP, RAGGED, loop_why_not
from meshloom.pallas_kernels.matmul.qarray import QArray

__all__ = ["GroupedSpec", "GroupedStatic", "grouped_matmul", "grouped_weight_gradient"]

GROUPED_MATMUL = (
    Implementation("mosaic_tpu", MOSAIC_TPU, mosaic_why_not),
    Implementation("mosaic_gpu", MOSAIC_GPU, hopper_grouped_why_not),
    Implementation("loop", LOOP, loop_why_not),
    Implementation("xla", RAGGED, lambda spec, target: None),
    Implementation("reference", REFERENCE, lambda spec, target: None),
)


@jax.named_scope("grouped_matmul")
def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E A B"] | QArray,
    group_sizes: Int[Array, "E"],
    *,
    transposed: bool = False,
    zeros: bool = True,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """The first `group_sizes[0]` rows of x times w[0], the next `group_sizes[1]` times w[1], and so on.

    Differentiable in x and w, to any mixture of dtypes; a quantized w is frozen: gradients go to x alone, through the
    numbers that w stands for, and int8 weights are multiplied as such, with x as it is.

    Args:
        w: `[E, K, N]`, or `[E, N, K]` if `transposed`, as weights of layers are stored; it is read as it lies.
        group_sizes: int32, not negative; groups may be empty. Rows past their sum give exactly zero and no gradient,
            whatever they hold, and groups end at the last row if they sum to more.
        zeros: without, results and gradients of rows past the groups' may hold anything, and a TPU writes none of them.
        implementation: by name, for tests and benches; None chooses.
    Returns:
        In the common dtype of x and w (that of its numbers, if quantized); sums are float32 on a TPU.
    Source: Gale et al. 2022, MegaBlocks, section 5 (products over ragged groups instead of padded batches).
    Raises MeshloomError when sizes differ, or the requested implementation declines.
    """
    return apply(_static(x, w, group_sizes, transposed, zeros, implementation), x, w, group_sizes)


@jax.named_scope("grouped_weight_gradient")
def grouped_weight_gradient(
    x: Float[Array, "M K"],
    w: Float[Array, "E A B"] | QArray,
    group_sizes: Int[Array, "E"],
    dy: Float[Array, "M N"],
    *,
    transposed: bool = False,
) -> Float[Array, "E A B"] | None:
    """Gradient of w, None for a quantized one, of `grouped_matmul(x, w, group_sizes)` by that of its result.

    For operations whose backward pass is written by hand; the gradient of x is a `grouped_matmul` of dy, with the other
    `transposed`. Raises MeshloomError as `grouped_matmul` does.
    """
    return _of_weight(_static(x, w, group_sizes, transposed, True, None), x, w, group_sizes, dy)


def _static(x, w, group_sizes, transposed: bool, zeros: bool, implementation: str | None) -> "GroupedStatic":
    target = Target.of_mesh()
    spec = GroupedSpec.of(x, w, group_sizes, transposed)
    kernel = select("grouped_matmul", GROUPED_MATMUL, spec, target, implementation).run
    if not zeros and kernel.own_rows is not None:
        kernel = dataclasses.replace(kernel, product=kernel.own_rows)
    return GroupedStatic(kernel, transposed, target)


@dataclasses.dataclass(frozen=True)
class GroupedStatic:
    """What shapes the program besides the arrays."""

    kernel: Kernel
    transposed: bool
    target: Target


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(static: GroupedStatic, x, w, group_sizes):
    """The product of one implementation, with its gradients."""
    return static.kernel.product(x, w, group_sizes, static.transposed, static.target)


def _fwd(static: GroupedStatic, x, w, group_sizes):
    return apply(static, x, w, group_sizes), (x, w, group_sizes)


def _bwd(static: GroupedStatic, residuals, dy):
    x, w, group_sizes = residuals
    dx = static.kernel.product(dy, w, group_sizes, not static.transposed, static.target).astype(x.dtype)
    return dx, _of_weight(static, x, w, group_sizes, dy), None


def _of_weight(static: GroupedStatic, x, w, group_sizes, dy):
    if isinstance(w, QArray):
        return None
    a, b = (dy, x) if static.transposed else (x, dy)
    return static.kernel.outer(a, b, group_sizes, w.dtype, static.target)


apply.defvjp(_fwd, _bwd)

"""Products that gather their rows, or scatter the sums of their results, over a mesh axis while they multiply.

In tensor parallelism with rows split as well, the first product of a pair gathers rows and the second scatters sums;
these functions take each shard as it arrives instead of waiting for all. Each is the other's derivative. They are
called inside `jax.shard_map`, on one device's arrays.

The kernels for TPUs come after the rings that XLA schedules, and run where they are asked for: their schedules are
known (docs/kernels.md), but they have not been timed beside XLA's.

Shape legend: n devices on the axis, r rows of one device, R = n r all rows, I contracted, O outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.collective import mosaic_tpu, mosaic_tpu_scatter, ring
from meshloom.pallas_kernels.matmul.collective.spec import CollectiveSpec

__all__ = ["all_gather_matmul", "matmul_reduce_scatter"]


def _gather_ring(x, w, axis):
    def visit(out, piece, first):
        return jax.lax.dynamic_update_slice_in_dim(out, ring.product(piece, w).astype(out.dtype), first, out.ndim - 2)

    shape = (*x.shape[:-2], jax.lax.axis_size(axis) * x.shape[-2], w.shape[0])
    return ring.gathered(x, axis, visit, _varying(jnp.zeros(shape, x.dtype), x, w))


def _gather_reference(x, w, axis):
    return ring.product(jax.lax.all_gather(x, axis, axis=x.ndim - 2, tiled=True), w).astype(x.dtype)


def _scatter_ring(x, w, axis):
    rows = x.shape[-2] // jax.lax.axis_size(axis)
    return ring.scattered(rows, axis, lambda first, count: ring.product(ring.rows_of(x, first, count), w), x.dtype)


def _scatter_reference(x, w, axis):
    whole = ring.product(x, w).astype(x.dtype)
    return jax.lax.psum_scatter(whole, axis, scatter_dimension=x.ndim - 2, tiled=True)


def _alone(spec: CollectiveSpec, target: Target) -> str | None:
    return "one device has no ring" if spec.devices == 1 else None


ALL_GATHER_MATMUL = (
    Implementation("ring", _gather_ring, _alone),
    Implementation("mosaic_tpu", mosaic_tpu.all_gather_matmul, mosaic_tpu.why_not),
    Implementation("reference", _gather_reference, lambda spec, target: None),
)
MATMUL_REDUCE_SCATTER = (
    Implementation("ring", _scatter_ring, _alone),
    Implementation("mosaic_tpu", mosaic_tpu_scatter.matmul_reduce_scatter, mosaic_tpu_scatter.why_not),
    Implementation("reference", _scatter_reference, lambda spec, target: None),
)


@jax.named_scope("all_gather_matmul")
def all_gather_matmul(
    x: Float[Array, "*batch r I"], w: Float[Array, "O I"], axis: str, *, implementation: str | None = None
) -> Float[Array, "*batch R O"]:
    """The rows of all devices along `axis`, in their order, times this device's w: all_gather(x) W^T.

    Differentiable in both, without keeping the gathered rows: the backward pass gathers them again as it scatters.

    Args:
        x, w: this device's rows and outputs.
        axis: of the mesh that `jax.shard_map` is manual over.
        implementation: by name, for tests and benches; None chooses.
    Returns:
        In x's dtype, of sums in float32.
    Source: Wang et al. 2023, Overlap Communication with Dependent Computation via Decomposition, section 4.
    Raises MeshloomError when sizes differ, or the requested implementation declines.
    """
    _check("all_gather_matmul", x.shape, w.shape)
    spec = CollectiveSpec(x.shape, w.shape, str(x.dtype), jax.lax.axis_size(axis), bool(_axes_of(x)))
    chosen = select("all_gather_matmul", ALL_GATHER_MATMUL, spec, Target.of_mesh(), implementation)
    return _gather_matmul(axis, chosen.run, _varying(x, w), _varying(w, x))


@jax.named_scope("matmul_reduce_scatter")
def matmul_reduce_scatter(
    x: Float[Array, "*batch R I"], w: Float[Array, "O I"], axis: str, *, implementation: str | None = None
) -> Float[Array, "*batch r O"]:
    """This device's rows of the sum over all devices along `axis` of x W^T, each with its part of I.

    Differentiable in both. Partial sums travel in x's dtype, each made in float32.

    Args:
        x, w: this device's part of what is contracted, for all rows and outputs.
        axis, implementation: as in `all_gather_matmul`.
    Returns:
        In x's dtype.
    Source: Wang et al. 2023, Overlap Communication with Dependent Computation via Decomposition, section 4.
    Raises MeshloomError when sizes differ, rows do not divide over the axis, or the requested implementation declines.
    """
    devices = jax.lax.axis_size(axis)
    _check("matmul_reduce_scatter", x.shape, w.shape)
    if x.shape[-2] % devices:
        raise MeshloomError(f"matmul_reduce_scatter: {x.shape[-2]} rows do not divide over {axis} = {devices} devices")
    spec = CollectiveSpec(x.shape, w.shape, str(x.dtype), devices, bool(_axes_of(x)))
    chosen = select("matmul_reduce_scatter", MATMUL_REDUCE_SCATTER, spec, Target.of_mesh(), implementation)
    return _matmul_scatter(axis, chosen.run, _varying(x, w), _varying(w, x))


def _check(name: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    if len(x) < 2:
        raise MeshloomError(f"{name}: x has shape {x}; rows are its last dimension but one")
    if x[-1] != w[-1]:
        raise MeshloomError(f"{name}: rows of x have {x[-1]} numbers, rows of w {w[-1]}")


def _axes_of(x) -> frozenset[str]:
    """The axes over which x varies, where `shard_map` follows that; none where it does not."""
    return jax.typeof(x).manual_axis_type.varying


def _varying(x, *others):
    """x as varying over every axis that it or the others do; its gradient is then the sum over the new ones."""
    missing = frozenset().union(*map(_axes_of, others)) - _axes_of(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_matmul(axis, run, x, w):
    return run(x, w, axis)


def _gather_matmul_bwd(axis, run, residuals, dy):
    x, w = residuals
    count = x.shape[-2]

    def visit(dw, piece, first):
        return dw + ring.outer(ring.rows_of(dy, first, piece.shape[-2]), piece)

    dx = ring.scattered(count, axis, lambda first, rows: ring.product(ring.rows_of(dy, first, rows), w.T), x.dtype)
    dw = ring.gathered(x, axis, visit, _varying(jnp.zeros(w.shape, jnp.float32), x, w))
    return dx, dw.astype(w.dtype)


_gather_matmul.defvjp(lambda axis, run, x, w: (run(x, w, axis), (x, w)), _gather_matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul_scatter(axis, run, x, w):
    return run(x, w, axis)


def _matmul_scatter_bwd(axis, run, residuals, dy):
    x, w = residuals

    def visit(carry, piece, first):
        dx, dw = carry
        dx = jax.lax.dynamic_update_slice_in_dim(dx, ring.product(piece, w.T).astype(dx.dtype), first, dx.ndim - 2)
        return dx, dw + ring.outer(piece, ring.rows_of(x, first, piece.shape[-2]))

    nothing = jnp.zeros(x.shape, x.dtype), jnp.zeros(w.shape, jnp.float32)
    dx, dw = ring.gathered(dy, axis, visit, tuple(_varying(each, x, w) for each in nothing))
    return dx, dw.astype(w.dtype)


_matmul_scatter.defvjp(lambda axis, run, x, w: (run(x, w, axis), (x, w)), _matmul_scatter_bwd)

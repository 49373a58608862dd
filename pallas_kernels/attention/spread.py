"""Kernels that XLA cannot split, on a mesh: every device runs them on its own rows of the batch and its own heads.

Rows lie over the axes that split batches, heads over the axis that splits weights, as in every layout that is derived;
where the arrays lie otherwise XLA moves them first. Kv heads that do not divide are repeated until they do, so that a
device has those that its heads read. A kernel that is a ring takes the tokens of a device as well, where an axis splits
those. Nothing else is summed over devices but the gradient of a bias that rows or heads share: attention has no other
such sum in either pass. Both passes are mapped apart, so none is ever transposed.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from meshloom.core.topology import BATCH_AXES
from meshloom.pallas_kernels.attention.kernel import Kernel
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask
from meshloom.pallas_kernels.dispatch import may_be_spread

_HEADS, TOKENS = "tensor", "context"


def token_ways() -> int:
    """Over how many devices the mesh in scope splits the tokens of a row."""
    return jax.sharding.get_abstract_mesh().shape.get(TOKENS, 1)


def of_a_device(spec: AttentionSpec) -> AttentionSpec:
    """The same call for one step of a ring, where the mesh in scope leaves it to us to spread tokens."""
    ways = token_ways() if may_be_spread() else 1
    q, kv = ((rows, -(-length // ways), *rest) for rows, length, *rest in (spec.q_shape, spec.kv_shape))
    return dataclasses.replace(spec, q_shape=q, kv_shape=kv)


def why_not(spec: AttentionSpec) -> str | None:
    """Why a kernel cannot be spread over the mesh in scope for arrays of these shapes, or None."""
    if token_ways() == 1:
        return _why_not_by_rows_and_heads(spec)
    reason = ring_why_not(spec)
    return None if reason is None else f"tokens lie over the context axis, and no ring can be made: {reason}"


def ring_why_not(spec: AttentionSpec, chunks: int = 1) -> str | None:
    """Why attention cannot be a ring over the mesh in scope whose devices hold so many chunks each, or None."""
    ways = token_ways()
    if ways == 1:
        return "no mesh in scope spreads tokens"
    if TOKENS in jax.sharding.get_abstract_mesh().manual_axes:
        return "inside shard_map over the tokens, ring_attention is to be called by its name"
    for what, length in (("queries", spec.q_shape[1]), ("keys", spec.kv_shape[1])):
        if length % (ways * chunks):
            return f"{length} {what} do not divide into {ways * chunks} chunks"
    return _why_not_by_rows_and_heads(spec)


def _why_not_by_rows_and_heads(spec: AttentionSpec) -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return "XLA does not split kernels, and only some axes of the mesh are inside shard_map"
    ways, heads = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES), mesh.shape.get(_HEADS, 1)
    if spec.q_shape[0] % ways:
        return f"{spec.q_shape[0]} rows of the batch do not divide over {ways} devices"
    if spec.q_shape[2] % heads:
        return f"{spec.q_shape[2]} heads do not divide over {heads} devices"
    return None


def kv_copies(kv_heads: int, devices: int) -> int:
    """How often kv heads are repeated, each in place, to divide over devices that the query heads divide over."""
    return math.lcm(kv_heads, devices) // kv_heads


def sum_of_copies(x: Float[Array, "B S copies H"], kv_heads: int) -> Float[Array, "B S K H"]:
    """Gradients of kv heads from those of their copies."""
    return jnp.sum(x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]), axis=3)


def over_mesh(kernel: Kernel, *, tokens: str | None = None) -> Kernel:
    """The same kernel over the mesh in scope, for shapes that `why_not` has nothing against.

    Args:
        tokens: the axis over which the kernel is a ring; without one every device has all tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1) or None
    heads = _HEADS if mesh.shape.get(_HEADS, 1) > 1 else None
    ways = mesh.shape.get(_HEADS, 1)
    array, statistics = PartitionSpec(rows, tokens, heads), PartitionSpec(rows, heads, tokens)

    def repeated(x: Any) -> Any:
        copies = kv_copies(x.shape[2], ways)
        return x if copies == 1 else jnp.repeat(x, copies, axis=2)

    def of_mask(mask: Mask) -> Mask:
        ids = PartitionSpec(rows, tokens)
        specs = {"q_segments": ids, "kv_segments": ids, "kv_lens": PartitionSpec(rows)}
        held = {name: spec for name, spec in specs.items() if getattr(mask, name) is not None}
        offset = None if mask.offset is None else PartitionSpec()
        return dataclasses.replace(mask, **held, offset=offset)

    def mapped(run: Any, mask: Mask, inputs: tuple[Any, ...], outputs: Any) -> Any:
        # The bodies hold Pallas calls, which do not say over which axes their results vary.
        return jax.shard_map(run, mesh=mesh, in_specs=(*inputs, of_mask(mask)), out_specs=outputs, check_vma=False)

    def of_bias(bias: Any) -> PartitionSpec | None:
        if bias is None:
            return None
        return PartitionSpec(rows if bias.shape[0] > 1 else None, heads if bias.shape[1] > 1 else None, tokens)

    def axes_sharing(bias: Any) -> tuple[str, ...]:
        """Those over which devices have the same part of the bias, for other rows or heads."""
        if bias is None:
            return ()
        of_rows, of_heads = rows or (), () if heads is None else (heads,)
        return (of_rows if bias.shape[0] == 1 else ()) + (of_heads if bias.shape[1] == 1 else ())

    def forward(q, k, v, bias, mask, scoring, dtype):
        def run(q, k, v, bias, mask):
            return kernel.forward(q, k, v, bias, mask, scoring, dtype)

        inputs = (array, array, array, of_bias(bias))
        return mapped(run, mask, inputs, (array, statistics))(q, repeated(k), repeated(v), bias, mask)

    def backward(q, k, v, bias, mask, scoring, lse, delta, d_out, dtype):
        kv_heads = k.shape[2]
        copied, sharing = kv_copies(kv_heads, ways) > 1, axes_sharing(bias)

        def run(q, k, v, bias, lse, delta, d_out, mask):
            own = jnp.float32 if copied else dtype
            *gradients, d_bias = kernel.backward(q, k, v, bias, mask, scoring, lse, delta, d_out, own)
            return *gradients, jax.lax.psum(d_bias, sharing) if sharing else d_bias

        inputs = (array, array, array, of_bias(bias), statistics, statistics, array)
        gradients = mapped(run, mask, inputs, (array, array, array, of_bias(bias)))
        dq, dk, dv, d_bias = gradients(q, repeated(k), repeated(v), bias, lse, delta, d_out, mask)
        if copied:
            dq, dk, dv = (x.astype(dtype) for x in (dq, sum_of_copies(dk, kv_heads), sum_of_copies(dv, kv_heads)))
        return dq, dk, dv, d_bias

    return Kernel(forward, backward)

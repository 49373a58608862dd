"""Kernels that XLA cannot split, on a mesh: every device runs them on its own rows of the batch and its own heads.

Rows lie over the axes that split batches, heads over the axis that splits weights, as in every layout that is derived;
where the arrays lie otherwise XLA moves them first. Nothing is summed over devices: attention has no such sum in either
pass. Both passes are mapped apart, so none is ever transposed.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from meshloom.pallas_kernels.attention.kernel import Kernel
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask

_ROWS, _HEADS, _TOKENS = ("data", "fsdp"), "tensor", "context"


def why_not(spec: AttentionSpec) -> str | None:
    """Why a kernel cannot be spread over the mesh in scope for arrays of these shapes, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return "XLA does not split kernels, and only some axes of the mesh are inside shard_map"
    if mesh.shape.get(_TOKENS, 1) > 1:
        return "tokens lie over the context axis"
    ways, heads = math.prod(mesh.shape.get(axis, 1) for axis in _ROWS), mesh.shape.get(_HEADS, 1)
    if spec.q_shape[0] % ways:
        return f"{spec.q_shape[0]} rows of the batch do not divide over {ways} devices"
    if spec.kv_shape[2] % heads:
        return f"{spec.kv_shape[2]} kv heads do not divide over {heads} devices"
    return None


def over_mesh(kernel: Kernel) -> Kernel:
    """The same kernel over the mesh in scope, for shapes that `why_not` has nothing against; without a bias."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in _ROWS if mesh.shape.get(axis, 1) > 1) or None
    heads = _HEADS if mesh.shape.get(_HEADS, 1) > 1 else None
    array, statistics = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)

    def of_mask(mask: Mask) -> Mask:
        by_rows = {name: PartitionSpec(rows) for name in ("q_segments", "kv_segments", "kv_lens")}
        held = {name: spec for name, spec in by_rows.items() if getattr(mask, name) is not None}
        offset = None if mask.offset is None else PartitionSpec()
        return dataclasses.replace(mask, **held, offset=offset)

    def mapped(run: Any, mask: Mask, inputs: tuple[Any, ...], outputs: Any) -> Any:
        # The bodies hold Pallas calls, which do not say over which axes their results vary.
        return jax.shard_map(run, mesh=mesh, in_specs=(*inputs, of_mask(mask)), out_specs=outputs, check_vma=False)

    def forward(q, k, v, bias, mask, scoring, dtype):
        def run(q, k, v, mask):
            return kernel.forward(q, k, v, bias, mask, scoring, dtype)

        return mapped(run, mask, (array, array, array), (array, statistics))(q, k, v, mask)

    def backward(q, k, v, bias, mask, scoring, lse, delta, d_out, dtype):
        def run(q, k, v, lse, delta, d_out, mask):
            return kernel.backward(q, k, v, bias, mask, scoring, lse, delta, d_out, dtype)[:3]

        inputs = (array, array, array, statistics, statistics, array)
        return *mapped(run, mask, inputs, (array, array, array))(q, k, v, lse, delta, d_out, mask), None

    return Kernel(forward, backward)

"""Paged attention over a mesh: every device runs a kernel on its own heads and all rows, and nothing is summed."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.pages import KVPages, Ragged
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import may_be_spread

_HEADS = "tensor"


def spread_why_not(spec: PagedSpec) -> str | None:
    """Why a kernel cannot have each device's heads, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if may_be_spread() and mesh.manual_axes:
        return "XLA does not split kernels, and only some axes of the mesh are inside shard_map"
    shards, devices = spec.pages_shape[1], mesh.shape.get(_HEADS, 1) if may_be_spread() else 1
    if shards != devices:
        return f"the cache's kv heads are in {shards} shard(s), for {devices} device(s) of the {_HEADS} axis"
    return None


def on_own_heads(
    attend: Callable[..., Any],
    q: Float[Array, "T N H"],
    pages: KVPages,
    ragged: Ragged,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "T N H"]:
    """`attend(q, pages, ragged, sinks)`; on a mesh with a device's query heads beside the kv heads that they read."""
    if not may_be_spread():
        return attend(q, pages, ragged, sinks)
    mesh = jax.sharding.get_abstract_mesh()
    heads = _HEADS if mesh.shape.get(_HEADS, 1) > 1 else None
    of_heads, everywhere = PartitionSpec(None, heads), PartitionSpec()
    # The body holds a Pallas call, which does not say over which axes its results vary.
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(of_heads, of_heads, everywhere, PartitionSpec(heads)),
        out_specs=of_heads,
        check_vma=False,
    )(q, pages, ragged, sinks)

"""`derive`: from a module and a mesh to a layout, by tracing alone.

No parameter name, annotation or rule of the user's takes part. The way is `trace` (what the program does to
dimensions), `roles` (what each dimension is for), `rules` (which are split over what).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import linen, nnx
from jax.sharding import AbstractMesh, Mesh

from meshloom.core.errors import ShardingError
from meshloom.core.topology import SERVED_STORE_AXES, STORE_AXES
from meshloom.sharding.convolutions import miscompiled
from meshloom.sharding.layout import Layout, automatic
from meshloom.sharding.roles import infer
from meshloom.sharding.rules import decide
from meshloom.sharding.trace import trace


def derive(
    module: nnx.Module | linen.Module, mesh: Mesh | AbstractMesh, *example_inputs: Any, **keywords: Any
) -> Layout:
    """A PartitionSpec for every parameter of `module`, derived from its forward pass.

    Args:
        module: any `nnx.Module`, concrete or abstract (`nnx.eval_shape(lambda: Module(...))`), or any `linen.Module`,
            whose specs are a pytree like the `params` that its `init` returns.
        mesh: a mesh over any of the axes of `core.topology.AXES`, in any order; sizes of 1 are fine.
        example_inputs: what the module is called with: arrays, `jax.ShapeDtypeStruct`s or pytrees of them, the batch
            first. Only shapes and dtypes matter, not whether they divide over the mesh; sizes of 1 tell nothing, so
            prefer a batch and length of 2 or more. Python flags and None stay constants. Default:
            `module.example_inputs()` where the module has that.
        keywords: passed to the module by name, e.g. `deterministic=True`.
    Raises:
        ShardingError: an unknown mesh axis, no example inputs, or a module that cannot be traced with them.
    """
    return _derived(module, mesh, example_inputs, keywords, STORE_AXES)


def derive_served(module: nnx.Module, mesh: Mesh | AbstractMesh, *example_inputs: Any) -> Layout:
    """As `derive`, for a module that is served: what does not belong to an expert is whole over `expert`."""
    return _derived(module, mesh, example_inputs, {}, SERVED_STORE_AXES)


def _derived(
    module: nnx.Module | linen.Module,
    mesh: Mesh | AbstractMesh,
    example_inputs: Sequence[Any],
    keywords: Mapping[str, Any],
    storing: Collection[str],
) -> Layout:
    mesh = automatic(mesh)
    if not example_inputs:
        if not hasattr(module, "example_inputs"):
            raise ShardingError(
                f"{type(module).__name__} has no example_inputs(): pass what it is called with, e.g. "
                "derive(module, mesh, jax.ShapeDtypeStruct((8, 128), jnp.int32)) for token ids [batch, length]"
            )
        example_inputs = module.example_inputs()
    program = trace(module, example_inputs, keywords)
    rows, kv_heads_axis = decide(program, infer(program), dict(mesh.shape), storing)
    wrong = miscompiled(program, rows, dict(mesh.shape))
    return Layout(mesh, rows, kv_heads_axis, dict(program.unknown), program.treedef, wrong)

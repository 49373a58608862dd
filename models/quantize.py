"""Quantized weights in place of a model's own: a quarter of the memory of float32, and on a CPU up to twice the speed.

Every matrix that is multiplied with becomes a `QArray`, experts and the embedding table included; norms, biases and
routers stay: a router is small, and a rounded score may send a token to another expert. A quantized model computes and
serves as before, but cannot be saved or trained.
"""

from collections.abc import Iterator

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.errors import ModelError
from meshloom.models.decoder import Decoder, Embedding
from meshloom.models.layers import ExpertWeights, Linear, MoE
from meshloom.pallas_kernels import QArray, quantize


def quantize_weights(module: nnx.Module) -> nnx.Module:
    """`module` with int8 weights, changed in place and returned; each weight is freed when its int8 form is made.

    Weights may be spread over a mesh: their int8 values stay where they are.

    Raises:
        ModelError: what `why_not` says.
    """
    if reason := why_not(module):
        raise ModelError(f"int8 weights: {reason}; load this model without quantize")
    convert = jax.jit(quantize)
    for node in _matrices(module):
        node.weight = nnx.Param(jax.block_until_ready(convert(node.weight.get_value())))
    return module


def quantize_abstract(module: nnx.Module) -> nnx.Module:
    """What `quantize_weights` would make of a module whose weights are shapes with shardings; changed in place.

    Raises:
        ModelError: what `why_not` says.
    """
    if reason := why_not(module):
        raise ModelError(f"int8 weights: {reason}; plan for this model without them")

    def placed(x: jax.ShapeDtypeStruct, like: NamedSharding) -> jax.ShapeDtypeStruct:
        # Scales have a row's place and no columns.
        spec = PartitionSpec(*(axis if size > 1 else None for axis, size in zip(like.spec, x.shape, strict=False)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(like.mesh, spec))

    for node in _matrices(module):
        weight = node.weight.get_value()
        small = jax.eval_shape(quantize, weight)
        node.weight = nnx.Param(jax.tree.map(lambda x, like=weight.sharding: placed(x, like), small))
    return module


def _matrices(module: nnx.Module) -> Iterator[Linear | Embedding | ExpertWeights]:
    """What holds a weight that is quantized."""
    nodes = [node for _, node in nnx.iter_graph(module)]
    routers = [node.router for node in nodes if isinstance(node, MoE)]
    for node in nodes:
        if isinstance(node, Linear | Embedding | ExpertWeights) and not any(node is router for router in routers):
            yield node


def why_not(module: nnx.Module) -> str | None:
    """Why the weights of a module cannot be quantized, or None."""
    if not isinstance(module, Decoder):
        return f"only decoders have them, not a {type(module).__name__}"
    return None


def is_quantized(module: nnx.Module) -> bool:
    """Whether any of its weights is quantized."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, QArray))
    return any(isinstance(leaf, QArray) for leaf in leaves)

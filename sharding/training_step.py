"""A module's training step as a module: forward and backward in one program, to be traced like any other.

Its results are the arrays saved between the two and the gradients, which is what costs are read from. It computes no
loss: its FLOPs are not counted, and any cotangent of the right shape makes the same program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class TrainingStep(nnx.Module):
    """Forward and backward of a module: what is saved between them, and the gradients of its parameters."""

    def __init__(self, module: nnx.Module):
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        graphdef, *states = nnx.split(self.module, nnx.Param, ...)
        parameters, rest = states

        def forward(parameters: Any) -> list[Any]:
            out = nnx.merge(graphdef, parameters, rest)(*inputs)
            return [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        out, backward = jax.vjp(forward, parameters)
        # Any cotangent that depends on the inputs will do: only shapes are read.
        (gradients,) = backward(out)
        return jax.tree.leaves(backward), jax.tree.leaves(gradients)


def in_dtype(module: nnx.Module, dtype: Any) -> nnx.Module:
    """The abstract module with floating parameters in the dtype of the computation."""
    graphdef, *states = nnx.split(nnx.eval_shape(lambda: module), nnx.Param, ...)
    parameters, rest = states

    def cast(leaf: Any) -> Any:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(cast, parameters), rest)

"""Fresh weights for an abstract module, drawn where they will stay."""

import functools
from typing import Any

import jax
from flax import nnx


def random_weights(module: nnx.Module, *, seed: int, shardings: Any = None) -> nnx.Module:
    """A concrete copy of the abstract `module` with weights drawn by its own constructor from `seed`.

    Args:
        shardings: pytree of `NamedSharding` like `nnx.state(module, nnx.Param)`; every device draws only its part.
    """
    graphdef, state = nnx.split(module)
    dtype = next(iter(nnx.to_flat_state(state)))[1].dtype
    kind: Any = type(module)
    make = functools.partial(kind, module.config, param_dtype=dtype)
    if shardings is None:
        return make(rngs=nnx.Rngs(seed))  # one small program per shape; all in one takes ten times as long to compile

    def draw() -> Any:
        return nnx.state(make(rngs=nnx.Rngs(seed)), nnx.Param)

    return nnx.merge(graphdef, jax.jit(draw, out_shardings=shardings)())

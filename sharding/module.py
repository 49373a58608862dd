"""A Flax module as a pure function of its parameters: what tracing needs to know of NNX and of Linen, and nothing else.

Nothing is run and no weight is allocated: Linen's `init` is traced for the shapes of its variables.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen, nnx

from meshloom.core.errors import ShardingError


@dataclasses.dataclass(frozen=True)
class Pure:
    """`apply(parameters, rest, *inputs)` is the module's forward pass.

    Attributes:
        name: of the module's class.
        parameters: abstract, as the module keeps them: `nnx.state(module, nnx.Param)`, or Linen's params.
        rest: every other variable, abstract: batch statistics, random keys, caches.
        inputs: leaves of the inputs that are arrays, abstract; the others (flags, names) are constants of `apply`.
    """

    name: str
    parameters: Any
    rest: Any
    inputs: list[jax.ShapeDtypeStruct]
    apply: Callable[..., Any]


def pure(module: nnx.Module | linen.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Pure:
    """The forward pass of `module` called with `inputs` and `keywords`: arrays, abstract arrays, pytrees and constants.

    Raises:
        ShardingError: not a Flax module, or Linen's `init` fails on these inputs.
    """
    leaves, treedef = jax.tree.flatten((tuple(inputs), dict(keywords)))
    places = [index for index, leaf in enumerate(leaves) if is_array(leaf)]

    def restored(arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        filled = list(leaves)
        for index, array in zip(places, arrays, strict=True):
            filled[index] = array
        return jax.tree.unflatten(treedef, filled)

    arrays = [abstract(leaves[index]) for index in places]
    if isinstance(module, nnx.Module):
        return _nnx(module, arrays, restored)
    if isinstance(module, linen.Module):
        return _linen(module, arrays, restored)
    raise ShardingError(
        f"a layout is derived for a flax.nnx.Module or a flax.linen.Module; got {type(module).__name__}. "
        "Wrap other programs: an nnx.Module that holds the weights as nnx.Param and calls the program in __call__"
    )


def is_array(leaf: Any) -> bool:
    """Whether tracing makes an argument of it; all else is a constant."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def abstract(leaf: Any) -> Any:
    """Shape and dtype of an array, anything else as it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf


def untraceable(name: str, arrays: Sequence[Any], error: Exception) -> ShardingError:
    """Why a module cannot be traced, and what would work."""
    shapes = ", ".join(f"{each.dtype}{list(each.shape)}" for each in arrays)
    if isinstance(error, jax.errors.ConcretizationTypeError | jax.errors.TracerArrayConversionError):
        hint = (
            "Its Python code decides by the values of an array, which a compiled program cannot do: use jnp.where or "
            "jax.lax.cond there, or pass a Python flag (True, not jnp.array(True)), which stays a constant"
        )
    else:
        hint = (
            "Pass example inputs as the module is called in training, e.g. "
            "derive(module, mesh, jax.ShapeDtypeStruct((8, 128), jnp.int32)) for token ids [batch, length], "
            "and flags such as train=False by name"
        )
    return ShardingError(f"{name} cannot be traced with inputs ({shapes}): {error}. {hint}")


def _nnx(module: nnx.Module, arrays: list[Any], restored: Callable[..., Any]) -> Pure:
    graphdef, *states = nnx.split(module, nnx.Param, ...)
    parameters, rest = jax.tree.map(abstract, states)

    def apply(parameters: Any, rest: Any, *given: Any) -> Any:
        args, keywords = restored(given)
        return nnx.merge(graphdef, parameters, rest)(*args, **keywords)

    return Pure(type(module).__name__, parameters, rest, arrays, apply)


def _linen(module: linen.Module, arrays: list[Any], restored: Callable[..., Any]) -> Pure:
    if module.scope is not None:  # bound to variables of its own
        module, _ = module.unbind()
    name = type(module).__name__
    key = jax.eval_shape(lambda: jax.random.key(0))

    def init(key: Any, given: Sequence[Any]) -> Any:
        args, keywords = restored(given)
        return module.init(key, *args, **keywords)

    try:
        variables = dict(jax.eval_shape(init, key, arrays))
    except Exception as error:
        raise untraceable(name, arrays, error) from error
    parameters = variables.pop("params", {})

    def apply(parameters: Any, rest: Any, *given: Any) -> Any:
        key, collections = rest
        args, keywords = restored(given)
        # Dropout and its like draw from the stream `params`, the default, when they have none of their own.
        every = {"params": parameters, **collections}
        return module.apply(every, *args, rngs={"params": key}, mutable=list(collections), **keywords)

    return Pure(name, parameters, (key, variables), arrays, apply)

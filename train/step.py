"""One optimizer step as one compiled program, on one device or a mesh.

A batch is computed in equal parts one after the other; their gradients are summed in float32 and divided by the tokens
of the whole batch, so that the number of parts changes memory and not the result. Weights and optimizer are float32 and
are donated; what a step computes in is another dtype if asked. Shardings come from a derived `Layout`.

Shape legend: A parts, B rows per part, T tokens per row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from meshloom.models.decoder import Unembedding
from meshloom.models.random_weights import random_weights
from meshloom.models.sequence import Packed
from meshloom.pallas_kernels.attention.context import to_zigzag
from meshloom.pallas_kernels.cross_entropy import Split
from meshloom.sharding.constrain import constrained, plain
from meshloom.sharding.layout import Layout
from meshloom.train.data import Batch, Share
from meshloom.train.objectives import next_token_loss, next_tokens

# Parameters and optimizer state as they go from step to step: `nnx.State` of parameters, and optax's state.
Weights = tuple[Any, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step reports.

    Attributes (scalars):
        loss: mean over the batch's tokens, in nats. grad_norm: global norm of its gradient, before clipping.
        learning_rate: of this step. tokens: tokens that the loss is a mean of.
    """

    loss: Any
    grad_norm: Any
    learning_rate: Any
    tokens: Any


def make_step(
    module: nnx.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dtype: Any,
    layout: Layout | None = None,
    loss: str | None = None,
) -> Callable[[Weights, Batch, Int[Array, ""]], tuple[Weights, StepMetrics]]:
    """The step as a function of (weights, batch `[A, B, T + 1]`, number of the step from 0), to be traced or jitted.

    Args:
        module: abstract or not; only its structure is used. One that has an `unembedding`, like `Decoder`, makes no
            logits; of another they are its first result.
        dtype: of the computation.
        layout: keeps activations split by rows on its mesh; without one the step has no constraints.
        loss: implementation of `linear_cross_entropy`; None chooses.
    """
    forward = forward_of(module, layout)
    split = None if layout is None else loss_split(module, layout)

    def loss_of(params: Any, part: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
        computed = jax.tree.map(lambda x: x.astype(dtype), params)
        tokens, packed, targets = arranged(module, part)
        unembedding = unembedding_of(module, computed)
        without_logits = () if unembedding is None else (None, None, False)
        hidden, _ = forward(computed, tokens, packed, *without_logits)
        return next_token_loss(hidden, unembedding, targets, split=split, implementation=loss)

    def add_part(params: Any, total: Any, part: Batch) -> tuple[Any, None]:
        (loss, count), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, part)
        return jax.tree.map(jnp.add, total, (loss, count, gradient)), None

    def step(weights: Weights, batch: Batch, number: Int[Array, ""]) -> tuple[Weights, StepMetrics]:
        params, state = weights
        nothing = (jnp.float32(0), jnp.int32(0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(lambda total, part: add_part(params, total, part), nothing, batch)
        loss, count, gradient = total
        tokens = jnp.maximum(count, 1)
        gradient = jax.tree.map(lambda g: g / tokens, gradient)
        with jax.named_scope("optimizer"):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        metrics = StepMetrics(loss / tokens, optax.tree.norm(gradient), jnp.float32(schedule(number)), count)
        return (params, state), metrics

    return step


def arranged(module: nnx.Module, part: Batch) -> tuple[Int[Array, "B T"], Packed, Int[Array, "B T"]]:
    """Tokens, their documents and what follows them, in the order that the module asks for on the mesh in scope.

    A module that asks for none gets the order of the text. The loss is a sum, which has none.
    """
    order_of = getattr(module, "token_order", None)
    order = "contiguous" if order_of is None else order_of(part.tokens.shape[1] - 1)
    inputs = part.tokens[:, :-1], part.segment_ids[:, :-1], part.positions[:, :-1]
    arrays: tuple[Any, ...] = (*inputs, next_tokens(part.tokens, part.segment_ids))
    if order == "zigzag":
        ways = jax.sharding.get_abstract_mesh().shape["context"]
        arrays = tuple(to_zigzag(x, ways) for x in arrays)
    tokens, segment_ids, positions, targets = arrays
    return tokens, Packed(segment_ids, positions, order), targets


def forward_of(module: nnx.Module, layout: Layout | None) -> Callable[..., Any]:
    """The forward pass of a step, `(params, *inputs) -> module(*inputs)`, constrained if there is a layout."""
    return plain(module) if layout is None else constrained(module, layout)


def unembedding_of(module: nnx.Module, state: Any) -> Unembedding | None:
    """What makes logits, from a tree like the module's parameters, of arrays or specs; None if it keeps that inside."""
    graphdef, _ = nnx.split(module)
    return getattr(nnx.merge(graphdef, state), "unembedding", None)


def loss_split(module: nnx.Module, layout: Layout) -> Split | None:
    """How the loss's arrays lie: tokens as batches do, the unembedding as it is stored."""
    unembedding = unembedding_of(module, layout.specs)
    return None if unembedding is None else Split(layout.mesh, layout.batch_spec, unembedding.weight)


def weight_shardings(module: nnx.Module, optimizer: optax.GradientTransformation, layout: Layout) -> Weights:
    """A sharding for every array of `Weights`; the optimizer's follow the parameters they belong to."""
    state = jax.eval_shape(optimizer.init, nnx.state(module, nnx.Param))
    return layout.shardings, layout.follow(state)


def abstract_weights(module: nnx.Module, optimizer: optax.GradientTransformation, layout: Layout) -> Weights:
    """`Weights` as shapes with shardings."""
    params = nnx.state(module, nnx.Param)
    shapes = (params, jax.eval_shape(optimizer.init, params))
    shardings = weight_shardings(module, optimizer, layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def fresh_weights(module: nnx.Module, optimizer: optax.GradientTransformation, layout: Layout, *, seed: int) -> Weights:
    """Weights drawn in place, each device its own part: the model need not fit on one.

    The values depend on `seed` alone, not on the mesh.
    """
    concrete = random_weights(module, seed=seed, shardings=layout.shardings)
    return with_optimizer(concrete, optimizer, layout)


def with_optimizer(module: nnx.Module, optimizer: optax.GradientTransformation, layout: Layout) -> Weights:
    """The placed parameters of a concrete module, and a fresh optimizer state beside them."""
    _, held = weight_shardings(module, optimizer, layout)
    params = nnx.state(module, nnx.Param)
    return params, jax.jit(optimizer.init, out_shardings=held)(params)


def lower_step(step: Callable[..., Any], weights: Weights, batch: Batch, layout: Layout) -> jax.stages.Lowered:
    """A step for weights and a batch that may be abstract, ready to compile; its results take over its weights."""
    shardings = jax.tree.map(lambda x: x.sharding, weights)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    with jax.set_mesh(layout.mesh):  # kernels choose what runs by it
        return jitted.lower(weights, batch, number)


def compile_step(step: Callable[..., Any], weights: Weights, batch: Batch, layout: Layout) -> jax.stages.Compiled:
    """Lowers and compiles a step for the devices of the layout."""
    return lower_step(step, weights, batch, layout).compile()


def place_batch(batch: Batch, layout: Layout, *, accumulation: int) -> Batch:
    """This process's rows `[rows, T + 1]` onto the devices, as `[A, B, T + 1]` with B split like the layout says.

    Args:
        batch: of each part, the rows that `share` says, part after part.
    Raises:
        ShardingError: the rows of one part do not divide over the `data` and `fsdp` axes.
    """
    held = share(layout)

    def place(x: np.ndarray) -> Array:
        mine = x.reshape(accumulation, len(held.slices), -1, x.shape[-1])
        size = mine.shape[2]
        shape = (accumulation, held.count * size, x.shape[-1])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            """Rows of one device, which lie in one slice."""
            first, last, _ = index[1].indices(shape[1])
            rows = mine[:, held.slices.index(first // size)]
            return rows[:, first % size : first % size + last - first]

        return jax.make_array_from_callback(shape, parts_sharding(layout, shape[1]), part)

    return jax.tree.map(place, batch)


def share(layout: Layout) -> Share:
    """The slices of each part's rows that this process's devices take: on a torus they need not be neighbours.

    Processes over which the layout splits no rows hold the same ones.
    """
    rows = NamedSharding(layout.mesh, PartitionSpec(layout.batch_spec[0]))
    places = rows.addressable_devices_indices_map((layout.batch_ways,)).values()
    return Share.of(sorted({place[0].indices(layout.batch_ways)[0] for place in places}), layout.batch_ways)


def abstract_batch(layout: Layout, *, accumulation: int, rows: int, length: int) -> Batch:
    """The shape of a placed batch: `rows` rows over all parts and processes."""
    part = rows // accumulation
    shape = jax.ShapeDtypeStruct((accumulation, part, length + 1), jnp.int32, sharding=parts_sharding(layout, part))
    return Batch(shape, shape, shape)


def parts_sharding(layout: Layout, rows: int) -> NamedSharding:
    """The sharding of `[A, rows, T + 1]`: only rows are split, for `T + 1` tokens do not divide where `T` do."""
    return NamedSharding(layout.mesh, PartitionSpec(None, layout.batch_sharding(rows).spec[0]))

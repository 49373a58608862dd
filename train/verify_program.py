"""The training step that is verified: the real one, with weights that come from the host and a gradient that is kept.

A `Subject` is a module with weights and a batch; a `Program` is its step, derived and compiled for one mesh.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from meshloom.models.random_weights import random_weights
from meshloom.models.sequence import Packed
from meshloom.models.stack import parameter_slots
from meshloom.sharding import derive
from meshloom.sharding.training_step import in_dtype
from meshloom.train.config import TrainConfig
from meshloom.train.data import Batch
from meshloom.train.optimizer import make_optimizer, make_schedule
from meshloom.train.rounding import Values
from meshloom.train.step import (
    abstract_batch,
    abstract_weights,
    compile_step,
    forward_of,
    make_step,
    place_batch,
    share,
    with_optimizer,
)
from meshloom.train.taps import tapped

# The defaults of a training run; of one step, or the warm-up would make the first step a thirtieth of the others.
_RUN = TrainConfig(steps=1)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        module: abstract, float32. params: like `nnx.state(module, nnx.Param)`, on the host.
        batch: all its rows, on the host.
        names: of the parameters in the unrolled model, by path of the leaf and index in its stack.
    """

    module: nnx.Module
    params: Any
    batch: Batch
    names: dict[tuple[tuple[str | int, ...], int | None], str]

    @classmethod
    def of(cls, module: nnx.Module, *, rows: int, length: int, seed: int) -> "Subject":
        """A module with weights, drawn from `seed` if it is abstract, and a random batch for it."""
        draws = np.random.default_rng(seed)
        shape = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        logits, _ = nnx.eval_shape(lambda module, tokens: module(tokens), module, shape)
        leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            module = random_weights(module, seed=seed)
        params = jax.tree.map(lambda x: _varied(np.asarray(x, np.float32), draws), nnx.state(module, nnx.Param))
        names = {(slot.path, slot.index): name for name, slot in parameter_slots(module).items()}
        return cls(in_dtype(module, jnp.float32), params, random_batch(rows, length, logits.shape[-1], draws), names)

    @property
    def size(self) -> int:
        """Elements of all parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What training takes by default."""
        return make_optimizer(_RUN, self.module)

    def by_name(self, tree: Any) -> Values:
        """The leaves of a tree like `params`, cut into layers."""
        leaves = {path: each.get_value() for path, each in nnx.to_flat_state(tree)}
        return {name: leaves[path] if i is None else leaves[path][i] for (path, i), name in self.names.items()}


def _varied(x: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """Constants, which fresh norms and biases are, would hide that elements have changed places."""
    return x + draws.normal(0, 0.1, x.shape).astype(x.dtype) if np.all(x == x.flat[0]) else x


def random_batch(rows: int, length: int, vocab: int, draws: np.random.Generator) -> Batch:
    """Rows of two documents and some padding, so that parts of the batch hold different numbers of tokens."""
    place = np.arange(length + 1)
    cut = draws.integers(length // 8 + 1, length // 2 + 1, (rows, 1))
    end = draws.integers(length // 2 + 1, length + 2, (rows, 1))
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(place < cut, place, np.where(place < end, place - cut, 0)).astype(np.int32)
    tokens = draws.integers(0, vocab, (rows, length + 1), dtype=np.int32)
    return Batch(np.where(segments > 0, tokens, 0).astype(np.int32), segments, positions)


def keep_gradient() -> optax.GradientTransformation:
    """A link of an optax chain that changes nothing; its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params=None: (gradient, gradient)
    )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step made, on its devices; `gradient` and `params`, after the step, are like the parameters."""

    loss: Any
    gradient: Any
    params: Any


class Program:
    """The training step of a subject on one mesh, computing in float32.

    Raises:
        ShardingError: the mesh does not suit the module or the batch.
    """

    def __init__(self, subject: Subject, mesh: Mesh):
        self.subject = subject
        rows, length = subject.batch.tokens.shape[0], subject.batch.tokens.shape[1] - 1
        self.layout = derive(subject.module, mesh, jax.ShapeDtypeStruct((rows, length), jnp.int32))
        self._optimizer = optax.chain(keep_gradient(), subject.optimizer)
        step = make_step(subject.module, self._optimizer, make_schedule(_RUN), dtype=jnp.float32, layout=self.layout)
        weights = abstract_weights(subject.module, self._optimizer, self.layout)
        batch = abstract_batch(self.layout, accumulation=1, rows=rows, length=length)
        with jax.default_matmul_precision("highest"):  # or accelerators multiply rounded factors
            self._step = compile_step(step, weights, batch, self.layout)
        held = share(self.layout)
        mine = jax.tree.map(lambda x: np.concatenate([np.split(x, held.count)[i] for i in held.slices]), subject.batch)
        self._batch = place_batch(mine, self.layout, accumulation=1)

    def run(self, params: Any) -> Outcome:
        """One step from `params`, which are on the host."""
        graphdef, _ = nnx.split(self.subject.module)
        weights = with_optimizer(nnx.merge(graphdef, self._placed(params)), self._optimizer, self.layout)
        (after, (gradient, _)), metrics = self._step(weights, self._batch, np.int32(0))
        return Outcome(metrics.loss, gradient, after)

    def gathered(self, tree: Any) -> Any:
        """A tree of arrays on the mesh, whole on the host of every process."""
        whole = jax.jit(lambda tree: tree, out_shardings=self.layout.replicated)(tree)
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)

    def _placed(self, params: Any) -> Any:
        # `jax.device_put` would have the processes compare every array, which they drew from one seed.
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
            params,
            self.layout.shardings,
        )

    def tapped(self) -> Callable[[Any], dict[str, Any]]:
        """A function from parameters on the host to all that weights make in the forward pass, in its order.

        What it returns is called by the weight's name in the unrolled model, a space, and 0 for the first that it
        makes, 1 for the second.
        """
        slots = {_tap_of(path, index): name for (path, index), name in self.subject.names.items()}
        batch = jax.tree.map(lambda x: x[0, :, :-1], self._batch)
        run = jax.jit(tapped(forward_of(self.subject.module, self.layout), [row.name for row in self.layout.rows]))

        def taps(params: Any) -> dict[str, Any]:
            with jax.default_matmul_precision("highest"):
                found = run(self._placed(params), batch.tokens, Packed(batch.segment_ids, batch.positions))
            made: collections.Counter[str] = collections.Counter()
            values = {}
            for tap in found:
                name = slots.get(tap.name, tap.name)
                values[f"{name} {made[name]}"] = tap.value
                made[name] += 1
            return values

        return taps


def _tap_of(path: tuple[str | int, ...], index: int | None) -> str:
    """What a tap calls a parameter: the name of its leaf, and the repeat of the scan that slices it."""
    return ".".join(map(str, path)) + ("" if index is None else f"[{index}]")

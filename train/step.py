"""One optimizer step as one compiled program: micro-batches, gradients, clipping and update, in place.

Parameters and optimizer state are float32 and live where the derived layout puts them; they are drawn there and never
gathered. The computation runs on a copy of the parameters in the compute dtype; gradients are added up in float32 and
divided once, by the number of predicted tokens of the whole batch, so that accumulation changes nothing but rounding.

Shape legend: A micro-batches, B rows of one, T tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.compile import compile_ahead
from meshloom.core.counting import count_flops
from meshloom.models.random_weights import random_weights
from meshloom.models.sequence import Packed
from meshloom.sharding.layout import Layout
from meshloom.train.config import TrainConfig
from meshloom.train.data import Batch
from meshloom.train.objectives import next_token_loss
from meshloom.train.optimizer import learning_rates, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes: float32 parameters and the optimizer's state, which counts the steps."""

    params: Any
    opt: Any

    def parts(self) -> dict[str, Any]:
        """Both as plain trees, the form in which checkpoints hold them."""
        return {"params": nnx.to_pure_dict(self.params), "opt": _plain(self.opt)}

    def with_parts(self, parts: dict[str, Any]) -> "TrainState":
        """The state whose `parts` these are."""
        plain = {name: jax.tree.leaves(parts[name]) for name in ("params", "opt")}
        return TrainState(
            jax.tree.unflatten(jax.tree.structure(self.params), plain["params"]),
            jax.tree.unflatten(jax.tree.structure(self.opt), plain["opt"]),
        )


def _plain(tree: Any) -> Any:
    def plain(node: Any) -> Any:
        return nnx.to_pure_dict(node) if isinstance(node, nnx.State) else node

    return jax.tree.map(plain, tree, is_leaf=lambda node: isinstance(node, nnx.State))


class Trainer:
    """The programs of one run: `init` makes a state, `step` advances it, `heldout_loss` measures it.

    Attributes:
        abstract: the state as `ShapeDtypeStruct`s with their shardings.
        flops: model FLOPs of one step: three times those of its forward pass, so that remat does not count.
    """

    def __init__(self, module: nnx.Module, layout: Layout, config: TrainConfig, dtype: Any):
        """
        Args:
            module: abstract, with float32 parameters.
            layout: derived from it.
            dtype: of the computation.
        """
        self._module = module
        self._layout = layout
        self._config = config
        self._dtype = jnp.dtype(dtype)
        self._graphdef, params = nnx.split(module)
        self._optimizer = make_optimizer(config, module)
        self._rate = learning_rates(config)
        self._opt_shardings = layout.follow(jax.eval_shape(self._optimizer.init, params))
        self.shardings = TrainState(layout.shardings, self._opt_shardings)
        shapes = TrainState(params, jax.eval_shape(self._optimizer.init, params))
        self.abstract = jax.tree.map(_placed, shapes, self.shardings)
        layout.batch_sharding(config.micro_batch)  # refuses a batch that does not divide over the mesh
        rows = (config.micro_batch, config.sequence_length)
        self._batch = self._abstract_batch((config.accumulation, *rows))
        forward = count_flops(self._loss, params, self._abstract_batch(rows))
        self.flops = 3 * config.accumulation * forward.flops

    def init(self, seed: int) -> TrainState:
        """A state with fresh weights, every device drawing only its part."""
        module = random_weights(self._module, seed=seed, shardings=self._layout.shardings)
        return self.state_of(nnx.state(module, nnx.Param))

    def state_of(self, params: Any) -> TrainState:
        """The state of update 0 with these parameters, which lie as the layout says."""
        return TrainState(params, jax.jit(self._optimizer.init, out_shardings=self._opt_shardings)(params))

    def compile(self) -> None:
        """Compiles `step`, so that its first call takes no longer than the others."""
        self._step = compile_ahead(
            self._one_step,
            self.abstract,
            self._batch,
            donate_argnums=0,
            out_shardings=(self.shardings, self._layout.replicated),
        )

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """The state after one update with a batch of rows `[A * B, T]`, and loss, grad_norm, learning_rate and tokens.

        `state` is used up. Returns before the work is done.
        """
        split = {name: rows.reshape(self._config.accumulation, -1, rows.shape[-1]) for name, rows in batch.items()}
        return self._step(state, self._place(split))

    def heldout_loss(self, state: TrainState, batches: list[Batch]) -> float:
        """Mean loss over all predicted tokens of batches `[B, T]` of the micro-batch's size, in nats."""
        measure = jax.jit(lambda params, batch: self._loss(self._computed(params), batch))
        sums = [measure(state.params, self._place(batch)) for batch in batches]
        return float(sum(total for total, _ in sums) / sum(count for _, count in sums))

    def _place(self, batch: Batch) -> dict[str, jax.Array]:
        """This process's rows of a batch, as part of the global arrays."""
        sharding = self._rows_sharding(next(iter(batch.values())).ndim)
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

    def _rows_sharding(self, dimensions: int) -> NamedSharding:
        whole = (None,) * (dimensions - 2)
        return NamedSharding(self._layout.mesh, PartitionSpec(*whole, *self._layout.batch_spec))

    def _abstract_batch(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = self._rows_sharding(len(shape))
        names = ("tokens", "targets", "segment_ids", "positions")
        return {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding) for name in names}

    def _computed(self, params: Any) -> Any:
        return jax.tree.map(lambda weight: weight.astype(self._dtype), params)

    def _loss(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        packed = Packed(batch["segment_ids"], batch["positions"])
        logits, _ = nnx.merge(self._graphdef, params)(batch["tokens"], packed)
        return next_token_loss(logits, batch["targets"])

    def _one_step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        params = self._computed(state.params)
        gradient = jax.value_and_grad(self._loss, has_aux=True)

        def add(totals, micro_batch):
            (loss, count), grads = gradient(params, micro_batch)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            return jax.tree.map(jnp.add, totals, (loss, count, grads)), None

        zeros = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), params)
        start = (jnp.zeros(()), jnp.zeros(()), zeros)
        (loss, count, grads), _ = jax.lax.scan(add, start, batch)
        count = jnp.maximum(count, 1.0)
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda g: g / count, grads)
            rate = self._rate(optax.tree.get(state.opt, "count"))
            directions, opt = self._optimizer.update(grads, state.opt, state.params)
            params = jax.tree.map(lambda weight, direction: weight - rate * direction, state.params, directions)
        metrics = {
            "loss": loss / count,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": rate,
            "tokens": count,
        }
        return TrainState(params, opt), metrics


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

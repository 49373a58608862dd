"""Where a run stands: weights, optimizer and the number of steps done; and how that goes into a checkpoint and back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from meshloom.core.checkpoint import DATA, Checkpointer
from meshloom.train.data import Batch
from meshloom.train.step import StepMetrics, Weights


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Weights after `done` optimizer steps. Advancing gives its arrays away."""

    weights: Weights
    done: int

    def advance(self, step: Callable[..., Any], batch: Batch) -> tuple["TrainState", StepMetrics]:
        """One more step."""
        weights, metrics = step(self.weights, batch, np.int32(self.done))
        return TrainState(weights, self.done + 1), metrics

    def items(self, position: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; `position` is the state of the data iterator."""
        params, optimizer = self.weights
        return {"params": _plain(params), "opt": _plain(optimizer), DATA: position}


def restore_state(checkpoints: Checkpointer, step: int, abstract: Weights) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint, placed as `abstract` says, and the position of its data iterator."""
    params, optimizer = abstract
    found = checkpoints.restore(step, {"params": _plain(params), "opt": _plain(optimizer), DATA: None})
    weights = (_refill(params, found["params"]), _refill(optimizer, found["opt"]))
    return TrainState(weights, step), found[DATA]


def _is_state(node: Any) -> bool:
    return isinstance(node, nnx.State)


def _plain(tree: Any) -> Any:
    """With plain dictionaries in place of `nnx.State`, which is how serving reads parameters."""
    return jax.tree.map(lambda node: nnx.to_pure_dict(node) if _is_state(node) else node, tree, is_leaf=_is_state)


def _refill(tree: Any, plain: Any) -> Any:
    """Inverse of `_plain`: the values of `plain` in the containers of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(plain))

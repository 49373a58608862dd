"""AdamW with warm-up, cosine and clipping, from optax; which parameters decay follows from their canonical shapes."""

from typing import Any

import jax
import optax
from flax import nnx

from meshloom.models.stack import parameter_slots
from meshloom.train.config import TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: a linear rise over the warm-up, then a cosine to the last step, or constant."""
    rise = optax.linear_schedule(config.learning_rate / max(config.warmup, 1), config.learning_rate, config.warmup)
    if config.schedule == "constant":
        return rise if config.warmup else optax.constant_schedule(config.learning_rate)
    rest = max(config.steps - config.warmup - 1, 1)
    fall = optax.cosine_decay_schedule(config.learning_rate, rest, alpha=config.final_lr_fraction)
    return optax.join_schedules([rise, fall], [config.warmup]) if config.warmup else fall


def make_optimizer(config: TrainConfig, module: nnx.Module) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with decay on the matrices of `module`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=1e-8),
        optax.add_decayed_weights(config.weight_decay, mask=decaying(module)),
        optax.scale_by_learning_rate(make_schedule(config)),
    )


def decaying(module: nnx.Module) -> Any:
    """True for every matrix, False for norms and biases, as a pytree like `nnx.state(module, nnx.Param)`.

    A stack of norms in a scanned model has two dimensions, yet each is a vector: the slot's shape tells.
    """
    dimensions = {slot.path: len(slot.shape) for slot in parameter_slots(module).values()}
    state = nnx.state(module, nnx.Param)
    flat = [(path, param.replace(dimensions[path] > 1)) for path, param in nnx.to_flat_state(state)]
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(nnx.from_flat_state(flat)))

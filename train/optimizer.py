"""AdamW (Loshchilov & Hutter 2019) behind a clip of the global gradient norm, with warm-up and a cosine."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from meshloom.models.stack import parameter_slots
from meshloom.train.config import TrainConfig


def learning_rates(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update number 0, 1, ...: a linear rise that reaches the peak after `config.warmup` updates, then
    the cosine or the constant."""
    warmup, peak = config.warmup, config.learning_rate

    def rate(update: Any) -> Any:
        step = jnp.asarray(update, jnp.float32)
        rising = peak * (step + 1) / max(warmup, 1)
        if config.schedule == "constant":
            return jnp.where(step < warmup, rising, peak)
        done = (step - warmup) / max(config.steps - warmup - 1, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        return jnp.where(step < warmup, rising, peak * (config.final_fraction + (1 - config.final_fraction) * cosine))

    return rate


def is_decayed(module: nnx.Module) -> Any:
    """For every parameter of the module, whether weight decay applies: to matrices, not to norms and biases.

    What counts is the shape in one layer: the stacked norms of scanned layers are no matrices.
    """
    matrices = {slot.path for slot in parameter_slots(module).values() if len(slot.shape) >= 2}
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return nnx.from_flat_state([(path, param.replace(path in matrices)) for path, param in state])


def make_optimizer(config: TrainConfig, module: nnx.Module) -> optax.GradientTransformation:
    """From gradients to descent directions, before the learning rate; its state mirrors the parameters twice and counts
    updates."""
    b1, b2 = config.betas
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1, b2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed(module)),
    )

"""What a model is trained to do: predict the next token of the same document.

Sums and counts are kept apart, so that micro-batches and devices add up to exactly the mean over all predicted tokens.

Shape legend: B rows, T tokens, V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# A target of this value is no target: padding, or a token of the next document.
IGNORE = -1


@jax.named_scope("next_token_loss")
def next_token_loss(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross entropy of the targets under the logits.

    Args:
        logits: float32.
        targets: token ids, or `IGNORE` where nothing is predicted.
    Returns:
        The sum over predicted tokens, in nats, and their number; both float32.
    """
    predicted = targets != IGNORE
    # The target's logit by comparison, not by gather: the vocabulary may be split over devices, and the gradient of a
    # gather is a scatter.
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    of_target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - of_target
    return jnp.sum(jnp.where(predicted, losses, 0.0)), jnp.sum(predicted, dtype=jnp.float32)

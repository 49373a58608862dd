"""What training minimises: next-token cross entropy over packed rows, in float32.

Shape legend: B rows, T tokens predicted per row, V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.named_scope("next_token_loss")
def next_token_loss(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T_and_1"], segment_ids: Int[Array, "B T_and_1"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of -log p(next token), in nats, and the number of tokens in it.

    A token counts if it lies in the same document (segment) as the one before it; padding (segment 0) never counts.

    Args:
        logits: float32, of the first T tokens.
    """
    targets = tokens[:, 1:]
    counted = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    # Comparing beats indexing: its gradient is no scatter, and a vocabulary split over devices needs no gather.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    chosen = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(counted, loss, 0.0)), jnp.sum(counted, dtype=jnp.int32)

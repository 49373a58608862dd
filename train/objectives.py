"""What training minimises: next-token cross entropy over packed rows, in float32, without logits where they are large.

Shape legend: B rows, T tokens predicted per row, D model, V vocab.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.models.decoder import Unembedding
from meshloom.pallas_kernels import linear_cross_entropy
from meshloom.pallas_kernels.cross_entropy import Split
from meshloom.pallas_kernels.cross_entropy.reference import cross_entropy_of_logits

# No token's id: what is not predicted.
IGNORED = -1


def next_tokens(tokens: Int[Array, "B T_and_1"], segment_ids: Int[Array, "B T_and_1"]) -> Int[Array, "B T"]:
    """What is predicted at each of the first T tokens.

    A token counts if it lies in the same document (segment) as the one before it; padding (segment 0) never counts, and
    is IGNORED.
    """
    counted = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    return jnp.where(counted, tokens[:, 1:], IGNORED)


@jax.named_scope("next_token_loss")
def next_token_loss(
    hidden: Float[Array, "B T D"],
    unembedding: Unembedding | None,
    targets: Int[Array, "B T"],
    *,
    split: Split | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of -log p(target), in nats, and the number of tokens in it: all that are not IGNORED.

    Args:
        hidden: what logits are made of.
        unembedding: what makes them; None says that `hidden` are the logits, float32.
        split, implementation: as in `linear_cross_entropy`.
    """
    counted = targets != IGNORED
    if unembedding is None:
        loss = jnp.where(counted, cross_entropy_of_logits(hidden, targets)[0], 0.0)
    else:
        options = {"split": split, "implementation": implementation}
        bias, soft_cap = unembedding.bias, unembedding.soft_cap
        loss, _ = linear_cross_entropy(hidden, unembedding.weight, targets, bias=bias, soft_cap=soft_cap, **options)
    return jnp.sum(loss), jnp.sum(counted, dtype=jnp.int32)

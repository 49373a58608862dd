"""What the cross entropy of a linear layer means: all logits in float32, and JAX's own gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.cross_entropy.spec import Split


def cross_entropy_reference(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "*rows"],
    *,
    soft_cap: float | int | None,
    split: Split | None,
    block: int,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Negative log-likelihood and log-sum-exp; the compiler spreads the logits over a mesh, and no block is used."""
    logits = jnp.einsum("...d,vd->...v", x, weight, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias.astype(jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return cross_entropy_of_logits(logits, targets)


def cross_entropy_of_logits(
    logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Negative log-likelihood and log-sum-exp of float32 logits; a target outside of [0, V) is that of no logit."""
    # Comparing beats indexing: its gradient is no scatter, and a vocabulary split over devices needs no gather.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), lse

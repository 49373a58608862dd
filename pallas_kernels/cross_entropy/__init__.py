"""The cross entropy of a linear layer's outputs, of which no more than a block need ever exist."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.cross_entropy.chunked import cross_entropy_chunked
from meshloom.pallas_kernels.cross_entropy.reference import cross_entropy_reference
from meshloom.pallas_kernels.cross_entropy.spec import CrossEntropySpec, Split
from meshloom.pallas_kernels.dispatch import Implementation, Target, select

__all__ = ["Split", "linear_cross_entropy"]


def _chunked_why_not(spec: CrossEntropySpec, target: Target) -> str | None:
    if spec.block(target) < spec.vocab:
        return None
    size = 4 * spec.tokens * spec.vocab / 2**20
    return f"a device's logits take {size:.0f} MiB, one block: computing them again would save nothing"


CROSS_ENTROPY = (
    Implementation("chunked", cross_entropy_chunked, _chunked_why_not),
    Implementation("reference", cross_entropy_reference, lambda spec, target: None),
)


@jax.named_scope("linear_cross_entropy")
def linear_cross_entropy(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, "*rows"],
    *,
    bias: Float[Array, "V"] | None = None,
    soft_cap: float | int | None = None,
    split: Split | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """-log softmax(soft_cap * tanh((x W^T + b) / soft_cap))[target] of every row, and the log of the softmax's sum.

    Differentiable in x, weight and bias through both results. Products take x and the weight as they are and sum in
    float32, in which all else is done; in bfloat16 the gradient of a logit is rounded to it before it is multiplied.

    Args:
        targets: rows with one outside of [0, V) are ignored: both results are exactly zero and give no gradient.
        soft_cap: None is no cap.
        split: how the arrays lie on a mesh; None leaves that to the compiler, and is for one device. With it no device
            makes logits of other devices' rows or vocabulary: over the axes of the vocabulary go three numbers per row
            and the gradient of x.
        implementation: "chunked" or "reference", for tests and benches; None chooses.
    Returns:
        Float32, in nats: the negative log-likelihood, and the log-sum-exp of the logits (for a z-loss).
    Source: Milakov & Gimelshein 2018, Online normalizer calculation for softmax; Wijmans et al. 2024, Cut Your Losses,
        section 4 (recomputing the logits in the backward pass).
    Raises MeshloomError when sizes differ, or do not divide over the axes of `split`, or the requested implementation
        declines.
    """
    _check(x.shape, weight.shape, targets.shape, None if bias is None else bias.shape)
    if split is None:
        spec, target = CrossEntropySpec(math.prod(x.shape[:-1]), weight.shape[0]), Target.of_mesh()
    else:
        spec, target = split.local(x.shape, weight.shape), split.target
    chosen = select("linear_cross_entropy", CROSS_ENTROPY, spec, target, implementation)
    counted = (targets >= 0) & (targets < weight.shape[0])
    nll, lse = chosen.run(x, weight, bias, targets, soft_cap=soft_cap, split=split, block=spec.block(target))
    return jnp.where(counted, nll, 0.0), jnp.where(counted, lse, 0.0)


def _check(x: tuple[int, ...], weight: tuple[int, ...], targets: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    if x[-1] != weight[1]:
        raise MeshloomError(f"linear_cross_entropy: rows of x have {x[-1]} numbers, rows of the weight {weight[1]}")
    if x[:-1] != targets:
        raise MeshloomError(f"linear_cross_entropy: x has rows {x[:-1]}, targets are {targets}; give one for each row")
    if bias is not None and bias != weight[:1]:
        raise MeshloomError(f"linear_cross_entropy: the weight has {weight[0]} rows, the bias {bias[0]} numbers")

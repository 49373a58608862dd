"""Cross entropy of a linear layer over blocks of its vocabulary, as plain XLA: logits exist for one block at a time.

The forward pass keeps a running maximum, sum and the target's logit of every row. The backward pass computes each block
again from the saved log-sum-exp: it adds to the gradient of x and writes its own rows of the weight's gradient, once.
Blocks of tokens would add to the whole weight's gradient in float32 again and again, 2 GB for a vocabulary of 128,256.

On a mesh both passes are a shard_map: each device works on its rows and its part of the vocabulary, and only the
running numbers and the gradient of x are combined over the axes of the vocabulary. Over the axes that only store the
weight, a block is gathered while the one before it is multiplied with, and its gradient is summed and scattered at
once, so that no device ever holds the whole weight or its gradient: 1.05 GB each for Llama-3-8B.

Shape legend: T tokens of one device, D model, V its vocabulary, S rows of the weight that it stores, c rows in a block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from meshloom.pallas_kernels.cross_entropy.blocks import Blocks
from meshloom.pallas_kernels.cross_entropy.spec import Split

# Finite, so that the maximum of nothing subtracts to 0 and not to NaN.
LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class _Static:
    """What shapes the program besides the arrays."""

    soft_cap: float | int | None
    split: Split | None
    blocks: Blocks


def cross_entropy_chunked(
    x: Float[Array, "*rows D"],
    weight: Float[Array, "V D"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "*rows"],
    *,
    soft_cap: float | int | None,
    split: Split | None,
    block: int,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Negative log-likelihood and log-sum-exp; `block` rows of the weight at a time."""
    if split is not None and split.mesh.size == 1:
        split = None
    return _cross_entropy(_Static(soft_cap, split, Blocks.of(split, block)), x, weight, bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static: _Static, x, weight, bias, targets):
    return _fwd(static, x, weight, bias, targets)[0]


def _fwd(static: _Static, x, weight, bias, targets):
    def local(x, weight, bias, targets):
        rows, own = targets.shape, _own(static, targets, weight)
        top, norm, chosen = _forward(static, x.reshape(-1, x.shape[-1]), weight, bias, own.reshape(-1))
        if static.split is not None and static.split.vocab_axes:
            axes = static.split.vocab_axes
            highest = jax.lax.pmax(top, axes)
            norm, chosen = jax.lax.psum((norm * jnp.exp(top - highest), chosen), axes)
            top = highest
        lse = top + jnp.log(norm)
        return (lse - chosen).reshape(rows), lse.reshape(rows)

    inside = ("x", "weight", "bias", "rows")
    nll, lse = _on_mesh(static.split, local, inside, ("rows", "rows"))(x, weight, bias, targets)
    return (nll, lse), (x, weight, bias, targets, lse)


def _bwd(static: _Static, residuals, cotangents):
    def local(x, weight, bias, targets, lse, d_nll, d_lse):
        own = _own(static, targets, weight)
        # nll = lse - chosen: d_nll + d_lse goes to the softmax, -d_nll to the target.
        rows = (each.reshape(-1) for each in (own, lse, d_nll + d_lse, d_nll))
        dx, dw, db = _backward(static, x.reshape(-1, x.shape[-1]), weight, bias, *rows)
        dx = dx.astype(x.dtype).reshape(x.shape)
        return (dx, dw, db) if static.split is None else _reduced(static.split, dx, dw, db)

    inside = ("x", "weight", "bias", "rows", "rows", "rows", "rows")
    dx, dw, db = _on_mesh(static.split, local, inside, ("x", "weight", "bias"))(*residuals, *cotangents)
    return dx, dw, db, None


_cross_entropy.defvjp(_fwd, _bwd)


def _on_mesh(
    split: Split | None, local: Callable[..., Any], inside: tuple[str, ...], outside: tuple[str, ...]
) -> Callable[..., Any]:
    """`local` on every device's part of arrays that lie as these words say; an array that is None stays None."""
    if split is None:
        return local
    by_rows, by_columns = split.storing
    specs = {
        "x": split.rows,
        "rows": split.rows,
        "weight": PartitionSpec((*split.vocab_axes, *by_rows) or None, by_columns or None),
        "bias": PartitionSpec(split.vocab_axes or None),
    }
    # Nothing differentiates through it, so that JAX need not follow what varies over which axis.
    options = {"mesh": split.mesh, "check_vma": False}
    return jax.shard_map(
        local,
        in_specs=tuple(specs[word] for word in inside),
        out_specs=tuple(specs[word] for word in outside),
        **options,
    )


def _own(static: _Static, targets, weight):
    """Targets counted from the first row of this device's vocabulary; those of other devices lie outside of it."""
    if static.split is None or not static.split.vocab_axes:
        return targets
    return targets - jax.lax.axis_index(static.split.vocab_axes) * (static.blocks.ways * weight.shape[0])


def _reduced(split: Split, dx, dw, db):
    """Sums over the devices that hold other parts of the vocabulary, for dx, or other rows, for dw and db."""
    if split.vocab_axes:
        dx = jax.lax.psum(dx, split.vocab_axes)
    whole = tuple(axis for axis in split.row_axes if not any(axis in axes for axes in split.storing))
    dw = jax.lax.psum(dw, whole) if whole else dw
    return dx, dw, jax.lax.psum(db, split.row_axes) if db is not None and split.row_axes else db


def _logits(static: _Static, x, weight, bias, targets, rows, first):
    """A block's logits [T, c], the slope of the soft cap there (None without one), and where targets are."""
    logits = jnp.einsum("td,vd->tv", x, rows, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += static.blocks.part(bias, first, rows.shape[0]).astype(jnp.float32)
    slope = None
    if static.soft_cap is not None:
        bent = jnp.tanh(logits / static.soft_cap)
        logits, slope = static.soft_cap * bent, 1 - bent * bent
    return logits, slope, static.blocks.ids(weight.shape[0], first, rows.shape[0])[None] == targets[:, None]


def _forward(static: _Static, x, weight, bias, targets):
    """Maximum, sum of exp(logit - maximum) and the target's logit (0 if it is not here) of each row [T], float32."""

    def visit(carry, rows, first):
        top, norm, chosen = carry
        logits, _, is_target = _logits(static, x, weight, bias, targets, rows, first)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        norm = norm * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[:, None]), axis=-1)
        return new_top, norm, chosen + jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

    nothing = jnp.zeros(x.shape[0])
    return static.blocks.over(weight, visit, (jnp.full_like(nothing, LEAST), nothing, nothing))


def _backward(static: _Static, x, weight, bias, targets, lse, to_softmax, to_target):
    """Gradients of x, float32, and of weight and bias, in their dtypes, from those of every row's two terms [T]."""
    dtype = jnp.result_type(x, weight)

    def visit(carry, rows, first):
        dx, dw, db = carry
        logits, slope, is_target = _logits(static, x, weight, bias, targets, rows, first)
        d = to_softmax[:, None] * jnp.exp(logits - lse[:, None]) - jnp.where(is_target, to_target[:, None], 0.0)
        d = d if slope is None else d * slope
        if db is not None:
            db = static.blocks.with_part(db, jnp.sum(d, axis=0).astype(db.dtype), first)
        d = d.astype(dtype)
        dx += jnp.einsum("tv,vd->td", d, rows, preferred_element_type=jnp.float32)
        dw_rows = jnp.einsum("tv,td->vd", d, x, preferred_element_type=jnp.float32).astype(dw.dtype)
        return dx, jax.lax.dynamic_update_slice_in_dim(dw, static.blocks.scattered(dw_rows), first, 0), db

    empty = jnp.zeros(x.shape, jnp.float32), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias)
    return static.blocks.over(weight, visit, empty)

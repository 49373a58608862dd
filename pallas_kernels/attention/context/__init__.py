"""Attention over sequences whose tokens are spread over devices, for the inside of `jax.shard_map`.

`attention` itself uses a ring where the mesh in scope has a `context` axis; these functions are for programs that are
manual over it, and for the layouts and forms that have to be asked for.

Shape legend: n devices, B batch, T and S this device's queries and keys, N heads, K kv heads, H head dim; t and s all
    queries and keys.
"""

import jax
from jaxtyping import Array, Float

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.attention.context.layouts import chunks_per_device, from_zigzag, to_zigzag
from meshloom.pallas_kernels.attention.context.ring import FORMS, Ring
from meshloom.pallas_kernels.attention.context.ulysses import Ulysses
from meshloom.pallas_kernels.attention.kernel import Kernel, Scoring
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask, check_heads
from meshloom.pallas_kernels.attention.spread import kv_copies
from meshloom.pallas_kernels.attention.table import ATTENTION, attend
from meshloom.pallas_kernels.dispatch import Target, select

__all__ = ["from_zigzag", "ring_attention", "to_zigzag", "ulysses_attention"]


@jax.named_scope("ring_attention")
def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    axis: str = "context",
    mask: Mask,
    layout: str = "contiguous",
    form: str = "keys",
    scale: float | int | None = None,
    soft_cap: float | int | None = None,
    bias: Float[Array, "#B #N T s"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """`attention` over the tokens of all devices along `axis`, each with its own, and as differentiable.

    Args:
        q, k, v: this device's tokens, in the order of `layout`.
        axis: of the mesh that `jax.shard_map(..., check_vma=False)` is manual over.
        mask: of the whole sequence: `kv_lens` and `offset` count from its beginning; segments are this device's.
        layout: "contiguous" or "zigzag", see layouts.py; a causal mask takes about half as long in zigzag.
        form: "keys", "halves" or "queries": what travels, see ring.py.
        bias: of this device's queries; its columns are all keys, in the order of `layout` as well. "queries" has none.
        scale, soft_cap, sinks, implementation: as in `attention`.
    Returns:
        This device's rows in q's dtype; zeros for queries that may read no key.
    Raises MeshloomError for heads or chunks that do not divide, unknown forms and layouts, and a bias that its queries
    would leave behind.
    """
    check_heads(q.shape[2], k.shape[2])
    if form not in FORMS:
        raise MeshloomError(f"ring_attention: no form {form!r}; it has {', '.join(FORMS)}")
    if bias is not None and form == "queries":
        raise MeshloomError(
            "ring_attention: queries that travel leave their bias behind; form='keys' and form='halves' take one"
        )
    count = chunks_per_device(layout)
    if q.shape[1] % count or k.shape[1] % count:
        raise MeshloomError(
            f"ring_attention: {q.shape[1]} queries and {k.shape[1]} keys of a device do not divide into the {count} "
            f"chunks of {layout}"
        )
    of_queries, of_keys = ((x.shape[0], x.shape[1] // count, *x.shape[2:]) for x in (q, k))
    bias_shape = None if bias is None else (*bias.shape[:2], of_queries[1], of_keys[1])
    spec = AttentionSpec(of_queries, of_keys, v.shape[-1], str(q.dtype), bias_shape, mask)
    ring = Ring(axis, layout, form, select("attention", ATTENTION, spec, Target.of_mesh(), implementation).run)
    return attend(Kernel(ring.forward, ring.backward), _scoring(q, scale, soft_cap), q, k, v, bias, sinks, mask)


@jax.named_scope("ulysses_attention")
def ulysses_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    axis: str = "context",
    mask: Mask,
    scale: float | int | None = None,
    soft_cap: float | int | None = None,
    bias: Float[Array, "#B #N t s"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """What `ring_attention` computes, in the contiguous layout, with two exchanges of tokens for heads.

    Args:
        bias: of the whole sequence, the same on all devices; its gradient is this device's share of the sum.
        others: as in `ring_attention`.
    Raises MeshloomError when the heads do not divide over the devices.
    """
    check_heads(q.shape[2], k.shape[2])
    size = jax.lax.axis_size(axis)
    if q.shape[2] % size:
        raise MeshloomError(
            f"ulysses_attention: {q.shape[2]} heads do not divide over {axis}={size}; ring_attention splits no heads"
        )
    of_queries = q.shape[0], q.shape[1] * size, q.shape[2] // size, q.shape[3]
    of_keys = k.shape[0], k.shape[1] * size, k.shape[2] * kv_copies(k.shape[2], size) // size, k.shape[3]
    bias_shape = None if bias is None else bias.shape
    spec = AttentionSpec(of_queries, of_keys, v.shape[-1], str(q.dtype), bias_shape, mask)
    over_heads = Ulysses(axis, select("attention", ATTENTION, spec, Target.of_mesh(), implementation).run)
    kernel = Kernel(over_heads.forward, over_heads.backward)
    return attend(kernel, _scoring(q, scale, soft_cap), q, k, v, bias, sinks, mask)


def _scoring(q, scale: float | int | None, soft_cap: float | int | None) -> Scoring:
    return Scoring(
        q.shape[-1] ** -0.5 if scale is None else float(scale), None if soft_cap is None else float(soft_cap)
    )

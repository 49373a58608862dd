"""Attention over whole sequences and over a paged cache: one function each, several implementations behind it."""

from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention.chunked import attention_chunked
from meshloom.pallas_kernels.attention.paged import paged_attention_chunked
from meshloom.pallas_kernels.attention.reference import attention_reference, paged_attention_reference
from meshloom.pallas_kernels.attention.spec import AttentionSpec, KVPages, Mask, PagedSpec, Ragged, check_heads
from meshloom.pallas_kernels.dispatch import Implementation, Target, select

__all__ = ["KVPages", "Mask", "Ragged", "attention", "paged_attention"]


def _chunked_attention_why_not(spec: AttentionSpec, target: Target) -> str | None:
    return "an additive bias needs the reference" if spec.has_bias else None


ATTENTION = (
    Implementation("chunked", attention_chunked, _chunked_attention_why_not),
    Implementation("reference", attention_reference, lambda spec, target: None),
)
PAGED_ATTENTION = (
    Implementation("chunked", paged_attention_chunked, lambda spec, target: None),
    Implementation("reference", paged_attention_reference, lambda spec, target: None),
)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask,
    scale: float | None = None,
    soft_cap: float | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Scaled dot-product attention with grouped kv heads; differentiable in q, k, v and bias.

    Args:
        mask: which keys each query may read.
        scale: multiplies q k; None is H ** -0.5.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap), after scale and before bias.
        bias: added to the scores, float32.
        implementation: "chunked" or "reference" for tests and benches; None chooses.
    Returns:
        Rows in q's dtype; zeros for queries that may read no key.
    Source: Dao 2023, FlashAttention-2, algorithm 1 (online softmax; `chunked`).
    Raises MeshloomError when N is not a multiple of K, or the requested implementation declines.
    """
    check_heads(q.shape[2], k.shape[2])
    spec = AttentionSpec(q.shape, k.shape, v.shape[-1], str(q.dtype), bias is not None, mask)
    chosen = select("attention", ATTENTION, spec, Target.of_mesh(), implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return chosen.run(q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, bias=bias)


def paged_attention(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    ragged: Ragged,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    distance_bias: Float[Array, "N D"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], KVPages]:
    """Causal attention of a ragged step over a paged cache; this step's keys and values are written first.

    Args:
        pages, ragged: the cache and where each row's sequence lies in it.
        window: only the last `window` keys, itself included.
        distance_bias: added to the score of the key `d` tokens back, d clipped to D - 1 (T5's relative positions).
        scale, soft_cap, implementation: as in `attention`.
    Returns:
        Output rows in q's dtype, and the updated cache (in place when it was donated).
    Source: Kwon et al. 2023, PagedAttention, section 4; Sarathi-Serve (2024) for mixed prefill and decode rows.
    """
    check_heads(q.shape[1], k.shape[1])
    spec = PagedSpec(q.shape, pages.k.shape, ragged.kv_lens.size, str(q.dtype), window)
    chosen = select("paged_attention", PAGED_ATTENTION, spec, Target.of_mesh(), implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"window": window, "scale": scale, "soft_cap": soft_cap, "distance_bias": distance_bias}
    return chosen.run(q, k, v, pages, ragged, **options)

"""Attention over whole sequences and over a paged cache: one function each, several implementations behind it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from meshloom.pallas_kernels.attention import paged_mosaic_gpu, paged_mosaic_tpu
from meshloom.pallas_kernels.attention.context import ring_attention, ulysses_attention
from meshloom.pallas_kernels.attention.context.spreading import SPREADING, SpreadSpec
from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.paged import PagedScoring, paged_attention_chunked, paged_partials_chunked
from meshloom.pallas_kernels.attention.paged_split import merged, merged_over
from meshloom.pallas_kernels.attention.pages import KVPages, PagePart, Ragged
from meshloom.pallas_kernels.attention.reference import paged_attention_reference, paged_partials_reference
from meshloom.pallas_kernels.attention.spec import AttentionSpec, Mask, PagedSpec, check_heads
from meshloom.pallas_kernels.attention.table import ATTENTION, attend
from meshloom.pallas_kernels.dispatch import Implementation, Target, select

__all__ = [
    "ATTENTION",
    "SPREADING",
    "KVPages",
    "Mask",
    "PagePart",
    "Ragged",
    "attention",
    "merged",
    "merged_over",
    "paged_attention",
    "paged_attention_part",
    "ring_attention",
    "ulysses_attention",
]

PAGED_ATTENTION = (
    Implementation("mosaic_tpu", paged_mosaic_tpu.paged_attention_mosaic_tpu, paged_mosaic_tpu.why_not),
    Implementation("mosaic_gpu", paged_mosaic_gpu.paged_attention_hopper, paged_mosaic_gpu.why_not),
    Implementation("chunked", paged_attention_chunked, lambda spec, target: None),
    Implementation("reference", paged_attention_reference, lambda spec, target: None),
)
PAGED_PARTIALS = (
    Implementation("chunked", paged_partials_chunked, lambda spec, target: None),
    Implementation("reference", paged_partials_reference, lambda spec, target: None),
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
    sinks: Float[Array, "N"] | None = None,
    layout: str = "contiguous",
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Scaled dot-product attention with grouped kv heads; differentiable in q, k, v, bias and sinks.

    Where the mesh in scope has a `context` axis, tokens lie over it and keys travel round it (context/ring.py).

    Args:
        mask: which keys each query may read.
        scale: multiplies q k; None is H ** -0.5.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap), after scale and before bias.
        bias: added to the scores, float32.
        sinks: score of one more key per head that every query may read and whose value is zero.
        layout: "zigzag" where all tokens come in that order over the `context` axis (`context.to_zigzag`); the mask is
            that of the sequence.
        implementation: by name, for tests and benches; None chooses.
    Returns:
        Rows in q's dtype; zeros for queries that may read no key.
    Source: Dao 2023, FlashAttention-2, algorithms 1 and 2 (online softmax).
    Raises MeshloomError when N is not a multiple of K, or the requested implementation declines.
    """
    check_heads(q.shape[2], k.shape[2])
    bias_shape = None if bias is None else bias.shape
    spec = AttentionSpec(q.shape, k.shape, v.shape[-1], str(q.dtype), bias_shape, mask)
    target = Target.of_mesh()
    kernel = select("attention", ATTENTION, spec, target, implementation).run
    spreading = select("attention over a mesh", SPREADING, SpreadSpec(spec, layout), target).run
    scoring = Scoring(q.shape[-1] ** -0.5 if scale is None else scale, soft_cap)
    return attend(spreading(kernel, layout), scoring, q, k, v, bias, sinks, mask)


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
    sinks: Float[Array, "N"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], KVPages]:
    """Causal attention of a ragged step over a paged cache; this step's keys and values are written first.

    Args:
        pages, ragged: the cache and where each row's sequence lies in it.
        window: only the last `window` keys, itself included.
        distance_bias: added to the score of the key `d` tokens back, d clipped to D - 1 (T5's relative positions).
        scale, soft_cap, sinks, implementation: as in `attention`.
    Returns:
        Output rows in q's dtype, and the updated cache (in place when it was donated).
    Source: Kwon et al. 2023, PagedAttention, section 4; Sarathi-Serve (2024) for mixed prefill and decode rows.
    Raises MeshloomError when N is not a multiple of K, or the requested implementation declines.
    """
    scoring = PagedScoring(q.shape[-1] ** -0.5 if scale is None else scale, window, soft_cap, distance_bias)
    chosen = select(
        "paged_attention", PAGED_ATTENTION, _spec(q, k, pages, ragged, scoring), Target.of_mesh(), implementation
    )
    pages = pages.write(k, v, ragged)
    return chosen.run(q, pages, ragged, scoring, sinks), pages


def paged_attention_part(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    pages: KVPages,
    ragged: Ragged,
    part: PagePart,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    distance_bias: Float[Array, "N D"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "N T"], KVPages]:
    """`paged_attention` over one part of each sequence's pages: all rows, and the keys that this part holds.

    Args:
        pages, part: this part's own cache, and which pages of each sequence it has; `ragged.page_table` is not read.
        others: as in `paged_attention`. Sinks belong to the whole: see `merged` and `merged_over`.
    Returns:
        out and lse, float32, for `merged` or `merged_over`; rows that read no key of this part have zeros and a lse
        of MASKED. The cache with those of this step's rows that fall into its pages.
    Raises MeshloomError as `paged_attention`.
    """
    scoring = PagedScoring(q.shape[-1] ** -0.5 if scale is None else scale, window, soft_cap, distance_bias)
    spec = _spec(q, k, pages, ragged, scoring)
    chosen = select("paged_attention_part", PAGED_PARTIALS, spec, Target.of_mesh(), implementation)
    pages = pages.write(k, v, ragged, part)
    return *chosen.run(q, pages, ragged, part, scoring, jnp.float32), pages


def _spec(q, k, pages: KVPages, ragged: Ragged, scoring: PagedScoring) -> PagedSpec:
    check_heads(q.shape[1], k.shape[1])
    sequences, width = ragged.page_table.shape
    return PagedSpec(
        q_shape=q.shape,
        kv_heads=k.shape[1],
        pages_shape=pages.k.shape,
        element=pages.element,
        sequences=sequences,
        table_width=width,
        dtype=str(q.dtype),
        window=scoring.window,
        distance_bias=scoring.distance_bias is not None,
    )

"""The one list of attention cases, for tests, benches and tuning: sizes, and which features are on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.spec import Mask


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of `attention`.

    Attributes:
        segments: packed documents in a row; 0 for none.
        lens: keys of each row of the batch that are not padding.
        offset: position of the first query; None aligns at the bottom right.
        bias: shape of the first two dimensions of an additive bias, (1 or B, 1 or N).
        sinks: one score per head beside the keys.
    """

    name: str
    batch: int = 2
    q_len: int = 24
    kv_len: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    causal: bool = True
    window: int | None = None
    segments: int = 0
    lens: tuple[int, ...] | None = None
    offset: int | None = None
    soft_cap: float | None = None
    bias: tuple[int, int] | None = None
    sinks: bool = False
    dtype: str = "float32"

    @property
    def scoring(self) -> Scoring:
        """The default scale, and the soft cap."""
        return Scoring(self.head_dim**-0.5, self.soft_cap)

    def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, Mask]:
        """q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv] and the mask."""
        rng = np.random.default_rng(seed)

        def normal(length: int, heads: int, dim: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=(self.batch, length, heads, dim)), self.dtype)

        q = normal(self.q_len, self.heads, self.head_dim)
        k = normal(self.kv_len, self.kv_heads, self.head_dim)
        v = normal(self.kv_len, self.kv_heads, self.value_dim)
        q_ids = kv_ids = None
        if self.segments:
            longest = max(self.q_len, self.kv_len)
            ids = jnp.asarray(np.sort(rng.integers(1, 1 + self.segments, (self.batch, longest))), jnp.int32)
            q_ids, kv_ids = ids[:, longest - self.q_len :], ids[:, : self.kv_len]
        lens = None if self.lens is None else jnp.asarray(self.lens, jnp.int32)
        offset = None if self.offset is None else jnp.int32(self.offset)
        return q, k, v, Mask(self.causal, self.window, q_ids, kv_ids, lens, offset)

    def extras(self, seed: int = 1) -> tuple[jax.Array | None, jax.Array | None]:
        """The bias [#B, #N, T, S] and the sinks [N], float32, or None."""
        rng = np.random.default_rng(seed)
        bias = sinks = None
        if self.bias is not None:
            bias = jnp.asarray(rng.normal(size=(*self.bias, self.q_len, self.kv_len)), jnp.float32)
        if self.sinks:
            sinks = jnp.asarray(rng.normal(size=self.heads), jnp.float32)
        return bias, sinks


ATTENTION_CASES = (
    AttentionCase("causal"),
    AttentionCase("one_head_each", heads=3, kv_heads=3),
    AttentionCase("one_kv_head", heads=4, kv_heads=1),
    AttentionCase("one_token", q_len=1, kv_len=1),
    AttentionCase("several_blocks", q_len=300, kv_len=600, batch=1),
    AttentionCase("more_queries_than_keys", q_len=40, kv_len=24),
    AttentionCase("window_within_block", window=5),
    AttentionCase("window_skips_blocks", q_len=600, kv_len=600, window=70, batch=1),
    AttentionCase("window_both_ways", causal=False, window=6),
    AttentionCase("segments", segments=3),
    AttentionCase("segments_skip_blocks", segments=4, q_len=600, kv_len=600),
    AttentionCase("segments_window_cap", segments=2, window=9, soft_cap=3.0),
    AttentionCase("bidirectional_lens", causal=False, lens=(5, 24)),
    AttentionCase("lens_skip_blocks", q_len=520, kv_len=520, lens=(90, 240)),
    AttentionCase("empty_row", causal=False, lens=(0, 24)),
    AttentionCase("keys_before", offset=100),
    AttentionCase("keys_after", offset=-10),
    AttentionCase("no_key_in_reach", offset=-600),
    AttentionCase("offset_window", offset=300, window=70, q_len=300, kv_len=600),
    AttentionCase("soft_cap", soft_cap=2.0),
    AttentionCase("sinks", sinks=True),
    AttentionCase("sinks_window_segments", sinks=True, window=7, segments=2),
    AttentionCase("sinks_and_empty_row", sinks=True, causal=False, lens=(0, 24)),
    AttentionCase("bias_of_heads", bias=(1, 4)),
    AttentionCase("bias_of_rows", bias=(2, 1), causal=False),
    AttentionCase("bias_of_both_in_blocks", bias=(2, 4), q_len=300, kv_len=310, soft_cap=5.0),
    AttentionCase("bias_skips_blocks", bias=(1, 1), q_len=600, kv_len=600, heads=2, kv_heads=1, window=70, segments=3),
    AttentionCase("value_dim_differs", value_dim=8),
    AttentionCase("head_dim_64", head_dim=64, value_dim=64),
    AttentionCase("head_dim_80", head_dim=80, value_dim=80),
    AttentionCase("head_dim_96", head_dim=96, value_dim=96),
    AttentionCase("head_dim_128", head_dim=128, value_dim=128),
    AttentionCase("latent", head_dim=192, value_dim=128, heads=2, kv_heads=2),
    AttentionCase("head_dim_256", head_dim=256, value_dim=256, batch=1),
    AttentionCase("bfloat16", dtype="bfloat16", q_len=40, kv_len=40),
    AttentionCase(
        "bfloat16_everything", dtype="bfloat16", window=30, segments=2, sinks=True, bias=(1, 4), soft_cap=9.0
    ),
)

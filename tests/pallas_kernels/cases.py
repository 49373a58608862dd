"""The one list of attention cases: name, shapes and mask features."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from meshloom.pallas_kernels import Mask


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of `attention`: sizes, and which mask features are on."""

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
    soft_cap: float | None = None
    dtype: str = "float32"

    def arrays(self, seed: int = 0):
        """q, k, v and the mask."""
        rng = np.random.default_rng(seed)

        def normal(length: int, heads: int, dim: int):
            return jnp.asarray(rng.normal(size=(self.batch, length, heads, dim)), self.dtype)

        q = normal(self.q_len, self.heads, self.head_dim)
        k = normal(self.kv_len, self.kv_heads, self.head_dim)
        v = normal(self.kv_len, self.kv_heads, self.value_dim)
        ids = None
        if self.segments:
            ids = jnp.asarray(np.sort(rng.integers(1, 1 + self.segments, (self.batch, self.kv_len))), jnp.int32)
        return (
            q,
            k,
            v,
            Mask(
                causal=self.causal,
                window=self.window,
                q_segments=None if ids is None else ids[:, self.kv_len - self.q_len :],
                kv_segments=ids,
                kv_lens=None if self.lens is None else jnp.asarray(self.lens, jnp.int32),
            ),
        )


ATTENTION_CASES = [
    AttentionCase("causal"),
    AttentionCase("one_head_each", heads=3, kv_heads=3),
    AttentionCase("one_kv_head", heads=4, kv_heads=1),
    AttentionCase("one_token", q_len=1, kv_len=1),
    AttentionCase("several_blocks", q_len=300, kv_len=600, batch=1),
    AttentionCase("window_within_block", window=5),
    AttentionCase("window_skips_blocks", q_len=600, kv_len=600, window=70, batch=1),
    AttentionCase("segments", segments=3),
    AttentionCase("segments_window_cap", segments=2, window=9, soft_cap=3.0),
    AttentionCase("bidirectional_lens", causal=False, lens=(5, 24)),
    AttentionCase("empty_row", causal=False, lens=(0, 24)),
    AttentionCase("soft_cap", soft_cap=2.0),
    AttentionCase("value_dim_differs", value_dim=8),
    AttentionCase("head_dim_80", head_dim=80, value_dim=80),
    AttentionCase("bfloat16", dtype="bfloat16", q_len=40, kv_len=40),
]

"""The one list of cross-entropy cases, for tests and benches: sizes, and which features are on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class CrossEntropyCase:
    """One call of `linear_cross_entropy`. `ignored`: every how manieth target is no token; 0 for none."""

    name: str
    rows: tuple[int, ...] = (2, 12)
    model: int = 16
    vocab: int = 384
    bias: bool = False
    soft_cap: float | None = None
    ignored: int = 0
    dtype: str = "float32"

    def arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
        """x, weight, bias or None, and targets; logits have a standard deviation of about 4."""
        draw = np.random.default_rng(sum(map(ord, self.name)))
        x = jnp.asarray(draw.normal(size=(*self.rows, self.model)), self.dtype)
        weight = jnp.asarray(4 * self.model**-0.5 * draw.normal(size=(self.vocab, self.model)), self.dtype)
        bias = jnp.asarray(draw.normal(size=self.vocab), self.dtype) if self.bias else None
        targets = draw.integers(0, self.vocab, self.rows, dtype=np.int32)
        if self.ignored:
            flat = targets.reshape(-1)
            flat[:: self.ignored] = -1
            flat[1 :: 2 * self.ignored] = self.vocab
        return x, weight, bias, jnp.asarray(targets)


CROSS_ENTROPY_CASES = (
    CrossEntropyCase("plain"),
    CrossEntropyCase("bfloat16", dtype="bfloat16"),
    CrossEntropyCase("last_block_is_shorter", vocab=333),
    CrossEntropyCase("soft_cap", soft_cap=3.0),
    CrossEntropyCase("soft_cap_bfloat16", soft_cap=3.0, dtype="bfloat16"),
    CrossEntropyCase("bias", bias=True),
    CrossEntropyCase("ignored", ignored=3),
    CrossEntropyCase("nothing_counts", ignored=1),
    CrossEntropyCase("one_row", rows=(1,), vocab=300),
    CrossEntropyCase("everything", rows=(8, 4), vocab=520, bias=True, soft_cap=5.0, ignored=4, dtype="bfloat16"),
)

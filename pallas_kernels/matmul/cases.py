"""The one list of grouped, adapted and quantized products, for tests, benches and tuning."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshloom.pallas_kernels.matmul.lora import LoraPages
from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized import quantize


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """One call of `grouped_matmul`.

    Attributes:
        sizes: rows of each group; they may sum to less than `rows`.
        quantized: weights are int8.
    """

    name: str
    sizes: tuple[int, ...]
    rows: int = 48
    contracted: int = 24
    columns: int = 40
    dtype: str = "float32"
    transposed: bool = True
    quantized: bool = False

    def arrays(self, seed: int = 0) -> tuple[jax.Array, jax.Array | QArray, jax.Array]:
        """x [M, K], w [E, N, K] if transposed and else [E, K, N], and the group sizes."""
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.normal(size=(self.rows, self.contracted)), self.dtype)
        sides = (self.columns, self.contracted) if self.transposed else (self.contracted, self.columns)
        w = jnp.asarray(rng.normal(size=(len(self.sizes), *sides)), self.dtype)
        return x, quantize(w) if self.quantized else w, jnp.asarray(self.sizes, jnp.int32)


GROUPED_CASES = (
    GroupedCase("even", (16, 16, 16)),
    GroupedCase("plain", (16, 0, 20), transposed=False),
    GroupedCase("empty_groups", (0, 20, 0)),
    GroupedCase("all_in_one", (0, 48, 0)),
    GroupedCase("rows_past_the_last", (7, 0, 12)),
    GroupedCase("no_rows_in_any", (0, 0, 0)),
    GroupedCase("more_than_rows", (30, 30, 30)),
    GroupedCase("one_row", (0, 1, 0), rows=1),
    GroupedCase("more_groups_than_rows", (1, 0, 1, 0, 0, 1, 0, 0, 1), rows=5),
    GroupedCase("tiles_shared_by_groups", (100, 3, 0, 125, 40, 60), rows=330, contracted=64),
    GroupedCase("tiles_shared_plain", (100, 3, 0, 125, 40, 60), rows=330, contracted=64, transposed=False),
    GroupedCase("columns_in_tiles", (40, 90), rows=150, contracted=40, columns=2100),
    GroupedCase("quantized", (16, 0, 20), quantized=True),
    GroupedCase("quantized_plain", (16, 0, 20), quantized=True, transposed=False),
    GroupedCase("bfloat16", (100, 0, 30, 60), rows=200, contracted=128, columns=136, dtype="bfloat16"),
    GroupedCase("bfloat16_plain", (9, 30), dtype="bfloat16", transposed=False),
    GroupedCase("bfloat16_quantized", (9, 30), dtype="bfloat16", quantized=True),
)


@dataclasses.dataclass(frozen=True)
class LoraCase:
    """One call of `lora_matmul`.

    Attributes:
        ranks: of each adapter.
        adapters: of each row, repeated to `rows`.
        pages: in the pool, of which each adapter owns some anywhere.
    """

    name: str
    ranks: tuple[int, ...]
    adapters: tuple[int, ...]
    rows: int = 24
    contracted: int = 20
    columns: int = 28
    pages: int = 40
    dtype: str = "float32"

    def arrays(self, seed: int = 0) -> tuple[jax.Array, LoraPages, jax.Array]:
        """x [M, K], the adapters, and the adapter of each row."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), self.dtype)

        free = rng.permutation(self.pages).astype(np.int32)
        owned = {}
        for adapter, rank in enumerate(self.ranks):
            if rank:
                own, free = free[:rank], free[rank:]
                owned[adapter] = own, normal(rank, self.contracted), normal(self.columns, rank)
        sizes = (self.pages, self.contracted, self.columns, len(self.ranks), max(1, *self.ranks), self.dtype)
        lora = _loaded(sizes, owned)
        return normal(self.rows, self.contracted), lora, jnp.asarray(np.resize(self.adapters, self.rows), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _loaded(sizes: tuple, owned: dict[int, Any]) -> LoraPages:
    """A pool of these sizes with some adapters: pages, a and b of each."""
    *shape, adapters, most_rank, dtype = sizes
    lora = LoraPages.empty(*shape, adapters=adapters, most_rank=most_rank, dtype=dtype)
    # Pages that nobody owns, and entries of the table past a rank, hold what must not be read.
    lora = dataclasses.replace(lora, a=lora.a + jnp.nan, b=lora.b + jnp.nan, table=lora.table - 1)
    for adapter, (own, a, b) in owned.items():
        lora = lora.load(adapter, own, a, b, alpha=2.0 * (adapter + 1))
    return lora


LORA_CASES = (
    LoraCase("one_adapter", (4,), (0,)),
    LoraCase("ranks_differ", (8, 1, 3), (0, 1, 2)),
    LoraCase("some_rows_have_none", (4, 2, 8), (2, -1, 0, -1, -1)),
    LoraCase("no_row_has_one", (4, 2, 8), (-1, 7)),
    LoraCase("an_adapter_of_rank_0", (4, 0, 8), (1, 0, 2)),
    LoraCase("more_adapters_than_rows", (2,) * 7, (6, 3, -1, 3, 0), rows=5),
    LoraCase("one_row", (2, 5), (1,), rows=1),
    LoraCase("bfloat16", (8, 1, 16), (2, 0, 1, -1), dtype="bfloat16", contracted=64, columns=96),
)


@dataclasses.dataclass(frozen=True)
class QuantizedCase:
    """One call of `quantized_matmul`.

    Attributes:
        format: of the weight. activations: what the rows are rounded to.
        outlier: what some numbers of some rows are multiplied with.
        zeros: rows of x and of the weight that are zero.
    """

    name: str
    format: str
    activations: str
    rows: int = 5
    contracted: int = 256
    columns: int = 128
    dtype: str = "float32"
    outlier: float = 1.0
    zeros: int = 0

    def arrays(self, seed: int = 0) -> tuple[jax.Array, QArray]:
        """x [R, I] and the weight [O, I]."""
        rng = np.random.default_rng(seed)
        x, w = rng.normal(size=(self.rows, self.contracted)), rng.normal(size=(self.columns, self.contracted))
        x[::2, ::7] *= self.outlier
        x[: self.zeros], w[: self.zeros] = 0, 0
        return jnp.asarray(x, self.dtype), _quantize(jnp.asarray(w, self.dtype), self.format)


_quantize = jax.jit(quantize, static_argnums=1)


QUANTIZED_CASES = (
    QuantizedCase("w8a8", "int8", "int8"),
    QuantizedCase("w8a8_bfloat16", "int8", "int8", dtype="bfloat16", rows=33),
    QuantizedCase("w8a8_one_row", "int8", "int8", rows=1),
    QuantizedCase("w8a8_no_rows", "int8", "int8", rows=0),
    QuantizedCase("w8a8_rows_of_zeros", "int8", "int8", zeros=2),
    QuantizedCase("w8a8_odd_sizes", "int8", "int8", rows=7, contracted=75, columns=13),
    QuantizedCase("w8a16_in_integers", "int8", "int16", outlier=100.0),
    QuantizedCase("w8a16", "int8", "float", dtype="bfloat16"),
    QuantizedCase("w4a16_groups_of_32", "int4_32", "float", dtype="bfloat16"),
    QuantizedCase("w4a16_groups_of_64", "int4_64", "float", dtype="bfloat16", rows=40),
    QuantizedCase("w4a16_groups_of_128", "int4_128", "float", zeros=2),
    QuantizedCase("w4a16_one_row", "int4_128", "float", dtype="bfloat16", rows=1, columns=40),
    QuantizedCase("w4a16_in_integers", "int4_64", "int16"),
    QuantizedCase("w4a8_groups_of_32", "int4_32", "int8", dtype="bfloat16"),
    QuantizedCase("w4a8_one_group", "int4_128", "int8", contracted=128, rows=2),
    QuantizedCase("w4a8_outliers", "int4_128", "int8", outlier=100.0, zeros=1),
    QuantizedCase("fp8_weights", "fp8", "float", dtype="bfloat16"),
    QuantizedCase("fp8_tensor", "fp8", "fp8", zeros=2),
    QuantizedCase("fp8_rows", "fp8_row", "fp8", outlier=1e4),
    QuantizedCase("fp8_blocks", "fp8_block", "fp8", rows=4, columns=256, outlier=100.0),
    QuantizedCase("fp8_blocks_bfloat16", "fp8_block", "fp8", dtype="bfloat16", zeros=1),
    QuantizedCase("fp8_no_rows", "fp8_block", "fp8", rows=0),
    QuantizedCase("mxfp4_weights", "mxfp4", "float", dtype="bfloat16"),
    QuantizedCase("mxfp4", "mxfp4", "mxfp4", zeros=2),
    QuantizedCase("nvfp4_weights", "nvfp4", "float"),
    QuantizedCase("nvfp4", "nvfp4", "nvfp4", zeros=2, outlier=30.0),
)

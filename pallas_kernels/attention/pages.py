"""The paged cache and the ragged steps that read and write it, as data.

A cache keeps keys and values as they come (float32, bfloat16) or in fewer bits with scales: int8, float8_e4m3fn, or
int4, two kv heads to a byte. One scale stands for one token and kv head, so that a write never touches what an earlier
token left: a scale per page or per tensor would have to grow with the greatest key seen and rescale or clip old ones.
It costs 4 bytes beside H elements, 3 % of an int8 cache of head dim 128, and rounds to 1/254 of the row's greatest
element (int8), 1/16 of each element (float8), 1/14 of the row's greatest (int4).

float8 and int4 are stored as bytes and read as what they are block by block. XLA's CPU widens a whole operand of these
types before it scatters to it, and a whole operand that is converted bit by bit is another copy of the cache.

Shape legend: see spec.py; Kb = K, or K / 2 for int4; m pages of one block, c = m * page keys.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, UInt

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.attention.spec import Leaf

# Greatest magnitude that each scaled element type stores. int8 and int4 are symmetric: -128 and -8 stay unused.
_SPAN = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}
_PLAIN = ("float32", "bfloat16")
_BYTES = ("float8_e4m3fn", "int4")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ragged:
    """One step over a paged cache: rows of several sequences, one after the other, some of many rows and some of one.

    Attributes:
        kv_lens: length of each sequence after this step's rows are written; 0 for padding sequences.
        page_table: pages of each sequence, in order.
        cu_q_lens: rows of sequence s are cu_q_lens[s] : cu_q_lens[s + 1]; padding entries repeat the total.
        num_seqs: sequences in this step. Each has at least one row, so T rows hold at most T sequences.
    Rows from cu_q_lens[num_seqs] on are padding: they are written nowhere and their output is finite and meaningless.
    """

    kv_lens: Int[Array, "S"] | Leaf
    page_table: Int[Array, "S W"] | Leaf
    cu_q_lens: Int[Array, "S_plus_1"] | Leaf
    num_seqs: Int[Array, ""] | Leaf

    def sequence_of(self, rows: int) -> Int[Array, "T"]:
        """The sequence that each of the first `rows` rows belongs to (clipped for padding rows)."""
        sequence = jnp.searchsorted(self.cu_q_lens, jnp.arange(rows, dtype=jnp.int32), side="right") - 1
        return jnp.clip(sequence, 0, self.kv_lens.size - 1).astype(jnp.int32)

    def positions(self, rows: int) -> Int[Array, "T"]:
        """Position of each row in its sequence, in tokens; 0 for padding rows."""
        sequence = self.sequence_of(rows)
        row = jnp.arange(rows, dtype=jnp.int32)
        position = self.kv_lens[sequence] - (self.cu_q_lens[sequence + 1] - row)
        return jnp.where(row < self.total, position, 0)

    @property
    def total(self) -> Int[Array, ""]:
        """Rows that are not padding."""
        return self.cu_q_lens[self.num_seqs]

    @property
    def capacity(self) -> int:
        """Pages that one sequence's row of the page table can hold."""
        return self.page_table.shape[1]


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "k_scale", "v_scale"], meta_fields=["element"])
@dataclasses.dataclass(frozen=True)
class KVPages:
    """One layer's share of the paged cache: keys and values in pages of `page_size` tokens.

    Attributes:
        k, v: elements as stored: float8 as the bits of each in uint8; int4 two to a uint8, kv heads 2i and 2i + 1 in
            the low and high half of [i].
        k_scale, v_scale: what the stored elements are multiplied by, one per token and kv head, tokens outermost, in
            one row per page; None for float32 and bfloat16. A row of its own per page, because a TPU moves whole
            (8, 128) tiles and [P, page * K] would put eight pages into one.
        element: name of the element type: "float32", "bfloat16", "int8", "float8_e4m3fn" or "int4".
    """

    k: Num[Array, "*L P page Kb H"] | Leaf
    v: Num[Array, "*L P page Kb H"] | Leaf
    k_scale: Float[Array, "*L P 1 page_K"] | Leaf | None = None
    v_scale: Float[Array, "*L P 1 page_K"] | Leaf | None = None
    element: str = "float32"

    @classmethod
    def zeros(cls, num_pages: int, page_size: int, n_kv_heads: int, head_dim: int, dtype: Any) -> "KVPages":
        """A fresh cache of `num_pages` pages of `page_size` tokens.

        Args:
            dtype: float32, bfloat16, or with scales int8, float8_e4m3fn, int4.
        Raises MeshloomError for other types, and for int4 with an odd number of kv heads.
        """
        name = jnp.dtype(dtype).name
        if name not in _PLAIN and name not in _SPAN:
            raise MeshloomError(f"a cache keeps {', '.join((*_PLAIN, *_SPAN))}; got {name}")
        if name == "int4" and n_kv_heads % 2:
            raise MeshloomError(f"an int4 cache packs kv heads in pairs; got {n_kv_heads}: take int8")
        stored = jnp.uint8 if name in _BYTES else dtype
        shape = (num_pages, page_size, n_kv_heads // 2 if name == "int4" else n_kv_heads, head_dim)
        scales = (num_pages, 1, page_size * n_kv_heads)

        def scale():
            return jnp.zeros(scales, jnp.float32) if name in _SPAN else None

        return cls(jnp.zeros(shape, stored), jnp.zeros(shape, stored), scale(), scale(), name)

    @property
    def page_size(self) -> int:
        """Tokens in one page."""
        return self.k.shape[-3]

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.k.shape[-2] * (2 if self.element == "int4" else 1)

    def write(
        self, k: Float[Array, "T K H"], v: Float[Array, "T K H"], ragged: Ragged, part: "PagePart | None" = None
    ) -> "KVPages":
        """Stores this step's rows at their positions; padding rows are dropped. In place when the cache is donated.

        Args:
            part: stores only the rows whose page is in this part, through its table.
        """
        rows = k.shape[0]
        position, sequence = ragged.positions(rows), ragged.sequence_of(rows)
        index, stored = position // self.page_size, jnp.arange(rows) < ragged.total
        if part is None:
            page = ragged.page_table[sequence, index]
        else:
            page, held = part.find(sequence, index)
            stored &= held
        num_slots = self.k.shape[0] * self.page_size
        # A slot past the last one is dropped by the scatter.
        slot = jnp.where(stored, page * self.page_size + position % self.page_size, num_slots)

        def put(pages, values):
            flat = pages.reshape(num_slots, *values.shape[1:])
            return flat.at[slot].set(values, mode="drop").reshape(pages.shape)

        if self.element in _PLAIN:
            k, v = (x.astype(self.k.dtype) for x in (k, v))
            return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))
        # Where they lie, one by one: as [P * page, K] rows, a TPU would copy the scales to another tiling and back.
        lane = (position % self.page_size)[:, None] * self.kv_heads + jnp.arange(self.kv_heads)
        where = jnp.where(stored, page, self.k.shape[0])[:, None], 0, lane

        def put_scaled(pages, scales, values):
            values, scale = _quantized(values, self.element)
            return put(pages, values), scales.at[where].set(scale, mode="drop")

        (new_k, k_scale), (new_v, v_scale) = put_scaled(self.k, self.k_scale, k), put_scaled(self.v, self.v_scale, v)
        return KVPages(new_k, new_v, k_scale, v_scale, self.element)

    def gather(self, ids: Int[Array, "X m"]) -> "KVBlock":
        """The keys and values of `m` pages for each of X sequences."""

        def elements(pages):
            found = pages[ids].reshape(ids.shape[0], -1, *pages.shape[2:])
            match self.element:
                case "int4":
                    return _unpacked(found)
                case "float8_e4m3fn":
                    return jax.lax.bitcast_convert_type(found, jnp.float8_e4m3fn)
            return found

        def scale(scales):
            return None if scales is None else scales[ids].reshape(ids.shape[0], ids.shape[1] * self.page_size, -1)

        return KVBlock(elements(self.k), elements(self.v), scale(self.k_scale), scale(self.v_scale))


@dataclasses.dataclass(frozen=True)
class KVBlock:
    """Keys and values of a block of pages in their element type (int4 as int8), and scales where they have any."""

    k: Num[Array, "X c K H"]
    v: Num[Array, "X c K H"]
    k_scale: Float[Array, "X c K"] | None
    v_scale: Float[Array, "X c K"] | None

    def dequantized(self) -> tuple[Float[Array, "X c K H"], Float[Array, "X c K H"]]:
        """Keys and values, float32."""
        pairs = ((self.k, self.k_scale), (self.v, self.v_scale))
        k, v = (x.astype(jnp.float32) * (1.0 if scale is None else scale[..., None]) for x, scale in pairs)
        return k, v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagePart:
    """The pages of each sequence that one device or host holds: any of them, as long as each page is in one part.

    Attributes:
        page_table: where they lie in this part's own cache.
        index: which page of the sequence each is, ascending; -1 where the row ends.
    """

    page_table: Int[Array, "S V"] | Leaf
    index: Int[Array, "S V"] | Leaf

    def find(self, sequence: Int[Array, "T"], index: Int[Array, "T"]) -> tuple[Int[Array, "T"], Bool[Array, "T"]]:
        """Page of this part's cache that holds page `index` of `sequence`, and whether there is one."""
        same = self.index[sequence] == index[:, None]
        return self.page_table[sequence, jnp.argmax(same, axis=1)], jnp.any(same, axis=1)


def _quantized(x: Float[Array, "T K H"], element: str) -> tuple[Array, Float[Array, "T K"]]:
    """Elements as stored and their scales; a row of zeros has scale zero."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _SPAN[element]
    x = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    if element == "float8_e4m3fn":
        return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8), scale
    x = jnp.round(x).astype(jnp.int8)
    return _packed(x) if element == "int4" else x, scale


def _packed(x: Int[Array, "T K H"]) -> UInt[Array, "T Kb H"]:
    """Two kv heads in a byte."""
    low, high = x[:, 0::2].astype(jnp.uint8), x[:, 1::2].astype(jnp.uint8)
    return (low & 15) | (high << 4)


def _unpacked(x: UInt[Array, "X c Kb H"]) -> Int[Array, "X c K H"]:
    """int8 from two kv heads in a byte; shifts of signed bytes restore the signs."""
    low, high = (x << 4).astype(jnp.int8) >> 4, x.astype(jnp.int8) >> 4
    return jnp.stack([low, high], axis=3).reshape(*x.shape[:2], -1, x.shape[3])

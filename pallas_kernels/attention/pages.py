"""The paged cache and the ragged steps that read and write it, as data.

A cache keeps keys and values as they come (float32, bfloat16) or in fewer bits with scales: int8, float8_e4m3fn, or
int4, two kv heads to a byte. One scale stands for one token and kv head, so that a write never touches what an earlier
token left: a scale per page or per tensor would have to grow with the greatest key seen and rescale or clip old ones.
It costs 4 bytes beside H elements, 3 % of an int8 cache of head dim 128, and rounds to 1/254 of the row's greatest
element (int8), 1/16 of each element (float8), 1/14 of the row's greatest (int4).

float8 and int4 are stored as bytes and read as what they are block by block. XLA's CPU widens a whole operand of these
types before it scatters to it, and a whole operand that is converted bit by bit is another copy of the cache.

A page is rows, heads of a token after each other, and no array has a dimension of kv heads. A TPU pads the last two
dimensions to whole tiles: for 2 heads of int8, or any 3, XLA turned such a cache around before each write and back
after it (v5e), and so it does where rows are no multiple of its 128 lanes. Such a cache is made with `lanes`: a key of
at most 64 elements and its value are one row, joined, and longer rows end in zeros. Joined rows take no more memory;
head sizes of 80 and 96 take that of 128. Where kv heads are split over devices, the rows of each are a shard.

Shape legend: see spec.py; Kp = kv heads of a shard, halved for int4; m pages of one block, c = m * page keys.
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
_PAGES = 8  # a tile's rows of scales, to which their pages are rounded up
_BYTES = ("float8_e4m3fn", "int4")
# What `lanes` of a cache on a TPU is.
TPU_LANES = 128


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "scales"],
    meta_fields=["page_size", "head_dim", "element"],
)
@dataclasses.dataclass(frozen=True)
class KVPages:
    """One layer's share of the paged cache: keys and values in pages of `page_size` tokens.

    Attributes:
        k, v: rows as stored, in shards of the kv heads, tokens outermost in each: float8 as the bits of each element in
            uint8; int4 more eight two to a uint8, kv heads 2i and 2i + 1 in the low and high half of [i]. Where heads
            are joined, k has [key, value] in each row and v is None.
        page_size: tokens in one page. head_dim: elements of a key, H of the columns.
        scales: what the stored elements are multiplied by, one per token and kv head, in one row per page and shard,
            those of keys and then those of values; None for float32 and bfloat16. A row of its own per page, because a
            TPU moves whole (8, 128) tiles and [P, page * K] would put eight pages into one. Pages, P8, are rounded up
            to whole tiles, since XLA writes to all rows of all pages as to tiles. Of int4 each 256 of either (or all,
            of a page that holds no multiple of them) are those of the even kv heads, then those of the odd ones, as
            halves of bytes are told apart.
        element: name of the element type: "float32", "bfloat16", "int8", "float8_e4m3fn" or "int4".
    """

    k: Num[Array, "*L P shards page_Kp columns"] | Leaf
    v: Num[Array, "*L P shards page_Kp columns"] | Leaf | None
    page_size: int
    head_dim: int
    scales: Float[Array, "*L P8 shards 1 two_page_K"] | Leaf | None = None
    element: str = "float32"

    @classmethod
    def zeros(
        cls, num_pages: int, page_size: int, n_kv_heads: int, head_dim: int, dtype: Any, shards: int = 1, lanes: int = 1
    ) -> "KVPages":
        """A fresh cache of `num_pages` pages of `page_size` tokens.

        Args:
            dtype: float32, bfloat16, or with scales int8, float8_e4m3fn, int4.
            shards: devices that kv heads are split over; all arrays split along the third dimension from the last.
            lanes: rows are multiples of so many elements: `TPU_LANES` for a cache in a TPU's memory.
        Raises MeshloomError for other types, heads that do not divide over the shards, and int4 with an odd number of
        kv heads in a shard.
        """
        name = jnp.dtype(dtype).name
        if name not in _PLAIN and name not in _SPAN:
            raise MeshloomError(f"a cache keeps {', '.join((*_PLAIN, *_SPAN))}; got {name}")
        each, rest = divmod(n_kv_heads, shards)
        if rest:
            raise MeshloomError(f"a cache of {n_kv_heads} kv heads does not divide over {shards} devices")
        if name == "int4" and each % 2:
            where = "" if shards == 1 else f" on each of {shards} devices"
            raise MeshloomError(f"an int4 cache packs kv heads in pairs; got {each}{where}: take int8")
        stored = jnp.uint8 if name in _BYTES else dtype
        joined = 2 * head_dim <= lanes
        columns = -(-(2 * head_dim if joined else head_dim) // lanes) * lanes
        shape = (num_pages, shards, page_size * (each // 2 if name == "int4" else each), columns)
        of_page = (-(-num_pages // _PAGES) * _PAGES, shards, 1, 2 * page_size * each)
        scales = jnp.zeros(of_page, jnp.float32) if name in _SPAN else None
        v = None if joined else jnp.zeros(shape, stored)
        return cls(jnp.zeros(shape, stored), v, page_size, head_dim, scales, name)

    @property
    def joined(self) -> bool:
        """Whether a row is a key and its value."""
        return self.v is None

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        shards, rows = self.k.shape[-3:-1]
        return shards * rows // self.page_size * (2 if self.element == "int4" else 1)

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
        offset = position % self.page_size

        def page_in(pages):
            return jnp.where(stored, page, pages.shape[0])  # past the last one: dropped by the scatter

        def put(pages, values):
            """Shard by shard: a scatter whose indices name the shard would gather them and the rows over devices."""
            shards = pages.shape[1]
            each = values.shape[1] // shards
            window = _rows_at_once(each, values.shape[2], values.dtype.itemsize)
            slot = page_in(pages) * self.page_size + offset
            where = slot[:, None] * (each // window) + jnp.arange(each // window)

            def put_shard(pages, values):
                flat = pages.reshape(-1, window, pages.shape[-1])
                return flat.at[where].set(values, mode="drop").reshape(pages.shape)

            return jax.vmap(put_shard, 1, 1)(pages, values.reshape(rows, shards, each // window, window, -1))

        def stored_rows(k, v) -> dict[str, Any]:
            def whole(rows):
                return jnp.pad(rows, ((0, 0), (0, 0), (0, self.k.shape[-1] - rows.shape[-1])))

            if self.joined:
                return {"k": put(self.k, whole(jnp.concatenate([k, v], axis=-1)))}
            return {"k": put(self.k, whole(k)), "v": put(self.v, whole(v))}

        if self.element in _PLAIN:
            return dataclasses.replace(self, **stored_rows(*(x.astype(self.k.dtype) for x in (k, v))))

        def put_scales(scales, *values):
            """One by one, by rows of a TPU's lanes: by other rows it would copy them to another tiling and back."""
            shards, columns = scales.shape[1], scales.shape[3]
            keys = columns // 2  # of a page
            each, lanes = keys // self.page_size, TPU_LANES if columns % TPU_LANES == 0 else columns
            key = offset[:, None] * each + jnp.arange(each)
            if self.element == "int4":
                run = _run(keys)
                key = key // run * run + key % 2 * (run // 2) + key % run // 2
            row, lane = jnp.divmod(jnp.concatenate([key, keys + key], axis=1), lanes)
            where = page_in(scales)[:, None] * (columns // lanes) + row, lane

            def put_shard(scales, values):
                return scales.reshape(-1, lanes).at[where].set(values, mode="drop").reshape(scales.shape)

            both = jnp.concatenate([each.reshape(rows, shards, -1) for each in values], axis=2)
            return jax.vmap(put_shard, 1, 1)(scales, both)

        (k, k_scale), (v, v_scale) = _quantized(k, self.element), _quantized(v, self.element)
        scales = put_scales(self.scales, k_scale, v_scale)
        return dataclasses.replace(self, **stored_rows(k, v), scales=scales)

    def gather(self, ids: Int[Array, "X m"]) -> "KVBlock":
        """The keys and values of `m` pages for each of X sequences."""

        def tokens(found, *last):
            """[X, m, shards, page * n, ...] as [X, c, K, *last]."""
            found = found.reshape(*ids.shape, found.shape[2], self.page_size, -1, *last)
            return found.swapaxes(2, 3).reshape(ids.shape[0], ids.shape[1] * self.page_size, -1, *last)

        def elements(pages):
            found = tokens(pages[ids], pages.shape[-1])
            match self.element:
                case "int4":
                    return _unpacked(found)
                case "float8_e4m3fn":
                    return jax.lax.bitcast_convert_type(found, jnp.float8_e4m3fn)
            return found

        def scale(found):
            if self.element == "int4":
                run = _run(found.shape[-1])
                found = found.reshape(*found.shape[:3], -1, 2, run // 2).swapaxes(-1, -2)
            return tokens(found)

        k = elements(self.k)
        v = k[..., self.head_dim :] if self.joined else elements(self.v)
        keys, values = (x[..., : self.head_dim] for x in (k, v))
        if self.scales is None:
            return KVBlock(keys, values, None, None)
        return KVBlock(keys, values, *map(scale, jnp.split(self.scales[ids], 2, axis=-1)))


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


def _run(scales: int) -> int:
    """How many of a page's scales of int4 are those of even kv heads, then those of odd ones: whole lanes of a TPU."""
    return 2 * TPU_LANES if scales % (2 * TPU_LANES) == 0 else scales


def _rows_at_once(heads: int, columns: int, itemsize: int) -> int:
    """Rows that one write of a token's `heads` rows moves: all, where they are whole tiles as a TPU lays out rows.

    Elsewhere it would turn the cache around for them. Rows one by one cost a write each.
    """
    least = max(4 // itemsize, 1) if columns <= 128 else 32 if itemsize == 1 else 8
    return heads if heads >= least and heads & (heads - 1) == 0 else 1


def _quantized(x: Float[Array, "T K H"], element: str) -> tuple[Array, Float[Array, "T K"]]:
    """Elements as stored and their scales; a row of zeros has scale zero."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / _SPAN[element]
    x = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    if element == "float8_e4m3fn":
        return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8), scale
    x = jnp.round(x).astype(jnp.int8)
    return _packed(x) if element == "int4" else x, scale


def _packed(x: Int[Array, "T K H"]) -> UInt[Array, "T half_K H"]:
    """Two kv heads in a byte, without signs."""
    low, high = jnp.moveaxis((x + 8).astype(jnp.uint8).reshape(x.shape[0], -1, 2, x.shape[2]), 2, 0)
    return low | high << 4


def _unpacked(x: UInt[Array, "X c half_K H"]) -> Int[Array, "X c K H"]:
    """int8 from two kv heads in a byte."""
    both = jnp.stack([x & 15, x >> 4], axis=3).astype(jnp.int8) - 8
    return both.reshape(*x.shape[:2], -1, x.shape[3])

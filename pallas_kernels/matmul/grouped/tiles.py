"""How large the tiles of a grouped product are on a TPU, from shapes alone."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp

from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec
from meshloom.pallas_kernels.tuning import Sizes, bucket, key_of, tuned

LANES = 128
# Fast memory that tiles may take, and that the compiler may use: the smallest core has 64 MiB (TPU v7x).
BUDGET, LIMIT = 44 * 2**20, 56 * 2**20
MOST_ROWS, MOST_COLUMNS = 512, 2048
# A tile of fewer columns reads the rows more often than the multiplier takes to use them.
LEAST_COLUMNS = 512
# Operations in the time of a byte from HBM, on v5e; other TPUs have more (v5p 166 is the exception).
OPERATIONS_PER_BYTE = 240
# Numbers contracted by one run of instructions. As many as STRAIGHT need no loop, and no sums between its rounds: 2,048
# numbers, 512 rows and 1,408 columns take 6,371 bundles on v6e, and 7,123 in rounds of 1,024 (v5e: 18,865 and 19,025).
# More than that would be slow to compile and to fetch: 4,096 numbers are 46,307 bundles on v5e. Longer rows take rounds
# of as many: a round of 1,792 columns takes 237 bundles to begin and end on v6e, be it of 1,024 numbers or of 2,048.
STRAIGHT = CHUNK = 2048
# Columns of the left side of a gradient of weights, and sides of what one run of instructions makes of it. Large sides
# are read seldom, and small runs are fetched fast: the gradient of Mixtral's 14,336 x 4,096 over 8,192 rows takes 1.72
# ms of v6e's bandwidth in tiles of 1,024 x 1,024, and 1.15 in those of 2,048 x 2,048, half of the left side at a time.
LARGEST_CHUNK, MOST_RUN = 1024, 1536 * 1536


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one visit.

    Attributes:
        rows, columns: of the result.
        contracted: numbers of a row that lie in fast memory at a time; divides K.
        chunk: those multiplied by one run of instructions; divides `contracted`.
    """

    rows: int
    columns: int
    contracted: int
    chunk: int


def product_tiles(spec: GroupedSpec) -> Tiles | None:
    """Tiles that are known to be fast (tuning.py), or else those of `least_tiles`; None when none fits fast memory."""
    own = least_tiles(spec)
    return own and _tuned_tiles(spec, own)


def grouped_key(spec: GroupedSpec) -> str:
    """A product by what decides its schedule."""
    return key_of(
        contracted=spec.contracted,
        columns=spec.columns,
        groups=spec.groups,
        rows=bucket(spec.rows),
        dtype=spec.x,
        weight=spec.weight,
        transposed=spec.transposed,
    )


def _tuned_tiles(spec: GroupedSpec, own: Tiles) -> Tiles:
    def refuse(sizes: Sizes) -> str | None:
        tiles = Tiles(**sizes)
        if tiles.rows % LANES and tiles.rows != spec.rows:
            return f"rows are multiples of {LANES}, or all"
        if tiles.rows > spec.rows:
            return f"there are {spec.rows} rows"
        if tiles.columns > spec.columns or (tiles.columns % LANES and tiles.columns != spec.columns):
            return f"columns are multiples of {LANES}, or all {spec.columns}"
        if spec.contracted % tiles.contracted or tiles.contracted % tiles.chunk:
            return f"chunks divide what is contracted, and that {spec.contracted}"
        if tiles.contracted < spec.contracted and tiles.contracted % LANES:
            return f"parts of {spec.contracted} numbers are multiples of {LANES}"
        if tiles.chunk < tiles.contracted and tiles.chunk % LANES:
            return f"chunks are multiples of {LANES}"
        return None if _held(spec, tiles) <= BUDGET else f"they take more than {BUDGET:,} bytes of fast memory"

    sizes = tuned("grouped_matmul", grouped_key(spec), refuse)
    return own if sizes is None else Tiles(**sizes)


def _held(spec: GroupedSpec, tiles: Tiles) -> int:
    """Bytes of fast memory."""
    x, w = jnp.dtype(spec.x).itemsize, jnp.dtype(spec.weight).itemsize
    copied = tiles.contracted * (tiles.rows * x + tiles.columns * w) + tiles.rows * tiles.columns * x
    return 2 * copied + 4 * tiles.rows * tiles.columns


def least_tiles(spec: GroupedSpec) -> Tiles | None:
    """The tiles of a product that multiply and copy least, or None when none fits fast memory."""
    rows = tile_rows(spec.rows, spec.groups)
    best: tuple[float, Tiles] | None = None
    for contracted in _parts(spec.contracted):
        for columns in _widths(spec.columns, MOST_COLUMNS):
            tiles = Tiles(rows, columns, contracted, _chunk(contracted))
            if _held(spec, tiles) > BUDGET:
                continue
            if best is None or _cost(spec, tiles) < best[0]:
                best = _cost(spec, tiles), tiles
    return best and best[1]


def _cost(spec: GroupedSpec, tiles: Tiles) -> float:
    """Bytes read from HBM, and those that could be read while all tiles are multiplied."""
    down, across = -(-spec.rows // tiles.rows), -(-spec.columns // tiles.columns)
    x = spec.rows * spec.contracted * jnp.dtype(spec.x).itemsize * across
    # With all of K at once a weight stays while its rows pass; else every visit reads it.
    reads = min(spec.groups, down) if tiles.contracted == spec.contracted else down + spec.groups
    w = spec.contracted * spec.columns * jnp.dtype(spec.weight).itemsize * reads
    operations = 2 * down * tiles.rows * spec.contracted * across * tiles.columns
    return x + w + operations / OPERATIONS_PER_BYTE


@dataclasses.dataclass(frozen=True)
class OuterTiles:
    """Sizes of one visit of the gradient of weights.

    Attributes:
        rows: that are summed over. left, right: sides of the result.
        chunk: of the left side, multiplied by one run of instructions; divides it.
    """

    rows: int
    left: int
    right: int
    chunk: int


def outer_tiles(rows: int, groups: int, a: int, b: int, dtype: Any) -> OuterTiles:
    """Tiles of a^T b over groups of rows [M, A] and [M, B] of one dtype: those known to be fast, or `least_outer`."""

    def refuse(sizes: Sizes) -> str | None:
        tiles = OuterTiles(**sizes)
        for name, size, whole in (("rows", tiles.rows, rows), ("left", tiles.left, a), ("right", tiles.right, b)):
            if size > whole or (size % LANES and size != whole):
                return f"{name} are a multiple of {LANES}, or all {whole}"
        if tiles.left % tiles.chunk or (tiles.chunk % LANES and tiles.chunk != tiles.left):
            return f"chunks are multiples of {LANES} that divide the left side"
        return None if _outer_held(tiles, dtype) <= BUDGET else f"they take more than {BUDGET:,} bytes of fast memory"

    sizes = tuned("grouped_outer", outer_key(rows, groups, a, b, dtype), refuse)
    return least_outer(rows, groups, a, b, dtype) if sizes is None else OuterTiles(**sizes)


def outer_key(rows: int, groups: int, a: int, b: int, dtype: Any) -> str:
    """A gradient of weights by what decides its schedule."""
    return key_of(left=a, right=b, groups=groups, rows=bucket(rows), dtype=jnp.dtype(dtype).name)


def least_outer(rows: int, groups: int, a: int, b: int, dtype: Any) -> OuterTiles:
    """The tiles that multiply and copy least, of those that fit; sides of 512 always do."""
    at_once, itemsize = tile_rows(rows, groups), jnp.dtype(dtype).itemsize

    def cost(tiles: OuterTiles) -> float:
        down, across = -(-a // tiles.left), -(-b // tiles.right)
        operations = 2 * rows * down * tiles.left * across * tiles.right
        return itemsize * rows * (a * across + b * down) + operations / OPERATIONS_PER_BYTE

    sides = itertools.product(_widths(a, MOST_COLUMNS), _widths(b, MOST_COLUMNS))
    every = (OuterTiles(at_once, left, right, _outer_chunk(left)) for left, right in sides)
    return min(
        (each for each in every if each.chunk * each.right <= MOST_RUN and _outer_held(each, dtype) <= BUDGET), key=cost
    )


def _outer_held(tiles: OuterTiles, dtype: Any) -> int:
    """Bytes of fast memory, the result in the rows' dtype or in float32."""
    itemsize = jnp.dtype(dtype).itemsize
    return 2 * itemsize * (tiles.rows * (tiles.left + tiles.right) + tiles.left * tiles.right) + 4 * (
        tiles.left * tiles.right
    )


def _outer_chunk(left: int) -> int:
    """All of it, or the most of 512 to 1,024 columns that divide it."""
    if left <= LARGEST_CHUNK:
        return left
    chunk = next((part for part in _parts(left) if part <= LARGEST_CHUNK), left)
    return chunk if 2 * chunk >= LARGEST_CHUNK else left


def tile_rows(rows: int, groups: int) -> int:
    """About the rows of one group, since a group's last tile is computed whole however few of its rows it has."""
    tile = max(LANES, min(MOST_ROWS, 1 << (rows // groups).bit_length()))
    return min(rows, tile)


def _chunk(contracted: int) -> int:
    if contracted <= STRAIGHT:
        return contracted
    chunk = next((part for part in _parts(contracted) if part <= CHUNK), contracted)
    return chunk if 4 * chunk >= CHUNK else contracted


def _widths(size: int, most: int) -> list[int]:
    """Widths of tiles over `size` columns: those that pad least first, and the widest among them."""
    widths = [width for width in range(LEAST_COLUMNS, most + 1, LANES) if width < size]
    if size <= most:
        widths.append(size)
    return sorted(widths, key=lambda width: (-(-size // width) * width, -width))


def _parts(size: int) -> list[int]:
    """The size itself and the multiples of the lanes that divide it, largest first."""
    return [size, *(part for part in range(size // LANES * LANES, 0, -LANES) if part < size and size % part == 0)]

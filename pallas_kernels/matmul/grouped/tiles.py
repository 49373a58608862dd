"""How large the tiles of a grouped product are on a TPU, from shapes and the chip alone.

A group that begins or ends within a tile of rows has it computed whole, as its neighbour has: E groups cost E - 1 tiles
beside those of the rows. Small tiles waste less of the multiplier, and read a weight that is not held whole more often.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp

from meshloom.core.hardware import CHIPS, chip_of_kind
from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec
from meshloom.pallas_kernels.tuning import Sizes, bucket, key_of, tuned

LANES = 128
# Fast memory that tiles may take, and that the compiler may use: the smallest core has 64 MiB (TPU v7x).
BUDGET, LIMIT = 44 * 2**20, 56 * 2**20
ROWS, MOST_COLUMNS = (128, 256, 512), 2048
# A tile of fewer columns reads the rows more often than the multiplier takes to use them.
LEAST_COLUMNS = 512
# Chips whose multiplier takes a weight in parts of 128 x 128. Those of the others are 256 x 256, and fewer rows than
# that take as long. Mixtral's projection up, 1,024 rows an expert that begin anywhere, takes v6e 1.65 ms in tiles of
# 512 rows and 1.41 in those of 256, and v5e 7.12 and, in those of 128, 5.54.
NARROW = ("v5e", "v5p")
# Rows times numbers contracted by one run of instructions. Without a loop there are no sums between its rounds: 2,048
# numbers, 512 rows and 1,408 columns take 6,371 bundles on v6e, and 7,123 in rounds of 1,024 (v5e: 18,865 and 19,025).
# More than that would be slow to compile and to fetch: 4,096 numbers are 46,307 bundles on v5e. Longer rows take rounds
# of as many: a round of 1,792 columns takes 237 bundles to begin and end on v6e, be it of 1,024 numbers or of 2,048.
STRAIGHT = 512 * 2048
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
    """The tiles of a product that take least on the chip of the mesh in scope, or None when none fits fast memory."""
    sides = itertools.product(_row_tiles(spec.rows), _parts(spec.contracted), _widths(spec.columns, MOST_COLUMNS))
    every = (Tiles(rows, columns, contracted, _chunk(contracted, rows)) for rows, contracted, columns in sides)
    return min(
        (each for each in every if _held(spec, each) <= BUDGET), key=lambda each: _cost(spec, each), default=None
    )


def _cost(spec: GroupedSpec, tiles: Tiles) -> float:
    """Of what `_longer` counts."""
    visits, across = most_visits(spec.rows, spec.groups, tiles.rows), -(-spec.columns // tiles.columns)
    # With all of K at once a weight stays while its rows pass; else every visit reads both.
    whole = tiles.contracted == spec.contracted
    rows, reads = (spec.rows, min(spec.groups, visits)) if whole else (visits * tiles.rows, visits)
    x = rows * spec.contracted * jnp.dtype(spec.x).itemsize * across
    w = spec.contracted * spec.columns * jnp.dtype(spec.weight).itemsize * reads
    return _longer(x + w, visits, tiles.rows, spec.contracted * across * tiles.columns)


def most_visits(rows: int, groups: int, tile: int) -> int:
    """Visits to tiles of so many rows by groups that begin anywhere."""
    return -(-rows // tile) + groups - 1


def _longer(copied: int, visits: int, rows: int, sides: int) -> float:
    """Bytes copied, or those that could be while all visits multiply, whichever are more, and a tenth of the others: of
    equally long ones the one that leaves more to spare.
    """
    kind = Target.of_mesh().device_kind
    chip = (kind and chip_of_kind(kind)) or CHIPS["v5e"]
    operations = 2 * visits * max(rows, 128 if chip.name in NARROW else 256) * sides
    multiplied = operations * chip.hbm_bandwidth / chip.flops["bfloat16"]
    return max(copied, multiplied) + min(copied, multiplied) / 10


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
    """The tiles that take least on the chip of the mesh in scope, of those that fit; sides of 512 always do."""
    itemsize = jnp.dtype(dtype).itemsize

    def cost(tiles: OuterTiles) -> float:
        down, across = -(-a // tiles.left), -(-b // tiles.right)
        visits = most_visits(rows, groups, tiles.rows)
        return _longer(
            itemsize * rows * (a * across + b * down), visits, tiles.rows, down * tiles.left * across * tiles.right
        )

    sides = itertools.product(_row_tiles(rows), _widths(a, MOST_COLUMNS), _widths(b, MOST_COLUMNS))
    every = (OuterTiles(at_once, left, right, _outer_chunk(left)) for at_once, left, right in sides)
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


def _row_tiles(rows: int) -> list[int]:
    """Rows that a tile may have."""
    return sorted({min(rows, tile) for tile in ROWS})


def _chunk(contracted: int, rows: int) -> int:
    """Numbers of one run of instructions: all, or the most that divide them, where that is no small part of a run."""
    most = STRAIGHT // rows
    chunk = next((part for part in _parts(contracted) if part <= most), contracted)
    return chunk if 4 * chunk >= most else contracted


def _widths(size: int, most: int) -> list[int]:
    """Widths of tiles over `size` columns: those that pad least first, and the widest among them."""
    widths = [width for width in range(LEAST_COLUMNS, most + 1, LANES) if width < size]
    if size <= most:
        widths.append(size)
    return sorted(widths, key=lambda width: (-(-size // width) * width, -width))


def _parts(size: int) -> list[int]:
    """The size itself and the multiples of the lanes that divide it, largest first."""
    return [size, *(part for part in range(size // LANES * LANES, 0, -LANES) if part < size and size % part == 0)]

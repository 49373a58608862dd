"""How large the tiles of a grouped product are on a TPU, from shapes alone."""

import dataclasses

import jax.numpy as jnp

from meshloom.pallas_kernels.matmul.grouped.spec import GroupedSpec
from meshloom.pallas_kernels.tuning import Sizes, bucket, key_of, tuned

LANES = 128
# Fast memory that tiles may take, and that the compiler may use: the smallest core has 64 MiB (TPU v7x).
BUDGET, LIMIT = 44 * 2**20, 56 * 2**20
MOST_ROWS, MOST_COLUMNS, MOST_SIDE = 512, 2048, 1536
# A tile of fewer columns reads the rows more often than the multiplier takes to use them.
LEAST_COLUMNS = 512
# Operations in the time of a byte from HBM, on v5e; other TPUs have more (v5p 166 is the exception).
OPERATIONS_PER_BYTE = 240
# Numbers contracted by one run of instructions. As many as STRAIGHT need no loop, and no sums between its rounds: 2,048
# numbers, 512 rows and 1,408 columns take 6,371 bundles on v6e, and 7,123 in rounds of 1,024 (v5e: 18,865 and 19,025).
# More than that would be slow to compile and to fetch: 4,096 numbers are 46,307 bundles on v5e. Longer rows take rounds
# of as many: a round of 1,792 columns takes 237 bundles to begin and end on v6e, be it of 1,024 numbers or of 2,048.
STRAIGHT = CHUNK = 2048


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


def outer_tiles(rows: int, groups: int, a: int, b: int) -> tuple[int, int, int]:
    """Rows of a visit, and the two sides of a tile of the result."""
    return tile_rows(rows, groups), _widths(a, MOST_SIDE)[0], _widths(b, MOST_SIDE)[0]


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

"""How large the blocks of a quantized product are on a TPU, from shapes alone."""

import dataclasses
import math

import jax.numpy as jnp

from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec
from meshloom.pallas_kernels.tuning import Sizes, bucket, key_of, tuned

LANES = 128
ROWS = 32  # of an int8 register; one of bfloat16 has half
# Fast memory that blocks may take, and that the compiler may use: the smallest core has 64 MiB (TPU v7x).
BUDGET, LIMIT = 44 * 2**20, 56 * 2**20
# Rows of x that stay while all of w passes. Fewer would read w so often that v6e waits for HBM: 2,048 rows of 4,096
# numbers by 4,096 columns take 37 us of int8 products, and four passes over w 39 us.
MOST_ROWS, MOST_COLUMNS = 1024, 512
# Products of one run of instructions. Longer runs keep the matrix unit busier (int4, 512 rows and columns, v6e: 65 % of
# the peak at 1,024 numbers, 77 % at 2,048, 86 % at 4,096) and take longer to compile: 6 s for the last.
MOST_PRODUCTS = 512 * 512 * 4096
# Rows, and numbers of each at a time, that are rounded beside products. The 512 x 4,096 numbers of 512 rows take 3,574
# bundles on v6e in two strips, 512 columns of their products included, 5,112 in four and 3,395 at once, which takes as
# long again to compile. Products alone take 2,188, rounding in a loop before them 4,352.
STRIP, PART = 256, 512


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one visit: `rows` x `columns` of the result, over all numbers of a row in `chunk`s that divide it."""

    rows: int
    columns: int
    chunk: int

    @property
    def strip(self) -> int:
        """Rows that are rounded and multiplied by one run of instructions."""
        return min(self.rows, STRIP)


def blocks_of(spec: MatmulSpec) -> Blocks | None:
    """Blocks that are known to be fast (tuning.py), or else the largest; None where there are none."""
    own = largest_blocks(spec)
    return own and _tuned_blocks(spec, own)


def largest_blocks(spec: MatmulSpec) -> Blocks | None:
    """The largest blocks that fit fast memory; None if there are none, or no chunk divides a row."""
    count, (out, size) = math.prod(spec.x[:-1]), spec.w
    for rows in _halves(MOST_ROWS, count, _unit(spec)):
        for columns in _halves(MOST_COLUMNS, out, LANES):
            if _held(spec, rows, columns) <= BUDGET:
                chunk = _chunk(size, _most_products(spec) // (rows * columns), spec.block[1] * LANES)
                return None if chunk is None else Blocks(rows, columns, chunk)
    return None


def matmul_key(spec: MatmulSpec) -> str:
    """A call by what decides its schedule."""
    return key_of(
        contracted=spec.w[1],
        columns=spec.w[0],
        rows=bucket(math.prod(spec.x[:-1])),
        values=spec.values,
        scaled="x".join(map(str, spec.block)),
        activations=spec.activations,
    )


def _tuned_blocks(spec: MatmulSpec, own: Blocks) -> Blocks:
    count, (out, size), unit = math.prod(spec.x[:-1]), spec.w, _unit(spec)

    def cut(sizes: Sizes) -> Blocks:
        return Blocks(min(sizes["rows"], -(-count // unit) * unit), sizes["columns"], sizes["chunk"])

    def refuse(sizes: Sizes) -> str | None:
        blocks = cut(sizes)
        if blocks.rows % unit or (blocks.columns % LANES and blocks.columns != out):
            return f"rows are multiples of {unit}, columns of {LANES}"
        if size % blocks.chunk or (blocks.chunk % LANES and blocks.chunk != size):
            return f"chunks are multiples of {LANES} numbers that divide {size}"
        scaled = spec.block[1] * LANES
        if size > scaled and scaled % blocks.chunk:
            return f"the scales of a chunk lie in one register, for {scaled} numbers"
        if _held(spec, blocks.rows, blocks.columns) > BUDGET:
            return f"they take more than {BUDGET:,} bytes of fast memory"
        if -(-count // blocks.rows) * blocks.rows > -(-count // own.rows) * own.rows:
            return f"they pad {count} rows to more than blocks of {own.rows} do"
        return None

    sizes = tuned("quantized_matmul", matmul_key(spec), refuse)
    return own if sizes is None else cut(sizes)


def _most_products(spec: MatmulSpec) -> int:
    """Products of numbers that become a run of about as many instructions, whatever the formats."""
    if spec.groups > 1 and spec.activations != "float":  # the sums of each group are numbers to scale and to add
        return MOST_PRODUCTS // 4 * min(spec.block[1], LANES) // LANES
    return (2 if spec.activations == "int8" else 1) * MOST_PRODUCTS  # those of int8 take half as many


def _unit(spec: MatmulSpec) -> int:
    return ROWS // 2 if spec.activations == "float" else ROWS


def _held(spec: MatmulSpec, rows: int, columns: int) -> float | int:
    """Bytes of fast memory; x and w arrive while others are used; int4 takes a byte of half the use."""
    size, x = spec.w[1], jnp.dtype(spec.dtype).itemsize
    w = columns * size * (0.5 if spec.values == "int4" else 1)
    scales = columns * -(-spec.groups // LANES) * LANES * 4
    held = 2 * (rows * size * x + w + scales + rows * columns * x) + rows * columns * 4 + scales
    if spec.activations == "float":
        return held
    of_rows = rows * LANES * 4 * (spec.groups if spec.activations == "fp8" else 1)
    return held + rows * size + of_rows + (scales if spec.groups > 1 else 0)


def _halves(most: int, size: int, unit: int) -> list[int]:
    """Sizes of blocks over `size`, largest first: all of it, if that is not more than `most`, else halves of `most`."""
    if size <= most:
        most = -(-size // unit) * unit
        return [most] if most <= unit else [most, *_halves(most // 2 // unit * unit, most, unit)]
    return [most] if most <= unit else [most, *_halves(most // 2, size, unit)]


def _chunk(size: int, most: int, scaled: int) -> int | None:
    """The most numbers of a row that one run of instructions multiplies: all of them, or a multiple of the lanes.

    Args:
        scaled: numbers whose scales fill a register; a chunk's scales lie in one.
    """
    if size <= min(most, scaled):
        return size
    parts = (part for part in range(max(most // LANES, 1) * LANES, 0, -LANES) if size % part == 0)
    return next((part for part in parts if size <= scaled or scaled % part == 0), None)

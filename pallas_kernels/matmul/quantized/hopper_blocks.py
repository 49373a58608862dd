"""How large the blocks of a quantized product are on a Hopper GPU, from shapes alone."""

import dataclasses
import math
from typing import Any, Literal

from meshloom.pallas_kernels.hopper import CORES, ROWS, SHARED_LIMIT, WORKERS, bits_of
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec

# Contracted numbers that one product takes from registers, and rows of the result that leave at a time.
STEP, LEAVING = 64, 64
# Rows of x of a thread block: with 256 the sums take 128 of a thread's 255 registers. Float8 keeps two of them.
MOST_ROWS, MOST_FLOAT8_ROWS = 256, 128
LEAST_STAGES, MOST_STAGES = 3, 6
# With few rows the weight's bytes are what counts: two thread blocks of this size on a core, and no short copies.
FEW_ROWS, FEW_ROWS_LIMIT = 64, SHARED_LIMIT // 2 - 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one thread block's work.

    Attributes:
        kind: what is multiplied: numbers of x's dtype, int8 or float8.
        rows: of x. depth: contracted numbers of a step, of which `stages` are in memory. steps: of one split.
        splits: parts of the contracted side that thread blocks of their own sum up.
        group: numbers that share a scale.
        scaled_by_step: scales change along the contracted side.
    """

    kind: Literal["float", "int8", "fp8"]
    rows: int
    depth: int
    stages: int
    steps: int
    splits: int
    group: int
    scaled_by_step: bool

    def across(self, dtype: Any) -> int:
        """Numbers of a tile's row: 128 bytes, or as many as a step has."""
        return min(128 * 8 // bits_of(dtype), self.depth)


def blocks_of(spec: MatmulSpec) -> Blocks:
    """The blocks of a product that the kernel has."""
    count, (columns, size) = math.prod(spec.x[:-1]), spec.w
    kind: Any = spec.activations
    most = MOST_FLOAT8_ROWS if kind == "fp8" else MOST_ROWS
    rows = -(-count // -(-count // most))
    rows = -(-rows // 8) * 8 if count <= LEAVING else -(-rows // LEAVING) * LEAVING
    few = rows <= FEW_ROWS
    bits = bits_of(spec.values)
    x_bits = bits_of(spec.dtype) if kind == "float" else 8
    out = WORKERS * ROWS * min(rows, LEAVING) * (4 if few else bits_of(spec.dtype) // 8)
    # Whole lines of 128 bytes of the weight; where x fills the memory, as many steps of it as there is room for.
    longest = STEP if kind == "float" and not few else 128 * 8 // bits
    room = (FEW_ROWS_LIMIT if few else SHARED_LIMIT) - out

    def stages(depth: int) -> int:
        return min(MOST_STAGES, room // (depth * (WORKERS * ROWS * bits + rows * x_bits) // 8))

    depths = [depth for depth in (256, 128, STEP) if depth <= longest and size % depth == 0]
    depth = next((depth for depth in depths if stages(depth) >= LEAST_STAGES), depths[-1])
    splits = _splits(spec, -(-columns // (WORKERS * ROWS)), size // depth, count) if few else 1
    return Blocks(kind, rows, depth, stages(depth), size // depth // splits, splits, spec.block[1], spec.groups > 1)


def _splits(spec: MatmulSpec, blocks: int, steps: int, rows: int) -> int:
    """As many as fill the cores twice, unless writing and reading their sums adds a quarter to the weight's bytes."""
    splits = 1
    while (
        2 * splits * blocks <= 2 * CORES
        and steps % (2 * splits) == 0
        and 2 * splits * rows * 8 <= spec.w[1] * bits_of(spec.values) // 8 / 4
    ):
        splits *= 2
    return splits

"""What the compiler's schedule of one TPU kernel says, and how it is had.

No TPU is needed: bundles are cycles unless something waits. What the estimate does not see is said in docs/kernels.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from meshloom.core.bundles import Region
from meshloom.core.compile import without_compilation_cache
from meshloom.core.hardware import CHIPS

# Cycles that all arrays of a core together take for one push of 16 rows of bfloat16 or 32 of int8. On v5e schedules of
# transposed products are shorter than that (8,780 bundles for 2,560 pushes): the arrays make the core wait.
PUSH_CYCLES = 4
# Cycles of a core for a product of 128 x 128 x 128 whose sums are long enough to fill its arrays, by dtype multiplied.
TILE_CYCLES = {"v5e": {"bf16": 32, "s8": 16}, "v5p": {"bf16": 32, "s8": 16}, "v6e": {"bf16": 8, "s8": 4}}


@dataclasses.dataclass(frozen=True)
class KernelFigures:
    """One kernel's schedule; no figures where the compiler refuses its blocks.

    Attributes:
        op: what it computes. kernel: whose, and its block sizes.
        tile_cycles: cycles per product of 128 x 128 x 128, in the region for pairs of blocks that are not masked; of
            products of other kinds, of all.
        peak_share: of the matrix unit's peak at these sizes, by these cycles; None where the peak is not known.
        cycles: for one head, or for the product, estimated.
        spills: vector registers written to memory in that region.
        hbm: bytes that blocks read and write in HBM, over those of all operands and the result once; None where they
            are not counted.
        page_cycles: per page of a paged cache that a step reads. times_bytes: the time it takes, of cycles or of bytes
            if they take longer, over that of the least bytes at the chip's bandwidth.
        vmem: bytes of fast memory that it takes, as the compiler reports them (`core.bundles.kernel_memory`).
    """

    op: str
    kernel: str
    tile_cycles: float | None
    peak_share: float | None
    cycles: float | None
    spills: int | None
    hbm: float | None
    vmem: int | None = None
    page_cycles: float | None = None
    times_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a kernel takes, if nothing waits: cycles of one core, and bytes that its blocks read and write in HBM."""

    cycles: float
    bytes: float

    def seconds(self, chip: str) -> float:
        """The longer of the two, at the clock of the chip's peak and at its bandwidth, as if all of it overlapped."""
        return max(self.cycles / cycle_rate(chip), self.bytes / CHIPS[chip].hbm_bandwidth)


def cycle_rate(chip: str) -> float:
    """Cycles a second, of all cores of a device together, at which its peak is the peak of the table of chips.

    What tpu7x multiplies in a cycle is not published: v6e's products are taken, which makes it 2.2 GHz.
    """
    cycles = TILE_CYCLES.get(chip, TILE_CYCLES["v6e"])["bf16"]
    return CHIPS[chip].flops["bfloat16"] * cycles / (2 * 128**3)


def compile_for(mesh: Any, function: Callable[..., Any], *arguments: Any) -> None:
    """Compiles, never from a cache, so that schedules are written."""
    with jax.set_mesh(mesh), without_compilation_cache():
        jax.jit(function).lower(*arguments).compile()


def cycles_of(region: Region) -> int:
    """Bundles of a region, or what the matrix unit takes for its products if that is longer."""
    return max(region.bundles, PUSH_CYCLES * sum(region.matmuls.get(dtype, 0) for dtype in ("bf16", "s8")))

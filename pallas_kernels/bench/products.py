"""Quantized products by the TPU compiler's schedules."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_memory, kernel_regions
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.bench.figures import TILE_CYCLES, Cost, KernelFigures, compile_for, cycles_of
from meshloom.pallas_kernels.matmul.qarray import QArray
from meshloom.pallas_kernels.matmul.quantized import quantized_matmul
from meshloom.pallas_kernels.matmul.quantized.blocks import Blocks, blocks_of
from meshloom.pallas_kernels.matmul.quantized.formats import quantize
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec

KERNEL = "quantized_matmul"
SIZE = 4096
ROW_COUNTS = (16, 512, 2048)
FORMATS = (("int8", "int8"), ("int4_128", "float"))  # of weights and of rows
# Others, of which one count of rows tells enough.
OTHERS, OTHER_COUNT = (("int4_128", "int8"), ("fp8_row", "fp8")), 512
PRODUCT_ROWS = len(ROW_COUNTS) * len(FORMATS) + len(OTHERS)


def products_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """Rows of 4,096 bfloat16 numbers by 4,096 x 4,096 weights in int8, with rows in int8, and in int4, with them as is;
    then int4 with rows in int8, and both in float8.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])
    whole = jax.NamedSharding(mesh, jax.P())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    counts_of = dict.fromkeys(FORMATS, ROW_COUNTS) | dict.fromkeys(OTHERS, (OTHER_COUNT,))
    for (format, activations), counts in counts_of.items():
        shapes = jax.eval_shape(lambda format=format: quantize(jnp.zeros((SIZE, SIZE)), format))
        w = jax.tree.map(placed, shapes)
        for count in counts:
            x = placed(jax.ShapeDtypeStruct((count, SIZE), jnp.bfloat16))

            def product(x, w, activations=activations):
                return quantized_matmul(x, w, activations=activations, implementation="mosaic_tpu")

            compile_for(mesh, product, x, w)
            spec = MatmulSpec(x.shape, w.shape, str(x.dtype), str(w.values.dtype), w.block, activations)
            with jax.set_mesh(mesh):
                blocks = blocks_of(spec)
            assert blocks is not None  # or the compiler would have had nothing to do
            op = f"{format} by rows in {'bfloat16' if activations == 'float' else activations}, {count} rows"
            peaks = TILE_CYCLES.get(devices.platform)
            regions, vmem = kernel_regions(folder, KERNEL), kernel_memory(folder, KERNEL)
            yield dataclasses.replace(_figures(op, regions, spec, blocks, peaks, bytes_of(w)), vmem=vmem)


def bytes_of(w: QArray) -> float:
    """Of values, some of half a byte, which JAX counts as one, and scales."""
    each = 0.5 if w.values.dtype == jnp.int4 else w.values.dtype.itemsize
    return float(w.values.size * each + w.scales.size * w.scales.dtype.itemsize)


def _figures(
    op: str, regions: list[Region], spec: MatmulSpec, blocks: Blocks, peaks: dict[str, int] | None, held: float | int
) -> KernelFigures:
    (count, size), columns = spec.x, spec.w[0]
    *_, product = (region for region in regions if region.matmuls)
    cost = kernel_cost(regions, spec, blocks, held)
    tiles = count * columns * size / 128**3
    peak = None if peaks is None else peaks.get(next(iter(product.matmuls)))
    share = None if peak is None else peak * tiles / cost.cycles
    label = f"meshloom {blocks.rows}x{blocks.columns}x{blocks.chunk}"
    hbm = cost.bytes / (count * (size + columns) * jnp.dtype(spec.dtype).itemsize + held)
    return KernelFigures(op, label, cost.cycles / tiles, share, cost.cycles, product.spills, hbm)


def kernel_cost(regions: list[Region], spec: MatmulSpec, blocks: Blocks, held: float | int) -> Cost:
    """All regions run once for each block of the result, but products once for each chunk of a row's numbers. Where
    rows are rounded, the first region with products is that of a strip of them, in the first block of columns.

    Args:
        held: bytes of the weights, which pass once for every block of rows.
    """
    (count, size), columns = spec.x, spec.w[0]
    down, across, chunks = -(-count // blocks.rows), -(-columns // blocks.columns), size // blocks.chunk
    *rounding, product = (region for region in regions if region.matmuls)
    ends = sum(region.bundles for region in regions if not region.matmuls)
    cycles = down * across * (cycles_of(product) * chunks + ends)
    if rounding:
        (strip,) = rounding
        cycles += down * chunks * (-(-blocks.rows // blocks.strip) * cycles_of(strip) - cycles_of(product))
    return Cost(float(cycles), float(count * (size + columns) * jnp.dtype(spec.dtype).itemsize + down * held))

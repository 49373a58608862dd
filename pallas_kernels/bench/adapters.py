"""Products with paged adapters by the TPU compiler's schedules, and what they move beside two grouped products."""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_memory, kernel_regions
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.bench.figures import KernelFigures, compile_for, cycles_of
from meshloom.pallas_kernels.matmul.lora import LoraPages, LoraSpec, lora_matmul
from meshloom.pallas_kernels.matmul.lora.mosaic_tpu import chunk_of, numbers_of_word, tile_of

# A decode step in which every row has an adapter of its own, and a prefill step of eight; of rank 16, in bfloat16.
SIZE, RANK, PAGES = 4096, 16, 1024
CALLS = ((32, 32), (2048, 8))  # rows, adapters
# Rows that the comparison makes.
ADAPTER_ROWS = 2 * len(CALLS)


def adapters_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """Rows of 4,096 bfloat16 numbers through adapters of rank 16 to 4,096: our kernel, and grouped products.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])
    whole = jax.NamedSharding(mesh, jax.P())

    def placed(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    for rows, adapters in CALLS:
        x = placed(rows, SIZE)
        lists = placed(adapters, dtype=jnp.int32), placed(adapters, dtype=jnp.float32)
        lora = LoraPages(placed(PAGES, SIZE), placed(PAGES, SIZE), placed(adapters, RANK, dtype=jnp.int32), *lists)
        numbers = placed(rows, dtype=jnp.int32)

        def product(x, lora, numbers):
            return lora_matmul(x, lora, numbers, implementation="mosaic_tpu")

        compile_for(mesh, product, x, lora, numbers)
        with jax.set_mesh(mesh):
            tile = tile_of(LoraSpec.of(x, lora, numbers))
        assert tile is not None  # or the compiler would have had nothing to do
        op, least = f"{adapters} adapters of {RANK}, {rows} rows", _pages(adapters) + 2 * rows * SIZE
        regions = kernel_regions(folder, "lora_matmul")
        cycles = float(_cycles(regions, adapters, max(adapters, rows // tile)))
        spills = sum(region.spills for region in regions if region.matmuls)
        moved = numbers_of_word("bfloat16") * _pages(adapters) + 2 * rows * SIZE
        vmem = kernel_memory(folder, "lora_matmul")
        yield KernelFigures(op, f"meshloom {tile}", None, None, cycles, spills, moved / least, vmem)
        # Pages are gathered, written and read again, and so are narrow rows.
        moved = 3 * _pages(adapters) + 2 * rows * SIZE + 2 * rows * RANK
        yield KernelFigures(op, "meshloom by_adapter", None, None, None, None, moved / least)


def _cycles(regions: list[Region], adapters: int, visits: int) -> int:
    """The longest loop without products starts the copies of one page; one with products goes over columns; what is in
    no loop counts for every visit. Loops of a few bundles are left out.
    """
    copies = max(region.bundles for region in regions if region.loops and not region.matmuls)
    columns = sum(cycles_of(region) for region in regions if region.loops and region.matmuls)
    once = sum(cycles_of(region) for region in regions if not region.loops)
    return adapters * RANK * copies + visits * (once + SIZE // chunk_of(SIZE) * columns)


def _pages(adapters: int) -> int:
    """Numbers in the pages of all adapters."""
    return adapters * RANK * 2 * SIZE

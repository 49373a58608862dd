"""Products around a ring of eight devices by the TPU compiler's schedules."""

import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_memory, kernel_regions
from meshloom.core.topology import Devices, make_mesh, parse_devices
from meshloom.pallas_kernels.bench.figures import TILE_CYCLES, KernelFigures, compile_for, cycles_of
from meshloom.pallas_kernels.matmul.collective import (
    all_gather_matmul,
    matmul_reduce_scatter,
    mosaic_tpu,
    mosaic_tpu_scatter,
)

# Of the MLP of Llama-3-8B over eight devices: 4,096 rows, 4,096 features of the model, 14,336 inside.
ROWS, MODEL, INNER, DEVICES = 4096, 4096, 14336, 8
_SLICES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4", "v5p": "v5p:2x2x2", "tpu7x": "tpu7x:2x2x1"}
# Rows that the comparison makes.
COLLECTIVE_ROWS = 2


def collective_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """The gather before and the scatter after an MLP of bfloat16, on one of eight devices of this kind.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    chips = target_devices(parse_devices(_SLICES[devices.platform]))
    mesh = make_mesh({"tensor": DEVICES}, chips[:DEVICES])
    peaks = TILE_CYCLES.get(devices.platform)
    shard, part = ROWS // DEVICES, INNER // DEVICES
    by_rows, by_features = PartitionSpec("tensor"), PartitionSpec(None, "tensor")
    for op, shapes, specs, out, block in (
        (
            all_gather_matmul,
            ((ROWS, MODEL), (INNER, MODEL)),
            (by_rows, by_rows, by_features),
            (ROWS, part),
            mosaic_tpu.block_of(shard, MODEL, part, "bfloat16"),
        ),
        (
            matmul_reduce_scatter,
            ((ROWS, INNER), (MODEL, INNER)),
            (by_features, by_features, by_rows),
            (shard, MODEL),
            mosaic_tpu_scatter.block_of(shard, part, MODEL, "bfloat16"),
        ),
    ):
        assert block is not None  # or the compiler would have nothing to do
        run = functools.partial(op, axis="tensor", implementation="mosaic_tpu")
        spread = jax.shard_map(run, mesh=mesh, in_specs=specs[:2], out_specs=specs[2], check_vma=False)
        x, w = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, specs, strict=False)
        )
        compile_for(mesh, spread, x, w)
        name = op.__name__
        sizes = math.prod(shapes[0]) // DEVICES, math.prod(shapes[1]) // DEVICES, math.prod(out)
        visits = DEVICES * (shapes[1][0] if op is matmul_reduce_scatter else part) // block
        figures = _figures(name, block, kernel_regions(folder, name), visits, sizes, peaks, kernel_memory(folder, name))
        yield figures


def _figures(
    op: str,
    block: int,
    regions: list[Region],
    visits: int,
    sizes: tuple[int, int, int],
    peaks: dict[str, int] | None,
    vmem: int | None,
) -> KernelFigures:
    """What comes before all loops runs once; all else counts for every block of outputs of every shard.

    Args:
        visits: blocks of outputs of all shards. sizes: numbers in x, in w and in the result, on one device.
    """
    before, *inside = regions
    x, w, out = sizes
    cycles = before.bundles + visits * sum(map(cycles_of, inside))
    tiles = ROWS * MODEL * INNER // DEVICES / 128**3
    share = None if peaks is None else peaks["bf16"] * tiles / cycles
    spills = sum(region.spills for region in regions if region.matmuls)
    hbm = (x + DEVICES * w + out) / (x + w + out)
    return KernelFigures(op, f"meshloom {block}", cycles / tiles, share, float(cycles), spills, hbm, vmem)

"""Grouped products by the TPU compiler's schedules, beside JAX's megablox."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_memory, kernel_regions
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.bench.figures import TILE_CYCLES, Cost, KernelFigures, compile_for, cycles_of
from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.grouped import GroupedSpec, grouped_matmul
from meshloom.pallas_kernels.matmul.grouped.mosaic_tpu import MOSAIC_TPU
from meshloom.pallas_kernels.matmul.grouped.tiles import OuterTiles, Tiles, most_visits, outer_tiles, product_tiles

# Mixtral's up projection: 1,024 rows for each expert.
ROWS, EXPERTS, CONTRACTED, COLUMNS = 8192, 8, 4096, 14336
BENCH = GroupedSpec(ROWS, EXPERTS, CONTRACTED, COLUMNS, "bfloat16", "bfloat16", transposed=True, spread=False)
# Rows, numbers contracted and columns at a time in which megablox was fastest of ten tried, on v6e and on v5e. Its
# default, 128 of each, takes hundreds of times as many steps.
TILINGS = ((256, 4096, 1024), (256, 4096, 512), (128, 4096, 512))
# Rows that the comparison makes.
EXPERT_ROWS = 3 + len(TILINGS)


def experts_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """8,192 rows of 4,096 bfloat16 numbers, of eight experts that begin anywhere, by 14,336 x 4,096 weights as they are
    stored; then both gradients of that, ours alone.

    What megablox has no fast memory for has no figures.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])
    whole = jax.NamedSharding(mesh, jax.P())
    x = jax.ShapeDtypeStruct((ROWS, CONTRACTED), jnp.bfloat16, sharding=whole)
    w = jax.ShapeDtypeStruct((EXPERTS, COLUMNS, CONTRACTED), jnp.bfloat16, sharding=whole)
    sizes = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32, sharding=whole)
    peaks = TILE_CYCLES.get(devices.platform)
    op = f"{EXPERTS} experts, {ROWS} rows"

    def ours(x, w, sizes):
        return grouped_matmul(x, w, sizes, transposed=True, implementation="mosaic_tpu")

    compile_for(mesh, ours, x, w, sizes)
    with jax.set_mesh(mesh):
        tiles = product_tiles(GroupedSpec.of(x, w, sizes, True))
    assert tiles is not None  # or the compiler would have had nothing to do
    yield _figures(op, f"meshloom {_label(tiles)}", folder, "grouped_matmul", BENCH, tiles, peaks)

    for tiling in TILINGS:

        def theirs(x, w, sizes, tiling=tiling):
            return megablox.gmm(x, w, sizes, jnp.bfloat16, tiling, transpose_rhs=True)

        label = f"megablox {'x'.join(map(str, tiling))}"
        try:
            compile_for(mesh, theirs, x, w, sizes)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield KernelFigures(op, f"{label}: no room", None, None, None, None, None)
            continue
        rows, contracted, columns = tiling
        yield _figures(op, label, folder, "gmm", BENCH, Tiles(rows, columns, contracted, contracted), peaks)

    def of_rows(d_out, w, sizes):
        return MOSAIC_TPU.product(d_out, w, sizes, False, Target.of_mesh())

    def of_weights(d_out, x, sizes):
        return MOSAIC_TPU.outer(d_out, x, sizes, d_out.dtype, Target.of_mesh())

    d_out = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16, sharding=whole)
    compile_for(mesh, of_rows, d_out, w, sizes)
    spec = dataclasses.replace(BENCH, contracted=COLUMNS, columns=CONTRACTED, transposed=False)
    with jax.set_mesh(mesh):
        tiles, outer = product_tiles(spec), outer_tiles(ROWS, EXPERTS, COLUMNS, CONTRACTED, d_out.dtype)
    assert tiles is not None  # as above
    yield _figures(f"{op}, gradient of rows", f"meshloom {_label(tiles)}", folder, "grouped_matmul", spec, tiles, peaks)
    compile_for(mesh, of_weights, d_out, x, sizes)
    label = f"meshloom {outer.rows}x{outer.left}x{outer.right}"
    yield _figures(f"{op}, gradient of weights", label, folder, "grouped_outer", BENCH, outer, peaks)


def _label(tiles: Tiles) -> str:
    return f"{tiles.rows}x{tiles.contracted}x{tiles.columns}"


def _figures(
    op: str,
    label: str,
    folder: pathlib.Path,
    kernel: str,
    spec: GroupedSpec,
    tiles: Tiles | OuterTiles,
    peaks: dict[str, int] | None,
) -> KernelFigures:
    """Of the kernel that was compiled last."""
    regions = kernel_regions(folder, kernel)
    cost = kernel_cost(regions, spec, tiles) if isinstance(tiles, Tiles) else outer_cost(regions, spec, tiles)
    products_of_tile = ROWS * CONTRACTED * COLUMNS / 128**3
    share = None if peaks is None else peaks["bf16"] * products_of_tile / cost.cycles
    least = 2.0 * (ROWS * CONTRACTED + EXPERTS * COLUMNS * CONTRACTED + ROWS * COLUMNS)
    spills = sum(region.spills for region in regions if region.matmuls)
    figures = KernelFigures(op, label, cost.cycles / products_of_tile, share, cost.cycles, spills, cost.bytes / least)
    return dataclasses.replace(figures, vmem=kernel_memory(folder, kernel))


def kernel_cost(regions: list[Region], spec: GroupedSpec, tiles: Tiles) -> Cost:
    """Of a product of groups that begin and end anywhere: two of them visit the tile that they share.

    A loop around the products runs once for every chunk; of two regions with products the first ends a visit. All other
    regions count once for every step, those that no visit here takes among them.
    """
    across, down = -(-spec.columns // tiles.columns), most_visits(spec.rows, spec.groups, tiles.rows)
    steps = spec.contracted // tiles.contracted
    products = [region for region in regions if region.matmuls]
    chunks = tiles.contracted // tiles.chunk
    last, *others = products
    multiplied = cycles_of(last) * chunks * (1 if others else steps)
    multiplied += sum(map(cycles_of, others)) * (steps - 1)
    beside = steps * sum(region.bundles for region in regions if not region.matmuls)
    # With all numbers of a row at once a weight stays while its rows pass.
    x, w = jnp.dtype(spec.x).itemsize, jnp.dtype(spec.weight).itemsize
    weights = spec.contracted * spec.columns * (spec.groups if steps == 1 else down)
    read = spec.rows if steps == 1 else down * tiles.rows
    moved = x * (across * read * spec.contracted + spec.rows * spec.columns) + w * weights
    return Cost(float(across * down * (multiplied + beside)), float(moved))


def outer_cost(regions: list[Region], spec: GroupedSpec, tiles: OuterTiles) -> Cost:
    """Of the gradient of a product's weights, of groups as above.

    Before the products (of a tile of one group, then of one that groups share) is a region for groups of no rows, after
    them one that writes the result of a group; each is the longest there. All others count once for every visit.
    """
    down, across = -(-spec.columns // tiles.left), -(-spec.contracted // tiles.right)
    visits = most_visits(spec.rows, spec.groups, tiles.rows)
    halves = 2 * (spec.groups - 1)  # visits to tiles that groups share
    whole, shared = (region for region in regions if region.matmuls)
    begin, end = regions.index(whole), regions.index(shared)
    empty, written = (max(part, key=lambda region: region.bundles) for part in (regions[:begin], regions[end + 1 :]))
    beside = sum(each.bundles for each in regions if each not in (empty, whole, shared, written))
    products = (visits - halves) * cycles_of(whole) + halves * cycles_of(shared)
    cycles = products * (tiles.left // tiles.chunk) + visits * beside + spec.groups * written.bundles
    x = jnp.dtype(spec.x).itemsize
    rows = x * spec.rows * (spec.columns * across + spec.contracted * down)
    result = x * spec.groups * spec.columns * spec.contracted
    return Cost(float(down * across * cycles), float(rows + result))

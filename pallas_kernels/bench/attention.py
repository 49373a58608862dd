"""Attention by the TPU compiler's schedules, beside JAX's splash attention at its best block sizes."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_memory, kernel_regions
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.attention import Mask, attention, mosaic_tpu, mosaic_tpu_backward
from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.tuned import tuned_blocks
from meshloom.pallas_kernels.attention.visits import MASKED_IN_PART, Blocks
from meshloom.pallas_kernels.bench.figures import Cost, KernelFigures, compile_for, cycles_of

TOKENS, HEADS, HEAD_DIM = 4096, 8, 128
TILE = 128
# Cycles of a core for a product of 128 x 128 x 128 in bfloat16, where 128 is what is summed over or the width: v5e and
# v5p have four arrays of 128 x 128, v6e two of 256 x 256 that take two rows a cycle, half empty at 128.
PAIR_CYCLES = {"v5e": 32, "v5p": 32, "v6e": 16}
# Block sizes (queries, keys, keys at a time) in which splash attention was fastest here, and whether its backward pass
# is one kernel or two.
SPLASH = (((1024, 1024, 512), False), ((1024, 1024, 512), True), ((1024, 1024, 1024), False))
# Rows that the comparison makes.
ATTENTION_ROWS = 5 + sum(1 if fused else 2 for _, fused in SPLASH)


def attention_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """Causal attention of 4,096 tokens, head size 128, bfloat16: ours, then JAX's splash attention.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])
    whole = jax.NamedSharding(mesh, jax.P())
    peak, dims = PAIR_CYCLES.get(devices.platform), (HEAD_DIM, HEAD_DIM)
    x = jax.ShapeDtypeStruct((1, TOKENS, HEADS, HEAD_DIM), jnp.bfloat16, sharding=whole)
    compile_for(mesh, jax.grad(lambda q, k, v: _sum(attention(q, k, v, mask=Mask())), argnums=(0, 1, 2)), x, x, x)
    yield from _ours(mesh, folder, "attention", x, peak)
    bias = jax.ShapeDtypeStruct((1, HEADS, TOKENS, TOKENS), jnp.float32, sharding=whole)

    def biased(q, k, v, bias):
        return _sum(attention(q, k, v, mask=Mask(), bias=bias))

    compile_for(mesh, jax.grad(biased, argnums=(0, 1, 2, 3)), x, x, x, bias)
    yield from _ours(mesh, folder, "attention with a bias,", x, peak, biased=True)
    x = jax.ShapeDtypeStruct((HEADS, TOKENS, HEAD_DIM), jnp.bfloat16, sharding=whole)
    for sizes, fused in SPLASH:
        peer = _splash(sizes, fused)
        compile_for(mesh, jax.grad(lambda q, k, v, peer=peer: _sum(peer(q, k, v)), argnums=(0, 1, 2)), x, x, x)
        blocks = Blocks(TOKENS, TOKENS, *sizes[:2])
        pairs = len(blocks.pairs(Mask()))
        label = f"splash {'x'.join(map(str, sizes))}"
        if not fused:  # the forward kernel is the same for both
            name = "splash_mha_fwd_residuals"
            forward, vmem = kernel_regions(folder, name), kernel_memory(folder, name)
            hbm = hbm_bytes(blocks, Mask(), 0, dims) / least_bytes(blocks, 0, dims)
            shown = {"peer": True, "hbm": hbm, "vmem": vmem}
            yield pair_figures("attention forward", label, forward, [pairs], blocks, 2, peak, **shown)
        names = ["splash_mha_dkv_no_residuals"] + ([] if fused else ["splash_mha_dq_no_residuals"])
        parts = [kernel_regions(folder, name) for name in names]
        regions = [region for part in parts for region in part]
        label += ", one kernel" if fused else ", two kernels"
        vmem = max(kernel_memory(folder, name) or 0 for name in names) or None
        shown = {"peer": True, "vmem": vmem}
        yield pair_figures("attention backward", label, regions, [pairs] * len(parts), blocks, 5, peak, **shown)


def _ours(
    mesh: Any, folder: pathlib.Path, op: str, x: Any, peak: int | None, *, biased: bool = False
) -> Iterator[KernelFigures]:
    """The kernels of the program that was compiled last."""
    dims = HEAD_DIM, HEAD_DIM
    kernels = [
        ("forward", mosaic_tpu, "attention_forward", "attention_forward", 2, 0),
        ("backward", mosaic_tpu_backward, "attention_backward", "attention_backward", 5, 1),
    ]
    if biased:  # the blocks of the backward kernel, in the order of queries
        kernels.append(("its gradient", mosaic_tpu_backward, "attention_backward", "attention_bias_gradient", 2, 0))
    for which, module, tuned, name, products, by in kernels:
        blocks = mosaic_tpu.blocks_of(TOKENS, TOKENS, module.BLOCK_Q, module.BLOCK_KV)
        with jax.set_mesh(mesh):
            blocks = tuned_blocks(tuned, x, x, x, Mask(), Scoring(1.0), blocks, biased=biased)
        label = f"meshloom {blocks.block_q}x{blocks.block_kv}"
        hbm = None if biased else hbm_bytes(blocks, Mask(), by, dims) / least_bytes(blocks, by, dims)
        regions, vmem, visits = kernel_regions(folder, name), kernel_memory(folder, name), visits_of(blocks, by)
        runs = sum(visits) if which == "its gradient" else None
        shown = {"hbm": hbm, "vmem": vmem, "runs": runs}
        yield pair_figures(f"{op} {which}", label, regions, visits, blocks, products, peak, **shown)


def _sum(x: Any) -> Any:
    return jnp.sum(x.astype(jnp.float32))


def _splash(sizes: tuple[int, int, int], fused: bool) -> Callable[..., Any]:
    queries, keys, at_once = sizes
    two = {} if fused else {"block_q_dq": queries, "block_kv_dq": keys}
    blocks = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=at_once,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=at_once,
        use_fused_bwd_kernel=fused,
        **two,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((TOKENS, TOKENS))] * HEADS)
    return splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)


def visits_of(blocks: Blocks, by: int, mask: Mask | None = None) -> list[int]:
    """How often our kernels run each of their regions with products: the diagonal, what is masked in part, the rest.

    The diagonal has a region of its own where `run_visits` goes along it in strips.
    """
    mask = mask or Mask()
    i, j, bits = np.asarray(blocks.visits(mask, by))[0].T
    partly = bits & MASKED_IN_PART > 0
    diagonal = partly & (i * blocks.block_q == j * blocks.block_kv)
    strip = (mosaic_tpu, mosaic_tpu_backward)[by].STRIP
    if not (mask.causal and blocks.block_q == blocks.block_kv > strip):
        return [int(partly.sum()), int((~partly).sum())]
    return [int(diagonal.sum()), int((partly & ~diagonal).sum()), int((~partly).sum())]


def kernel_cost(regions: list[Region], blocks: Blocks, mask: Mask, by: int, dims: tuple[int, int]) -> Cost:
    """Of our forward kernel (`by` 0) or backward one (1) for one head in bfloat16, queries and keys from one position.

    Args:
        dims: sizes of a head and of its values.
    """
    visits = visits_of(blocks, by, mask)
    return Cost(_cycles(regions, visits, sum(visits), blocks.counts[by]), hbm_bytes(blocks, mask, by, dims))


def hbm_bytes(blocks: Blocks, mask: Mask, by: int, dims: tuple[int, int]) -> float:
    """Bytes that blocks of one head in bfloat16 move; what a visit needs again is kept."""
    i, j, _ = np.asarray(blocks.visits(mask, by))[0].T
    q_reads, kv_reads = (1 + int(np.count_nonzero(np.diff(column))) for column in (i, j))
    head, values = dims
    keys = 2 * kv_reads * blocks.block_kv * (head + values)
    if by == 0:
        return float(keys + q_reads * blocks.block_q * (2 * (head + values) + 4))
    gradients = 4 * (blocks.q_total * head + blocks.kv_total * (head + values))
    return float(keys + q_reads * blocks.block_q * (2 * (head + values) + 8) + gradients)


def least_bytes(blocks: Blocks, by: int, dims: tuple[int, int]) -> float:
    """Of all operands and results of one head in bfloat16 once, and what passes between the kernels in float32."""
    (head, values), passes = dims, 1 + by
    rows = blocks.q_total * (2 * (head + values) + 4) + blocks.kv_total * 2 * (head + values)
    return float(
        rows if passes == 1 else rows + blocks.q_total * (2 * head + 4) + blocks.kv_total * 2 * (head + values)
    )


def _cycles(regions: list[Region], visits: list[int], steps: int, runs: int) -> float:
    """Loops are counted once for a step, branches without products, which begin and end a run, once for a run."""
    working = [region for region in regions if region.matmuls]
    cycles = sum(cycles_of(region) * times for region, times in zip(working, visits, strict=True))
    for region in regions:
        if not region.matmuls:
            cycles += region.bundles * (steps if region.loops else runs)
    return float(cycles)


def pair_figures(
    op: str,
    kernel: str,
    regions: list[Region],
    visits: list[int],
    blocks: Blocks,
    products: int,
    peak: int | None,
    *,
    peer: bool = False,
    runs: int | None = None,
    hbm: float | None = None,
    vmem: int | None = None,
) -> KernelFigures:
    """Figures of one op from the schedule of its kernels. Our last region with products is the one without a mask; a
    peer tests the mask in all it has, and every visit runs all of them. What begins and ends a run counts for as many
    runs as are said, or for one of each block.
    """
    working = [region for region in regions if region.matmuls]
    plain = working if peer else working[-1:]
    tiles = products * blocks.block_q * blocks.block_kv / TILE**2
    tile_cycles = sum(map(cycles_of, plain)) / tiles
    cycles = _cycles(regions, visits, visits[0] if peer else sum(visits), runs or blocks.counts[0])
    share = None if peak is None else peak / tile_cycles
    return KernelFigures(op, kernel, tile_cycles, share, cycles, sum(region.spills for region in plain), hbm, vmem)

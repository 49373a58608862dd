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
from meshloom.core.bundles import Region, kernel_regions
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.attention import Mask, attention, mosaic_tpu, mosaic_tpu_backward
from meshloom.pallas_kernels.attention.visits import MASKED_IN_PART, Blocks
from meshloom.pallas_kernels.bench.figures import KernelFigures, compile_for, cycles_of

TOKENS, HEADS, HEAD_DIM = 4096, 8, 128
TILE = 128
# Cycles of a core for a product of 128 x 128 x 128 in bfloat16, where 128 is what is summed over or the width: v5e and
# v5p have four arrays of 128 x 128, v6e two of 256 x 256 that take two rows a cycle, half empty at 128.
_TILE_CYCLES = {"v5e": 32, "v5p": 32, "v6e": 16}
# Block sizes (queries, keys, keys at a time) in which splash attention was fastest here, and whether its backward pass
# is one kernel or two.
SPLASH = (((1024, 1024, 512), False), ((1024, 1024, 512), True), ((1024, 1024, 1024), False))
# Rows that the comparison makes.
ATTENTION_ROWS = 2 + sum(1 if fused else 2 for _, fused in SPLASH)


def attention_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """Causal attention of 4,096 tokens, head size 128, bfloat16: ours, then JAX's splash attention.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])
    whole = jax.NamedSharding(mesh, jax.P())
    peak = _TILE_CYCLES.get(devices.platform)
    x = jax.ShapeDtypeStruct((1, TOKENS, HEADS, HEAD_DIM), jnp.bfloat16, sharding=whole)
    compile_for(mesh, jax.grad(lambda q, k, v: _sum(attention(q, k, v, mask=Mask())), argnums=(0, 1, 2)), x, x, x)
    for op, module, name, products, by in (
        ("attention forward", mosaic_tpu, "attention_forward", 2, 0),
        ("attention backward", mosaic_tpu_backward, "attention_backward", 5, 1),
    ):
        blocks = mosaic_tpu.blocks_of(TOKENS, TOKENS, module.BLOCK_Q, module.BLOCK_KV)
        label = f"meshloom {blocks.block_q}x{blocks.block_kv}"
        yield _figures(op, label, kernel_regions(folder, name), _visits(blocks, by), blocks, products, peak)
    x = jax.ShapeDtypeStruct((HEADS, TOKENS, HEAD_DIM), jnp.bfloat16, sharding=whole)
    for sizes, fused in SPLASH:
        peer = _splash(sizes, fused)
        compile_for(mesh, jax.grad(lambda q, k, v, peer=peer: _sum(peer(q, k, v)), argnums=(0, 1, 2)), x, x, x)
        blocks = Blocks(TOKENS, TOKENS, *sizes[:2])
        pairs = len(blocks.pairs(Mask()))
        label = f"splash {'x'.join(map(str, sizes))}"
        if not fused:  # the forward kernel is the same for both
            forward = kernel_regions(folder, "splash_mha_fwd_residuals")
            yield _figures("attention forward", label, forward, [pairs], blocks, 2, peak)
        names = ["splash_mha_dkv_no_residuals"] + ([] if fused else ["splash_mha_dq_no_residuals"])
        parts = [kernel_regions(folder, name) for name in names]
        regions = [region for part in parts for region in part]
        label += ", one kernel" if fused else ", two kernels"
        yield _figures("attention backward", label, regions, [pairs] * len(parts), blocks, 5, peak)


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


def _visits(blocks: Blocks, by: int) -> list[int]:
    """How often our kernels run each of their regions with products: the diagonal, what is masked in part, the rest."""
    i, j, bits = np.asarray(blocks.visits(Mask(), by))[0].T
    partly = bits & MASKED_IN_PART > 0
    diagonal = partly & (i * blocks.block_q == j * blocks.block_kv)
    return [int(diagonal.sum()), int((partly & ~diagonal).sum()), int((~partly).sum())]


def _figures(
    op: str, kernel: str, regions: list[Region], visits: list[int], blocks: Blocks, products: int, peak: int | None
) -> KernelFigures:
    """Figures of one op from the schedule of its kernels; the last regions with products are those without a mask.

    Loops are counted once for a visit, branches without products, which begin and end a run, once for a run.
    """
    working = [region for region in regions if region.matmuls]
    plain = working[-1:] if len(visits) == 3 else working
    tiles = products * blocks.block_q * blocks.block_kv / TILE**2
    tile_cycles = sum(map(cycles_of, plain)) / tiles
    steps = sum(visits) if len(visits) == 3 else visits[0]
    cycles = sum(cycles_of(region) * times for region, times in zip(working, visits, strict=True))
    for region in regions:
        if not region.matmuls:
            cycles += region.bundles * (steps if region.loops else blocks.counts[0])
    share = None if peak is None else peak / tile_cycles
    return KernelFigures(op, kernel, tile_cycles, share, float(cycles), sum(region.spills for region in plain), None)

"""Attention of tokamax, where it is installed, by the TPU compiler's schedules.

Its kernel is a successor of JAX's splash attention. Its block sizes are no argument of its public function, so its own
classes are called, those of one release.
"""

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from meshloom.core.ahead import target_devices
from meshloom.core.bundles import Region, kernel_memory, kernel_regions
from meshloom.core.topology import Devices, make_mesh
from meshloom.pallas_kernels.attention import Mask
from meshloom.pallas_kernels.attention.visits import Blocks
from meshloom.pallas_kernels.bench import attention
from meshloom.pallas_kernels.bench.figures import KernelFigures, compile_for

RELEASE = "0.0.17"
KERNEL = "splash_mha_fwd_no_residuals"
# Queries, keys, keys at a time; its default, 128 of each, is 64 times as many steps. Its own scheduler hint and base 2
# take 2,557 bundles a pair on v6e, without the hint 2,749.
SIZES = (1024, 1024, 512)
# Rows that the comparison makes.
TOKAMAX_ROWS = int(importlib.util.find_spec("tokamax") is not None)


def tokamax_on_tpu(devices: Devices, folder: pathlib.Path) -> Iterator[KernelFigures]:
    """Its forward pass where `attention_on_tpu` has ours; nothing where it is not installed.

    Args:
        devices: one chip. folder: where libtpu leaves its schedules (`core.bundles.dump_bundles`).
    """
    if not TOKAMAX_ROWS:
        return
    if (release := importlib.metadata.version("tokamax")) != RELEASE:
        label = f"tokamax {release}: {RELEASE} is compared"
        yield KernelFigures("attention forward", label, None, None, None, None, None)
        return
    import tokamax
    from absl import flags
    from tokamax._src.ops.attention import pallas_mosaic_tpu
    from tokamax.config import cross_compile

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["meshloom"])
    layout = pallas_mosaic_tpu.splash.QKVLayout.HEAD_DIM_MINOR
    config = pallas_mosaic_tpu.Config(
        **dict(zip(("block_q", "block_kv", "block_kv_compute"), SIZES, strict=True)),
        **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
        use_experimental_scheduler=True,
        use_base2_exp=True,
    )
    kernel = pallas_mosaic_tpu.PallasMosaicTpuFlashAttention(config=config)
    mesh = make_mesh({"fsdp": 1}, target_devices(devices)[:1])
    shape = (1, attention.TOKENS, attention.HEADS, attention.HEAD_DIM)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))

    def attend(q, k, v):
        return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation=[kernel])

    with cross_compile(True):
        compile_for(mesh, attend, x, x, x)
    yield figures(kernel_regions(folder, KERNEL), devices.platform, kernel_memory(folder, KERNEL))


def figures(regions: list[Region], chip: str, vmem: int | None) -> KernelFigures:
    """Of its two regions with products the longer one tests the mask; the other is for pairs that it leaves whole."""
    blocks, dims = Blocks(attention.TOKENS, attention.TOKENS, *SIZES[:2]), (attention.HEAD_DIM,) * 2
    diagonal, partly, whole = attention.visits_of(blocks, by=0)
    plain, testing = sorted((region for region in regions if region.matmuls), key=lambda region: region.bundles)
    ordered = [*(region for region in regions if not region.matmuls), testing, plain]
    label, peak = f"tokamax {'x'.join(map(str, SIZES))}", attention.PAIR_CYCLES.get(chip)
    hbm = attention.hbm_bytes(blocks, Mask(), 0, dims) / attention.least_bytes(blocks, 0, dims)
    visits = [diagonal + partly, whole]
    return attention.pair_figures("attention forward", label, ordered, visits, blocks, 2, peak, hbm=hbm, vmem=vmem)

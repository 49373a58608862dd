"""Devices that are elsewhere: what XLA compiles for when a device string names hardware that this machine lacks.

The compilers are the real ones: libtpu's for TPUs, jaxlib's CUDA plugin for NVIDIA GPUs. Neither needs its hardware.
What comes out are devices to build a mesh on and compile for; they hold no data and run nothing.
"""

import dataclasses
import glob
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from meshloom.core.errors import ConfigError
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import Devices, closed, simulate_cpu_devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """What XLA's GPU compiler asks of a chip; figures of the target configurations that XLA itself is tested with.

    Attributes:
        capability: CUDA compute capability, major and minor.
        accelerated: architecture-specific instructions (sm_90a: wgmma).
        cores: streaming multiprocessors. fpus: float32 units of one.
        shared_memory: bytes of one core; a block may ask for `block_memory` of them.
        l2, memory: bytes. clock_ghz: boost clock.
    """

    capability: tuple[int, int]
    accelerated: bool
    cores: int
    fpus: int
    shared_memory: int
    block_memory: int
    l2: int
    clock_ghz: float
    memory: int
    name: str


_A100 = GpuTarget(
    capability=(8, 0),
    accelerated=False,
    cores=108,
    fpus=64,
    shared_memory=167_936,
    block_memory=166_912,
    l2=41_943_040,
    clock_ghz=1.41,
    memory=85_100_068_864,
    name="NVIDIA A100-SXM4-80GB",
)
_H100 = GpuTarget(
    capability=(9, 0),
    accelerated=True,
    cores=132,
    fpus=128,
    shared_memory=233_472,
    block_memory=232_448,
    l2=52_428_800,
    clock_ghz=1.98,
    memory=84_942_979_072,
    name="NVIDIA H100 80GB HBM3",
)
# V100 and MI250X are in the table to plan with only: CUDA 13 has no Volta, and there is no ROCm plugin of this JAX.
_GPUS = {
    "a100": _A100,
    "a100-40": dataclasses.replace(_A100, memory=42_297_786_368, name="NVIDIA A100-SXM4-40GB"),
    "h100": _H100,
    "h200": dataclasses.replace(_H100, memory=151_397_597_184, name="NVIDIA H200 141GB HBM3e"),
    "b200": dataclasses.replace(
        _H100,
        capability=(10, 0),
        cores=148,
        l2=132_644_864,
        clock_ghz=1.965,
        memory=191_514_411_008,
        name="NVIDIA B200",
    ),
}
_COMPILER = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda13_plugin", "cuda")}


def compiler_missing(devices: Devices) -> str | None:
    """Why programs cannot be compiled for these devices here and what to install, or None if they can."""
    if devices.platform == "cpu":
        return None
    kind = _kind(devices)
    if kind == "cuda" and devices.platform not in _GPUS:
        return f"no compiler for {devices.platform} is part of JAX {jax.__version__}"
    package, extra = _COMPILER[kind]
    if importlib.util.find_spec(package) is None:
        return f"compiling for {devices.platform} needs its compiler: pip install 'meshloom[{extra}]'"
    return None


def target_devices(devices: Devices) -> list[jax.Device]:
    """Devices to compile for, in the order in which a mesh is laid over them; simulated ones for "cpu:N".

    Raises:
        ConfigError: the compiler is not installed (the message names the extra), or there is none for this chip.
    """
    if (missing := compiler_missing(devices)) is not None:
        raise ConfigError(missing)
    if devices.platform == "cpu":
        simulate_cpu_devices(devices.count)
        return jax.devices()
    compilers_only()
    found = list((_tpu if _kind(devices) == "tpu" else _gpu)(devices).devices)
    if len(found) != devices.count:
        raise ConfigError(f"the compiler knows {len(found)} devices where the table has {devices.count}")
    return found


def compiler_options(devices: Devices) -> dict[str, bool | str | int]:
    """Options for `Lowered.compile` without hardware: kernels cannot be timed, so XLA takes its defaults."""
    return {"xla_gpu_autotune_level": 0} if devices.platform in _GPUS else {}


def _kind(devices: Devices) -> str:
    if devices.platform not in CHIPS:
        raise ConfigError(f'programs are compiled for "cpu:N" or a chip of the table; got {devices.platform!r}')
    return "tpu" if CHIPS[devices.platform].node_devices is None else "cuda"


def _tpu(devices: Devices) -> topologies.TopologyDescription:
    name = f"{devices.platform}:{'x'.join(map(str, devices.shape))}"
    options: dict[str, Any] = {"num_slices": devices.slices} if devices.slices > 1 else {}
    if devices.platform == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    # Whole hosts of 2x2 chips are assumed; a smaller slice, or one of 2x1, has to say its own bounds.
    bounds = (*devices.shape, 1)[:3]
    if any(size % per_host for size, per_host in zip(bounds, (2, 2, 1), strict=True)):
        options["chips_per_host_bounds"] = bounds
    # libtpu takes dimensions as open unless told, and then gathers over a whole torus by sums (`core.device_order`).
    options["wrap"] = (*closed(devices), False)[:3]
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise ConfigError(f"libtpu has no topology {name}: {str(error).splitlines()[0]}") from error


def _gpu(devices: Devices) -> topologies.TopologyDescription:
    nodes, per_node = (1, *devices.shape) if len(devices.shape) == 1 else devices.shape
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=devices.platform,
        target_config=target_config(_GPUS[devices.platform], CHIPS[devices.platform].hbm_bandwidth),
        topology=f"1x{nodes}x{per_node}",
    )


def target_config(gpu: GpuTarget, memory_bandwidth: float) -> str:
    """The text of XLA's `GpuTargetConfigProto` for a chip; `memory_bandwidth` in bytes/s."""
    major, minor = gpu.capability
    feature = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.block_memory}
  core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {round(memory_bandwidth)} l2_cache_size: {gpu.l2} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  device_vendor: "NVIDIA Corporation" name: "{gpu.name}"
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.name}"
"""


# libtpu asks a cloud's metadata server which TPU this is and complains where there is none: these answer for it. Only
# one process may drive a TPU, but any number may compile for one.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# JAX's CUDA plugin refuses to load where it finds no driver, its compiler with it.
_NO_GPU = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}


def compilers_only() -> None:
    """Makes libtpu and the CUDA plugin start as compilers only, at once and silently, where their hardware is absent.

    Call it before anything has used JAX. What the user has set in the environment stays.
    """
    if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        _set_if_unset(_NO_TPU)
    if not glob.glob("/dev/nvidia*"):
        _set_if_unset(_NO_GPU)


def _set_if_unset(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)

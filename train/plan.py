"""Training as planned: a plan file's choices become the run's, and mesh "auto" becomes the mesh that a search finds.

Both end in an ordinary configuration, so that a run knows nothing of plans once it has begun.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.hardware import Chip, chip_named
from meshloom.core.topology import Devices, describe_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract_module
from meshloom.sharding.plan_file import read_plan
from meshloom.sharding.planner import plan_training
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig

# Round figures, and not the measured ones of `core.topology.measured_chip`: every process of a run has to choose the
# same mesh, and so has a run that resumes, but bandwidth and products measured twice on a busy machine differ by a
# factor of two, and so does their ratio. Communication at a tenth of the memory's speed makes the choices those of a
# small pod.
_SIMULATED = Chip(
    name="cpu",
    flops={"bfloat16": 1e11, "float32": 1e11},
    hbm_bytes=2**40,
    hbm_bandwidth=1e10,
    link_bandwidth=1e9,
    network_bandwidth=1e9,
    sources=dict.fromkeys(
        ("flops", "hbm_bytes", "hbm_bandwidth", "link_bandwidth", "network_bandwidth"), "assumed, for simulated devices"
    ),
)


def followed(config: TrainConfig) -> TrainConfig:
    """The configuration with its plan's model, devices, mesh, remat, batch, parts and length in place of the file.

    Raises:
        ConfigError: the file is no plan, or one of these fields is also set to something else.
    """
    if config.plan is None:
        return config
    plan = read_plan(config.plan)
    planned: dict[str, Any] = {
        "model": plan.model,
        "devices": plan.devices,
        "mesh": plan.mesh_text,
        "remat": plan.remat,
        "batch_size": plan.rows,
        "accumulation": plan.parts,
        "sequence_length": plan.sequence_length,
    }
    unset = TrainConfig()
    for name, value in planned.items():
        given = getattr(config, name)
        if given not in (getattr(unset, name), value):
            raise ConfigError(f"{name}: {config.plan} says {value}, the configuration {given}; leave one of them out")
    return dataclasses.replace(config, **planned, plan=None)


def baked_settings(config: TrainConfig) -> dict[str, str | int | float | None]:
    """What a compiled step has inside as constants besides the model, by the names of the configuration."""
    names = ("learning_rate", "schedule", "final_lr_fraction", "weight_decay", "clip_norm", "beta1", "beta2")
    return {"steps": config.steps, "warmup_steps": config.warmup} | {name: getattr(config, name) for name in names}


def chip_of(where: Devices) -> Chip:
    """The figures to plan with for these devices.

    Raises:
        ConfigError: nothing is known of them.
    """
    return _SIMULATED if where.platform == "cpu" else chip_named(where.platform)


def choose_mesh(config: TrainConfig, model: DecoderConfig, devices: Sequence[jax.Device]) -> dict[str, int]:
    """The mesh that trains this configuration fastest on these devices, by the planner's prediction.

    Raises:
        ShardingError: no mesh of the devices takes the batch in this many parts.
    """
    where = describe_devices(list(devices), config.devices)
    if len(devices) == 1 or where.platform == "local":  # nothing is known of this chip
        return {"fsdp": len(devices)}
    chip = chip_of(where)
    dtype = "bfloat16" if config.dtype == "auto" or config.dtype not in chip.flops else config.dtype
    workload = TrainWorkload(config.batch_size * config.sequence_length, config.sequence_length, dtype)

    def module_of(remat: Any) -> Any:
        return abstract_module(dataclasses.replace(model, scan_layers=True, remat=remat), jnp.float32)

    candidates = plan_training(module_of, where, workload, chip=chip, remats=(config.remat,), limit=2**31)
    for candidate in candidates:
        if candidate.parts == config.accumulation:
            return {axis: size for axis, size in candidate.mesh.items() if size > 1}
    raise ShardingError(
        f"no mesh of {len(devices)} devices takes {config.batch_size} rows in accumulation={config.accumulation} "
        f"parts; use a batch of {len(devices) * config.accumulation} rows, or fewer parts"
    )

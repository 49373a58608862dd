"""Where a command that serves puts its model: on one device, a given mesh, the planner's choice or a plan file's."""

import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from meshloom import cli
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import describe_devices, make_mesh, mesh_text, parse_devices, use_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract, default_axes
from meshloom.serve.config import EngineConfig
from meshloom.serve.plan import KV_DTYPES, choose_axes, planned_engine, replica_axes
from meshloom.sharding.plan_file import ServingPlan, read_serving_plan
from meshloom.train.plan import chip_of


def serving_mesh(command: Any) -> Mesh | None:
    """The mesh that a command's --devices and --mesh ask for, None for one device; says on stderr what was chosen.

    Raises:
        ConfigError, ShardingError: devices that are not here, or a mesh that they do not make.
    """
    if command.mesh is None and command.devices == "local":
        return None
    devices = use_devices(command.devices)
    if command.mesh not in (None, "auto"):
        return make_mesh(command.mesh, devices)
    if len(devices) == 1:
        return None
    axes = _chosen(command, devices)
    return make_mesh(axes, devices[: math.prod(axes.values())])


def _chosen(command: Any, devices: list[jax.Device]) -> dict[str, int]:
    """The planner's axes, or a fixed rule's where it cannot say."""
    where = describe_devices(devices, command.devices)
    try:
        config, _ = abstract(command.model)
        if not isinstance(config, DecoderConfig):
            raise ShardingError(f"{command.model} is an encoder-decoder; serving plans are for decoders")
        weights = "int8" if command.quantize == "int8" else "bfloat16"
        choice = choose_axes(config, where, command.engine, chip=chip_of(where), weight_dtype=weights)
    except (ConfigError, ShardingError) as error:
        axes = default_axes(command.model, len(devices))
        print(f"mesh auto: {mesh_text(axes)}, by a fixed rule, for there is no plan: {error}", file=sys.stderr)
        return axes
    print(f"mesh auto: {choice.reason}", file=sys.stderr)
    return choice.axes


def followed(command: cli.Serve, path: pathlib.Path) -> tuple[cli.Serve, Mesh]:
    """The command with a plan's model, weights and engine in place of the file, and the mesh of one replica.

    Raises:
        ConfigError: the file is no serving plan, its devices are not here, or one of its fields is also set otherwise.
    """
    plan = read_serving_plan(path)
    if plan.kv_dtype not in KV_DTYPES:
        raise ConfigError(f"{path}: kv_dtype={plan.kv_dtype} cannot be served; this engine has {', '.join(KV_DTYPES)}")
    axes, sizes = replica_axes(plan.mesh), {"input_length": plan.input_length, "output_length": plan.output_length}
    engine = planned_engine(command.engine, batch=plan.batch, kv_dtype=plan.kv_dtype, **sizes)
    unset = EngineConfig()
    _refuse_others(path, command.engine, unset, dataclasses.asdict(engine), "engine.")
    if command.engine.kv_cache_memory != unset.kv_cache_memory:
        raise ConfigError(f"engine.kv_cache_memory: {path} says how many pages there are; leave one of them out")
    planned: dict[str, Any] = {
        "model": plan.model,
        "devices": plan.devices,
        "mesh": mesh_text(axes) or "tensor=1",
        "dtype": "bfloat16",
        "quantize": "int8" if plan.weight_dtype == "int8" else "none",
    }
    _refuse_others(path, command, cli.Serve(), planned)
    devices = _replica_devices(plan, math.prod(axes.values()))
    replicas = plan.mesh.get("data", 1)
    if replicas > 1:
        print(f"{path}: one of {replicas} replicas, each on {len(devices)} device(s), is served here", file=sys.stderr)
    return dataclasses.replace(command, **planned, engine=engine, plan=None), make_mesh(axes, devices)


def _refuse_others(path: pathlib.Path, given: Any, unset: Any, planned: dict[str, Any], prefix: str = "") -> None:
    for name, value in planned.items():
        if getattr(given, name) not in (getattr(unset, name), value):
            raise ConfigError(
                f"{prefix}{name}: {path} says {value}, the command {getattr(given, name)}; leave one of them out"
            )


def _replica_devices(plan: ServingPlan, count: int) -> list[jax.Device]:
    """The devices of one replica: those that this process sees, if it sees no others, or the first of all planned."""
    where = parse_devices(plan.devices)
    if where.platform in CHIPS and where.platform != "cpu":
        attached = jax.devices()
        if len(attached) == count and attached[0].device_kind.lower() in CHIPS[where.platform].kinds:
            return attached
    return use_devices(plan.devices)[:count]

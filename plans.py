"""`meshloom plan`: a layout, a training plan, a serving plan or a purchase, by what the command says of its workload.

Each kind takes flags of its own; a flag of another kind is refused.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
from rich.console import Console

from meshloom import cli
from meshloom.core.ahead import compiler_missing
from meshloom.core.config import load_toml
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.executable import Header
from meshloom.core.topology import BATCH_AXES, Devices, abstract_mesh, measured_chip, mesh_text, parse_devices
from meshloom.kernel_choices import check_kernels, kernels_of_training
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract, abstract_module, default_axes
from meshloom.serving_plans import purchase, serving_plan
from meshloom.sharding import Layout, derive, explain, table
from meshloom.sharding.charts import (
    candidate_table,
    check_chart,
    compiled_table,
    cost_table,
    save_chart,
)
from meshloom.sharding.explain import spec_text
from meshloom.sharding.explain_flow import explain_flow
from meshloom.sharding.explicit import check
from meshloom.sharding.flow import Flow, flow, strict
from meshloom.sharding.plan_file import check_plan_path, write_plan
from meshloom.sharding.planner import Candidate, plan_training
from meshloom.sharding.trace import trace
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig

if TYPE_CHECKING:
    from meshloom.doctor import Diagnosis

_ALWAYS = ("model", "config", "json")
# Kind of plan -> the flags that it takes.
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "layout": ("devices", "mesh", "explain", "picture", "strict"),
    "training plan": (
        *("devices", "mesh", "batch_tokens", "sequence_length", "remat", "parts"),
        *("candidates", "compile", "explain_cost", "kernels", "chart", "out", "executable", "train_config"),
    ),
    "serving plan": ("devices", "requests", "slo", "candidates", "compile", "kernels", "out"),
    "purchase": ("cheapest", "requests", "slo", "offers", "prices"),
}


def plan(command: cli.Plan) -> dict[str, Any]:
    """Makes the plan that the flags ask for."""
    if command.cheapest:
        _refuse_others(command, "purchase")
        return purchase(command)
    if command.requests is not None:
        _refuse_others(command, "serving plan")
        return serving_plan(command, command.requests)
    if command.batch_tokens is not None:
        _refuse_others(command, "training plan")
        return _training(command, command.batch_tokens)
    _refuse_others(command, "layout")
    return _layout(command)


def _refuse_others(command: cli.Plan, kind: str) -> None:
    unset = cli.Plan()
    allowed = (*_ALWAYS, *_FLAGS[kind])
    given = [
        field.name
        for field in dataclasses.fields(command)
        if getattr(command, field.name) != getattr(unset, field.name)
    ]
    for name in given:
        if name not in allowed:
            owners = [other for other, names in _FLAGS.items() if name in names]
            asks = {
                "training plan": "say its --batch-tokens",
                "serving plan": "say its --requests",
                "purchase": "say --cheapest",
            }
            advice = asks.get(owners[0])
            if (name, kind) == ("devices", "purchase"):
                advice = "it chooses devices itself, among --offers"
            raise ConfigError(
                f"--{name.replace('_', '-')}: of a {' or '.join(owners)}, and this is a {kind}"
                + ("" if advice is None else f"; {advice}")
            )


def _layout(command: cli.Plan) -> dict[str, Any]:
    inputs: tuple[Any, ...]
    if command.picture is not None:
        check_chart(command.picture, "picture")
    count = parse_devices(command.devices).count or len(jax.devices())
    mesh = abstract_mesh(command.mesh or default_axes(command.model, count), count)
    # Stacked, equal layers are one row of the table, and tracing does not grow with depth.
    config, module = abstract(command.model, scan_layers=True)
    if isinstance(config, DecoderConfig):  # a row of usual length per device, so that bytes are those of training
        rows = max(math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES), 2)
        inputs = (jax.ShapeDtypeStruct((rows, min(4096, config.context)), jnp.int32),)
    else:
        inputs = cast(Any, module).example_inputs()
    layout = derive(module, mesh, *inputs)
    result: dict[str, Any] = {"model": command.model, "mesh": dict(mesh.shape)}
    if command.strict:
        strict(trace(module, inputs), layout)
        typed = check(module, layout, inputs)
        result["strict"] = {"typed": typed.typed, "trusted": dict(typed.trusted)}
        print(f"strict: {typed}", file=sys.stderr)
    moves = flow(trace(module, inputs), layout) if command.explain is not None or command.picture is not None else None
    if moves is not None and command.picture is not None:
        from meshloom.sharding.picture import save_picture  # draws, and imports matplotlib for it

        title = f"{command.model} on {command.devices}, {mesh_text(mesh.shape) or 'one device'}"
        save_picture(moves, command.picture, title)
        result["picture"] = str(command.picture)
        print(f"wrote {command.picture}", file=sys.stderr)
    if moves is not None and command.explain is not None:
        return result | _explanation(command, layout, moves, inputs)
    if not command.json:
        # A pipe has no width: wide enough for the longest names, so that a row stays a line.
        Console(width=None if sys.stdout.isatty() else 180).print(table(layout))
    parameters = [
        {
            "parameter": row.name,
            "shape": list(row.shape),
            "dtype": str(row.dtype),
            "spec": spec_text(row),
            "rule": row.rule,
            "roles": list(row.roles),
            "bytes_per_device": row.bytes_per_device,
        }
        for row in layout.rows
    ]
    for warning in layout.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return result | {
        "bytes_per_device": layout.bytes_per_device,
        "parameters": parameters,
        "warnings": list(layout.warnings),
    }


def _explanation(command: cli.Plan, layout: Layout, moves: Flow, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Why a parameter or an activation lies as it does, and what that moves."""
    name = command.explain or ""
    is_parameter = any(row.name == name for row in layout.rows)
    moved = explain_flow(moves, name)
    text = f"{explain(layout, name)}\nin a forward pass:\n{moved}" if is_parameter else moved
    if not command.json:
        print(text)
        print(f"(forward pass over {' x '.join(map(str, inputs[0].shape))} tokens)")
    return {"name": name, "explanation": text}


def _training(command: cli.Plan, batch_tokens: int) -> dict[str, Any]:
    config = abstract(command.model, scan_layers=True)[0]
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{command.model} is an encoder-decoder; training plans are for decoders")
    length = min(4096, config.context) if command.sequence_length is None else command.sequence_length
    if length > config.context:
        raise ConfigError(
            f"sequence_length={length} is longer than {command.model}'s context of {config.context} tokens"
        )
    devices, workload = parse_devices(command.devices), TrainWorkload(batch_tokens, length)

    def module_of(remat: Any) -> Any:
        return abstract_module(dataclasses.replace(config, remat=remat), jnp.float32)

    if command.kernels:
        check_kernels(devices)
    if command.chart is not None:
        check_chart(command.chart)
    if command.out is not None:
        check_plan_path(command.out)
    wanted = 2 if command.compile is None else command.compile
    if wanted < 0:
        raise ConfigError(f"--compile is a number of plans, 0 or more; got {wanted}")
    run = _run_of(command, wanted, devices)
    limit = 5 if command.candidates is None else command.candidates
    if limit < 1:
        raise ConfigError(f"at least 1 plan must be asked for; got {limit}")
    chip = measured_chip(devices)
    if chip is not None:
        print(f"{command.devices}: this machine's processor, measured, in {devices.count} equal parts", file=sys.stderr)
    priced = plan_training(module_of, devices, workload, chip=chip, limit=2**31)
    asked_for = _asked_for(command, devices, priced)
    found = asked_for[:limit]
    missing, diagnosis = compiler_missing(devices), None
    saved: list[Header] = []
    if wanted and missing is None:
        from meshloom.doctor import diagnose  # these make training steps, which are slow to import
        from meshloom.planning import StepProgram, compile_best

        def keep(program: StepProgram) -> None:
            if command.executable is not None:
                saved.append(program.save(command.executable, run))

        progress = Console(stderr=True)
        found = compile_best(config, devices, found, workload, wanted, progress, run=run, keep=keep)
        if not any(each.fits for each in found):
            diagnosis = diagnose(config, devices, found[0], priced, workload, progress)
    compiled = any(each.compiled_bytes is not None for each in found)
    if not command.json:
        _print_plans(command, found, diagnosis, compiled=compiled)
    if wanted and missing is not None:
        print(f"predicted, not compiled: {missing}", file=sys.stderr)
    if command.chart is not None:
        save_chart(found, command.chart)
    result = {
        "model": command.model,
        "devices": command.devices,
        "figures": "data sheet" if chip is None else "measured",
        "workload": dataclasses.asdict(workload),
        "compiled": compiled,
        "not_compiled_because": None if compiled else missing or "--compile 0",
        "candidates": [each.to_json() for each in found],
    }
    if command.kernels:
        result["kernels"] = kernels_of_training(config, devices, found[0], workload, quiet=command.json)
    if diagnosis is not None:
        result["doctor"] = diagnosis.to_json()
    if command.executable is not None:
        result["executable"] = str(command.executable) if saved else None
        said = f"wrote {command.executable}" if saved else f"no plan fits: {command.executable} is not written"
        print(said, file=sys.stderr)
    if command.out is not None:
        write_plan(command.out, result)
    # A command that could not write what it was asked for has failed, whatever else it found.
    return result if command.executable is None else result | {"ok": bool(saved)}


def _run_of(command: cli.Plan, wanted: int, devices: Devices) -> TrainConfig:
    """The training run that a compiled step is for.

    Raises:
        ConfigError: no step would be compiled, or the run's would be another one than a plan's.
    """
    if command.executable is None:
        if command.train_config is not None:
            raise ConfigError("--train-config says what is inside the program of --executable; give both")
        return TrainConfig()
    if not wanted:
        raise ConfigError("--executable is a compiled step, and --compile 0 compiles none")
    if (missing := compiler_missing(devices)) is not None:
        raise ConfigError(f"--executable: {missing}")
    check_plan_path(command.executable, "executable")
    run = TrainConfig() if command.train_config is None else load_toml(cli.Train, command.train_config)
    for name, planned in (("dtype", ("auto", "bfloat16")), ("scan_layers", (True,))):
        if getattr(run, name) not in planned:
            raise ConfigError(
                f"{command.train_config}: a plan's step has {name}={planned[-1]}; got {getattr(run, name)}"
            )
    return run


def _asked_for(command: cli.Plan, devices: Devices, priced: list[Candidate]) -> list[Candidate]:
    """Those with the mesh, remat policy and parts that the command names."""
    mesh = None if command.mesh is None else mesh_text(abstract_mesh(command.mesh, devices.count).shape)
    found = [
        each
        for each in priced
        if mesh in (None, mesh_text(each.mesh))
        and command.remat in (None, each.remat)
        and command.parts in (None, each.parts)
    ]
    if not found:
        meshes = sorted({mesh_text(each.mesh) for each in priced} - {""})
        raise ShardingError(
            f"no plan has mesh={command.mesh}, remat={command.remat}, parts={command.parts}; meshes that split the "
            f"weights and take the batch are {', '.join(meshes[:12])}{' and others' if len(meshes) > 12 else ''}"
        )
    return found


def _print_plans(command: cli.Plan, found: list[Candidate], diagnosis: "Diagnosis | None", *, compiled: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else 180)
    state = "the compiler's memory beside the predicted" if compiled else "predicted, not compiled"
    console.print(candidate_table(found, title=f"{command.model} on {command.devices}: {state}"))
    if any(each.compiled is not None for each in found):
        console.print(compiled_table(found))
    if command.explain_cost:
        console.print(cost_table(found[0]))
    if diagnosis is not None:
        for each in diagnosis.tables():
            console.print(each)

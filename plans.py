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
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import Devices, abstract_mesh, mesh_text, parse_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract, abstract_module, default_axes
from meshloom.sharding import Layout, derive, explain, table
from meshloom.sharding.charts import (
    candidate_table,
    check_chart,
    compiled_table,
    cost_table,
    purchase_table,
    save_chart,
    serving_table,
)
from meshloom.sharding.cheapest import RequestKind, Slo, cheapest
from meshloom.sharding.explain import spec_text
from meshloom.sharding.explain_flow import explain_flow
from meshloom.sharding.flow import Flow, flow, strict
from meshloom.sharding.plan_file import check_plan_path, write_plan
from meshloom.sharding.planner import Candidate, plan_training
from meshloom.sharding.serving import plan_serving
from meshloom.sharding.trace import trace
from meshloom.sharding.workload import ServeWorkload, TrainWorkload

if TYPE_CHECKING:
    from meshloom.doctor import Diagnosis

_ALWAYS = ("model", "config", "json")
# Kind of plan -> the flags that it takes.
_FLAGS: Mapping[str, tuple[str, ...]] = {
    "layout": ("devices", "mesh", "explain", "strict"),
    "training plan": (
        *("devices", "mesh", "batch_tokens", "sequence_length", "remat", "parts"),
        *("candidates", "compile", "explain_cost", "chart", "out"),
    ),
    "serving plan": ("devices", "requests", "slo", "candidates"),
    "purchase": ("cheapest", "requests", "slo", "offers", "prices"),
}
# What is offered if nobody says: one host's worth of each accelerator that has a list price.
_OFFERS = tuple(
    f"{name}:{shape}"
    for name, chip in CHIPS.items()
    if chip.price_per_hour is not None and "bfloat16" in chip.flops
    for shape in (("1", "2", "4", "8") if chip.node_devices else {2: ("1x1", "2x2", "2x4"), 3: ("2x2x1",)}[chip.torus])
)


def plan(command: cli.Plan) -> dict[str, Any]:
    """Makes the plan that the flags ask for."""
    if command.cheapest:
        _refuse_others(command, "purchase")
        return _purchase(command)
    if command.requests is not None:
        _refuse_others(command, "serving plan")
        return _serving(command, command.requests)
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
            owner = next(other for other, names in _FLAGS.items() if name in names)
            asks = {
                "training plan": "say its --batch-tokens",
                "serving plan": "say its --requests",
                "purchase": "say --cheapest",
            }
            raise ConfigError(
                f"--{name.replace('_', '-')}: of a {owner}, and this is a {kind}"
                + (f"; {asks[owner]}" if owner in asks else "")
            )


def _layout(command: cli.Plan) -> dict[str, Any]:
    inputs: tuple[Any, ...]
    count = parse_devices(command.devices).count or len(jax.devices())
    mesh = abstract_mesh(command.mesh or default_axes(command.model, count), count)
    # Stacked, equal layers are one row of the table, and tracing does not grow with depth.
    config, module = abstract(command.model, scan_layers=True)
    if isinstance(config, DecoderConfig):  # a row of usual length per device, so that bytes are those of training
        rows = max(math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp")), 2)
        inputs = (jax.ShapeDtypeStruct((rows, min(4096, config.context)), jnp.int32),)
    else:
        inputs = cast(Any, module).example_inputs()
    layout = derive(module, mesh, *inputs)
    if command.strict:
        strict(trace(module, inputs), layout)
    if command.explain is not None:
        return _explanation(command, layout, flow(trace(module, inputs), layout), inputs)
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
    return {
        "model": command.model,
        "mesh": dict(mesh.shape),
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
    return {"model": command.model, "mesh": dict(layout.mesh.shape), "name": name, "explanation": text}


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

    if command.chart is not None:
        check_chart(command.chart)
    if command.out is not None:
        check_plan_path(command.out)
    wanted = 2 if command.compile is None else command.compile
    if wanted < 0:
        raise ConfigError(f"--compile is a number of plans, 0 or more; got {wanted}")
    limit = 5 if command.candidates is None else command.candidates
    if limit < 1:
        raise ConfigError(f"at least 1 plan must be asked for; got {limit}")
    priced = plan_training(module_of, devices, workload, limit=2**31)
    asked_for = _asked_for(command, devices, priced)
    found = asked_for[:limit]
    missing, diagnosis = compiler_missing(devices), None
    if wanted and missing is None:
        from meshloom.doctor import diagnose  # these make training steps, which are slow to import
        from meshloom.planning import compile_best

        progress = Console(stderr=True)
        found = compile_best(config, devices, found, workload, wanted, progress)
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
        "workload": dataclasses.asdict(workload),
        "compiled": compiled,
        "not_compiled_because": None if compiled else missing or "--compile 0",
        "candidates": [each.to_json() for each in found],
    }
    if diagnosis is not None:
        result["doctor"] = diagnosis.to_json()
    if command.out is not None:
        write_plan(command.out, result)
    return result


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


def _serving(command: cli.Plan, requests: str) -> dict[str, Any]:
    (kind, *more), limit = _request_mix(requests), 5 if command.candidates is None else command.candidates
    if more:
        raise ConfigError(
            f"--requests: a serving plan is for one kind of requests, --cheapest for many; got {requests!r}"
        )
    slo = None if command.slo is None else _slo(command.slo)
    workload = ServeWorkload(
        kind.input_length,
        kind.output_length,
        ttft_s=None if slo is None else slo.ttft_s,
        tpot_s=None if slo is None else slo.tpot_s,
    )
    found = plan_serving(_served(command.model), parse_devices(command.devices), workload, limit=limit)
    if not command.json:
        title = f"{command.model} on {command.devices}, {kind.input_length} tokens in, {kind.output_length} out"
        Console(width=None if sys.stdout.isatty() else 180).print(serving_table(found, title=f"{title}: predicted"))
    return {
        "model": command.model,
        "devices": command.devices,
        "workload": dataclasses.asdict(workload),
        "compiled": False,
        "candidates": [each.to_json() for each in found],
    }


def _purchase(command: cli.Plan) -> dict[str, Any]:
    if command.requests is None or command.slo is None:
        raise ConfigError(
            '--cheapest needs --requests, e.g. "1024:256:2.5,128:64:20" (tokens in : out : requests per second), and '
            '--slo, e.g. "ttft=1,tpot=0.05" (seconds)'
        )
    mix, slo = _request_mix(command.requests), _slo(command.slo)
    offers = _OFFERS if command.offers is None else tuple(each.strip() for each in command.offers.split(","))
    prices = {} if command.prices is None else _pairs("--prices", command.prices)
    found = cheapest(_served(command.model), mix, slo, offers, prices)
    if not command.json:
        Console(width=None if sys.stdout.isatty() else 180).print(purchase_table(found, mix, model=command.model))
    return {
        "model": command.model,
        "requests": [dataclasses.asdict(kind) for kind in mix],
        "slo": dataclasses.asdict(slo),
        "offers": list(offers),
        "counts": found.counts,
        "cost_per_hour": found.cost_per_hour,
        "shares": list(found.shares),
        "compiled": False,
    }


def _served(model: str) -> Any:
    config, module = abstract(model, scan_layers=True)
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{model} is an encoder-decoder; serving plans are for decoders")
    return module


def _request_mix(text: str) -> list[RequestKind]:
    """Reads "1024:256:2.5,128:64:20"; without a rate it is one request per second."""
    kinds = []
    for part in text.split(","):
        try:
            lengths, rate = part.split(":")[:2], (part.split(":")[2:] or ["1"])
            (rate_text,) = rate
            kinds.append(RequestKind(int(lengths[0]), int(lengths[1]), float(rate_text)))
        except (ValueError, IndexError) as error:
            raise ConfigError(
                f'--requests are "tokens in:out:requests per second", as in "1024:256:2.5,128:64:20"; got {part!r}'
            ) from error
    return kinds


def _slo(text: str) -> Slo:
    """Reads "ttft=1,tpot=0.05"."""
    times = _pairs("--slo", text)
    if set(times) != {"ttft", "tpot"}:
        raise ConfigError(f'--slo is "ttft=SECONDS,tpot=SECONDS"; got {text!r}')
    return Slo(times["ttft"], times["tpot"])


def _pairs(flag: str, text: str) -> dict[str, float]:
    """Reads "a=1,b=2.5", all greater than 0."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(number)
        except ValueError:
            raise ConfigError(f'{flag} is name=number pairs, as in "a=1,b=2.5"; got {part!r}') from None
        if not 0 < found[name] < float("inf"):
            raise ConfigError(f"{flag}: {name} must be greater than 0; got {number}")
    return found

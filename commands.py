"""What the commands of the command line do: load, call the room that owns the work, print.

A command prints for people unless `json`, and returns what `--json` prints. How flags are read is known to `cli.py`.
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

import meshloom
from meshloom import cli, models
from meshloom.core.ahead import compiler_missing
from meshloom.core.compile import cache_folder, enable_compilation_cache
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.topology import Devices, abstract_mesh, make_mesh, parse_devices, use_devices
from meshloom.loading import load
from meshloom.models.config import DecoderConfig
from meshloom.models.language_model import LanguageModel
from meshloom.models.source import abstract, abstract_module, resolve
from meshloom.serve.config import BenchServeConfig, ChatConfig, ServeConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams
from meshloom.sharding import derive, table
from meshloom.sharding.charts import candidate_table, check_chart, compiled_table, cost_table, save_chart
from meshloom.sharding.explain import spec_text
from meshloom.sharding.plan_file import write_plan
from meshloom.sharding.planner import Candidate, plan_training
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig

if TYPE_CHECKING:
    from meshloom.doctor import Diagnosis


def _part[T](cls: type[T], command: Any) -> T:
    """The room's own configuration out of a command that extends it."""
    return cls(**{field.name: getattr(command, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _load(command: Any) -> LanguageModel:
    """The command's model on its devices, with compiled programs kept on disk."""
    mesh = _mesh(command)
    enable_compilation_cache()
    dtype = None if command.dtype == "auto" else command.dtype
    quantize = None if command.quantize == "none" else command.quantize
    lm = load(command.model, dtype=dtype, mesh=mesh, quantize=quantize)
    if lm.quantized and command.quantize == "auto":
        print("weights are held as int8 (--quantize none: as the file's numbers)", file=sys.stderr)
    return lm


def _mesh(command: Any) -> Mesh | None:
    if command.mesh is None and command.devices == "local":
        return None
    devices = use_devices(command.devices)
    return make_mesh(command.mesh or default_axes(command.model, len(devices)), devices)


def default_axes(model: str, count: int) -> dict[str, int]:
    """The split that `Plan.mesh` documents."""
    config, _ = abstract(model)
    kv_heads = getattr(config, "n_kv_heads", config.n_heads)
    if count < 4 or count % 2:
        return {"fsdp": count}
    if getattr(config, "moe", None) is not None:
        return {"fsdp": count // 2, "expert": 2}
    return {"fsdp": count // 2, "tensor": 2} if kv_heads % 2 == 0 else {"fsdp": count}


def generate(command: cli.Generate) -> dict[str, Any]:
    prompt = sys.stdin.read() if command.prompt is None else command.prompt
    lm = _load(command)
    if command.chat and lm.tokenizer is not None:
        prompt = lm.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    text, tokens, reason = "", 0, None
    with Engine(lm, command.engine) as engine:
        request = engine.prepare(prompt, _part(SamplingParams, command), add_special=not command.chat)
        for _, delta in engine.iterate(request):
            text, tokens, reason = text + delta.text, tokens + len(delta.token_ids), delta.finish_reason
            if not command.json:
                print(delta.text, end="", flush=True)
    if not command.json:
        print()
    usage = {"prompt_tokens": len(request.prompt), "completion_tokens": tokens}
    return {"model": command.model, "text": text, "finish_reason": reason, "usage": usage}


def chat(command: cli.Chat) -> dict[str, Any]:
    lm = _load(command)
    from meshloom.serve.chat import chat  # here and below: the HTTP server and the trainer are slow to import

    # With --json people read standard error, and standard output gets the whole conversation when it has ended.
    console = Console(highlight=False, stderr=command.json)
    return {"model": command.model, "messages": chat(lm, _part(ChatConfig, command), console=console)}


def serve(command: cli.Serve) -> None:
    lm = _load(command)
    from meshloom.serve.api.server import serve

    def announce(ready: dict[str, Any]) -> None:
        print(json.dumps(ready), flush=True)

    config = _part(ServeConfig, command)
    if config.model_name is None:
        config = dataclasses.replace(config, model_name=pathlib.Path(command.model).name)
    serve(lm, config, announce if command.json else None)


def train(command: cli.Train) -> dict[str, Any]:
    from meshloom.train.loop import train

    enable_compilation_cache()
    return train(_part(TrainConfig, command)).figures()


def plan(command: cli.Plan) -> dict[str, Any]:
    return _layout(command) if command.batch_tokens is None else _training_plan(command, command.batch_tokens)


def _layout(command: cli.Plan) -> dict[str, Any]:
    asked = {"--sequence-length": command.sequence_length, "--candidates": command.candidates, "--chart": command.chart}
    asked |= {
        "--remat": command.remat,
        "--parts": command.parts,
        "--compile": command.compile,
        "--out": command.out,
        "--explain-cost": command.explain_cost or None,
    }
    if given := [flag for flag, value in asked.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: of a training plan; say its --batch-tokens")
    count = parse_devices(command.devices).count or len(jax.devices())
    mesh = abstract_mesh(command.mesh or default_axes(command.model, count), count)
    # Stacked, equal layers are one row of the table, and tracing does not grow with depth.
    layout = derive(abstract(command.model, scan_layers=True)[1], mesh)
    if not command.json:
        # A pipe has no width: wide enough for the longest names, so that a row stays a line.
        Console(width=None if sys.stdout.isatty() else 180).print(table(layout))
    rows = [
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
    axes = dict(mesh.shape)
    return {"model": command.model, "mesh": axes, "bytes_per_device": layout.bytes_per_device, "parameters": rows}


def _training_plan(command: cli.Plan, batch_tokens: int) -> dict[str, Any]:
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
    mesh = None if command.mesh is None else dict(abstract_mesh(command.mesh, devices.count).shape)
    found = [
        each
        for each in priced
        if (mesh is None or {a: n for a, n in each.mesh.items() if n > 1} == {a: n for a, n in mesh.items() if n > 1})
        and command.remat in (None, each.remat)
        and command.parts in (None, each.parts)
    ]
    if not found:
        meshes = sorted({",".join(f"{a}={n}" for a, n in each.mesh.items() if n > 1) for each in priced})
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


def convert(command: cli.Convert) -> dict[str, Any]:
    dtype = jnp.dtype(resolve(command.source).dtype if command.dtype == "auto" else command.dtype)
    lm = models.load(command.source, dtype=dtype)
    if command.to == "huggingface":
        lm.save(command.out)
    else:
        lm.save_checkpoint(command.out)
    if not command.json:
        print(f"wrote {command.source} as {dtype.name} to {command.out}")
    return {"source": command.source, "out": str(command.out), "to": command.to, "dtype": dtype.name}


def bench_serve(command: cli.BenchServe) -> dict[str, Any]:
    lm = _load(command)
    from meshloom.serve.bench import bench_serve

    result = bench_serve(_part(BenchServeConfig, command), lm)
    if not command.json:
        _print_values(result)
    return result


def info(command: cli.Info) -> dict[str, Any]:
    devices = jax.devices()
    page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    result = {
        "meshloom": meshloom.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(page * pages / 2**30, 1),
        "memory_free_gib": round(page * free / 2**30, 1),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in devices],
        "device_memory_gib": [
            round((d.memory_stats() or {}).get("bytes_limit", 0) / 2**30, 1) or None for d in devices
        ],
        "cache": str(cache_folder()),
        "compilation_cache": jax.config.jax_compilation_cache_dir or str(cache_folder() / "xla"),
    }
    if not command.json:
        _print_values(result)
    return result


def _print_values(values: dict[str, Any]) -> None:
    """One `name value` per line; nested tables as name.key."""
    flat = list(_flat(values))
    width = max(len(name) for name, _ in flat)
    for name, value in flat:
        print(f"{name:<{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value

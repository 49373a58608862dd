"""What the commands of the command line do: load, call the room that owns the work, print.

A command prints for people unless `json`, and returns what `--json` prints. How flags are read is known to `cli.py`.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from meshloom import cli, models
from meshloom.core.compile import enable_compilation_cache
from meshloom.core.processes import join_processes, joined
from meshloom.core.topology import use_devices
from meshloom.loading import load
from meshloom.models.language_model import LanguageModel
from meshloom.models.source import abstract, resolve
from meshloom.serve.config import BenchServeConfig, ChatConfig, ServeConfig
from meshloom.serve.engine import Engine
from meshloom.serve.request import SamplingParams
from meshloom.train.config import TrainConfig

if TYPE_CHECKING:
    pass


def _part[T](cls: type[T], command: Any) -> T:
    """The room's own configuration out of a command that extends it."""
    return cls(**{field.name: getattr(command, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _load(command: Any, mesh: Mesh | None = None) -> LanguageModel:
    """The command's model on a mesh, or else on its devices, with compiled programs kept on disk."""
    from meshloom.placement import serving_mesh  # the planner is slow to import

    mesh = mesh or serving_mesh(command)
    enable_compilation_cache()
    dtype = None if command.dtype == "auto" else command.dtype
    quantize = None if command.quantize == "none" else command.quantize
    lm = load(command.model, dtype=dtype, mesh=mesh, quantize=quantize)
    if lm.quantized and command.quantize == "auto":
        print("weights are held as int8 (--quantize none: as the file's numbers)", file=sys.stderr)
    return lm


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
    from meshloom.placement import followed
    from meshloom.serve.api.server import serve

    mesh = None
    if command.plan is not None:
        command, mesh = followed(command, command.plan)
    lm = _load(command, mesh)

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
    from meshloom.plans import plan

    return plan(command)


def verify(command: cli.Verify) -> dict[str, Any]:
    from meshloom.verification import verify_model

    join_processes()
    devices = use_devices(command.devices)
    console = Console(width=None if sys.stdout.isatty() else 180, quiet=command.json or joined()[0] > 0)
    config, _ = abstract(command.model)
    return verify_model(config, devices, mesh=command.mesh, seed=command.seed, console=console).to_json()


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


def bench_kernels(command: cli.BenchKernels) -> dict[str, Any]:
    from meshloom.kernel_bench import bench_kernels

    return bench_kernels(command)


def tune(command: cli.Tune) -> dict[str, Any]:
    from meshloom.kernel_tuning import tune

    return tune(command)


def info(command: cli.Info) -> dict[str, Any]:
    from meshloom.machine import info

    return info(command)


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

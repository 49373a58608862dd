"""`meshloom plan --requests` and `--cheapest`: how to serve a model, compiled if asked, and what to rent for it."""

import dataclasses
import sys
from typing import Any

from rich.console import Console

from meshloom import cli
from meshloom.core.ahead import compiler_missing
from meshloom.core.errors import ConfigError
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import measured_chip, parse_devices
from meshloom.kernel_choices import check_kernels, kernels_of_serving
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract
from meshloom.serve.plan import search
from meshloom.sharding.charts import compiled_table, purchase_table, serving_table
from meshloom.sharding.cheapest import RequestKind, Slo, cheapest
from meshloom.sharding.plan_file import check_plan_path, write_plan
from meshloom.sharding.workload import ServeWorkload

# What is offered if nobody says: one host's worth of each accelerator that has a list price.
_OFFERS = tuple(
    f"{name}:{shape}"
    for name, chip in CHIPS.items()
    if chip.price_per_hour is not None and "bfloat16" in chip.flops
    for shape in (("1", "2", "4", "8") if chip.node_devices else {2: ("1x1", "2x2", "2x4"), 3: ("2x2x1",)}[chip.torus])
)


def serving_plan(command: cli.Plan, requests: str) -> dict[str, Any]:
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
    devices, wanted = parse_devices(command.devices), command.compile or 0
    if wanted < 0:
        raise ConfigError(f"--compile is a number of plans, 0 or more; got {wanted}")
    if limit < 1:
        raise ConfigError(f"at least 1 plan must be asked for; got {limit}")
    if command.kernels:
        check_kernels(devices)
    if command.out is not None:
        check_plan_path(command.out)
    config, module = _served(command.model)
    found = search(module, devices, workload, chip=measured_chip(devices), limit=limit)
    missing = compiler_missing(devices) if wanted else "--compile 0"
    if missing is None:
        from meshloom.planning import compile_best_serving  # imports training, which is slow

        found = compile_best_serving(config, devices, found, workload, wanted, Console(stderr=True))
    compiled = any(each.compiled_bytes is not None for each in found)
    if not command.json:
        console = Console(width=None if sys.stdout.isatty() else 180)
        title = f"{command.model} on {command.devices}, {kind.input_length} tokens in, {kind.output_length} out"
        state = "the compiler's memory beside the predicted" if compiled else "predicted, not compiled"
        console.print(serving_table(found, title=f"{title}: {state}"))
        if any(each.compiled is not None for each in found):
            console.print(compiled_table(found))
    if wanted and missing is not None:
        print(f"predicted, not compiled: {missing}", file=sys.stderr)
    result = {
        "model": command.model,
        "devices": command.devices,
        "workload": dataclasses.asdict(workload),
        "compiled": compiled,
        "not_compiled_because": None if compiled else missing,
        "candidates": [each.to_json() for each in found],
    }
    if command.kernels:
        result["kernels"] = kernels_of_serving(config, devices, found[0], workload, quiet=command.json)
    if command.out is not None:
        write_plan(command.out, result)
    return result


def purchase(command: cli.Plan) -> dict[str, Any]:
    if command.requests is None or command.slo is None:
        raise ConfigError(
            '--cheapest needs --requests, e.g. "1024:256:2.5,128:64:20" (tokens in : out : requests per second), and '
            '--slo, e.g. "ttft=1,tpot=0.05" (seconds)'
        )
    mix, slo = _request_mix(command.requests), _slo(command.slo)
    offers = _OFFERS if command.offers is None else tuple(each.strip() for each in command.offers.split(","))
    prices = {} if command.prices is None else _pairs("--prices", command.prices)
    found = cheapest(_served(command.model)[1], mix, slo, offers, prices, plan=search)
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


def _served(model: str) -> tuple[DecoderConfig, Any]:
    config, module = abstract(model, scan_layers=True)
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{model} is an encoder-decoder; serving plans are for decoders")
    return config, module


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

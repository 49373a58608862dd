"""`meshloom tune`: a search for the block sizes of kernels, its progress, its table, and the file programs read."""

import dataclasses
import importlib.metadata
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from meshloom import cli
from meshloom.core.ahead import compiler_missing, target_devices
from meshloom.core.bundles import dump_bundles
from meshloom.core.config import nearest
from meshloom.core.errors import ConfigError
from meshloom.core.hardware import chip_of_kind
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.kernel_bench import ONE_CHIP
from meshloom.pallas_kernels import tuning
from meshloom.pallas_kernels.bench import programs, search


class _Rate(ProgressColumn):
    """Programs a minute."""

    def render(self, task: Task) -> Text:
        return Text("- a minute" if not task.speed else f"{60 * task.speed:.3g} a minute")


def tune(command: cli.Tune) -> dict[str, Any]:
    """Prints the table unless `--json`; returns `{"target", "by", "out", "kept", "calls": [...]}`.

    Entries are written as they are found, so an interrupted search keeps what it has.

    Raises:
        ConfigError: the target or the op is not known, or its compiler is not installed; says what would work.
    """
    if command.target != "local" and command.target not in ONE_CHIP:
        raise ConfigError(f"--target {command.target}: kernels are tuned for local, {', '.join(ONE_CHIP)}")
    if command.op is not None and command.op not in programs.OPS:
        raise ConfigError(f"--op {command.op}: {nearest(command.op, programs.OPS)}")
    chip, devices = _target(command.target)
    out = command.out or tuning.user_file(chip)
    tuning.read(out)  # a damaged file is found before the search, not after it
    timed = command.target == "local"
    by = "time" if timed else f"schedules of libtpu {importlib.metadata.version('libtpu')}"
    with tempfile.TemporaryDirectory() as folder:
        if not timed:
            dump_bundles(folder)  # before anything loads the compiler
        mesh = make_mesh({"fsdp": 1}, devices()[:1])
        judge: search.Judge = search.Clock(mesh) if timed else search.Schedules(mesh, pathlib.Path(folder), chip)
        asked = [command.op] if command.op else programs.OPS
        with jax.set_mesh(mesh):  # rules ask which chip it is
            wanted = [program for op in asked for program in programs.programs_of(op, apart=timed)]
        results = []
        columns = BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn()
        console = Console(stderr=True, quiet=command.json)
        with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as progress:
            task = progress.add_task(f"tuning for {chip}", total=search.trials(wanted))
            for result in search.search(wanted, judge, lambda label: progress.advance(task)):
                results.append(result)
                gains = result.gain > search.LEAST_GAIN
                found = tuning.Found(dict(result.sizes), result.gain) if gains else None
                tuning.write(out, chip, by, {result.op: {result.call: found}})
    kept = sum(result.gain > search.LEAST_GAIN for result in results)
    if not command.json:
        console = Console(width=None if sys.stdout.isatty() else 180)
        console.print(_table(chip, by, results))
        console.print(f"{kept} of {len(results)} calls are more than 1 % faster: see {out}")
    calls = [dataclasses.asdict(result) | {"gain": result.gain} for result in results]
    return {"target": chip, "by": by, "out": str(out), "kept": kept, "calls": calls}


def _target(target: str) -> tuple[str, Callable[[], list[jax.Device]]]:
    """The chip, and what finds devices of it."""
    if target == "local":
        device = jax.devices()[0]
        chip = chip_of_kind(device.device_kind)
        if device.platform != "tpu" or chip is None:
            raise ConfigError(
                f"--target local: kernels are tuned on TPUs, and this is {device.device_kind}; for a TPU elsewhere "
                f"name it: {', '.join(ONE_CHIP)}"
            )
        return chip.name, lambda: [device]
    devices = parse_devices(ONE_CHIP[target])
    if (missing := compiler_missing(devices)) is not None:
        raise ConfigError(missing)
    return target, lambda: target_devices(devices)


def _table(chip: str, by: str, results: list[Any]) -> Table:
    table = Table(title=f"block sizes for {chip}, by {by}")
    for heading in ("kernel", "call", "its own rule", "best found"):
        table.add_column(heading, overflow="fold")
    for heading in ("own, us", "best, us", "ratio", "tried", "left out"):
        table.add_column(heading, justify="right")
    for each in results:
        own, best = ("x".join(map(str, sizes.values())) for sizes in (each.own, each.sizes))
        times = (f"{seconds * 1e6:,.1f}" for seconds in (each.own_seconds, each.seconds))
        left = ", ".join(f"{count} {reason}" for reason, count in each.refused.items()) or "-"
        table.add_row(each.op, each.call, own, best, *times, f"{each.gain:.3f}", str(each.tried), left)
    return table

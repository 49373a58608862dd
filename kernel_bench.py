"""`meshloom bench kernels`: the table of kernels beside their peers, for a TPU that is elsewhere or for this CPU."""

import dataclasses
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from meshloom import cli
from meshloom.core.ahead import compiler_missing
from meshloom.core.bundles import dump_bundles
from meshloom.core.errors import ConfigError
from meshloom.core.topology import parse_devices

ONE_CHIP = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v5p": "v5p:1x1x1", "tpu7x": "tpu7x:1x1x1"}


def bench_kernels(command: cli.BenchKernels) -> dict[str, Any]:
    """Prints the table unless `--json`; returns `{"target", "kernels": [...]}`.

    Raises:
        ConfigError: the target is not known, or its compiler is not installed; says what would work.
    """
    if command.target != "cpu" and command.target not in ONE_CHIP:
        raise ConfigError(f"--target {command.target}: kernels are compared for cpu, {', '.join(ONE_CHIP)}")
    console = Console(stderr=True, quiet=command.json)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress,
    ):
        expected, found = _comparison(command.target, pathlib.Path(folder))
        for row in progress.track(found, expected, description=f"kernels for {command.target}"):
            rows.append(dataclasses.asdict(row))
    if not command.json:
        Console(width=None if sys.stdout.isatty() else 180).print(_table(command.target, rows))
    return {"target": command.target, "kernels": rows}


def _comparison(target: str, folder: pathlib.Path) -> tuple[int, Iterator[Any]]:
    """How many rows there will be, and the rows."""
    if target != "cpu":
        devices = parse_devices(ONE_CHIP[target])
        if (missing := compiler_missing(devices)) is not None:
            raise ConfigError(missing)
        dump_bundles(folder)  # before anything below loads the compiler
    from meshloom.pallas_kernels.bench import adapters, attention, collective, cpu, experts, paged, products, tokamax

    if target == "cpu":
        return cpu.CPU_ROWS, cpu.kernels_on_cpu()
    parts = (
        (attention.ATTENTION_ROWS, attention.attention_on_tpu),
        (tokamax.TOKAMAX_ROWS, tokamax.tokamax_on_tpu),
        (paged.PAGED_ROWS, paged.paged_on_tpu),
        (products.PRODUCT_ROWS, products.products_on_tpu),
        (experts.EXPERT_ROWS, experts.experts_on_tpu),
        (adapters.ADAPTER_ROWS, adapters.adapters_on_tpu),
        (collective.COLLECTIVE_ROWS, collective.collective_on_tpu),
    )
    found = itertools.chain.from_iterable(part(devices, folder) for _, part in parts)
    return sum(rows for rows, _ in parts), found


def _table(target: str, rows: list[dict[str, Any]]) -> Table:
    headings = {
        "tile_cycles": "cycles per 128x128x128",
        "peak_share": "of the peak",
        "cycles": "cycles",
        "spills": "spills",
        "hbm": "HBM bytes over least",
        "vmem": "VMEM, MiB",
        "page_cycles": "cycles per page",
        "times_bytes": "times the HBM bound",
        "seconds": "seconds",
        "times_peer": "times the peer",
    }
    table = Table(title=f"kernels on {target}")
    table.add_column("op")
    table.add_column("kernel")
    shown = [name for name in headings if name in rows[0]]
    for name in shown:
        table.add_column(headings[name], justify="right")
    for row in rows:
        table.add_row(row["op"], row["kernel"], *(_text(name, row[name]) for name in shown))
    return table


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "peak_share":
        return f"{value:.0%}"
    if name == "vmem":
        return f"{value / 2**20:.1f}"
    return f"{value:,.0f}" if name in ("cycles", "spills") else f"{value:.3g}"

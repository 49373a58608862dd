"""Which implementation every kernel of a plan's programs takes, and why those before it declined.

The programs are traced and lowered for the devices of the plan, which need not be here, and not compiled.
"""

import collections
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from meshloom.core.ahead import compiler_missing, target_devices
from meshloom.core.errors import ConfigError
from meshloom.core.topology import Devices, make_mesh, mesh_text
from meshloom.models.config import DecoderConfig
from meshloom.pallas_kernels.dispatch import recorded
from meshloom.serve.plan import lowered_steps, replica_axes
from meshloom.sharding.planner import Candidate
from meshloom.sharding.serving import ServeCandidate
from meshloom.sharding.workload import ServeWorkload, TrainWorkload
from meshloom.train.config import TrainConfig


def check_kernels(where: Devices) -> None:
    """Before a long search: whether the kernels for these devices can be told.

    Raises:
        ConfigError: the compiler for the devices, which knows what they are, is not installed.
    """
    if (missing := compiler_missing(where)) is not None:
        raise ConfigError(f"--kernels: {missing}")


def kernels_of_training(
    config: DecoderConfig, where: Devices, candidate: Candidate, workload: TrainWorkload, *, quiet: bool
) -> list[dict[str, Any]]:
    """The kernels of a training step, as `meshloom plan --kernels --json` gives them; printed unless `quiet`."""
    from meshloom.planning import lowered_step  # training steps are slow to import

    mesh = make_mesh(mesh_text(candidate.mesh) or "fsdp=1", target_devices(where))
    return _told(lambda: lowered_step(config, mesh, candidate, workload, TrainConfig()), quiet)


def kernels_of_serving(
    config: DecoderConfig, where: Devices, candidate: ServeCandidate, workload: ServeWorkload, *, quiet: bool
) -> list[dict[str, Any]]:
    """The same of the steps of one replica: one for prompts and one for answers."""
    axes = replica_axes(candidate.mesh)
    mesh = make_mesh(axes, target_devices(where)[: math.prod(axes.values())])
    return _told(lambda: lowered_steps(config, mesh, candidate, workload), quiet)


def _told(lower: Callable[[], Any], quiet: bool) -> list[dict[str, Any]]:
    jax.clear_caches()  # what was traced before would not be selected for again
    with Console(stderr=True, quiet=quiet).status("tracing the programs of the best plan"), recorded() as found:
        lower()
    # Layouts are derived from a trace without a mesh, which runs nowhere.
    counted = collections.Counter(each for each in found if each.target.platform is not None)
    rows = [
        {"op": each.op, "call": each.call, "chosen": each.chosen, "times_traced": count}
        | {"declined": {choice.name: choice.reason for choice in each.declined}}
        for each, count in counted.items()
    ]
    if not quiet:
        Console(width=None if sys.stdout.isatty() else 180).print(_table(rows))
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="kernels of the best plan, as traced: equal layers are traced once")
    for heading in ("op", "call", "runs", "instead of"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        passed_over = "\n".join(f"{name}: {reason}" for name, reason in row["declined"].items())
        table.add_row(row["op"], row["call"], row["chosen"], passed_over)
    return table

"""Which implementation every kernel of a plan's programs takes, and why those before it declined.

The programs are traced and lowered for the devices of the plan, which need not be here, and not compiled.
"""

import collections
import math
from collections.abc import Iterable
from typing import Any

import jax
from rich.table import Table

from meshloom.core.ahead import target_devices
from meshloom.core.topology import Devices, make_mesh, mesh_text
from meshloom.models.config import DecoderConfig
from meshloom.pallas_kernels.dispatch import Selection, recorded
from meshloom.serve.plan import lowered_steps, replica_axes
from meshloom.sharding.planner import Candidate
from meshloom.sharding.serving import ServeCandidate
from meshloom.sharding.workload import ServeWorkload, TrainWorkload
from meshloom.train.config import TrainConfig


def kernels_of_training(
    config: DecoderConfig, where: Devices, candidate: Candidate, workload: TrainWorkload
) -> list[dict[str, Any]]:
    """The selections of a training step, as `meshloom plan --kernels --json` prints them.

    Raises:
        ConfigError: the compiler for the devices is not installed.
    """
    from meshloom.planning import lowered_step  # training steps are slow to import

    mesh = make_mesh(mesh_text(candidate.mesh) or "fsdp=1", target_devices(where))
    jax.clear_caches()  # what was traced before would not be selected for again
    with recorded() as found:
        lowered_step(config, mesh, candidate, workload, TrainConfig())
    return _rows("training step", found)


def kernels_of_serving(
    config: DecoderConfig, where: Devices, candidate: ServeCandidate, workload: ServeWorkload
) -> list[dict[str, Any]]:
    """The same of the steps of one replica: one for prompts and one for answers, which have the same kernels."""
    axes = replica_axes(candidate.mesh)
    mesh = make_mesh(axes, target_devices(where)[: math.prod(axes.values())])
    jax.clear_caches()
    with recorded() as found:
        lowered_steps(config, mesh, candidate, workload)
    return _rows("serving steps", found)


def kernels_table(rows: Iterable[dict[str, Any]]) -> Table:
    """For people: a line for each kind of call."""
    table = Table(title="kernels of the best plan, as traced: equal layers are traced once")
    for heading in ("op", "call", "runs", "instead of"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        passed_over = "\n".join(f"{name}: {reason}" for name, reason in row["declined"].items())
        table.add_row(row["op"], row["call"], row["chosen"], passed_over)
    return table


def _rows(program: str, found: Iterable[Selection]) -> list[dict[str, Any]]:
    # Layouts are derived from a trace without a mesh, which runs nowhere.
    counted = collections.Counter(each for each in found if each.target.platform is not None)
    return [
        {"program": program, "op": each.op, "call": each.call, "chosen": each.chosen, "times_traced": count}
        | {"declined": {choice.name: choice.reason for choice in each.declined}}
        for each, count in counted.items()
    ]

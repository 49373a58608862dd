"""Plans put to the test: the real training step of a candidate, compiled for devices that need not be here.

Searching is `sharding.planner`'s, the step is `train`'s, the compiler is the target's own. What this adds is the order:
compile the best few, rank them again by what the compiler says.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.program_report import OutOfMemoryError, compile_and_report
from meshloom.core.topology import Devices, make_mesh
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract_module
from meshloom.sharding import derive
from meshloom.sharding.charts import label
from meshloom.sharding.planner import Candidate
from meshloom.sharding.workload import TrainWorkload
from meshloom.train.config import TrainConfig
from meshloom.train.optimizer import make_optimizer, make_schedule
from meshloom.train.step import abstract_batch, abstract_weights, lower_step, make_step


def lowered_step(
    config: DecoderConfig, devices: Sequence[jax.Device], candidate: Candidate, workload: TrainWorkload
) -> jax.stages.Lowered:
    """The training step of a candidate, ready for the compiler of `devices`.

    Args:
        config: of the model; layers are scanned and recomputed as the candidate says.
    """
    module = abstract_module(
        dataclasses.replace(config, scan_layers=True, remat=cast(Any, candidate.remat)),
        jnp.float32,
    )
    run = TrainConfig()
    optimizer = make_optimizer(run, module)
    mesh = make_mesh(candidate.mesh, list(devices))
    layout = derive(module, mesh, jax.ShapeDtypeStruct((workload.rows, workload.sequence_length), jnp.int32))
    step = make_step(module, optimizer, make_schedule(run), dtype=jnp.dtype(workload.dtype), layout=layout)
    batch = abstract_batch(layout, accumulation=candidate.parts, rows=workload.rows, length=workload.sequence_length)
    return lower_step(step, abstract_weights(module, optimizer, layout), batch, layout)


def compile_candidate(
    config: DecoderConfig,
    where: Devices,
    devices: Sequence[jax.Device],
    candidate: Candidate,
    workload: TrainWorkload,
) -> Candidate:
    """The candidate with the compiler's figures, or with what it would need."""
    lowered = lowered_step(config, devices, candidate, workload)
    try:
        _, report = compile_and_report(lowered, candidate.mesh, compiler_options(where))
    except OutOfMemoryError as error:
        return dataclasses.replace(candidate, needed_bytes=error.needed_bytes)
    return dataclasses.replace(candidate, compiled=report, needed_bytes=None)


def compile_best(
    config: DecoderConfig,
    where: Devices,
    candidates: Sequence[Candidate],
    workload: TrainWorkload,
    wanted: int,
    console: Console,
) -> list[Candidate]:
    """The candidates, compiled in order until `wanted` of them fit; those that fit come first.

    Raises:
        ConfigError: there is no compiler for the devices here; the message says what to install.
    """
    devices = target_devices(where)
    done: list[Candidate] = []
    columns = SpinnerColumn(), TextColumn("compiling {task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=wanted)
        for candidate in candidates:
            progress.update(task, description=label(candidate))
            done.append(compile_candidate(config, where, devices, candidate, workload))
            found = sum(each.fits for each in done)
            progress.update(task, completed=found)
            if found == wanted:
                break
    return sorted([*done, *candidates[len(done) :]], key=lambda each: not each.fits)

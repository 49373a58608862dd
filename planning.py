"""Plans put to the test: the real steps of a candidate, compiled for devices that need not be here.

Searching is `sharding`'s, the steps are `train`'s and `serve`'s, the compiler is the target's own. What this adds is
the order: compile the best few, rank them again by what the compiler says, and hand on the program of the best.
"""

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.executable import Header, save_executable
from meshloom.core.program_report import OutOfMemoryError, compile_and_report
from meshloom.core.topology import Devices, make_mesh, mesh_text
from meshloom.models.config import DecoderConfig
from meshloom.models.source import abstract_module
from meshloom.serve.plan import lowered_steps, prefill_tokens, replica_axes
from meshloom.sharding import derive
from meshloom.sharding.charts import label, serving_label
from meshloom.sharding.explain import bytes_text
from meshloom.sharding.planner import Candidate
from meshloom.sharding.serving import ServeCandidate
from meshloom.sharding.workload import ServeWorkload, TrainWorkload
from meshloom.train.config import TrainConfig
from meshloom.train.optimizer import make_optimizer, make_schedule
from meshloom.train.plan import baked_settings
from meshloom.train.step import abstract_batch, abstract_weights, lower_step, make_step


@dataclasses.dataclass(frozen=True)
class StepProgram:
    """A training step for the devices of `mesh`: lowered, and compiled."""

    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    mesh: Mesh

    def save(self, path: pathlib.Path, run: TrainConfig) -> Header:
        """Writes it for `meshloom train --executable`; `run` is the configuration that it was made with."""
        return save_executable(path, self.compiled, self.lowered, self.mesh, baked_settings(run))


def lowered_step(
    config: DecoderConfig,
    mesh: Mesh,
    candidate: Candidate,
    workload: TrainWorkload,
    run: TrainConfig,
) -> jax.stages.Lowered:
    """The training step of a candidate, ready for the compiler of the mesh's devices: the one that a run would take.

    Args:
        config: of the model; layers are scanned and recomputed as the candidate says.
        run: learning rate, schedule and optimizer, which are constants of the program.
    """
    module = abstract_module(
        dataclasses.replace(config, scan_layers=True, remat=cast(Any, candidate.remat)),
        jnp.float32,
    )
    optimizer = make_optimizer(run, module)
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
    *,
    hasty: bool = False,
) -> Candidate:
    """The candidate with the compiler's figures, or with what it would need.

    Args:
        hasty: with few of the compiler's optimizations. A step of Llama-3-8B for v5e:4x4 (`fsdp=16`, `full`, 2 parts,
            131,072 tokens) takes libtpu 31 s so and 116 s in full, and 11.36 of a device's memory instead of 11.56 GiB.
    """
    options = compiler_options(where) | ({"optimization_level": "O1"} if hasty else {})
    return _compiled(config, devices, candidate, workload, TrainConfig(), options)[0]


def _compiled(
    config: DecoderConfig,
    devices: Sequence[jax.Device],
    candidate: Candidate,
    workload: TrainWorkload,
    run: TrainConfig,
    options: Mapping[str, bool | str | int],
) -> tuple[Candidate, StepProgram | None]:
    # As a run lays it out: axes of one device are not in its mesh, and would make another program.
    mesh = make_mesh(mesh_text(candidate.mesh) or "fsdp=1", list(devices))
    lowered = lowered_step(config, mesh, candidate, workload, run)
    try:
        compiled, report = compile_and_report(lowered, dict(mesh.shape), options)
    except OutOfMemoryError as error:
        return dataclasses.replace(candidate, needed_bytes=error.needed_bytes), None
    return dataclasses.replace(candidate, compiled=report, needed_bytes=None), StepProgram(lowered, compiled, mesh)


def compile_best(
    config: DecoderConfig,
    where: Devices,
    candidates: Sequence[Candidate],
    workload: TrainWorkload,
    wanted: int,
    console: Console,
    *,
    run: TrainConfig | None = None,
    keep: Callable[[StepProgram], Any] | None = None,
) -> list[Candidate]:
    """The candidates, compiled in order until `wanted` of them fit; those come first, by what was compiled.

    Args:
        run: as for `lowered_step`; the defaults, if None, move as many bytes as any other.
        keep: gets the program of the first that fits, as soon as it is compiled, and of each that turns out faster.
    Raises:
        ConfigError: there is no compiler for the devices here; the message says what to install.
    """
    devices = target_devices(where)
    fastest = math.inf

    def compile_one(candidate: Candidate) -> Candidate:
        nonlocal fastest
        options = compiler_options(where)
        after, program = _compiled(config, devices, candidate, workload, run or TrainConfig(), options)
        if program is not None and after.fits and _compiled_step(after) < fastest:
            fastest = _compiled_step(after)
            if keep is not None:
                keep(program)
        return after

    return _until_found(candidates, compile_one, label, _compiled_step, wanted, console)


def _compiled_step(candidate: Candidate) -> float:
    return math.inf if candidate.compiled_step_time_s is None else candidate.compiled_step_time_s


def compile_best_serving(
    config: DecoderConfig,
    where: Devices,
    candidates: Sequence[ServeCandidate],
    workload: ServeWorkload,
    wanted: int,
    console: Console,
) -> list[ServeCandidate]:
    """As `compile_best`, for serving: of each candidate the steps of one replica, on its share of the devices."""
    devices = target_devices(where)

    def compile_one(candidate: ServeCandidate) -> ServeCandidate:
        axes = replica_axes(candidate.mesh)
        mesh = make_mesh(axes, devices[: math.prod(axes.values())])
        reports = {}
        for name, lowered in lowered_steps(config, mesh, candidate, workload).items():
            try:
                _, reports[name] = compile_and_report(lowered, dict(mesh.shape), compiler_options(where))
            except OutOfMemoryError as error:
                return dataclasses.replace(candidate, needed_bytes=error.needed_bytes)
        tokens = prefill_tokens(workload.input_length)
        return dataclasses.replace(candidate, compiled=reports, compiled_tokens=tokens)

    return _until_found(candidates, compile_one, serving_label, lambda each: 0.0, wanted, console)


class CompileProgress:
    """What is being compiled and what came of it: a line of each, and a bar below them on a terminal."""

    def __init__(self, console: Console, what: str, total: int):
        """`what`: begins every line. `total`: what `count` reaches at most."""
        shown = SpinnerColumn(), TextColumn(f"{what}: compiling {{task.description}}"), BarColumn()
        self._console, self._what = console, what
        columns = *shown, MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "CompileProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def compiling(self, name: str) -> Iterator[Callable[[str], None]]:
        """Times what is done inside, which tells what came of it."""
        self._bar.update(self._task, description=name)
        start = time.perf_counter()
        outcome: list[str] = []
        yield outcome.append
        seconds = f"{time.perf_counter() - start:.0f} s"
        self._console.print(f"{self._what}: {name}: {', '.join([*outcome, seconds])}", highlight=False, soft_wrap=True)

    def count(self, done: int) -> None:
        """`done` of the total."""
        self._bar.update(self._task, completed=done)


def outcome_text(candidate: Candidate | ServeCandidate) -> str:
    """`fits, 11.6 GiB of 16 GiB per device`: what the compiler said of a candidate's memory."""
    memory = candidate.compiled_bytes
    assert memory is not None  # it was compiled
    verdict = "fits" if candidate.fits else "does not fit"
    return f"{verdict}, {bytes_text(memory)} of {bytes_text(candidate.hbm_bytes)} per device"


def _until_found[T: (Candidate, ServeCandidate)](
    candidates: Sequence[T],
    compile_one: Callable[[T], T],
    name: Callable[[T], str],
    rank: Callable[[T], float],
    wanted: int,
    console: Console,
) -> list[T]:
    """The candidates, compiled in order until `wanted` of them fit; those that fit first, and of these the compiled."""
    done: list[T] = []
    with CompileProgress(console, "plan", wanted) as progress:
        for candidate in candidates:
            with progress.compiling(name(candidate)) as tell:
                done.append(compile_one(candidate))
                tell(outcome_text(done[-1]))
            found = sum(each.fits for each in done)
            progress.count(found)
            if found == wanted:
                break
    done.sort(key=rank)
    done += candidates[len(done) :]
    return sorted(done, key=lambda each: not each.fits)

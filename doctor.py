"""What is wrong with a training plan that does not fit, and the cheapest changes that make it fit, each compiled.

The largest arrays are read from the compiled program itself: the one that is too large where its compiler still gives
one (GPU), else the same step compiled for chips with more memory. A change counts only if the devices' own compiler
says that it fits.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from meshloom.core.ahead import compiler_missing, target_devices
from meshloom.core.buffers import Buffer, largest_buffers
from meshloom.core.hardware import CHIPS
from meshloom.core.topology import Devices, mesh_text
from meshloom.models.config import DecoderConfig
from meshloom.planning import CompileProgress, compile_candidate, outcome_text
from meshloom.sharding.charts import label
from meshloom.sharding.explain import bytes_text
from meshloom.sharding.planner import Candidate
from meshloom.sharding.workload import TrainWorkload

# TPUs whose programs are compiled for this one to look inside: the most memory, and slices of any small size.
_ROOMY = "v5p"
# Compiles of changes that keep the mesh, and as many of others: one of Llama-3-8B takes libtpu two minutes.
_ATTEMPTS = 2


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change and the plan that it makes, compiled and fitting."""

    change: str
    candidate: Candidate


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Why a candidate does not fit.

    Attributes:
        buffers: the largest temporaries at the peak, empty where no compiler gave the program.
        compiled_for: the chip of that program, and how many of the rows, where it had to be fewer.
        remedies: by predicted step time, fastest first; empty where nothing was found to fit.
        least_devices: of this kind, that could hold weights, gradients and optimizer state as the rules split them.
    """

    candidate: Candidate
    buffers: tuple[Buffer, ...]
    compiled_for: str | None
    remedies: tuple[Remedy, ...]
    least_devices: int

    def to_json(self) -> dict[str, Any]:
        """The entry `doctor` of `meshloom plan --json`."""
        return {
            "mesh": dict(self.candidate.mesh),
            "compiled_for": self.compiled_for,
            "largest_buffers": [dataclasses.asdict(each) for each in self.buffers],
            "remedies": [{"change": each.change} | each.candidate.to_json() for each in self.remedies],
            "least_devices": self.least_devices,
        }

    def tables(self) -> Iterator[Table]:
        """For people: what fills the memory, and what helps."""
        if self.buffers:
            table = Table(
                title=f"largest arrays at the peak of {label(self.candidate)}, compiled for {self.compiled_for}"
            )
            table.add_column("size", justify="right")
            for heading in ("shape", "module", "source"):
                table.add_column(heading)
            for each in self.buffers:
                line = "/".join(pathlib.PurePath(each.source).parts[-3:])
                table.add_row(bytes_text(each.bytes), each.shape, each.operation, line)
            yield table
        if not self.remedies:
            table = Table("no change on these devices was found to fit")
            table.add_row(self._advice())
            yield table
            return
        table = Table(title="changes that make it fit, each compiled")
        for heading in ("change", "step", "against now", "compiled memory"):
            table.add_column(heading, justify="left" if heading == "change" else "right")
        for remedy in self.remedies:
            after = remedy.candidate
            assert after.compiled is not None  # only what was compiled is a remedy
            slower = f"{after.step_time_s / self.candidate.step_time_s - 1:+.0%}"
            memory = f"{bytes_text(after.compiled.peak_bytes)} of {bytes_text(after.hbm_bytes)}"
            table.add_row(remedy.change, f"{after.step_time_s:.3g} s", slower, memory)
        yield table

    def _advice(self) -> str:
        here = math.prod(self.candidate.mesh.values())
        if self.least_devices > here:
            return (
                f"weights, gradients and optimizer state alone fill {self.least_devices} of them, and there are "
                f"{here}; plan for more devices, or for some with more memory"
            )
        return "activations take the rest; plan for shorter rows, or for more devices"


def diagnose(
    config: DecoderConfig,
    where: Devices,
    candidate: Candidate,
    others: Sequence[Candidate],
    workload: TrainWorkload,
    console: Console,
) -> Diagnosis:
    """Looks into a candidate that was compiled and does not fit, and tries what would help.

    Args:
        others: everything that the planner priced for the same workload and devices.
    """
    changes = 2 * _ATTEMPTS
    plan = f"doctor: {label(candidate)} does not fit; at most {changes} changes are compiled, and told as they end"
    console.print(plan, highlight=False, soft_wrap=True)
    with CompileProgress(console, "doctor", changes) as progress:
        buffers, chip = _inside(config, where, candidate, workload, progress)
        remedies = _remedies(config, where, candidate, others, workload, progress)
    count = math.prod(candidate.mesh.values())
    state = min(each.memory.weights + each.memory.gradients + each.memory.optimizer for each in others)
    return Diagnosis(candidate, buffers, chip, tuple(remedies), math.ceil(state * count / candidate.hbm_bytes))


def _inside(
    config: DecoderConfig,
    where: Devices,
    candidate: Candidate,
    workload: TrainWorkload,
    progress: CompileProgress,
) -> tuple[tuple[Buffer, ...], str | None]:
    """The largest arrays, and the chip whose compiler showed them."""
    if candidate.compiled is not None:
        return largest_buffers(candidate.compiled.module), where.platform
    roomy = _roomier(where)
    if roomy is None:
        return (), None
    devices = target_devices(roomy)
    # Rows fill memory in proportion: where even that chip has too little, fewer of them show the same arrays.
    for share in (each for each in (1, 2, 4, 8, 16) if candidate.microbatch % each == 0):
        part = dataclasses.replace(candidate, microbatch=candidate.microbatch // share)
        fewer = dataclasses.replace(workload, batch_tokens=workload.batch_tokens // share)
        with progress.compiling(f"{label(part)} for {roomy.platform}, to look inside") as tell:
            again = compile_candidate(config, roomy, devices, part, fewer, hasty=True)
            tell("too large there too" if again.compiled is None else bytes_text(again.compiled.peak_bytes))
        if again.compiled is not None:
            rows = f", {part.microbatch} of {candidate.microbatch} row(s) per device" if share > 1 else ""
            return largest_buffers(again.compiled.module), f"{roomy.platform}{rows}"
    return (), None


def _roomier(where: Devices) -> Devices | None:
    """As many devices with more memory, of the same kind of compiler."""
    chip, roomy = CHIPS.get(where.platform), CHIPS[_ROOMY]
    if chip is None or chip.node_devices is not None or chip.hbm_bytes >= roomy.hbm_bytes or chip.devices_per_chip > 1:
        return None
    devices = Devices(_ROOMY, (*where.shape, 1)[:3], where.slices)
    return devices if compiler_missing(devices) is None else None


def _remedies(
    config: DecoderConfig,
    where: Devices,
    candidate: Candidate,
    others: Sequence[Candidate],
    workload: TrainWorkload,
    progress: CompileProgress,
) -> list[Remedy]:
    """The fastest change that keeps the mesh, and one of the mesh where that is faster still; by step time."""
    devices = target_devices(where)
    by_time = sorted((each for each in others if each.fits), key=lambda each: each.step_time_s)
    overrun, fastest = _overrun(candidate), math.inf
    tried: list[Candidate] = []
    found: list[Remedy] = []
    for same_mesh in (True, False):
        for _ in range(_ATTEMPTS):
            left = [each for each in by_time if each.step_time_s < fastest and each not in tried]
            attempt = _likely([each for each in left if each.mesh == candidate.mesh or not same_mesh], overrun)
            if attempt is None:
                break
            tried.append(attempt)
            with progress.compiling(_change(candidate, attempt)) as tell:
                after = compile_candidate(config, where, devices, attempt, workload)
                tell(outcome_text(after))
            progress.count(len(tried))
            if after.fits:
                found.append(Remedy(_change(candidate, attempt), after))
                fastest = after.step_time_s
                break
            overrun = max(overrun, _overrun(after))
    return sorted(found, key=lambda each: each.candidate.step_time_s)


def _overrun(candidate: Candidate) -> float:
    """How many times the memory that was predicted the compiler asked for."""
    return (candidate.compiled_bytes or 0) / candidate.memory.total


def _likely(by_time: Sequence[Candidate], overrun: float) -> Candidate | None:
    """The fastest that fits if its memory is underestimated as that of another was; else the smallest."""
    smallest = min(by_time, key=lambda each: each.memory.total, default=None)
    return next((each for each in by_time if each.memory.total * overrun <= each.hbm_bytes), smallest)


def _change(before: Candidate, after: Candidate) -> str:
    """`remat full, 16 parts`: what differs."""
    words = []
    if before.mesh != after.mesh:
        words.append(mesh_text(after.mesh))
    if before.remat != after.remat:
        words.append(f"remat {after.remat}")
    if before.parts != after.parts:
        words.append(f"{after.parts} part(s) of {after.microbatch} row(s) per device")
    return ", ".join(words)

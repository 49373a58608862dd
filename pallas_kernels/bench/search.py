"""A search for the block sizes of a kernel: every candidate is compiled and judged, and the best is kept.

A judge says what a program takes: `Schedules` by the compiler's schedule for a chip that need not be there, `Clock` by
running it on the device at hand. The kernels' own rule is judged like any candidate.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from meshloom.core.bundles import Region, kernel_regions
from meshloom.core.compile import without_compilation_cache
from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.bench.figures import Cost, compile_for
from meshloom.pallas_kernels.tuning import Sizes, overlay

# What an entry of a file must gain, since figures of schedules are no better than that.
LEAST_GAIN = 1.01
LONGEST = 2


@dataclasses.dataclass(frozen=True)
class Program:
    """A call of a kernel, to be compiled with one candidate after another.

    Attributes:
        op: of `tuning.SIZES`; the kernel's name as well.
        function, arguments: what is compiled; the latter makes the arrays.
        own: sizes by the kernel's own rule.
        candidates: other sizes.
        costs: by key (`tuning.key_of`), each call that runs the same instructions: its cost by their schedule, or None
            where it has no use for such sizes. The first is that of `arguments`.
    """

    op: str
    label: str
    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    own: Sizes
    candidates: Sequence[Sizes]
    costs: Mapping[str, Callable[[list[Region], Sizes], Cost | None]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found for one call.

    Attributes:
        own_seconds, seconds: of the kernel's own rule, and of `sizes`, which are the best.
        tried: candidates that were judged. refused: how many were not, by reason.
    """

    op: str
    call: str
    own: Sizes
    own_seconds: float
    sizes: Sizes
    seconds: float
    tried: int
    refused: dict[str, int]

    @property
    def gain(self) -> float:
        """How many times as fast as the kernel's own rule."""
        return self.own_seconds / self.seconds


# Seconds of each call of a program with these sizes, None being those of the kernel's own rule. Raises MeshloomError
# where the kernel cannot have them, JaxRuntimeError where they do not compile.
Judge = Callable[[Program, Sizes | None], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """By the compiler's schedules (`core.bundles.dump_bundles`), which it leaves in `folder`.

    No schedule tells how long instructions take to arrive. Sizes that make more than `LONGEST` times the instructions
    of the kernel's own rule are therefore refused, however few of them run.
    """

    mesh: Any
    folder: pathlib.Path
    chip: str
    _lengths: dict[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, program: Program, sizes: Sizes | None) -> dict[str, float]:
        placed = jax.NamedSharding(self.mesh, jax.P())
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), jax.eval_shape(program.arguments)
        )
        with overlay(program.op, sizes):
            compile_for(self.mesh, program.function, *arguments)
        regions = kernel_regions(self.folder, program.op)
        for path in self.folder.iterdir():
            path.unlink()
        length = sum(region.bundles for region in regions)
        if sizes is None:
            self._lengths[program.label] = length
        elif length > LONGEST * self._lengths[program.label]:
            raise MeshloomError(f"too long: {length:,} instructions")
        costs = {key: cost(regions, sizes or program.own) for key, cost in program.costs.items()}
        return {key: cost.seconds(self.chip) for key, cost in costs.items() if cost is not None}


@dataclasses.dataclass(frozen=True)
class Clock:
    """By time on the device of `mesh`; of every program the call of its own arguments alone."""

    mesh: Any
    runs: int = 5
    calls: int = 10

    def __call__(self, program: Program, sizes: Sizes | None) -> dict[str, float]:
        with jax.set_mesh(self.mesh), without_compilation_cache():
            arguments = program.arguments()
            with overlay(program.op, sizes):
                call = jax.jit(program.function).lower(*arguments).compile()
            jax.block_until_ready(call(*arguments))
            best = float("inf")
            for _ in range(self.runs):
                start = time.perf_counter()
                jax.block_until_ready([call(*arguments) for _ in range(self.calls)])
                best = min(best, (time.perf_counter() - start) / self.calls)
        return {next(iter(program.costs)): best}


def trials(programs: Sequence[Program]) -> int:
    """How many programs a search compiles."""
    return sum(1 + len(program.candidates) for program in programs)


def search(programs: Sequence[Program], judge: Judge, tried: Callable[[str], None]) -> Iterator[Result]:
    """The best sizes of every call; `tried` hears of every candidate when it has been judged.

    Of equals the kernel's own rule wins, then the first candidate.
    """
    for program in programs:
        own = judge(program, None)
        tried(program.label)
        best = {call: (program.own, seconds) for call, seconds in own.items()}
        judged = dict.fromkeys(own, 0)
        refused: dict[str, int] = {}
        for sizes in program.candidates:
            try:
                found = judge(program, sizes)
            except (MeshloomError, jax.errors.JaxRuntimeError) as error:
                reason = _reason(error)
                refused[reason] = refused.get(reason, 0) + 1
                found = {}
            for call, seconds in found.items():
                judged[call] += 1
                if seconds < best[call][1]:
                    best[call] = sizes, seconds
            tried(program.label)
        for call, (sizes, seconds) in best.items():
            yield Result(program.op, call, program.own, own[call], sizes, seconds, judged[call], refused)


def _reason(error: Exception) -> str:
    """In few words."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "vmem" in text.lower():
        return "no room"
    if isinstance(error, MeshloomError):
        return "too long" if text.startswith("too long") else "not legal"
    return "does not compile"

"""What the compiler says of a program: memory of one device, collectives by kind and axis, time to compile.

Bytes of a collective are those of its result on one device, times the trips of the loops around it. That is the
convention of the cost model, so that predicted and compiled stand side by side. Collectives that XLA takes apart count
as what they were; a CPU's compiler knows no reduce-scatter and makes it an all-reduce and a slice, which stays one.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from meshloom.core.compile import without_compilation_cache
from meshloom.core.errors import MeshloomError
from meshloom.core.hlo import Computation, Instruction, Module, parse

_KINDS = {
    "all-gather": "all_gather",
    "all-reduce": "all_reduce",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "collective_permute",
}


class OutOfMemoryError(MeshloomError):
    """The compiler refused a program that does not fit. `needed_bytes`, `available_bytes`: of one device."""

    def __init__(self, message: str, needed_bytes: int, available_bytes: int):
        super().__init__(message)
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same axes.

    Attributes:
        count: how many run in a step. bytes: of their results on one device. sent: what one device sends for them on
            rings, which compares programs that do the same by other kinds (XLA makes loops of permutes of some).
    """

    kind: str
    axes: tuple[str, ...]
    count: float
    bytes: float
    sent: float


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """A compiled program on one device.

    Attributes:
        temporary_bytes: all that is allocated beside arguments and results.
        peak_bytes: what must fit: arguments, results that are not written over them, and temporaries.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    peak_bytes: int
    collectives: tuple[Collective, ...]
    compile_seconds: float
    module: Module = dataclasses.field(repr=False)

    @property
    def bytes_by_kind(self) -> dict[str, float]:
        """Collective kind -> bytes of results per device and run."""
        totals: dict[str, float] = {}
        for each in self.collectives:
            totals[each.kind] = totals.get(each.kind, 0.0) + each.bytes
        return totals

    @property
    def sent_bytes(self) -> float:
        """What one device sends in a run, over all links."""
        return sum((each.sent for each in self.collectives), 0.0)


def compile_and_report(
    lowered: jax.stages.Lowered, mesh: Mapping[str, int], options: Mapping[str, Any] | None = None
) -> tuple[jax.stages.Compiled, ProgramReport]:
    """Compiles, never from the persistent cache, and reads what came of it.

    Args:
        mesh: axis -> size, in the order of the mesh's devices.
        options: for the compiler.
    Raises:
        OutOfMemoryError: the compiler says that it does not fit; TPU's does, the others do not.
    """
    start = time.perf_counter()
    try:
        with without_compilation_cache():
            compiled = lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        raise _out_of_memory(error) or error from error
    return compiled, report(compiled, mesh, time.perf_counter() - start)


def report(compiled: jax.stages.Compiled, mesh: Mapping[str, int], compile_seconds: float | int = 0.0) -> ProgramReport:
    """Reads a compiled program; `mesh` as for `compile_and_report`.

    Raises:
        MeshloomError: the backend does not say what its program takes.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise MeshloomError("this backend's compiler says nothing of memory and collectives")
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # Not `temp_size_in_bytes`: libtpu counts space there that temporaries share. It said 12.5 GiB beside 5.6 GiB of
    # arguments of a step of Llama-3-8B that it compiled for the 15.75 GiB of a v5e, and allocates 14.6.
    allocated = memory.total_allocation_bytes
    return ProgramReport(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        allocated - held,
        allocated,
        collectives(module := parse(text), mesh),
        float(compile_seconds),
        module,
    )


def collectives(module: Module, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """Every collective that runs, summed by kind and axes."""
    found: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for computation, times, _ in module.visits():
        if _goes_on(computation):
            continue
        for each in computation.instructions:
            kind = _KINDS.get(each.opcode.removesuffix("-start"))
            if kind is None:
                continue
            axes = axes_of(each, mesh)
            ways = math.prod(mesh[axis] for axis in axes)
            kind, count, amount = _meant(computation, kind, _result_bytes(each), ways)
            total = found.setdefault((kind, axes), [0.0, 0.0, 0.0])
            for index, more in enumerate((count, amount, sent(kind, amount, ways))):
                total[index] += times * more
    return tuple(Collective(*key, *amounts) for key, amounts in sorted(found.items()))


def sent(kind: str, result_bytes: float | int, ways: int) -> float:
    """Bytes that each of `ways` devices sends on a ring for a collective whose result has `result_bytes` on each."""
    share = (ways - 1) / ways
    match kind:
        case "reduce_scatter":
            return (ways - 1) * result_bytes
        case "all_reduce":
            return 2 * share * result_bytes
        case "collective_permute":
            return float(result_bytes)
    return share * result_bytes


def _meant(computation: Computation, kind: str, amount: float | int, ways: int) -> tuple[str, float, float]:
    """Kind, count and result bytes of a collective as the program had it before XLA took it apart.

    TPU's all-reduce-scatter is an all-reduce of which the computation keeps a part. A gather or scatter at a product
    may become a loop that multiplies one shard while it permutes the next: one permute is a part of `ways - 1`.
    """
    if "all-reduce-scatter" in computation.name:
        return "reduce_scatter", 1.0, float(computation.root.bytes)
    if kind == "collective_permute" and "windowed_dot_general_body_ag" in computation.name:
        return "all_gather", 1 / (ways - 1), amount * ways / (ways - 1)
    if kind == "collective_permute" and "windowed_dot_general_body_rs" in computation.name:
        return "reduce_scatter", 1 / (ways - 1), amount / (ways - 1)
    return kind, 1.0, float(amount)


def _goes_on(computation: Computation) -> bool:
    """Whether it is a later piece of a collective that TPU's compiler spread over several fusions."""
    done = any('custom_call_target="AsyncCollectiveDone"' in each.attributes for each in computation.instructions)
    return done or computation.name.startswith("async_collective_fusion")


def _result_bytes(instruction: Instruction) -> int:
    """Bytes of the results; what starts an asynchronous one may carry its operands in front of them."""
    shapes, count = instruction.shapes, len(instruction.operands)
    if instruction.opcode.endswith("-start") and len(shapes) >= 2 * count:
        shapes = shapes[count : 2 * count]
    return sum(shape.bytes for shape in shapes)


def axes_of(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of one group of a collective differ."""
    group = _first_group(instruction.attributes, int(np.prod(list(mesh.values()))))
    if len(group) < 2:
        return ()
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if len(set(along)) > 1)


def _first_group(attributes: str, devices: int) -> list[int]:
    """Devices that take part together: of `replica_groups` in any of its forms, or of `source_target_pairs`."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return [int(device) for device in match[1].split(",") if device]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, sizes, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
        places = np.arange(devices).reshape(sizes)
        return (places.transpose(order) if order else places).reshape(groups)[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=[^ ]*)? \{([^}]*)\}", attributes):
        return _along_axes(match[1], match[2])
    return list(range(devices))  # replica_groups={}: all


def _along_axes(mesh: str, axes: str) -> list[int]:
    """Group of device 0 in `'a'=2,'b'=4` over `'a','b':(1)2`: part of axis b, after 1 of its factors, of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    group = [0]
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        ways = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * ways) if size else 1)
        group = [device + place * step for device in group for place in range(ways)]
    return group


def _out_of_memory(error: jax.errors.JaxRuntimeError) -> OutOfMemoryError | None:
    """TPU's "temporaries (16.21G) exceeds available HBM (15.75G)" as an error with both sizes."""
    match = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error))
    match = match or re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
        return None
    needed, available = (_size(*match.groups()[i : i + 2]) for i in (0, 2))
    return OutOfMemoryError(
        f"the compiler needs {needed / 2**30:.1f} GiB of memory on each device, which has {available / 2**30:.1f} GiB",
        needed,
        available,
    )


def _size(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))

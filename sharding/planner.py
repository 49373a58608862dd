"""Which mesh, remat policy and micro-batch train a model fastest on given devices: a search without compiling.

A module is traced once per remat policy. Each mesh is then derived by the two rules and priced by arithmetic, so that
all meshes times all micro-batches are tried. What comes out is a guess until it is compiled, and labelled so by whoever
prints it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.hardware import Chip, chip_named
from meshloom.core.program_report import ProgramReport
from meshloom.core.topology import AXES, BATCH_AXES, Devices, abstract_mesh
from meshloom.sharding.cost import (
    Breakdown,
    CollectiveCost,
    Memory,
    Pricer,
    Split,
    elements,
    gathered_elements,
    in_blocks,
    layer_elements,
    merged,
    repeated,
    split_of,
)
from meshloom.sharding.layout import Row
from meshloom.sharding.roles import Roles
from meshloom.sharding.rules import decide
from meshloom.sharding.trace import Program
from meshloom.sharding.training_step import in_dtype
from meshloom.sharding.values import Lookup, Product
from meshloom.sharding.work import ROWS, Work, forward_work, training_work
from meshloom.sharding.workload import TrainWorkload

REMAT = ("none", "dots", "full")
# The compiler's own buffers, padding and fragmentation: a plan fits if it leaves this share of memory free.
RESERVE = 0.08
# Of what a layer's backward pass reads, the share that stands at one time: XLA frees the rest before the last of it is
# made. Fitted to Llama-3-8B on 16 and 64 v5e and 8 H100, which it then exceeds by 4 to 13 % in all.
LAYER_SHARE = 0.6
# Tokens of a row that a device must be left: with fewer, the ring waits for its keys. v5e, whose links are the slowest
# for its products, needs 4,400 over the number of query heads to a kv head.
LEAST_TOKENS = 1024
# What a loss without logits holds at a time: 2**25 float32 logits with their gradient in half the bytes, and as much
# again for each of three blocks of the unembedding: the one in use, the next one and a gradient.
LOSS_BYTES = 4.5 * 2**27


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train: predicted, and what the compiler for its devices made of it, once that was asked.

    Attributes:
        microbatch: rows per device and part; `parts` of them make the batch.
        mfu: useful FLOPs (three times the forward pass) over what all devices could do in the step.
        pricer: what priced it.
        compiled: the compiler's figures. needed_bytes: what it asks for on each device, where it refuses for that.
    """

    mesh: dict[str, int]
    remat: str
    microbatch: int
    parts: int
    step_time_s: float
    mfu: float
    memory: Memory
    hbm_bytes: int
    breakdown: Breakdown
    pricer: Pricer = dataclasses.field(repr=False)
    compiled: ProgramReport | None = None
    needed_bytes: int | None = None

    @property
    def memory_per_device_bytes(self) -> int:
        return round(self.memory.total)

    @property
    def compiled_bytes(self) -> int | None:
        """Memory per device as the compiler says, of a program that it refused as well."""
        return self.needed_bytes if self.compiled is None else self.compiled.peak_bytes

    @functools.cached_property
    def compiled_step_time_s(self) -> float | None:
        """The step with the collectives that are in the compiled program in place of the predicted ones."""
        if self.compiled is None:
            return None
        moved = self.pricer.of_program(self.compiled.collectives)
        update = self.breakdown.optimizer_s * self.pricer.chip.hbm_bandwidth
        return self.pricer.breakdown(self.breakdown.groups, moved, update).step_s

    @property
    def fits(self) -> bool:
        """What the compiler says, or before that the prediction with a reserve."""
        if self.compiled is not None:
            return self.compiled.peak_bytes <= self.hbm_bytes
        return self.needed_bytes is None and self.memory.total <= self.hbm_bytes * (1 - RESERVE)

    @property
    def leaves_islands(self) -> bool:
        """Whether weights or partial sums cross the line between islands: only gradients over `data` should."""
        return any(each.level == "line" and each.axis != "data" for each in self.breakdown.collectives)

    def to_json(self) -> dict[str, Any]:
        """The candidate's entry in `meshloom plan --json`; compiled figures are None until they are known."""
        predicted = self.breakdown.bytes_by_kind
        actual = {} if self.compiled is None else self.compiled.bytes_by_kind
        return {
            "mesh": dict(self.mesh),
            "remat": self.remat,
            "microbatch": self.microbatch,
            "parts": self.parts,
            "step_time_s": self.step_time_s,
            "compiled_step_time_s": self.compiled_step_time_s,
            "mfu": self.mfu,
            "memory_per_device_bytes": self.memory_per_device_bytes,
            "compiled_memory_per_device_bytes": self.compiled_bytes,
            "compile_seconds": None if self.compiled is None else self.compiled.compile_seconds,
            "hbm_bytes": self.hbm_bytes,
            "fits": self.fits,
            "collectives": {
                kind: {
                    "predicted_bytes": round(predicted.get(kind, 0)),
                    "compiled_bytes": None if self.compiled is None else round(actual.get(kind, 0)),
                }
                for kind in predicted | actual
            },
        }


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model as the planner knows it: its forward pass, and one training step per remat policy.

    Attributes:
        makes_logits: all at once; a module that has an `unembedding` leaves them to the loss, which makes few.
    """

    forward: Work
    program: Program
    roles: Roles
    steps: Mapping[str, Work]
    makes_logits: bool

    @functools.cached_property
    def tables(self) -> frozenset[int]:
        """Parameters that are looked up and never multiplied with."""
        uses = [(step.fact, value) for step in self.program.steps for value in step.inputs]
        looked_up = {index for fact, value in uses if isinstance(fact, Lookup) for index in value.parameters}
        return frozenset(looked_up - {i for fact, value in uses if isinstance(fact, Product) for i in value.parameters})

    @property
    def has_experts(self) -> bool:
        return "expert" in self.roles.by_leaf.values()


def trace_model(
    module_of: Callable[[str], nnx.Module], workload: TrainWorkload, remats: Sequence[str] = REMAT
) -> Traced:
    """Traces each policy once. `module_of(remat)` makes the abstract module, called with tokens `[rows, length]`."""
    inputs = (jax.ShapeDtypeStruct((ROWS, workload.sequence_length), jnp.int32),)
    module = in_dtype(module_of("none"), workload.dtype)
    plain, program, roles = forward_work(module, inputs)
    # What one layer keeps without remat is what its backward holds, so that "none" is always needed.
    works = {
        remat: training_work(in_dtype(module_of(remat), workload.dtype), inputs, program, roles)
        for remat in dict.fromkeys(("none", *remats))
    }
    return Traced(plain, program, roles, works, not hasattr(module, "unembedding"))


def meshes(count: int, *, experts: bool, length: int = 0) -> Iterator[dict[str, int]]:
    """Every mesh of `count` devices over data, fsdp, tensor, expert if there are any, and context if rows are long.

    Args:
        length: tokens of a row; a device of a ring has two chunks of at least half of LEAST_TOKENS.
    """
    for tensor in _divisors(count):
        for expert in _divisors(count // tensor) if experts else (1,):
            for context in _divisors(left := count // tensor // expert):
                if context > 1 and (length % (2 * context) or length < context * LEAST_TOKENS):
                    continue
                for fsdp in _divisors(left // context):
                    sizes = (left // context // fsdp, fsdp, expert, context, tensor)
                    yield dict(zip(AXES, sizes, strict=True))


def plan_training(
    module_of: Callable[[str], nnx.Module],
    devices: Devices,
    workload: TrainWorkload,
    *,
    chip: Chip | None = None,
    mesh: str | dict[str, int] | None = None,
    remats: Sequence[str] = REMAT,
    limit: int = 20,
) -> list[Candidate]:
    """The best candidates, best first: of what fits the fastest, after that the smallest.

    Those that leave only `data` to a line between islands come before those that do not, whatever their times: its
    latency is assumed, and counted once for each gradient, which XLA may join.

    Args:
        module_of: remat policy -> abstract module; scan its layers, or tracing takes as long as there are layers.
        chip: other figures than the table's, e.g. for a CPU.
        mesh: only this one, as `core.topology.make_mesh` takes it.
        limit: how many to return at most.
    Raises:
        ConfigError: the chip is unknown. ShardingError: no mesh takes the batch; the message says which would.
    """
    if devices.count < 1 or (devices.platform == "cpu" and chip is None):
        raise ShardingError(
            f'a training plan is for devices of the hardware table, such as "v5p:4x4x4" or "h100:8"; '
            f"got {devices.platform!r}"
        )
    if limit < 1:
        raise ConfigError(f"at least 1 plan must be asked for; got {limit}")
    chip = chip or chip_named(devices.platform)
    given = None if mesh is None else dict(abstract_mesh(mesh, devices.count).shape)
    traced = trace_model(module_of, workload, remats)
    every = meshes(devices.count, experts=traced.has_experts, length=workload.sequence_length)
    tried = every if given is None else [given]
    found = [candidate for sizes in tried for candidate in price_mesh(traced, devices, chip, sizes, workload, remats)]
    if not found:
        raise ShardingError(_no_mesh(devices, workload, given))
    found.sort(key=_rank)
    return found[:limit]


def _rank(each: Candidate) -> tuple[bool, bool, float]:
    return (False, each.leaves_islands, each.step_time_s) if each.fits else (True, False, each.memory.total)


def price_mesh(
    traced: Traced,
    devices: Devices,
    chip: Chip,
    mesh: dict[str, int],
    workload: TrainWorkload,
    remats: Sequence[str],
) -> Iterator[Candidate]:
    """All remat policies and micro-batches on one mesh; none if its axes do not take the batch or split nothing."""
    ways = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
    if workload.rows % ways or workload.sequence_length % mesh.get("context", 1):
        return
    rules, _ = decide(traced.program, traced.roles, mesh)
    paired = {axis for row in rules for axis in row.paired}
    if any(mesh.get(axis, 1) > 1 and axis not in paired for axis in ("tensor", "expert")):
        return
    pricer = Pricer(chip, devices, mesh, workload.dtype)
    held = _Held.of(pricer, rules, traced.tables)
    none_split = split_of(traced.steps["none"], rules, mesh)
    forward_split = split_of(traced.forward, rules, mesh)
    useful = 3 * traced.forward.total_flops / traced.forward.rows * workload.rows
    peak = chip.flops[workload.dtype] * devices.count
    for remat in remats:
        work = traced.steps[remat]
        splits = split_of(work, rules, mesh), none_split, forward_split
        for microbatch in _divisors(workload.rows // ways):
            parts = workload.rows // ways // microbatch
            memory = _memory(traced, work, held, splits, mesh, workload, microbatch, parts)
            passes = 1 if remat == "none" else 2
            breakdown = _step(pricer, traced, work, held, splits, workload, microbatch, parts, passes)
            yield Candidate(
                mesh,
                remat,
                microbatch,
                parts,
                breakdown.step_s,
                useful / peak / breakdown.step_s,
                memory,
                chip.hbm_bytes,
                breakdown,
                pricer,
            )


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a mesh makes of the weights, whatever the micro-batch.

    Attributes:
        elements: on one device. gathered: that stand gathered at once. whole: of the largest layer of one, gathered.
        moved: in one part, without lookups.
    """

    rules: Sequence[Row]
    elements: float
    gathered: float
    whole: float
    moved: tuple[CollectiveCost, ...]

    @classmethod
    def of(cls, pricer: Pricer, rules: Sequence[Row], tables: Collection[int]) -> "_Held":
        whole = (layer_elements(row, pricer.mesh) for row in rules if not in_blocks(row))
        return cls(
            rules,
            sum(elements(row) for row in rules),
            sum(gathered_elements(row, pricer.mesh) for row in rules),
            max(whole, default=0.0),
            merged(pricer.weights_and_gradients(rules, tables)),
        )


def _step(
    pricer: Pricer,
    traced: Traced,
    work: Work,
    held: _Held,
    splits: tuple[Split, Split, Split],
    workload: TrainWorkload,
    microbatch: int,
    parts: int,
    passes: int,
) -> Breakdown:
    split, _, forward_split = splits
    rows = microbatch / pricer.mesh.get("context", 1)
    moved = pricer.partial_sums(work, split, rows, parts)
    moved += pricer.rings(traced.forward, forward_split, microbatch, parts, passes)
    reductions, tokens = parts if workload.reduce_every_part else 1, rows * workload.sequence_length
    moved += repeated(held.moved, parts, reductions)
    moved += pricer.lookups(held.rules, traced.tables, tokens, parts)
    # The update reads parameters, gradients and state, and writes parameters and state.
    each = 2 * workload.parameter_bytes + 2 * workload.optimizer_bytes_per_parameter + workload.gradient_bytes
    update = each * held.elements
    return pricer.breakdown(pricer.groups(work, split, rows, parts), moved, update)


def _memory(
    traced: Traced,
    work: Work,
    held: _Held,
    splits: tuple[Split, Split, Split],
    mesh: Mapping[str, int],
    workload: TrainWorkload,
    microbatch: int,
    parts: int,
) -> Memory:
    split, none_split, forward_split = splits
    item = np.dtype(workload.dtype).itemsize
    rows = microbatch / mesh.get("context", 1)
    scale = rows / work.rows
    saved = sum((split.share(each.bytes, each.dims, each.over) for each in work.saved), 0.0)
    # Backward through one layer holds what that layer would save without remat.
    layer = sum(
        none_split.share(each.bytes, each.dims, each.over) / each.layers
        for each in traced.steps["none"].saved
        if each.layers > 1
    )
    # Gradients in the computation's dtype stand beside those of earlier parts that they are added to. Those of one part
    # are converted as the optimizer reads them.
    gradient = item + (workload.gradient_bytes if parts > 1 else 0)
    copy = item if item < workload.parameter_bytes else 0
    # Logits and their gradient.
    loss = 2 * sum(forward_split.share(each.bytes, each.dims) for each in traced.forward.output)
    loss *= rows / traced.forward.rows
    loss = loss if traced.makes_logits else min(loss, LOSS_BYTES)
    # The loss is done when the last layer's backward pass begins.
    layer *= LAYER_SHARE * scale
    return Memory(
        weights=held.elements * (workload.parameter_bytes + copy),
        gradients=held.elements * gradient + held.whole * item,
        optimizer=held.elements * workload.optimizer_bytes_per_parameter,
        activations=saved * scale + layer,
        logits=max(loss - layer, 0.0),
        gathered=held.gathered * item,
    )


def _no_mesh(devices: Devices, workload: TrainWorkload, mesh: Mapping[str, int] | None) -> str:
    if mesh is not None:
        ways = math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)
        nearest = max(workload.rows // ways, 1) * ways
        return (
            f"mesh {dict(mesh)} cannot be used: {workload.rows} rows over {' x '.join(BATCH_AXES)} = {ways} devices, "
            f"or a tensor or expert axis that no pair is split over; use a batch of "
            f"{nearest * workload.sequence_length} tokens, or another mesh"
        )
    return (
        f"no mesh of {devices.count} devices takes {workload.rows} rows of {workload.sequence_length} tokens: use a "
        f"batch of {devices.count * workload.sequence_length} tokens, which every mesh divides"
    )


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]

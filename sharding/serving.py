"""How a model is best served on given devices: mesh, batch, KV dtype and weight dtype for given target times.

A prompt is computed by one replica alone; decoding reads all weights, but those of experts that no sequence wants, and
the cached keys and values once per step, for as many sequences as run together. Prompts that arrive meanwhile are
computed between steps, so that each answer's tokens also wait for its share of them. Weights are split over `tensor`
(and `expert`) and never over `fsdp`: gathering them for every token would cost more than reading them.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshloom.core.errors import ShardingError
from meshloom.core.hardware import Chip, chip_named
from meshloom.core.program_report import ProgramReport
from meshloom.core.topology import SERVED_STORE_AXES, Devices
from meshloom.sharding.cost import Breakdown, Memory, Pricer, Split, elements, split_of
from meshloom.sharding.layout import Row
from meshloom.sharding.planner import RESERVE, meshes
from meshloom.sharding.rules import decide
from meshloom.sharding.trace import Program
from meshloom.sharding.training_step import in_dtype
from meshloom.sharding.work import ROWS, Work, forward_work
from meshloom.sharding.workload import ServeWorkload

KV_DTYPES = ("bfloat16", "int8")
WEIGHT_DTYPES = ("bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class ServeCandidate:
    """One way to serve: predicted, and what the compiler for its devices made of it, once that was asked.

    Attributes:
        batch: sequences that each of the mesh's `data` replicas decodes together.
        tpot_s: seconds per token of one answer, its share of others' prompts included.
        tokens_per_s: output tokens of all replicas together.
        requests_per_s: the same in whole requests.
        decode: cost of a step of the batch. prefill: of a prompt of `prompt_tokens` tokens.
        compiled: the compiler's figures of the steps of one replica, "decode" and "prefill", by name.
        compiled_tokens: tokens of the compiled prefill step.
        needed_bytes: what the compiler asks for on each device, where it refuses for that.
    """

    mesh: dict[str, int]
    batch: int
    kv_dtype: str
    weight_dtype: str
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    requests_per_s: float
    memory: Memory
    hbm_bytes: int
    meets_targets: bool
    decode: Breakdown
    prefill: Breakdown
    prompt_tokens: int
    compiled: Mapping[str, ProgramReport] | None = None
    compiled_tokens: int | None = None
    needed_bytes: int | None = None

    @property
    def compiled_bytes(self) -> int | None:
        """Memory per device as the compiler says, of the step that takes most, or of one that it refused."""
        if self.compiled is None:
            return self.needed_bytes
        return max(each.peak_bytes for each in self.compiled.values())

    @property
    def fits(self) -> bool:
        """What the compiler says, or before that the prediction with a reserve."""
        if self.compiled_bytes is not None:
            return self.needed_bytes is None and self.compiled_bytes <= self.hbm_bytes
        return self.memory.total <= self.hbm_bytes * (1 - RESERVE)

    def predicted_bytes(self, step: str) -> dict[str, float]:
        """Collective kind -> bytes of results per device, of the "decode" step or of the "prefill" step compiled."""
        if step == "decode":
            return self.decode.bytes_by_kind
        share = (self.compiled_tokens or self.prompt_tokens) / self.prompt_tokens
        return {kind: amount * share for kind, amount in self.prefill.bytes_by_kind.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `meshloom plan --json`; compiled figures are None until they are known.

        Collectives and compile time are those of the decode step; `prefill` has the other's.
        """
        names = ("mesh", "batch", "kv_dtype", "weight_dtype", "ttft_s", "tpot_s", "tokens_per_s", "requests_per_s")
        return (
            {name: getattr(self, name) for name in names}
            | {"memory_per_device_bytes": round(self.memory.total), "hbm_bytes": self.hbm_bytes}
            | {"fits": self.fits, "meets_targets": self.meets_targets}
            | self._step_json("decode")
            | {"compiled_memory_per_device_bytes": self.compiled_bytes}
            | {"prefill": {"tokens": self.compiled_tokens or self.prompt_tokens} | self._step_json("prefill")}
        )

    def _step_json(self, step: str) -> dict[str, Any]:
        report = None if self.compiled is None else self.compiled[step]
        predicted, actual = self.predicted_bytes(step), {} if report is None else report.bytes_by_kind
        return {
            "compiled_memory_per_device_bytes": None if report is None else report.peak_bytes,
            "compile_seconds": None if report is None else report.compile_seconds,
            "collectives": {
                kind: {
                    "predicted_bytes": round(predicted.get(kind, 0)),
                    "compiled_bytes": None if report is None else round(actual.get(kind, 0)),
                }
                for kind in predicted | actual
            },
        }


def plan_serving(
    module: nnx.Module,
    devices: Devices,
    workload: ServeWorkload,
    *,
    chip: Chip | None = None,
    kv_dtypes: Sequence[str] = KV_DTYPES,
    weight_dtypes: Sequence[str] = WEIGHT_DTYPES,
    limit: int = 20,
) -> list[ServeCandidate]:
    """The best candidates: those that fit and meet the targets first, then by output tokens per second, then by
    memory.

    Args:
        module: abstract, with an `init_cache(pages, page_size, dtype)`, which says what a cached token takes.
        chip: other figures than the table's, e.g. for a CPU.
        kv_dtypes, weight_dtypes: number formats to try.
    Raises:
        ConfigError: the chip is unknown. ShardingError: the module has no cache, or no mesh holds one request.
    """
    if devices.count < 1:
        raise ShardingError('a plan needs devices with a shape, such as "v5e:2x4" or "h100:8"; got "local"')
    if not hasattr(module, "init_cache"):
        raise ShardingError(f"{type(module).__name__} has no init_cache(): only modules with a KV cache can be served")
    chip = chip or chip_named(devices.platform)
    inputs = (jax.ShapeDtypeStruct((ROWS, workload.input_length), jnp.int32),)
    work, program, roles = forward_work(in_dtype(module, "bfloat16"), inputs)
    cache = jax.eval_shape(lambda: module.init_cache(1, 1, jnp.int8))
    cached = float(sum(leaf.size for leaf in jax.tree.leaves(cache)))  # elements per token
    experts = "expert" in roles.by_leaf.values()
    wanted = _wanted(program)
    found: list[ServeCandidate] = []
    for mesh in meshes(devices.count, experts=experts):
        if mesh["fsdp"] > 1:
            continue
        rules, kv_axis = decide(program, roles, mesh, SERVED_STORE_AXES)
        paired = {axis for row in rules for axis in row.paired}
        if any(mesh.get(axis, 1) > 1 and axis not in paired for axis in ("tensor", "expert")):
            continue
        local = cached / (mesh[kv_axis] if kv_axis else 1)
        found += _price(work, rules, mesh, devices, chip, workload, local, wanted, kv_dtypes, weight_dtypes)
    if not any(each.fits for each in found):
        least = min((each.memory.total for each in found), default=0.0)
        raise ShardingError(
            f"no mesh of {devices.count} x {chip.name} holds the model and one request: the least is "
            f"{least / 1e9:.1f} GB per device of {chip.hbm_bytes / 1e9:.1f} GB; use more devices or larger ones"
        )
    # Larger batches that gain less than the prediction can tell only take memory.
    found.sort(
        key=lambda each: (not each.fits, not each.meets_targets, -float(f"{each.tokens_per_s:.3g}"), each.memory.total)
    )
    return found[:limit]


def _price(
    work: Work,
    rules: tuple[Row, ...],
    mesh: dict[str, int],
    devices: Devices,
    chip: Chip,
    workload: ServeWorkload,
    cached: float,
    wanted: Mapping[int, float],
    kv_dtypes: Sequence[str],
    weight_dtypes: Sequence[str],
) -> Iterator[ServeCandidate]:
    split = split_of(work, rules, mesh, ())  # every device has all rows of a step
    pricer = Pricer(chip, devices, mesh, "bfloat16")
    length = workload.input_length + workload.output_length
    replicas = mesh["data"]
    held = sum(elements(row) for row in rules)
    prefill = _prefill(pricer, work, split)
    for weight_dtype in weight_dtypes:
        item = np.dtype(jnp.dtype(weight_dtype)).itemsize
        weights = held * item
        for kv_dtype in kv_dtypes:
            per_token = cached * np.dtype(jnp.dtype(kv_dtype)).itemsize
            room = chip.hbm_bytes * (1 - RESERVE) - weights
            most = max(int(room // (per_token * length)), 1)
            if workload.concurrency is not None:
                most = min(most, -(-workload.concurrency // replicas))
            for batch in _doublings(most):
                context = workload.input_length + workload.output_length / 2
                idle = sum((1 - share) ** batch * elements(rules[index]) for index, share in wanted.items())
                read = weights - idle * item
                step = _decode(pricer, work, split, workload, batch, read, batch * context * per_token)
                # Between two of its tokens an answer waits for one step and its share of the prompts of the batch.
                tpot = step.step_s + batch * prefill.step_s / workload.output_length
                rate = replicas * batch / tpot
                meets = (workload.ttft_s is None or prefill.step_s + tpot <= workload.ttft_s) and (
                    workload.tpot_s is None or tpot <= workload.tpot_s
                )
                enough = workload.concurrency is None or replicas * batch >= workload.concurrency
                memory = Memory(weights, 0.0, 0.0, 0.0, 0.0, 0.0, kv_cache=batch * length * per_token)
                yield ServeCandidate(
                    mesh,
                    batch,
                    kv_dtype,
                    weight_dtype,
                    prefill.step_s + tpot,
                    tpot,
                    rate,
                    rate / workload.output_length,
                    memory,
                    chip.hbm_bytes,
                    meets and enough,
                    step,
                    prefill,
                    workload.input_length,
                )


def _wanted(program: Program) -> dict[int, float]:
    """Parameters of experts -> the share of them that one row chooses, as if each were as likely as the others."""
    found: dict[int, float] = {}
    for region in program.regions:
        _, _, chosen, *matrices = region.inputs
        for each in matrices:
            found |= dict.fromkeys(each.parameters, chosen.dims[-1].size / each.dims[0].size)
    return found


def _prefill(pricer: Pricer, work: Work, split: Split) -> Breakdown:
    """One prompt on one replica."""
    return pricer.breakdown(pricer.groups(work, split, 1), pricer.partial_sums(work, split, 1), 0.0)


def _decode(
    pricer: Pricer, work: Work, split: Split, workload: ServeWorkload, batch: int, weights: float, cache: float
) -> Breakdown:
    """One step of `batch` sequences: products with one row each, and the cache read once."""
    rows = batch / workload.input_length
    products = pricer.groups(work, split, rows)
    flops = sum(group.flops for group in products if group.name != "attention")
    step = pricer.group("weights", flops, weights)
    # Scores against the cache take a few FLOPs per element read, far below what a chip does in that time.
    read = pricer.group("cache", 0.0, cache)
    return pricer.breakdown((step, read), pricer.partial_sums(work, split, rows), 0.0)


def _doublings(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*sizes, most]

"""Serving plans and the engine: which of them it can follow, its sizes under one, and the steps it would run.

An engine is one replica: a plan with `data=4` asks for four of them, each on its share of the devices.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from meshloom.core.hardware import Chip
from meshloom.core.topology import Devices, mesh_text
from meshloom.models.config import DecoderConfig
from meshloom.models.quantize import quantize_abstract, why_not
from meshloom.models.source import abstract_module
from meshloom.serve.config import EngineConfig
from meshloom.serve.runner import Runner
from meshloom.serve.sizing import size_cache, step_shapes
from meshloom.sharding.derive import derive_served
from meshloom.sharding.serving import WEIGHT_DTYPES, ServeCandidate, plan_serving
from meshloom.sharding.workload import ServeWorkload

KV_DTYPES = ("bfloat16", "int8")  # of those that are planned for
_SCALED_PAGE = 128  # tokens of a page with scales
_LONGEST_PREFILL = 2048  # tokens of one step: more would keep running answers waiting for longer


def search(
    module: nnx.Module, devices: Devices, workload: ServeWorkload, *, chip: Chip | None = None, limit: int = 20
) -> list[ServeCandidate]:
    """`plan_serving` over what the engine can run; errors as there."""
    weights = WEIGHT_DTYPES if why_not(module) is None else ("bfloat16",)
    return plan_serving(module, devices, workload, chip=chip, kv_dtypes=KV_DTYPES, weight_dtypes=weights, limit=limit)


def replica_axes(mesh: Mapping[str, int]) -> dict[str, int]:
    """The mesh of one of a plan's replicas: its axes without `data`, and `tensor=1` for one device."""
    return {axis: size for axis, size in mesh.items() if size > 1 and axis != "data"} or {"tensor": 1}


def planned_engine(
    engine: EngineConfig, *, batch: int, input_length: int, output_length: int, kv_dtype: str
) -> EngineConfig:
    """An engine's sizes for `batch` sequences at once of these lengths in tokens, with a cache that holds them all.

    The step programs are one for the whole batch decoding, one for prompts, and smaller ones between. Pages of a cache
    with scales hold 128 tokens, so that they are whole vectors for a TPU, however few kv heads a device has.
    """
    prefill = prefill_tokens(input_length)
    largest = max(batch, prefill)
    buckets = {bucket for bucket in engine.buckets if bucket < largest} | {batch, prefill}
    page_size = engine.page_size if kv_dtype == "bfloat16" else _SCALED_PAGE
    pages = batch * -(-(input_length + output_length) // page_size)
    return dataclasses.replace(
        engine,
        max_num_seqs=batch,
        buckets=tuple(sorted(buckets)),
        page_size=page_size,
        num_pages=pages,
        cache_dtype=kv_dtype,
    )


def prefill_tokens(input_length: int) -> int:
    """Tokens of the step that computes a prompt: the next power of two, up to a limit that keeps steps short."""
    return min(1 << (input_length - 1).bit_length(), _LONGEST_PREFILL)


def lowered_steps(
    config: DecoderConfig, mesh: Mesh, candidate: ServeCandidate, workload: ServeWorkload
) -> dict[str, jax.stages.Lowered]:
    """The "decode" and the "prefill" step of one replica of a candidate, as the engine runs them, without weights.

    Args:
        config: of the model; its layers are unrolled, as they are served.
        mesh: of one replica, over devices that need not be attached.
    """
    module = abstract_module(dataclasses.replace(config, scan_layers=False), jnp.bfloat16)
    layout = derive_served(module, mesh)
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nnx.state(module, nnx.Param),
        layout.shardings,
    )
    nnx.update(module, placed)
    if candidate.weight_dtype == "int8":
        quantize_abstract(module)
    sizes = planned_engine(
        EngineConfig(),
        batch=candidate.batch,
        input_length=workload.input_length,
        output_length=workload.output_length,
        kv_dtype=candidate.kv_dtype,
    )
    dtype = jnp.dtype(sizes.cache_dtype)
    cache = size_cache(config, sizes, dtype, mesh.devices.flat[0].platform)
    shapes = {shape.tokens: shape for shape in step_shapes(sizes, cache.pages_per_sequence)}
    runner = Runner(
        module,
        list(shapes.values()),
        num_pages=cache.num_pages,
        page_size=sizes.page_size,
        cache_dtype=dtype,
        cache_lanes=cache.lanes,
        mesh=mesh,
        kv_heads_axis=layout.kv_heads_spec,
    )
    steps = {"decode": candidate.batch, "prefill": prefill_tokens(workload.input_length)}
    return {name: runner.lower(shapes[tokens]) for name, tokens in steps.items()}


@dataclasses.dataclass(frozen=True)
class Choice:
    """Axes of the mesh of one engine, on the first of the devices, and why these."""

    axes: dict[str, int]
    reason: str


def choose_axes(
    config: DecoderConfig, devices: Devices, engine: EngineConfig, *, chip: Chip, weight_dtype: str = "bfloat16"
) -> Choice:
    """The mesh on which one engine is predicted to make most tokens per second of its `max_num_seqs` sequences.

    Its answers are those of one device. More devices are not always faster: what they share they must also send each
    other, so that a small model is served on few of them.

    Raises:
        ShardingError: no mesh of the devices holds the model and one request.
    """
    input_length, output_length = min(1024, config.context // 2), min(256, config.context // 4)
    module = abstract_module(dataclasses.replace(config, scan_layers=True), jnp.bfloat16)
    found = plan_serving(
        module,
        devices,
        ServeWorkload(input_length, output_length),
        chip=chip,
        # The planner has two sizes of elements: float8 is that of int8, and int4, a half, is counted as it too.
        kv_dtypes=("bfloat16" if engine.cache_dtype in ("model", "float32", "bfloat16") else "int8",),
        weight_dtypes=(weight_dtype,),
        limit=2**31,
    )
    largest: dict[str, ServeCandidate] = {}
    for each in found:
        name = mesh_text(replica_axes(each.mesh)) or "one device"
        if each.fits and each.batch <= engine.max_num_seqs and each.batch > getattr(largest.get(name), "batch", 0):
            largest[name] = each

    def rate(candidate: ServeCandidate) -> float:
        # Rounded, so that the order of two alike does not hang on the last bit; fewer devices come first then.
        return float(f"{candidate.tokens_per_s / candidate.mesh['data']:.3g}")

    ranked = sorted(largest.items(), key=lambda item: (-rate(item[1]), -item[1].mesh["data"], item[0]))
    (name, best), others = ranked[0], ranked[1:]
    count = devices.count // best.mesh["data"]
    share = f"{name} on {count} of {devices.count} devices" if count > 1 else f"one device of {devices.count}"
    reason = (
        f"{share}: predicted {rate(best):,.0f} output tokens/s for {best.batch} "
        f"sequence(s) of {input_length} tokens in and {output_length} out"
    )
    if others:
        reason += "; " + ", ".join(f"{other} {rate(each):,.0f}" for other, each in others[:2])
    return Choice(replica_axes(best.mesh), reason)

"""What `meshloom verify` runs: a model that fits here, and the meshes to try it on.

A training step is the same program at any size, so a large model is verified small. Sizes go down to divisors of
themselves that the same mesh axes divide, so that what is split in the large model is split in the small one.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from meshloom.core.errors import ConfigError
from meshloom.core.topology import AXES, abstract_mesh, make_mesh
from meshloom.models.config import DecoderConfig, EncoderDecoderConfig, ModelConfig, MoEConfig, RopeConfig
from meshloom.models.source import abstract_module
from meshloom.sharding import derive
from meshloom.train.verify import verify
from meshloom.train.verify_report import VerifyReport

LENGTH = 32  # tokens per row
MESHES = 6  # that are verified at most if none is named: each takes a compilation


def verify_model(
    model: ModelConfig,
    devices: Sequence[jax.Device],
    *,
    mesh: str | dict[str, int] | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> VerifyReport:
    """Verifies the training step of a model with random weights on one mesh, or on those proposed for it.

    Args:
        model: run as it is if small, else as `shrunk` makes it.
        devices: of all processes; at least 2.
        mesh: as `core.topology.make_mesh` takes it; None is `proposed_meshes`.
        seed: of weights and tokens.
        console: shows progress, and the table of results.
    Raises:
        ConfigError: an encoder-decoder, a single device, or a negative seed.
        ShardingError: the mesh does not suit devices or model.
    """
    if isinstance(model, EncoderDecoderConfig):
        raise ConfigError("verify runs training steps, which are for decoders; this model is an encoder-decoder")
    if len(devices) < 2:
        raise ConfigError('verify compares one device with several, and there is 1; simulate some: --devices "cpu:8"')
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more; got {seed}")
    console = console or Console(quiet=True)
    small = shrunk(model, len(devices))
    module = abstract_module(small, jnp.float32)
    proposed = proposed_meshes(small, len(devices)) if mesh is None else [mesh]
    meshes = [make_mesh(axes, list(devices)) for axes in proposed]
    ways = max(each.shape.get("context", 1) for each in meshes)
    length = max(row_length(small) // ways, 1) * ways  # a row divides over the mesh that was asked for, even of three
    with console.status("") as status:
        report = verify(
            module, meshes, length=length, seed=seed, announce=lambda text: status.update(f"verifying: {text}")
        )
    report = dataclasses.replace(report, shrunk=changes(model, small))
    console.print(report.table(f"The training step on {len(devices)} devices against one, float32"))
    return report


def shrunk(config: DecoderConfig, devices: int) -> DecoderConfig:
    """The same architecture with layers scanned, at sizes that compile and run in seconds.

    Layers: two, or four where they differ. Widths: see `_smaller`. Kv heads: the fewest of at least two that the same
    axes divide, with as many query heads for each as before. Experts: the fewest of at least eight, and of at least
    twice those chosen. The window is a quarter of a row. Fresh weights have the standard deviation d_model ** -0.5, so
    that activations neither vanish nor grow. Everything else stays.
    """
    kv_heads = _smaller(config.n_kv_heads, 2, devices)
    head_dim = _smaller(config.head_dim, 16, devices)
    d_model = _smaller(config.d_model, 128, devices)
    global_every = min(config.global_every, 2)
    kinds = global_every or config.window_from or (config.moe is not None and config.moe.dense_layers)
    n_layers = min(config.n_layers, 4 if kinds else 2)
    return dataclasses.replace(
        config,
        vocab_size=_smaller(config.vocab_size, 256, devices),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=kv_heads * (config.n_heads // config.n_kv_heads),
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        d_ff=_smaller(config.d_ff, 256, devices),
        context=min(config.context, 2 * LENGTH),
        learned_positions=min(config.learned_positions, 2 * LENGTH),
        rope=_small_rope(config.rope, head_dim),
        local_rope=_small_rope(config.local_rope, head_dim),
        window=None if config.window is None else min(config.window, LENGTH // 4),
        window_from=min(config.window_from, n_layers // 2 if config.window_from < config.n_layers else n_layers),
        global_every=global_every,
        moe=_small_experts(config.moe, n_layers, devices),
        init_scale=config.init_scale if d_model == config.d_model else d_model**-0.5,
        scan_layers=True,
    )


def _smaller(size: int, least: int, devices: int) -> int:
    """The smallest divisor of `size`, at least `least`, that numbers of devices divide if they divide `size`."""
    same = (each for each in range(min(size, least), size + 1) if size % each == 0)
    return next(each for each in same if math.gcd(each, devices) == math.gcd(size, devices))


def _small_rope(rope: RopeConfig | None, head_dim: int) -> RopeConfig | None:
    if rope is None:
        return None
    pairs = rope.rotated(head_dim) // 2
    return dataclasses.replace(rope, long_factors=rope.long_factors[:pairs], short_factors=rope.short_factors[:pairs])


def _small_experts(moe: MoEConfig | None, n_layers: int, devices: int) -> MoEConfig | None:
    if moe is None:
        return None
    return dataclasses.replace(
        moe,
        n_experts=_smaller(moe.n_experts, max(8, 2 * moe.top_k), devices),
        d_ff=_smaller(moe.d_ff, 64, devices),
        dense_layers=tuple(layer for layer in moe.dense_layers if layer < n_layers - 1),
    )


def changes(before: DecoderConfig, after: DecoderConfig) -> dict[str, tuple[Any, Any]]:
    """Sizes that differ, as field -> (before, after); nested ones as `moe.d_ff`."""
    return dict(_changes("", before, after))


def _changes(prefix: str, before: Any, after: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old == new or field.name == "scan_layers":  # which changes no value
            continue
        if dataclasses.is_dataclass(old):
            yield from _changes(f"{prefix}{field.name}.", old, new)
        else:
            yield prefix + field.name, (old, new)


def proposed_meshes(config: DecoderConfig, devices: int) -> list[dict[str, int]]:
    """At most `MESHES` meshes: each axis as large as the model takes it, then some with as many axes as can be."""
    module = abstract_module(config, jnp.float32)
    length = row_length(config)

    def useful(axes: dict[str, int]) -> bool:
        """Whether every axis splits something, and `expert` experts."""
        layout = derive(module, abstract_mesh(axes, devices), jax.ShapeDtypeStruct((8, length), jnp.int32))
        split = {axis for row in layout.rows for axis in row.paired} | {"data"}
        split |= {axis for row in layout.rows for axis in row.stored if axis != "expert"}
        return all(axis in split or (axis == "context" and length % size == 0) for axis, size in axes.items())

    everything = sorted(_factorings(devices, AXES), key=_simple)
    found = []
    for axis in AXES:
        largest = sorted((axes for axes in everything if axis in axes), key=lambda axes: -axes[axis])
        found += list(itertools.islice(filter(useful, largest), 1))
    mixed = sorted(everything, key=lambda axes: -len(axes))
    found += list(itertools.islice((axes for axes in mixed if axes not in found and useful(axes)), MESHES))
    return found[:MESHES]


def row_length(config: DecoderConfig) -> int:
    """Tokens per row that a model is verified with."""
    return min(LENGTH, config.context)


def _factorings(count: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Every mesh of `count` devices over some of `axes`, without axes of size 1."""
    if count == 1:
        yield {}
    elif axes:
        axis, *others = axes
        for size in (each for each in range(1, count + 1) if count % each == 0):
            for rest in _factorings(count // size, others):
                yield {axis: size, **rest} if size > 1 else rest


def _simple(axes: dict[str, int]) -> tuple[int, int, list[int]]:
    """Sorts meshes: of few axes first, then balanced ones, then by how usual the axes are."""
    usual = ("fsdp", "tensor", "expert", "data", "context")
    return len(axes), max(axes.values()), sorted(usual.index(axis) for axis in axes)

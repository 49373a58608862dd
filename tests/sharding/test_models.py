"""Every family of ours, scanned and unrolled: the derived layout is the one that an expert would write down by weight
name.

Names appear only here, on the side of the expert.
"""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from meshloom.models.config import DecoderConfig, EncoderDecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.models.encoder_decoder import EncoderDecoder
from meshloom.models.families import FAMILIES, family_of
from meshloom.models.sequence import Packed
from meshloom.sharding import Layout, derive

GOLDENS = sorted((pathlib.Path(__file__).parents[1] / "golden" / "families").glob("*.json"))
MESHES = [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2, "expert": 2}]


def golden(path: pathlib.Path):
    values = json.loads(path.read_text())["config"]
    return family_of(values).read_config(values)


def layout_of(config, axes: dict[str, int], length: int = 12) -> Layout:
    make = EncoderDecoder if isinstance(config, EncoderDecoderConfig) else Decoder
    module = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    return derive(module, AbstractMesh(tuple(axes.values()), tuple(axes)), *module.example_inputs(2, length))


def tensor_dimension(name: str, d_ff: int, config, tensor: int) -> int | None:
    """The dimension of a weight [out, in] (counted without stack and experts) that Megatron's layout splits."""
    kv_heads = getattr(config, "n_kv_heads", config.n_heads)
    heads = kv_heads % tensor == 0 or (tensor % kv_heads == 0 and config.n_heads % tensor == 0)
    *_, owner, kind = name.split(".")
    match owner:
        case "embed" | "unembed":
            return 0 if config.vocab_size % tensor == 0 else None
        case "q":
            return 0 if heads else None
        case "k" | "v":
            return 0 if kv_heads % tensor == 0 else None
        case "out":
            return 1 if heads and kind == "weight" else None
        case "relative_bias":
            return 1 if heads else None
        case "gate" | "up":
            return 0 if d_ff % tensor == 0 else None
        case "down":
            return 1 if kind == "weight" and d_ff % tensor == 0 else None
    return None


def expert_choice(name: str, shape: tuple[int, ...], config, axes: dict[str, int]) -> tuple:
    stacked = ".scanned." in name
    first = int(stacked)
    spec: list[str | tuple[str, ...] | None] = [None] * len(shape)
    d_ff = config.d_ff
    if name.split(".")[-2] in ("gate", "up", "down") and len(shape) - stacked == 3:
        d_ff = config.moe.d_ff
        if axes.get("expert", 1) > 1 and config.moe.n_experts % axes["expert"] == 0:
            spec[first] = "expert"
        first += 1
    if axes.get("tensor", 1) > 1 and (dimension := tensor_dimension(name, d_ff, config, axes["tensor"])) is not None:
        spec[first + dimension] = "tensor"
    storing = tuple(axis for axis in ("fsdp", "expert") if axes.get(axis, 1) > 1 and axis not in spec)
    ways = math.prod(axes[axis] for axis in storing)
    free = [d for d in range(int(stacked), len(shape)) if spec[d] is None and shape[d] % ways == 0]
    if storing and len(shape) - stacked > 1 and free:
        has_vocabulary = name.split(".")[-2] in ("embed", "unembed")  # [vocab, d_model]: its rows are stored last
        place = max(free, key=lambda d: (d > 0 or not has_vocabulary, shape[d]))
        spec[place] = storing[0] if len(storing) == 1 else storing
    return tuple(spec)


def assert_expert_layout(config, axes: dict[str, int]) -> None:
    layout = layout_of(config, axes)
    derived = {row.name: tuple(row.spec) for row in layout.rows}
    assert derived == {row.name: expert_choice(row.name, row.shape, config, axes) for row in layout.rows}
    assert not layout.unknown
    kv_heads = getattr(config, "n_kv_heads", config.n_heads)
    splits = axes.get("tensor", 1) > 1 and kv_heads % axes["tensor"] == 0
    assert layout.kv_heads_spec == ("tensor" if splits else None)


def test_every_family_has_a_golden_configuration():
    assert {golden(path).family for path in GOLDENS} == set(FAMILIES)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("path", GOLDENS, ids=[path.stem for path in GOLDENS])
def test_every_family_gets_the_layout_of_an_expert(path, scan):
    config = dataclasses.replace(golden(path), scan_layers=scan)
    for axes in MESHES[2:]:
        assert_expert_layout(config, axes)


ROOMY = DecoderConfig(
    vocab_size=96, d_model=32, n_layers=4, n_heads=8, n_kv_heads=4, head_dim=8, d_ff=48, scan_layers=True
)


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        {"remat": "dots", "tie_embeddings": False},
        {"n_kv_heads": 1},
        {"n_kv_heads": 2, "parallel": True},
        {"window": 4, "global_every": 2, "post_norm": True},
        {"norm": "layer", "learned_positions": 64, "rope": None, "gated": False, "qkv_bias": True, "mlp_bias": True},
        {"moe": MoEConfig(8, 2, 16), "tie_embeddings": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_sizes_that_divide_are_all_split(changes):
    for axes in MESHES:
        assert_expert_layout(dataclasses.replace(ROOMY, **changes), axes)


def test_long_sequences_change_nothing():
    # Long enough for attention in blocks, which loops over slices of the sequence.
    axes = {"fsdp": 2, "tensor": 2}
    assert layout_of(ROOMY, axes, length=1024).rows == layout_of(ROOMY, axes).rows


def test_packed_documents_change_nothing():
    config = dataclasses.replace(ROOMY, learned_positions=64, rope=None, tie_embeddings=False)
    axes = {"fsdp": 2, "tensor": 2}
    tokens = jax.ShapeDtypeStruct((2, 12), jnp.int32)
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    packed = derive(module, AbstractMesh((2, 2), ("fsdp", "tensor")), tokens, Packed(tokens, tokens))
    assert [row.spec for row in packed.rows] == [row.spec for row in layout_of(config, axes).rows]


def test_weights_in_bfloat16_have_the_same_layout():
    module = nnx.eval_shape(lambda: Decoder(ROOMY, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))
    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))
    layout = derive(module, mesh, jax.ShapeDtypeStruct((2, 12), jnp.int32))
    assert [row.spec for row in layout.rows] == [row.spec for row in layout_of(ROOMY, {"fsdp": 2, "tensor": 2}).rows]


def test_llama_70b_lies_evenly_over_its_pod():
    config = DecoderConfig(
        vocab_size=128_256,
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        d_ff=28_672,
        tie_embeddings=False,
        scan_layers=True,
    )
    layout = layout_of(config, {"fsdp": 16, "tensor": 8}, length=4096)
    total = sum(row.bytes_total for row in layout.rows)
    vectors = sum(row.bytes_total for row in layout.rows if row.rule == "replicated")
    assert layout.bytes_per_device - vectors == (total - vectors) // 128
    assert math.isclose(total / 4, 70.55e9, rel_tol=1e-3)

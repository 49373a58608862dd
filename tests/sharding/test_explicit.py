"""JAX's explicit types over derived layouts: they hold, values stay what they are, and what they refuse is named."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from meshloom.core.errors import ShardingError
from meshloom.core.topology import abstract_mesh, make_mesh, parse_mesh
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.models.presets import PRESETS
from meshloom.models.source import abstract_module
from meshloom.sharding import derive
from meshloom.sharding.constrain import plain
from meshloom.sharding.explicit import check, explicit
from tests.sharding import modules

DENSE = DecoderConfig(
    vocab_size=96, d_model=32, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=8, d_ff=64, scan_layers=True
)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(n_experts=4, top_k=2, d_ff=32))


@pytest.mark.parametrize(
    ("config", "mesh", "trusted"),
    [
        # Two kv heads with four queries each, over tensor=4: an axis on two dimensions.
        (DENSE, "fsdp=2,tensor=4", {"gather": 1, "custom_vjp_call": 1}),
        (EXPERTS, "fsdp=2,expert=2,tensor=2", {"gather": 1, "routed_experts": 1}),
        (DENSE, "fsdp=2,context=2,tensor=2", {"gather": 1, "attention": 1}),
    ],
    ids=["kv_heads_by_group", "experts", "tokens"],
)
def test_a_decoder_under_explicit_types_is_the_decoder(config, mesh, trusted):
    module = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, 96)
    auto = make_mesh(mesh, jax.devices()[: math.prod(parse_mesh(mesh).values())])
    layout, state = derive(module, auto, tokens), nnx.state(module, nnx.Param)
    types = Mesh(auto.devices, auto.axis_names, axis_types=(AxisType.Explicit,) * len(auto.axis_names))
    with jax.set_mesh(types):
        placed = jax.device_put(state, jax.tree.map(lambda spec: NamedSharding(types, spec), layout.specs))
        rows = jax.device_put(tokens, NamedSharding(types, layout.batch_spec))
        logits, _ = jax.jit(explicit(module, layout))(placed, rows)
    np.testing.assert_allclose(logits, plain(module)(state, tokens)[0], atol=2e-6)
    assert jax.typeof(logits).sharding.spec == jax.P(*layout.batch_spec, "tensor")
    found = check(module, layout, (tokens,))
    assert found.typed > 90
    assert found.trusted == trusted


@pytest.mark.parametrize(
    ("model", "mesh", "least"),
    [
        ("llama3-8b", "fsdp=16,tensor=4", 150),
        ("gpt2", "data=2,fsdp=4,tensor=2", 150),
        ("mixtral-8x7b", "fsdp=8,expert=4", 150),
        ("llama3-8b", "fsdp=4,context=4,tensor=4", 110),  # attention is one equation
    ],
)
def test_real_sizes_are_typed_without_a_device(model, mesh, least):
    module = abstract_module(dataclasses.replace(PRESETS[model], scan_layers=True), jnp.float32)
    layout = derive(module, abstract_mesh(mesh, math.prod(parse_mesh(mesh).values())))
    found = check(module, layout, (jax.ShapeDtypeStruct((64, 128), jnp.int32),))
    assert found.typed > least
    assert {"gather"} <= found.trusted.keys() <= {"gather", "routed_experts", "attention"}
    assert str(found).startswith(f"{found.typed} equations typed by JAX; trusted to Meshloom's signatures:")


@pytest.mark.parametrize(
    "make", [modules.AllExperts, lambda: modules.Experts("one_hot"), lambda: modules.ScannedGroups(4)]
)
@pytest.mark.parametrize("mesh", ["fsdp=4,expert=2", "expert=4,tensor=2"])
def test_sums_that_go_back_to_rows_over_expert_are_typed(make, mesh):
    module, rows = nnx.eval_shape(make), jax.ShapeDtypeStruct((8, 16, modules.D), jnp.float32)
    assert not check(module, derive(module, abstract_mesh(mesh, 8), rows), (rows,)).trusted


class Block(nnx.Module):
    """`x + between(x up^T) down^T`, whose middle the pair rule splits."""

    def __init__(self, between):
        self.up, self.down = nnx.Param(jnp.zeros((2048, 512))), nnx.Param(jnp.zeros((512, 2048)))
        self.between = between

    def __call__(self, x):
        return x + self.between(x @ self.up.T) @ self.down.T


def sort(h):
    return jnp.sort(h, axis=-1)


def running_sum(h):
    return jnp.cumsum(h, axis=-1)


@pytest.mark.parametrize("between", [sort, running_sum])
def test_an_operation_along_a_split_dimension_is_refused_with_its_line(between):
    module = nnx.eval_shape(lambda: Block(between))
    x = jax.ShapeDtypeStruct((8, 64, 512), jnp.float32)
    assert check(module, derive(module, abstract_mesh("fsdp=4", 4), x), (x,)).typed > 4
    layout = derive(module, abstract_mesh("fsdp=2,tensor=2", 4), x)
    line = between.__code__.co_firstlineno + 1
    with pytest.raises(ShardingError, match=rf"test_explicit.py:{line}: JAX refuses to type .*2048@tensor"):
        check(module, layout, (x,))


def mixed_rows(h):
    return jnp.einsum("ts,bsf->btf", jnp.einsum("btf,bsf->ts", h, h), h)


def test_a_sum_that_no_rule_intends_is_refused():
    module = nnx.eval_shape(lambda: Block(mixed_rows))
    x = jax.ShapeDtypeStruct((8, 512, 512), jnp.float32)
    with pytest.raises(ShardingError, match=r"JAX refuses to type `dot_general` .*Contracting dimensions are sharded"):
        check(module, derive(module, abstract_mesh("fsdp=4", 4), x), (x,))


def turned(h):
    return h + jnp.swapaxes(h, 0, 1)


def test_a_sum_of_two_arrays_that_lie_differently_is_refused():
    module = nnx.eval_shape(lambda: Block(turned))
    x = jax.ShapeDtypeStruct((64, 64, 512), jnp.float32)
    line = turned.__code__.co_firstlineno + 1
    with pytest.raises(ShardingError, match=rf"test_explicit.py:{line}: JAX refuses to type `add` of .*64@fsdp"):
        check(module, derive(module, abstract_mesh("fsdp=4", 4), x), (x,))

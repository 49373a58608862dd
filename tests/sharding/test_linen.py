"""Linen modules get the layouts of their NNX equals, as a pytree like the `params` that their `init` returns."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen
from jax.sharding import AbstractMesh, PartitionSpec

from meshloom.core.errors import ShardingError
from meshloom.sharding import derive
from tests.sharding.modules import HIDDEN, TOKENS

MESH = AbstractMesh((2, 4), ("fsdp", "tensor"))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = True):
        normed = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=4)(normed, normed)
        y = linen.gelu(linen.Dense(128)(linen.LayerNorm()(x)))
        return x + linen.Dense(32)(linen.Dropout(0.1, deterministic=not train)(y))


class Layer(linen.Module):
    train: bool

    @linen.compact
    def __call__(self, x, _):
        return Block()(x, self.train), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, tokens, train: bool):
        x = linen.Embed(64, 32)(tokens)
        stack = linen.scan(
            linen.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3
        )
        x, _ = stack(train, name="layers")(x, None)
        return linen.Dense(64)(x)


class Partitioned(linen.Module):
    """Carries an annotation of its own, which decides nothing."""

    @linen.compact
    def __call__(self, x):
        init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
        inner = linen.relu(linen.Dense(64, kernel_init=init)(x))
        return x + linen.Dense(32)(inner)


class Normalized(linen.Module):
    """Batch statistics beside the parameters."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Conv(32, (3, 3))(x)))
        return linen.Dense(8)(linen.Conv(64, (3, 3))(x).mean((1, 2)))


def test_attention_and_mlp_are_split_by_heads_and_inner_features():
    specs = derive(Block(), MESH, HIDDEN).specs
    attention = specs["MultiHeadDotProductAttention_0"]
    for name in ("query", "key", "value"):
        assert attention[name]["kernel"] == PartitionSpec("fsdp", "tensor", None)
        assert attention[name]["bias"] == PartitionSpec("tensor", None)
    assert attention["out"]["kernel"] == PartitionSpec("tensor", None, "fsdp")
    assert specs["Dense_0"] == {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec("tensor")}
    assert specs["Dense_1"] == {"kernel": PartitionSpec("tensor", "fsdp"), "bias": PartitionSpec(None)}


@pytest.mark.parametrize("train", [True, False])
def test_a_scanned_stack_is_never_split_and_flags_stay_flags(train):
    layout = derive(Scanned(), MESH, TOKENS, train=train)
    assert layout.row("layers.Block_0.Dense_0.kernel").spec == PartitionSpec(None, "fsdp", "tensor")
    assert layout.row("Embed_0.embedding").spec == PartitionSpec("tensor", "fsdp")
    assert all(row.roles[0] == "stack" and row.spec[0] is None for row in layout.rows if "layers" in row.name)


def test_specs_have_the_structure_of_the_params():
    params = jax.eval_shape(Partitioned().init, jax.random.key(0), HIDDEN)["params"]
    layout = derive(Partitioned(), MESH, HIDDEN)
    assert jax.tree.structure(layout.specs) == jax.tree.structure(params)
    assert layout.row("Dense_0.kernel").spec == PartitionSpec("fsdp", "tensor")


def test_other_collections_are_no_parameters():
    layout = derive(Normalized(), MESH, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), True)
    assert not any("mean" in row.name for row in layout.rows)
    assert layout.row("Conv_0.kernel").spec == PartitionSpec(None, None, None, "tensor")
    assert layout.row("Conv_1.kernel").spec == PartitionSpec(None, None, "tensor", "fsdp")


def test_a_flag_given_as_an_array_is_refused_with_what_would_work():
    with pytest.raises(ShardingError, match=r"(?s)Scanned cannot be traced .*pass a Python flag"):
        derive(Scanned(), MESH, TOKENS, jnp.array(True))

"""The compiled forward pass has the collectives that the pair rule promises: one reduction for each pair, and nothing
else."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.sharding import derive

HIDDEN = jax.ShapeDtypeStruct((2, 6, 32), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)


def collectives(make, tensor: int, example) -> dict[str, int]:
    """Collectives by kind in the forward pass compiled for `tensor` devices."""
    module = nnx.eval_shape(make)
    mesh = jax.make_mesh((tensor,), ("tensor",), devices=jax.devices()[:tensor], axis_types=(AxisType.Auto,))
    layout = derive(module, mesh, example)
    graphdef, parameters = nnx.split(module)

    def forward(parameters, x):
        return nnx.merge(graphdef, parameters)(x)

    forward = jax.jit(forward, in_shardings=(layout.shardings, layout.replicated))
    text = forward.lower(parameters, example).compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
    return dict(collections.Counter(re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", text)))


class MLPBlock(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Param(jnp.zeros((64, 32))), nnx.Param(jnp.zeros((32, 64)))

    def __call__(self, x):
        return x + jax.nn.silu(x @ self.up.T) @ self.down.T


class AttentionBlock(nnx.Module):
    """Grouped-query attention over 8 heads of 8."""

    def __init__(self, kv_heads: int):
        shapes = {"q": (64, 32), "k": (kv_heads * 8, 32), "v": (kv_heads * 8, 32), "o": (32, 64)}
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

    def __call__(self, x):
        q, k, v = ((x @ each.T).reshape(*x.shape[:2], -1, 8) for each in (self.q, self.k, self.v))
        return x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*x.shape[:2], -1) @ self.o.T


def test_an_mlp_pair_costs_one_reduction():
    assert collectives(MLPBlock, 4, HIDDEN) == {"all-reduce": 1}


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_an_attention_pair_costs_one_reduction_however_few_the_kv_heads(kv_heads):
    assert collectives(lambda: AttentionBlock(kv_heads), 4, HIDDEN) == {"all-reduce": 1}


SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, 32)], ids=["dense", "experts"])
def test_a_decoder_costs_two_reductions_a_layer_and_one_for_its_embedding(moe):
    config = DecoderConfig(**SIZES, moe=moe)
    assert collectives(lambda: Decoder(config, rngs=nnx.Rngs(0)), 4, TOKENS) == {"all-reduce": 7}


def test_an_odd_vocabulary_saves_the_reduction_of_the_embedding():
    config = DecoderConfig(**SIZES | {"vocab_size": 67}, scan_layers=True)  # a scanned layer is in the program once
    assert collectives(lambda: Decoder(config, rngs=nnx.Rngs(0)), 4, TOKENS) == {"all-reduce": 2}

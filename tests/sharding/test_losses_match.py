"""Training over a mesh with a derived layout gives the losses of one device: each axis alone and mixed, in float32.

Ten AdamW steps; losses agree to 1e-5 relative (measured: 4e-7).
"""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.sharding import derive

SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}
CONFIGS = {
    "grouped_query": DecoderConfig(**SIZES, scan_layers=True),
    "gemma": DecoderConfig(
        **SIZES,
        activation="gelu_tanh",
        norm_offset=True,
        post_norm=True,
        embed_scale=32**0.5,
        window=4,
        global_every=2,
        attention_soft_cap=50.0,
        logit_soft_cap=30.0,
        scan_layers=True,
    ),
    "gpt2": DecoderConfig(
        **SIZES | {"vocab_size": 67, "n_kv_heads": 8},
        norm="layer",
        gated=False,
        rope=None,
        learned_positions=32,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        scan_layers=True,
    ),
    "mixtral": DecoderConfig(**SIZES, tie_embeddings=False, moe=MoEConfig(4, 2, 32), scan_layers=True),
}
BATCH, LENGTH, STEPS = 8, 16, 10
OPTIMIZER = optax.adamw(1e-3)


def mesh_of(axes: dict[str, int]) -> jax.sharding.Mesh:
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices, axis_types=(AxisType.Auto,) * len(axes))


def train_step(graphdef, parameters, optimizer, tokens):
    def loss_of(parameters):
        logits, _ = nnx.merge(graphdef, parameters)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    loss, gradients = jax.value_and_grad(loss_of)(parameters)
    updates, optimizer = OPTIMIZER.update(gradients, optimizer, parameters)
    return optax.apply_updates(parameters, updates), optimizer, loss


def losses(name: str, axes: dict[str, int] | None) -> list[float]:
    """Ten steps from the same weights on the same tokens; `axes` None is one device without shardings."""
    module = Decoder(CONFIGS[name], rngs=nnx.Rngs(0))
    graphdef, parameters = nnx.split(module)
    optimizer = OPTIMIZER.init(parameters)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, SIZES["vocab_size"])
    step = functools.partial(train_step, graphdef)
    if axes is None:
        step = jax.jit(step)
    else:
        layout = derive(module, mesh_of(axes), tokens)
        held = (layout.shardings, layout.follow(optimizer))
        batch = layout.batch_sharding(BATCH)
        step = jax.jit(step, in_shardings=(*held, batch), out_shardings=(*held, layout.replicated))
        parameters, optimizer, tokens = layout.place(parameters), *jax.device_put((optimizer, tokens), (held[1], batch))
    history = []
    for _ in range(STEPS):
        parameters, optimizer, loss = step(parameters, optimizer, tokens)
        history.append(float(loss))
    return history


@functools.cache
def losses_of_one_device(name: str) -> list[float]:
    return losses(name, None)


EACH_AXIS_ALONE = [{"data": 8}, {"fsdp": 8}, {"tensor": 2}, {"tensor": 4}]
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
CASES = [
    *(("grouped_query", axes) for axes in [*EACH_AXIS_ALONE, MIXED]),
    *(("gemma", axes) for axes in [{"fsdp": 8}, MIXED]),
    *(("gpt2", axes) for axes in [{"fsdp": 8}, {"tensor": 4}]),
    *(("mixtral", axes) for axes in [{"expert": 4}, {"fsdp": 2, "tensor": 2, "expert": 2}]),
]


@pytest.mark.parametrize(
    ("name", "axes"),
    CASES,
    ids=lambda case: case if isinstance(case, str) else "-".join(f"{k}{v}" for k, v in case.items()),
)
def test_losses_equal_those_of_one_device(name, axes):
    expected = losses_of_one_device(name)
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses(name, axes), expected, rtol=1e-5)

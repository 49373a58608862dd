"""A vision transformer and a residual network out of Flax's own layers get the layouts that an expert would write down.

Shape legend: B images, T patches and the class token, D model, N heads, H head dim, C channels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshloom.core.topology import make_mesh
from meshloom.sharding import derive
from tests.sharding.modules import layout_of

IMAGES = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
D, N, H, INNER, CLASSES = 32, 4, 8, 64, 10


MESHES = [{"fsdp": 2, "tensor": 2}, {"fsdp": 4}]


class EncoderBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(D, rngs=rngs), nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(N, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, INNER, rngs=rngs), nnx.Linear(INNER, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(jax.nn.gelu(self.up(self.norm2(x)))))


class VisionTransformer(nnx.Module):
    """16 patches of 4x4 pixels and a class token."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.patches = nnx.Conv(3, D, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, D)))
        self.positions = nnx.Param(jnp.zeros((1, 17, D)))
        self.blocks = nnx.List([EncoderBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images).reshape(images.shape[0], -1, D)
        x = jnp.concatenate([jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, D)), x], axis=1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the channels change."""

    def __init__(self, c_in, c_out, rngs):
        stride = 1 if c_in == c_out else 2
        self.conv1 = nnx.Conv(c_in, c_out, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(c_out, rngs=rngs)
        self.conv2 = nnx.Conv(c_out, c_out, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(c_out, rngs=rngs)
        self.shortcut = nnx.Conv(c_in, c_out, (1, 1), strides=stride, rngs=rngs) if stride > 1 else None

    def __call__(self, x):
        y = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
        return jax.nn.relu((x if self.shortcut is None else self.shortcut(x)) + y)


class ResidualNetwork(nnx.Module):
    """16 channels, then 32 at half the resolution."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(*sizes, rngs) for sizes in [(16, 16), (16, 32), (32, 32)]])
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, images):
        x = nnx.max_pool(jax.nn.relu(self.stem(images)), (2, 2), (2, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def transformer_by_an_expert(fsdp, tensor):
    """Heads and inner features over `tensor`; of the rest the largest dimension over `fsdp`; no vector is stored."""
    heads = {
        **{f"attention.{name}.kernel": (fsdp, tensor, None) for name in ("query", "key", "value")},
        **{f"attention.{name}.bias": (tensor, None) for name in ("query", "key", "value")},
        "attention.out.kernel": (tensor, None, fsdp),
        "attention.out.bias": (None,),
    }
    # Without tensor the 64 inner features are the largest dimension of both.
    mlp = {
        "up.kernel": (fsdp, tensor) if tensor else (None, fsdp),
        "up.bias": (tensor,),
        "down.kernel": (tensor, fsdp) if tensor else (fsdp, None),
        "down.bias": (None,),
    }
    norms = {f"{name}.{kind}": (None,) for name in ("norm1", "norm2") for kind in ("scale", "bias")}
    return {
        "patches.kernel": (None, None, None, fsdp),
        "patches.bias": (None,),
        "class_token": (None, None, None),
        "positions": (None, None, fsdp),
        **{f"blocks.{i}.{name}": spec for i in range(2) for name, spec in {**heads, **mlp, **norms}.items()},
        "norm.scale": (None,),
        "norm.bias": (None,),
        "head.kernel": (fsdp, tensor),
        "head.bias": (tensor,),
    }


def network_by_an_expert(fsdp, tensor):
    """The channels between the two convolutions of a block over `tensor`, with the norm between them."""

    def block(grows):
        first = (None, None, fsdp, tensor) if tensor else (None, None, *((None, fsdp) if grows else (fsdp, None)))
        return {
            "conv1.kernel": first,
            "norm1.scale": (tensor,),
            "norm1.bias": (tensor,),
            "conv2.kernel": (None, None, tensor, fsdp) if tensor else (None, None, fsdp, None),
            "norm2.scale": (None,),
            "norm2.bias": (None,),
            **({"shortcut.kernel": (None, None, None, fsdp), "shortcut.bias": (None,)} if grows else {}),
        }

    return {
        "stem.kernel": (None, None, None, fsdp),
        "stem.bias": (None,),
        **{f"blocks.{i}.{name}": spec for i in range(3) for name, spec in block(grows=i == 1).items()},
        "head.kernel": (fsdp, tensor),
        "head.bias": (tensor,),
    }


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize(
    ("make", "by_an_expert"),
    [(VisionTransformer, transformer_by_an_expert), (ResidualNetwork, network_by_an_expert)],
)
def test_the_layout_is_that_of_an_expert(make, by_an_expert, axes):
    layout = layout_of(make, IMAGES, **axes)
    assert {row.name: tuple(row.spec) for row in layout.rows} == by_an_expert(
        "fsdp", "tensor" if "tensor" in axes else None
    )
    assert not layout.unknown


@pytest.mark.parametrize("make", [VisionTransformer, ResidualNetwork])
def test_loss_and_gradients_are_those_of_one_device(make):
    module, images = make(), jax.random.normal(jax.random.key(0), IMAGES.shape)
    module.set_attributes(deterministic=True, raise_if_not_found=False)
    layout = derive(module, make_mesh(MESHES[0], jax.devices()[:4]), images)
    graphdef, parameters, statistics = nnx.split(module, nnx.Param, ...)

    def loss(parameters, images):
        return jnp.mean(jnp.sin(nnx.merge(graphdef, parameters, statistics, copy=True)(images)))

    shardings = (layout.shardings, layout.batch_sharding(images.shape[0]))
    spread = jax.jit(jax.value_and_grad(loss), in_shardings=shardings)(parameters, images)
    alone = jax.jit(jax.value_and_grad(loss))(parameters, images)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(alone))
    for found, wanted in zip(*map(jax.tree.leaves, (spread, alone)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * largest)


def test_channels_carried_from_block_to_block_are_residual():
    roles = {row.name: row.roles for row in layout_of(ResidualNetwork, IMAGES, fsdp=2).rows}
    assert roles["stem.kernel"][3] == "residual"
    assert roles["blocks.0.conv1.kernel"][2:] == ("residual", "inner")
    assert roles["blocks.1.shortcut.kernel"][2:] == ("residual", "residual")
    assert roles["blocks.2.conv2.kernel"][2:] == ("inner", "residual")

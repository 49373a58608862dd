"""What XLA's partitioner computes wrongly is foreseen: these tests fail where XLA is right, and then the warning has to
go.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshloom.core.topology import make_mesh
from meshloom.sharding import derive


class Between(nnx.Module):
    """A convolution over 3 tokens between two weights, channel by channel or from 8 channels to `inner`."""

    def __init__(self, inner, grouped):
        keys = jax.random.split(jax.random.key(0), 3)
        self.up = nnx.Param(jax.random.normal(keys[0], (8, inner if grouped else 8)))
        self.within = nnx.Param(jax.random.normal(keys[1], (3, 1 if grouped else 8, inner)))
        self.down = nnx.Param(jax.random.normal(keys[2], (inner, 8)))
        self.groups = inner if grouped else 1

    def __call__(self, x):
        y = jax.lax.conv_general_dilated(
            jnp.tanh(x @ self.up),
            self.within[...],
            (1,),
            "SAME",
            dimension_numbers=("NTC", "TIO", "NTC"),
            feature_group_count=self.groups,
        )
        return x + jnp.tanh(y) @ self.down


def spread_and_alone(axes, inner, grouped):
    """The layout, and loss and gradient of the convolution's weight: on the mesh, and on one device."""
    devices = jax.devices()[: np.prod(list(axes.values()))]
    module, x = Between(inner, grouped), jax.random.normal(jax.random.key(1), (8, 8, 8))
    layout = derive(module, make_mesh(axes, devices), x)
    graphdef, parameters = nnx.split(module)
    step = jax.value_and_grad(lambda parameters, x: jnp.mean(jnp.sin(nnx.merge(graphdef, parameters)(x))))
    results = []
    for shardings in ({}, {"in_shardings": (layout.shardings, layout.batch_sharding(8, 8))}):
        loss, gradient = jax.jit(step, **shardings)(parameters, x)
        results.append((float(loss), np.asarray(gradient["within"][...])))
    alone, spread = results
    return layout, spread, alone


@pytest.mark.parametrize(
    ("axes", "inner", "times"),
    [
        ({"fsdp": 8}, 16, 1),
        ({"fsdp": 4, "tensor": 2}, 16, 1),
        ({"fsdp": 4, "expert": 2}, 16, 1),
        ({"fsdp": 2, "tensor": 4}, 18, 4),
    ],
    ids=["one axis", "channels divide", "no experts", "channels do not divide"],
)
def test_gradients_of_grouped_convolutions_are_too_large_by_what_is_foreseen(axes, inner, times):
    layout, (loss, gradient), (wanted_loss, wanted) = spread_and_alone(axes, inner, grouped=True)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, times * wanted, atol=1e-5 * np.abs(wanted).max())
    if times == 1:
        assert not layout.miscompiled
    else:
        assert f"{times} times too large" in layout.miscompiled["within"]
        assert layout.warnings == (f"within: {layout.miscompiled['within']}",)


@pytest.mark.parametrize(
    ("axes", "wrong"),
    [
        ({"context": 2, "tensor": 2}, True),
        ({"context": 4}, False),
        ({"fsdp": 2, "context": 2, "tensor": 2}, False),
        ({"fsdp": 2, "tensor": 2}, False),
    ],
    ids=str,
)
def test_values_of_convolutions_split_by_position_and_channel_are_wrong_where_foreseen(axes, wrong):
    layout, (loss, gradient), (wanted_loss, wanted) = spread_and_alone(axes, 16, grouped=False)
    right = np.isclose(loss, wanted_loss, rtol=1e-5) and np.allclose(gradient, wanted, atol=1e-5)
    assert right != wrong
    assert ("within" in layout.miscompiled) == wrong

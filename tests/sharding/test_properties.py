"""Random stacks of layers on random meshes: whatever the sizes, layouts are valid, explained, and change no number.

Shape legend: B batch, T tokens, D model, N heads, K kv heads, H head dim, F inner, E experts, W kernel width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from meshloom.core.topology import AXES, make_mesh
from meshloom.sharding import Layout, derive
from meshloom.sharding.constrain import constrained, plain
from tests.sharding.modules import attend, norm

BATCH, TOKENS = 8, 8


def drawn(rngs, *shape):
    """A weight whose products have about the scale of what goes in."""
    return nnx.Param(jax.random.normal(rngs(), shape) / math.sqrt(math.prod(shape[:-1])))


class Linear(nnx.Module):
    """An MLP with biases: gated in one fused weight, gated in two, or not at all; pre- or post-norm."""

    def __init__(self, width, rngs, *, inner, gate, post_norm):
        self.gate, self.post_norm = gate, post_norm
        self.up = drawn(rngs, width, 2 * inner if gate == "fused" else inner)
        self.beside = drawn(rngs, width, inner) if gate == "beside" else None
        self.up_bias, self.down, self.down_bias = (
            drawn(rngs, inner),
            drawn(rngs, inner, width),
            drawn(rngs, width),
        )

    def __call__(self, x):
        y = x if self.post_norm else norm(x)
        inner = y @ self.up
        if self.gate == "fused":
            gate, inner = jnp.split(inner, 2, axis=-1)
        else:
            gate = 1.0 if self.beside is None else y @ self.beside
        x = x + (jnp.tanh(gate) * jnp.tanh(inner + self.up_bias)) @ self.down + self.down_bias
        return norm(x) if self.post_norm else x


class Attention(nnx.Module):
    """Grouped-query attention: weights [D, N, H] with biases [N, H], or [N * H, D] without."""

    def __init__(self, width, rngs, *, kv_heads, group, head_dim, flat):
        self.flat, self.head_dim, heads = flat, head_dim, kv_heads * group
        if flat:
            self.q, self.o = drawn(rngs, heads * head_dim, width), drawn(rngs, width, heads * head_dim)
            self.k, self.v = (drawn(rngs, kv_heads * head_dim, width) for _ in range(2))
        else:
            self.q, self.o = drawn(rngs, width, heads, head_dim), drawn(rngs, heads, head_dim, width)
            self.k, self.v = (drawn(rngs, width, kv_heads, head_dim) for _ in range(2))
            self.q_bias, self.o_bias = drawn(rngs, heads, head_dim), drawn(rngs, width)

    def __call__(self, x):
        y = norm(x)
        if self.flat:
            q, k, v = ((y @ each.T).reshape(*x.shape[:2], -1, self.head_dim) for each in (self.q, self.k, self.v))
            return x + attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T
        q, k, v = (jnp.einsum("btd,dnh->btnh", y, each[...]) for each in (self.q, self.k, self.v))
        return x + jnp.einsum("btnh,nhd->btd", attend(q + self.q_bias, k, v), self.o[...]) + self.o_bias


class Experts(nnx.Module):
    """A mixture of experts: every token goes through all of them, weighted, or sorted to the best one."""

    def __init__(self, width, rngs, *, experts, inner, ragged):
        self.ragged, self.router = ragged, drawn(rngs, width, experts)
        self.up, self.down = drawn(rngs, experts, width, inner), drawn(rngs, experts, inner, width)

    def __call__(self, x):
        rows = norm(x).reshape(-1, x.shape[-1])
        scores = jax.nn.softmax(rows @ self.router)
        if self.ragged:
            best = jnp.argmax(scores, -1)
            order, sizes = jnp.argsort(best), jnp.bincount(best, length=scores.shape[-1])
            inner = jnp.tanh(jax.lax.ragged_dot(rows[order], self.up[...], sizes))
            y = jax.lax.ragged_dot(inner, self.down[...], sizes)[jnp.argsort(order)] * scores.max(-1, keepdims=True)
        else:
            inner = jnp.tanh(jnp.einsum("rd,edf->erf", rows, self.up[...]))
            y = jnp.einsum("erf,efd,re->rd", inner, self.down[...], scores)
        return x + y.reshape(x.shape)


class Convolution(nnx.Module):
    """Two convolutions over tokens with a channel-wise one between them."""

    def __init__(self, width, rngs, *, inner, span, groups):
        self.up, self.down = drawn(rngs, span, width, inner), drawn(rngs, 1, inner, width)
        self.within, self.bias = drawn(rngs, span, 1, inner) if groups else None, drawn(rngs, inner)

    def __call__(self, x):
        convolve = functools.partial(
            jax.lax.conv_general_dilated, window_strides=(1,), padding="SAME", dimension_numbers=("NTC", "TIO", "NTC")
        )
        y = convolve(norm(x), self.up[...]) + self.bias
        if self.within is not None:
            y = convolve(y, self.within[...], feature_group_count=y.shape[-1])
        return x + convolve(jnp.tanh(y), self.down[...])


class Stack(nnx.Module):
    """Token ids to logits: a table (used again for the logits if tied), layers, a norm."""

    def __init__(self, vocab, width, tied, layers, *, scanned):
        rngs = nnx.Rngs(0)
        self.table, self.positions = drawn(rngs, vocab, width), drawn(rngs, TOKENS, width)
        self.scale, self.unembed = nnx.Param(jnp.ones(width)), None if tied else drawn(rngs, width, vocab)
        self.scanned = scanned
        if scanned:
            make, options = layers[0]
            self.layers = nnx.vmap(lambda rngs: make(width, rngs, **options))(rngs.split(3))
        else:
            self.layers = nnx.List([make(width, rngs, **options) for make, options in layers])

    def __call__(self, tokens):
        x = self.table[tokens] + self.positions[...]
        if self.scanned:
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        x = norm(x) * self.scale
        return x @ (self.table.T if self.unembed is None else self.unembed[...])


def layer(make, **options):
    return st.tuples(st.just(make), st.fixed_dictionaries(options))


def layers(sizes, heads):
    return st.one_of(
        layer(Linear, inner=sizes, gate=st.sampled_from(["none", "beside", "fused"]), post_norm=st.booleans()),
        layer(Attention, kv_heads=heads, group=st.integers(1, 3), head_dim=st.integers(2, 5), flat=st.booleans()),
        layer(Experts, experts=st.integers(2, 6), inner=sizes, ragged=st.booleans()),
        layer(Convolution, inner=sizes, span=st.integers(1, 3), groups=st.booleans()),
    )


def stacks(sizes, heads, most):
    """Functions that make a stack of at most so many layers; sizes are drawn from `sizes`."""
    options = st.fixed_dictionaries(
        {
            "vocab": sizes,
            "width": sizes,
            "tied": st.booleans(),
            "layers": st.lists(layers(sizes, heads), min_size=1, max_size=most),
            "scanned": st.booleans(),
        }
    )
    return options.map(lambda chosen: functools.partial(Stack, **chosen))


# The same examples in every run. A failing one is small already: to shrink it would compile for minutes.
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": [HealthCheck.too_slow],
}

# All ways to write 8 as a product along the axes, `context` and `expert` among them.
FACTORS = [sizes for sizes in np.ndindex(*(4,) * len(AXES)) if sum(sizes) == 3]
MESHES = [{axis: 2**power for axis, power in zip(AXES, sizes, strict=True) if power} for sizes in FACTORS]


def layout_on(mesh, module) -> Layout:
    return derive(module, mesh, jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32))


@settings(max_examples=50, **SETTINGS)
@given(make=stacks(st.integers(2, 40), st.integers(1, 6), most=3), axes=st.sampled_from(MESHES))
def test_every_layout_is_valid_and_explained(make, axes):
    module = nnx.eval_shape(make)
    layout = layout_on(AbstractMesh(tuple(axes.values()), tuple(axes)), module)
    assert not layout.unknown
    assert [row.shape for row in layout.rows] == [leaf.shape for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    for row in layout.rows:
        used = [axis for choice in row.choices for axis in choice.axes]
        assert len(used) == len(set(used)), row
        assert set(used) <= {"fsdp", "tensor", "expert", "context"}, row
        assert row.spec == jax.sharding.PartitionSpec(*(choice.axes or None for choice in row.choices))
        for choice in row.choices:
            assert choice.reason, row
            assert bool(choice.axes) == (choice.rule is not None), row
            assert choice.size % math.prod(axes[axis] for axis in choice.axes) == 0, row
        assert row.bytes_per_device * math.prod(axes[axis] for axis in used) == row.bytes_total


EVEN = st.sampled_from([8, 16, 24])


@settings(max_examples=6, **SETTINGS)
@given(make=stacks(EVEN, st.sampled_from([2, 4]), most=2), axes=st.sampled_from(MESHES))
def test_loss_and_gradients_are_those_of_one_device(make, axes):
    layout = layout_on(make_mesh(axes), nnx.eval_shape(make))
    assume(not layout.miscompiled)  # defects of XLA's, which a warning names
    module = make()
    parameters = nnx.state(module, nnx.Param)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, TOKENS), 0, module.table.shape[0])

    def loss_of(forward):
        return lambda parameters, tokens: -jnp.mean(jax.nn.log_softmax(forward(parameters, tokens))[..., 0])

    wanted, wanted_gradient = jax.jit(jax.value_and_grad(loss_of(plain(module))))(parameters, tokens)
    spread = jax.jit(
        jax.value_and_grad(loss_of(constrained(module, layout))),
        in_shardings=(layout.shardings, layout.batch_sharding(BATCH, TOKENS)),
        out_shardings=(layout.replicated, layout.shardings),
    )
    loss, gradient = spread(parameters, tokens)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for row, found, expected in zip(layout.rows, *map(jax.tree.leaves, (gradient, wanted_gradient)), strict=True):
        scale = float(np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale, err_msg=row.name)

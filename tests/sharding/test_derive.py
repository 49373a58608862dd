"""`derive` and `Layout` as callers see them: meshes, placement, errors, explanations."""

import io
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from meshloom.core.errors import ShardingError
from meshloom.core.topology import axes_of
from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.sharding import derive, explain

EXAMPLE = jax.ShapeDtypeStruct((4, 16), jnp.float32)


class Block(nnx.Module):
    """A residual MLP of uncommon size, with dropout and batch statistics beside its parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return x + self.down(self.drop(jax.nn.relu(self.up(self.norm(x)))))


class WithExample(Block):
    def example_inputs(self):
        return (EXAMPLE,)


class Product(nnx.Module):
    """One matrix of 16 rows."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.zeros((16, width)))

    def __call__(self, x):
        return x @ self.weight


def block() -> Block:
    return Block(nnx.Rngs(0))


def abstract(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_concrete_and_abstract_modules_get_one_layout(mesh):
    concrete = derive(block(), mesh, EXAMPLE)
    assert concrete.rows == derive(nnx.eval_shape(block), abstract(fsdp=2, tensor=4), EXAMPLE).rows
    assert concrete.rows == derive(WithExample(nnx.Rngs(0)), mesh).rows


def test_specs_match_the_parameter_state(mesh):
    module = block()
    layout = derive(module, mesh, EXAMPLE)
    state = nnx.state(module, nnx.Param)
    assert jax.tree.structure(layout.specs) == jax.tree.structure(state) == jax.tree.structure(layout.shardings)
    placed = layout.place(state)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, placed)) == jax.tree.leaves(layout.shardings)
    for row, leaf in zip(layout.rows, jax.tree.leaves(placed), strict=True):
        assert leaf.addressable_shards[0].data.nbytes == row.bytes_per_device
    assert layout.bytes_per_device == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))


def test_optimizer_state_follows_the_parameters(mesh):
    module = nnx.eval_shape(block)
    layout = derive(module, mesh, EXAMPLE)
    optimizer = jax.eval_shape(optax.adamw(1e-3).init, nnx.state(module, nnx.Param))
    shardings = layout.follow(optimizer)
    assert jax.tree.structure(shardings) == jax.tree.structure(optimizer)
    adam = shardings[0]
    assert jax.tree.leaves(adam.mu) == jax.tree.leaves(adam.nu) == jax.tree.leaves(layout.shardings)
    assert adam.count.spec == PartitionSpec()


def test_explicit_axes_are_taken_as_automatic():
    explicit = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    layout = derive(block(), explicit, EXAMPLE)
    assert layout.mesh.axis_types == (AxisType.Auto,)


def test_axes_of_size_one_split_nothing():
    layout = derive(block(), abstract(data=1, fsdp=1, tensor=1, expert=1), EXAMPLE)
    assert all(row.spec == PartitionSpec(*(None for _ in row.shape)) for row in layout.rows)
    assert layout.batch_spec == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ({"data": 2, "fsdp": 4}, (("data", "fsdp"), None)),
        ({"fsdp": 4, "data": 2, "tensor": 1}, (("data", "fsdp"), None)),
        ({"data": 8, "fsdp": 1}, ("data", None)),
        ({"tensor": 8}, (None, None)),
        ({"data": 2, "fsdp": 4, "expert": 2}, (("data", "fsdp", "expert"), None)),
        ({"expert": 4, "tensor": 2}, ("expert", None)),
    ],
)
def test_batches_lie_over_data_fsdp_and_expert(axes, spec):
    assert derive(block(), abstract(**axes), EXAMPLE).batch_spec == PartitionSpec(*spec)


def test_a_batch_that_does_not_divide_is_refused_with_what_would():
    layout = derive(block(), abstract(data=2, fsdp=4), EXAMPLE)
    assert isinstance(layout.batch_sharding(16), NamedSharding)
    with pytest.raises(ShardingError, match=r"12 rows does not divide over data x fsdp = 8 devices; use 8 or 16"):
        layout.batch_sharding(12)
    with pytest.raises(ShardingError, match=r"use 8,"):
        layout.batch_sharding(3)


def test_sequences_lie_over_context():
    layout = derive(block(), abstract(fsdp=2, context=4), EXAMPLE)
    assert layout.batch_spec == PartitionSpec("fsdp", "context")
    assert derive(block(), abstract(context=4), EXAMPLE).batch_spec == PartitionSpec(None, "context")
    assert layout.batch_sharding(4, 16) == layout.batch_sharding(4)
    with pytest.raises(ShardingError, match=r"18 tokens does not divide over context = 4 devices; use 16 or 20"):
        layout.batch_sharding(4, 18)
    with pytest.raises(ShardingError, match=r"3 tokens .* use 4,"):
        layout.batch_sharding(4, 3)


@pytest.mark.parametrize(
    ("width", "axes", "spec"),
    [
        (24, {"fsdp": 2, "context": 4}, PartitionSpec(None, ("fsdp", "context"))),
        (24, {"context": 4}, PartitionSpec(None, "context")),
        (12, {"fsdp": 3, "context": 8}, PartitionSpec("context", None)),  # neither side by 24; 16 by 8
        (12, {"fsdp": 4, "context": 3}, PartitionSpec(None, ("fsdp", "context"))),
        (12, {"fsdp": 2, "context": 7}, PartitionSpec("fsdp", None)),
        (12, {"fsdp": 4, "context": 4, "tensor": 2}, PartitionSpec(("fsdp", "context"), "tensor")),
    ],
)
def test_weights_are_stored_over_fsdp_and_context_together(width, axes, spec):
    """Where neither side divides by both, by the one with more devices."""
    layout = derive(Product(width), abstract(**axes), jax.ShapeDtypeStruct((4, 16), jnp.float32))
    (row,) = layout.rows
    assert row.spec == spec
    assert set(row.stored) == {axis for entry in spec for axis in axes_of(entry)} - {"tensor"}


def test_an_unknown_axis_is_refused_with_the_known_ones():
    with pytest.raises(ShardingError, match=r"'model' is unknown; axes are any of data, fsdp, expert, "):
        derive(block(), abstract(data=2, model=4), EXAMPLE)


def test_a_failed_trace_says_what_to_pass():
    with pytest.raises(
        ShardingError, match=r"Block cannot be traced with inputs \(float32\[4, 5\]\).*Pass example inputs"
    ):
        derive(block(), abstract(fsdp=2), jax.ShapeDtypeStruct((4, 5), jnp.float32))


def test_missing_example_inputs_are_asked_for():
    with pytest.raises(ShardingError, match=r"Block has no example_inputs\(\): pass what it is called with"):
        derive(block(), abstract(fsdp=2))


def test_an_abstract_mesh_places_nothing():
    layout = derive(block(), abstract(fsdp=2), EXAMPLE)
    with pytest.raises(ShardingError, match="no devices to place"):
        layout.place(nnx.state(block(), nnx.Param))


def test_explain_gives_spec_rule_bytes_and_reasons():
    text = explain(derive(block(), abstract(fsdp=2, tensor=4), EXAMPLE), "up.kernel")
    assert "P(fsdp, tensor)  by the store + pair rule" in text
    assert "256 B of 2 KiB per device" in text
    assert "(32, inner) tensor: inner: produced by up.kernel, contracted by down.kernel; one reduction per pair" in text
    assert "(16, residual) fsdp: the largest dimension left that divides by fsdp=2" in text


def test_explain_says_why_something_stays_whole():
    layout = derive(block(), abstract(fsdp=7, tensor=5), EXAMPLE)
    text = explain(layout, "up.kernel")
    assert "32 inner features do not divide over tensor=5; 32 does not divide by fsdp=7" in text
    assert "a vector" in explain(layout, "norm.scale")


def test_explain_knows_the_nearest_name():
    with pytest.raises(ShardingError, match=r"no parameter is named 'up.kernl'; nearest are up.kernel"):
        explain(derive(block(), abstract(fsdp=2), EXAMPLE), "up.kernl")


def test_the_table_lists_every_parameter():
    layout = derive(block(), abstract(fsdp=2, tensor=4), EXAMPLE)
    console = Console(width=160, file=io.StringIO())
    console.print(layout.table())
    text = console.file.getvalue()
    assert all(row.name in text for row in layout.rows)
    assert "fsdp=2 tensor=4" in text


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    experts=st.integers(2, 6),
    vocab=st.integers(5, 40),
    axes=st.fixed_dictionaries({axis: st.integers(1, 6) for axis in ("data", "fsdp", "tensor", "expert")}),
)
def test_whatever_the_sizes_every_split_divides_and_no_axis_is_used_twice(kv_heads, group, experts, vocab, axes):
    config = DecoderConfig(
        vocab_size=vocab,
        d_model=12,
        n_layers=2,
        n_heads=kv_heads * group,
        n_kv_heads=kv_heads,
        head_dim=4,
        moe=MoEConfig(experts, 1, 8),
        scan_layers=True,
    )
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    layout = derive(module, abstract(**axes), *module.example_inputs(2, 6))
    for row in layout.rows:
        used = [axis for choice in row.choices for axis in choice.axes]
        assert len(used) == len(set(used)), row
        assert all(choice.size % math.prod(axes[axis] for axis in choice.axes) == 0 for choice in row.choices), row
        assert row.bytes_per_device * math.prod(axes[axis] for axis in used) == row.bytes_total


class Odd(nnx.Module):
    def __init__(self):
        self.matrix = nnx.Param(jnp.zeros((8, 8)))
        self.unused = nnx.Param(jnp.zeros((8, 8)))

    def __call__(self, x):
        return jnp.linalg.qr(x @ self.matrix)[0] if x.ndim == 2 else x


def test_a_primitive_without_a_rule_ties_nothing_and_is_reported():
    layout = derive(Odd(), abstract(fsdp=2), jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert layout.unknown
    assert layout.row("unused").spec == PartitionSpec("fsdp", None)


def lone(*shape: int, stack: int = 0):
    """A module with one weight of this shape, contracted with the input; scanned if it is a stack."""

    class Lone(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.zeros((stack, *shape) if stack else shape))

        def __call__(self, x):
            if not stack:
                return x @ self.weight
            return jax.lax.scan(lambda x, w: (x @ w, None), x, self.weight[...])[0]

    return derive_lone(Lone, shape[0])


def derive_lone(make, width):
    return lambda **axes: derive(nnx.eval_shape(make), abstract(**axes), jax.ShapeDtypeStruct((4, width), jnp.float32))


def test_a_large_weight_that_stays_whole_is_a_warning_with_its_reason_and_a_remedy():
    (warning,) = lone(509, 521)(fsdp=4).warnings
    assert warning.startswith("weight, float32[509, 521], 1.01 MiB, lies whole on every device. ")
    assert "dimension 0 (509, feature): 509 does not divide by fsdp=4; " in warning
    assert "dimension 1 (521, vocab): 521 does not divide by fsdp=4. " in warning
    assert warning.endswith("What would help: dimension 1 padded from 521 to 524")
    (warning,) = lone(510, 521)(fsdp=4).warnings
    assert warning.endswith("padded from 521 to 524, or fsdp=2")
    (warning,) = lone(510, 521)(tensor=2).warnings
    assert "521 vocabulary rows do not divide over tensor=2" in warning
    assert warning.endswith("What would help: an fsdp axis, over which dimension 0 divides")
    (warning,) = lone(511, 511, stack=4)(fsdp=2).warnings
    assert "stack" not in warning
    assert warning.endswith("What would help: dimension 1 padded from 511 to 512")


def test_what_is_split_or_small_or_a_vector_is_no_warning():
    assert not lone(512, 521)(fsdp=4).warnings
    assert not lone(509, 511)(fsdp=4).warnings  # 4 KiB below the limit
    assert not lone(509, 521)(data=4).warnings

    class Scaled(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.zeros(2**19 + 1))

        def __call__(self, x):
            return x * self.scale

    assert not derive_lone(Scaled, 2**19 + 1)(fsdp=2).warnings


def test_an_unknown_operation_is_a_warning():
    layout = derive(Odd(), abstract(fsdp=2), jax.ShapeDtypeStruct((8, 8), jnp.float32))
    assert [warning.split(" and is not known")[0] for warning in layout.warnings] == ["the operation qr occurs once"]


def test_a_module_without_parameters_has_an_empty_layout():
    class Nothing(nnx.Module):
        def __call__(self, x):
            return x

    layout = derive(Nothing(), abstract(fsdp=2), EXAMPLE)
    assert layout.rows == ()
    assert layout.bytes_per_device == 0
    assert jax.tree.leaves(layout.specs) == []

"""What the algebra of split, broadcast and partial says, the compiler does: byte for byte, on eight devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshloom.sharding.algebra import BROADCAST, PARTIAL, Partial, Split, conversion, cost, local_bytes, text
from meshloom.sharding.reshaping import reshaped
from meshloom.sharding.signatures import signatures
from meshloom.sharding.submesh import factored, merged
from meshloom.sharding.trace import trace
from tests.sharding.hlo import bytes_by_kind

MESH = {"a": 4, "b": 2}
ARRAY = jax.ShapeDtypeStruct((16, 32), jnp.float32)
SIZE = 16 * 32 * 4
FIRST, SECOND = Split(0), Split(1)


def devices(**axes: int):
    count = math.prod(axes.values())
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:count], axis_types=types)


def spec(placement, rank: int = 2) -> PartitionSpec:
    along = (tuple(axis for axis, state in placement.items() if state == Split(d)) for d in range(rank))
    return PartitionSpec(*(axes or None for axes in along))


def total(collectives) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in collectives:
        found[each.kind] = found.get(each.kind, 0) + each.bytes
    return found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": FIRST}, {}),
        ({"b": SECOND}, {}),
        ({"a": FIRST, "b": FIRST}, {}),
        ({"a": FIRST, "b": SECOND}, {}),
        ({"a": FIRST}, {"a": SECOND}),
        ({"a": FIRST, "b": FIRST}, {"a": SECOND, "b": SECOND}),
        ({"a": FIRST, "b": SECOND}, {"a": FIRST}),
        ({"a": FIRST, "b": SECOND}, {"b": SECOND}),
        ({"a": FIRST, "b": FIRST}, {"a": FIRST}),
        ({}, {"a": FIRST}),
        ({"b": SECOND}, {"a": FIRST, "b": SECOND}),
        ({"a": FIRST}, {"a": FIRST}),
    ],
    ids=lambda placement: text(placement),
)
def test_a_conversion_takes_the_collectives_of_the_compiled_identity(before, after):
    mesh = devices(**MESH)
    shardings = (NamedSharding(mesh, spec(each)) for each in (before, after))
    source, target = shardings
    program = jax.jit(lambda x: x, in_shardings=source, out_shardings=target).lower(ARRAY).compile()
    assert total(conversion(before, after, SIZE, MESH)) == bytes_by_kind(program)


@pytest.mark.parametrize(
    ("before", "after", "sum_up"),
    [
        ({"a": PARTIAL}, {}, lambda x: jax.lax.psum(x, "a")),
        ({"a": PARTIAL, "b": PARTIAL}, {}, lambda x: jax.lax.psum(x, ("a", "b"))),
        ({"a": PARTIAL}, {"a": FIRST}, lambda x: jax.lax.psum_scatter(x, "a", tiled=True)),
        (
            {"a": PARTIAL, "b": PARTIAL},
            {"a": FIRST},
            lambda x: jax.lax.psum(jax.lax.psum_scatter(x, "a", tiled=True), "b"),
        ),
    ],
    ids=["all-reduce", "both axes", "reduce-scatter", "scattered before it is reduced"],
)
def test_partial_sums_take_the_collectives_of_the_same_written_by_hand(before, after, sum_up):
    mesh = devices(**MESH)
    by_hand = jax.shard_map(sum_up, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec(after), check_vma=False)
    program = jax.jit(by_hand).lower(ARRAY).compile()
    assert total(conversion(before, after, SIZE, MESH)) == bytes_by_kind(program)


@pytest.mark.parametrize("after", [{"a": FIRST}, {"a": PARTIAL}, {"a": FIRST, "b": SECOND}])
def test_what_is_whole_is_split_or_made_partial_for_nothing(after):
    assert conversion({}, after, SIZE, MESH) == ()


def test_the_smaller_gather_comes_first():
    first, second = conversion({"a": FIRST, "b": SECOND}, {}, SIZE, MESH)
    assert (first.axes, first.bytes, second.axes, second.bytes) == (("b",), SIZE / 4, ("a",), SIZE)


def test_axes_of_one_device_move_nothing():
    assert conversion({"a": FIRST, "b": PARTIAL}, {}, SIZE, {"a": 1, "b": 1}) == ()


STATES = st.sampled_from([FIRST, SECOND, BROADCAST, PARTIAL])


@given(st.fixed_dictionaries({"a": STATES, "b": STATES}), st.fixed_dictionaries({"a": STATES, "b": STATES}))
def test_the_last_result_is_what_a_device_then_holds(before, after):
    """However many steps it takes, what is left is the local part of the new placement."""
    steps = conversion(before, after, SIZE, MESH)
    if steps:
        assert steps[-1].bytes == local_bytes(after, SIZE, MESH)
    assert cost(before, after, SIZE, MESH) == sum(each.bytes for each in steps)
    assert conversion(after, after, SIZE, MESH) == ()


def test_states_read_like_the_paper():
    assert text({"fsdp": FIRST, "tensor": PARTIAL, "data": BROADCAST}) == "fsdp S(0), tensor P"
    assert text({}) == "B"


# -- axes in factors --


def test_an_axis_that_splits_two_dimensions_is_shown_by_its_factors():
    mesh = factored({"tensor": 4, "fsdp": 3})
    assert mesh == {"fsdp.0": 3, "tensor.0": 2, "tensor.1": 2}
    assert merged({"tensor.0": FIRST, "tensor.1": FIRST, "fsdp.0": SECOND}, mesh) == {"fsdp": SECOND, "tensor": FIRST}
    assert merged({"tensor.0": FIRST, "tensor.1": SECOND}, mesh) == {"tensor.0": FIRST, "tensor.1": SECOND}


# -- reshapes --


def local(array: np.ndarray, placement, mesh, place) -> np.ndarray:
    """What the device at `place` (axis -> index) holds."""
    for axis, ways in mesh.items():
        if isinstance(state := placement.get(axis), Split):
            array = np.split(array, ways, state.dimension)[place[axis]]
    return array


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.randoms(use_true_random=False), st.data())
def test_a_reshape_keeps_on_every_device_what_it_says(before, random, data):
    factors = [prime for size in before for prime in {4: [2, 2], 6: [2, 3]}.get(size, [size])]
    after: list[int] = []
    for factor in factors:  # the same elements in the same order, cut elsewhere
        if after and random.random() < 0.5:
            after[-1] *= factor
        else:
            after.append(factor)
    mesh = {"a": 2, "b": 2, "c": 3}
    left, placement = list(before), {}
    for axis, ways in mesh.items():
        fitting = [dimension for dimension, size in enumerate(left) if size % ways == 0]
        if fitting and data.draw(st.booleans()):
            dimension = data.draw(st.sampled_from(fitting))
            placement[axis] = Split(dimension)
            left[dimension] //= ways
    needed, result = reshaped(placement, before, after, mesh)
    assert all(needed[axis] in (state, BROADCAST) for axis, state in placement.items())
    array = np.arange(math.prod(before)).reshape(before)
    for place in np.ndindex(*mesh.values()):
        device = dict(zip(mesh, place, strict=True))
        own, made = (
            local(array, needed, mesh, device),
            local(array.reshape(after), result, mesh, device),
        )
        np.testing.assert_array_equal(own.ravel(), made.ravel())


@pytest.mark.parametrize(
    ("before", "after", "placement", "wanted"),
    [
        ((4, 8, 16), (4, 8, 2, 8), {"tensor": Split(2)}, {"tensor": Split(2)}),
        ((4, 8, 2, 8), (4, 8, 16), {"tensor": Split(2)}, {"tensor": Split(2)}),
        ((4, 8, 16), (32, 16), {"fsdp": FIRST}, {"fsdp": FIRST}),
        ((4, 8, 16), (32, 16), {"tensor": SECOND}, {}),
        ((2, 8, 16), (16, 16), {"fsdp": FIRST, "tensor": SECOND}, {"fsdp": FIRST, "tensor": FIRST}),
    ],
    ids=["heads", "merged heads", "rows", "tokens of whole rows", "tokens of one row each"],
)
def test_a_split_goes_on_if_it_stays_in_one_piece(before, after, placement, wanted):
    needed, result = reshaped(placement, before, after, {"fsdp": 2, "tensor": 2})
    assert result == wanted
    assert [axis for axis in placement if needed[axis] == BROADCAST] == [
        axis for axis in placement if axis not in wanted
    ]


# -- signatures --

X, Y = jnp.zeros((4, 6, 8)), jnp.zeros((4, 8, 10))
IDS = jnp.zeros((4, 6), jnp.int32)
# Of top_k XLA's CPU compiler gathers the operand, whatever splits it.
OPERATORS = {
    "elementwise": (lambda x, y: x * y, (X, X)),
    "addition": (lambda x, y: x + y, (X, X)),
    "broadcast": (lambda x, y: x * y, (X, jnp.zeros((1, 6, 8)))),
    "cast": (lambda x: x.astype(jnp.bfloat16), (X,)),
    "transpose": (lambda x: x.transpose(2, 0, 1), (X,)),
    "repeated": (lambda x: jax.lax.broadcast_in_dim(x, (4, 6, 2, 8), (0, 1, 3)), (X,)),
    "sum": (lambda x: jnp.sum(x, 1), (X,)),
    "maximum": (lambda x: jnp.max(x, (0, 2)), (X,)),
    "product": (jax.lax.dot, (jnp.zeros((4, 8)), jnp.zeros((8, 6)))),
    "batched product": (jax.lax.batch_matmul, (X, Y)),
    "lookup": (lambda table, ids: jax.lax.gather(table, ids[..., None], LOOKUP, (1, 10)), (jnp.zeros((16, 10)), IDS)),
    "concatenation": (lambda x, y: jnp.concatenate([x, y], 1), (X, X)),
    "slice": (lambda x: jax.lax.slice_in_dim(x, 0, 3, axis=1), (X,)),
    "update": (lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, 2, 1), (X, X[:, :2])),
    "sort": (lambda x: jnp.sort(x, 1), (X,)),
    "running sum": (lambda x: jnp.cumsum(x, 2), (X,)),
    "padding": (lambda x: jnp.pad(x, ((0, 0), (0, 2), (0, 0))), (X,)),
    "convolution": (
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1,), "SAME"),
        (jnp.zeros((4, 6, 8)), jnp.zeros((10, 6, 3))),
    ),
}
LOOKUP = jax.lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0,))


class Operator(nnx.Module):
    """One operator on what is passed in."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_signature_costs_nothing_and_a_partial_result_one_reduction(name):
    """Compiled with operands and results as each signature says; partial results are asked for as a whole."""
    function, inputs = OPERATORS[name]
    program = trace(Operator(function), inputs)
    (step,) = (each for each in program.steps if program.outputs[0] in each.outputs and signatures(each))
    mesh, checked = devices(x=2), 0
    for signature in signatures(step):
        states = dict(zip(step.inputs, signature.operands, strict=True))
        if PARTIAL in signature.operands:
            continue  # there is no writing such an operand down
        if any(value not in program.inputs and state != BROADCAST for value, state in states.items()):
            continue  # nor one that is made inside
        placed = [spec({"x": states.get(value, BROADCAST)}, len(value.dims)) for value in program.inputs]
        result = signature.results[0]
        out = PartitionSpec() if isinstance(result, Partial) else spec({"x": result}, len(step.outputs[0].dims))
        compiled = (
            jax.jit(
                function,
                in_shardings=[NamedSharding(mesh, each) for each in placed],
                out_shardings=NamedSharding(mesh, out),
            )
            .lower(*inputs)
            .compile()
        )
        size = step.equation.outvars[0].aval
        reduced = {"all_reduce": size.size * size.dtype.itemsize} if isinstance(result, Partial) else {}
        assert bytes_by_kind(compiled) == reduced, signature
        checked += 1
    assert checked

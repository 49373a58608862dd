"""A mixture of experts is the same on one device and over every mesh, and no weight leaves the device of its expert."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from meshloom.core.ahead import target_devices
from meshloom.core.hlo import parse
from meshloom.core.program_report import report
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import QArray, quantize, routed_experts, top_experts
from meshloom.pallas_kernels.dispatch import Implementation, Target, explain
from meshloom.pallas_kernels.matmul.experts import local, spread
from meshloom.pallas_kernels.matmul.experts.rows import EXCHANGES, RowsSpec, ring_gathered, ring_scattered
from tests.compilers import needs_tpu
from tests.pallas_kernels.schedules import permutes

E, D, F, K = 8, 16, 24, 2
ROWS = (4, 6)
MESHES = [
    {"expert": 4},
    {"tensor": 4},
    {"fsdp": 4, "expert": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 2, "context": 2, "expert": 2},
    {"fsdp": 2, "expert": 4},
]


def arrays(dtype=jnp.float32):
    """Rows, weights of their experts, gate, up and down."""
    rng = np.random.default_rng(0)
    shapes = ((*ROWS, D), (*ROWS, K), (E, F, D), (E, F, D), (E, D, F))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def chosen():
    rng = np.random.default_rng(1)
    return jnp.asarray(np.stack([rng.permutation(E)[:K] for _ in range(math.prod(ROWS))]).reshape(*ROWS, K), jnp.int32)


def dense(numbers, x, weights, gate, up, down):
    """Every row through all experts, weighted by zero where they are not its own."""
    inner = jax.nn.silu(jnp.einsum("btd,efd->btef", x, gate)) * jnp.einsum("btd,efd->btef", x, up)
    share = jnp.sum(jax.nn.one_hot(numbers, E) * weights[..., None], axis=2)
    return jnp.einsum("btef,edf,bte->btd", inner, down, share)


def ours(numbers, x, weights, gate, up, down):
    return routed_experts(x, weights, numbers, gate, up, down, activation=jax.nn.silu)


def of_mesh(axes):
    return make_mesh(axes, jax.devices()[: math.prod(axes.values())])


def with_gradients(function, operands):
    """The result and the gradients of all operands, by one made-up gradient of the result."""
    by = jnp.asarray(np.random.default_rng(2).normal(size=(*ROWS, D)), operands[0].dtype)

    def run(*operands):
        out, pull = jax.vjp(function, *operands)
        return out, *pull(by)

    return jax.jit(run)


def difference(one, two):
    return max(
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


@functools.cache
def expected():
    """Values and gradients of `dense` for `arrays()` and `chosen()`."""
    operands, numbers = arrays(), chosen()
    return with_gradients(lambda *operands: dense(numbers, *operands), operands)(*operands)


@pytest.mark.parametrize("axes", [None, *MESHES], ids=str)
def test_values_and_gradients_are_those_of_all_experts_for_every_row(axes):
    operands, numbers = arrays(), chosen()
    run = with_gradients(lambda *operands: ours(numbers, *operands), operands)
    if axes is None:
        got = run(*operands)
    else:
        with jax.set_mesh(of_mesh(axes)):
            got = run(*operands)
    assert difference(got, expected()) < 1e-6  # 3e-7


@pytest.mark.parametrize("axes", [{"expert": 4, "tensor": 2}, {"fsdp": 2, "expert": 4}], ids=str)
def test_int8_experts_over_a_mesh_are_those_of_one_device_and_learn_nothing(axes):
    x, weights, *matrices = arrays()
    frozen = [quantize(each) for each in matrices]
    assert isinstance(frozen[0], QArray)

    def function(x, weights):
        return ours(chosen(), x, weights, *frozen)

    expected = with_gradients(function, (x, weights))(x, weights)
    with jax.set_mesh(of_mesh(axes)):
        got = with_gradients(function, (x, weights))(x, weights)
    assert difference(got, expected) < 1e-6


def test_a_number_of_no_expert_gives_zeros_on_a_mesh_too():
    operands, numbers = arrays(), chosen().at[0, 0].set(jnp.array([-1, E], jnp.int32))
    with jax.set_mesh(of_mesh({"expert": 4})):
        out, *gradients = with_gradients(lambda *operands: ours(numbers, *operands), operands)(*operands)
    assert not any(each[0, 0].any() for each in (out, *gradients[:2]))
    assert out[0, 1].all()


@pytest.mark.parametrize("axes", [None, {"expert": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}], ids=str)
def test_what_the_room_for_other_rows_holds_reaches_nothing(axes, monkeypatch):
    def spoiled(values, sizes):
        there = jnp.arange(len(values)) < jnp.sum(sizes)
        return jnp.where(there[:, None] if values.ndim == 2 else there, values, jnp.nan)

    product, mapped = local._product, local.map_rows
    monkeypatch.setattr(local, "_product", lambda x, w, sizes, **how: spoiled(product(x, w, sizes, **how), sizes))
    monkeypatch.setattr(
        local,
        "map_rows",
        lambda f, count, *x, **how: jax.tree.map(lambda each: spoiled(each, count), mapped(f, count, *x, **how)),
    )
    operands, numbers = arrays(), chosen().at[0, 0].set(jnp.array([-1, E], jnp.int32))
    run = with_gradients(lambda *operands: ours(numbers, *operands), operands)
    exact = with_gradients(lambda *operands: dense(numbers, *operands), operands)(*operands)
    with jax.set_mesh(of_mesh(axes or {"fsdp": 1})):
        assert difference(run(*operands), exact) < 1e-6


def test_every_row_may_want_the_experts_of_one_device():
    operands, numbers = arrays(), jnp.broadcast_to(jnp.array([1, 0], jnp.int32), (*ROWS, K))
    with jax.set_mesh(of_mesh({"expert": 4})):
        got = jax.jit(ours)(numbers, *operands)
    assert difference(got, dense(numbers, *operands)) < 1e-6


def collectives_of(axes, function, operands):
    """(kind, axes) -> bytes of results in the compiled program."""
    mesh = of_mesh(axes)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*operands).compile()
    return {(each.kind, each.axes): each.bytes for each in report(compiled, dict(mesh.shape)).collectives}


def test_rows_of_a_step_of_serving_take_one_sum_and_nothing_else():
    x, weights, *matrices = arrays()
    mesh, over = of_mesh({"expert": 4, "tensor": 2}), jax.sharding.PartitionSpec
    specs = (over("expert", "tensor"), over("expert", "tensor"), over("expert", None, "tensor"))
    placed = [jax.device_put(m, jax.NamedSharding(mesh, spec)) for m, spec in zip(matrices, specs, strict=True)]
    flat = (x.reshape(-1, D), weights.reshape(-1, K), *placed)
    numbers = chosen().reshape(-1, K)
    moved = collectives_of(
        {"expert": 4, "tensor": 2},
        lambda *operands: routed_experts(*operands[:2], numbers, *operands[2:], activation=jax.nn.silu),
        flat,
    )
    assert moved == {("all_reduce", ("expert", "tensor")): x.size * 4}


def test_the_largest_scores_are_found_where_their_rows_are():
    scores = jnp.asarray(np.random.default_rng(3).normal(size=(8, 6, E)), jnp.float32)
    mesh = of_mesh({"fsdp": 4, "expert": 2})
    placed = jax.device_put(scores, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))

    def loss(scores):
        best, numbers = top_experts(scores, K)
        return jnp.sum(best * best), numbers

    moved = collectives_of({"fsdp": 4, "expert": 2}, jax.grad(loss, has_aux=True), (placed,))
    assert not moved
    with jax.set_mesh(mesh):
        gradient, numbers = jax.jit(jax.grad(loss, has_aux=True))(placed)
    assert (numbers == jax.lax.top_k(scores, K)[1]).all()
    np.testing.assert_allclose(gradient, jax.grad(loss, has_aux=True)(scores)[0])


# -- rows that go around --


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_ring_brings_what_a_gather_and_a_scatter_bring(devices):
    mesh = make_mesh({"expert": devices}, jax.devices()[:devices])
    x = jnp.asarray(np.random.default_rng(4).integers(-9, 9, (devices * 2, 3)), jnp.float32)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def both(x):
        own = x * (1 + jax.lax.axis_index("expert"))
        every, gathered = ring_gathered(own, "expert"), jax.lax.all_gather(own, "expert", axis=0, tiled=True)
        summed = jax.lax.psum_scatter(every * own[:1], "expert", scatter_dimension=0, tiled=True)
        return jnp.stack([jnp.sum(every == gathered), jnp.sum(ring_scattered(every * own[:1], "expert") == summed)])

    counts = jax.jit(both)(x).reshape(devices, 2)
    assert (counts == jnp.array([devices * 2 * 3, 2 * 3])).all()


def test_a_tpu_passes_rows_around_and_others_gather_them():
    def reasons(target: Target, devices: int = 4) -> list[str | None]:
        return [row.reason for row in explain(EXCHANGES, RowsSpec(devices), target)]

    assert reasons(Target("tpu", "TPU v5 lite")) == [None, None]
    assert reasons(Target("tpu", "TPU v5p"), 32)[0] == "it is written out for up to 16 devices, not 32"
    assert reasons(Target("cpu", "cpu")) == ["it is for TPUs, not for cpu", None]


def test_experts_whose_rows_go_around_are_those_of_one_device(monkeypatch):
    (ring, _) = EXCHANGES
    monkeypatch.setattr(spread, "EXCHANGES", (Implementation("ring", ring.run, lambda spec, target: None),))
    operands, numbers = arrays(), chosen()
    with jax.set_mesh(of_mesh({"expert": 4})):
        program = with_gradients(lambda *operands: ours(numbers, *operands), operands).lower(*operands).compile()
    assert "collective-permute" in program.as_text()
    assert difference(program(*operands), expected()) < 1e-6


@functools.cache
def hops_on(text: str, tokens=512, size=256, inner=256, experts=4, k=1) -> list[tuple[bool, int]]:
    """Of every hop of whole rows in a layer that is computed again: whether it is of the backward pass, and how many
    kernels run beside it. Nothing else moves but a few numbers of each row, by hops as well."""
    mesh = make_mesh({"expert": 4}, target_devices(parse_devices(text)))

    def array(dtype, *shape: int):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))

    rows = [array(jnp.bfloat16, 4, tokens, size), array(jnp.bfloat16, 4, tokens, k)]
    matrices = [array(jnp.bfloat16, experts, inner, size)] * 2 + [array(jnp.bfloat16, experts, size, inner)]

    def gradients(numbers, *operands):
        out, pull = jax.vjp(jax.checkpoint(functools.partial(ours, numbers)), *operands)
        return out, *pull(out)

    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(array(jnp.int32, 4, tokens, k), *rows, *matrices)
        module = parse(lowered.compile().as_text())
    opcodes = {each.opcode for computation in module.computations.values() for each in computation.instructions}
    assert not opcodes & {"all-gather", "all-gather-start", "reduce-scatter", "all-reduce", "all-to-all"}
    whole = [pair for pair in permutes(module) if pair[0].shapes[0].text == f"bf16[1,{tokens},{size}]"]
    return [("backward" in each.operation, beside) for each, beside in whole]


@needs_tpu
@pytest.mark.parametrize(
    ("text", "least"),
    [("v5e:2x2", 3), *(pytest.param(each, 2, marks=pytest.mark.slow) for each in ("v5p:2x2x1", "v6e:2x2"))],
)
def test_a_tpu_makes_gradients_of_weights_while_those_of_rows_travel(text, least):
    hops = hops_on(text)
    # Rows, twice, since they are gathered again; gradients of the result; sums of both passes.
    assert len(hops) == 3 * (2 + 1 + 2)
    assert sum(backward and beside > 0 for backward, beside in hops[-3:]) >= least


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize(("text", "least"), [("v5e:2x2", 5), ("v5p:2x2x1", 2), ("v6e:2x2", 2)])
def test_in_a_layer_of_mixtral_rows_travel_beside_kernels_in_the_backward_pass(text, least):
    hops = hops_on(text, tokens=4096, size=4096, inner=14336, experts=8, k=2)
    assert sum(backward and beside > 0 for backward, beside in hops) >= least


@needs_tpu
@pytest.mark.parametrize(("text", "activation"), [("v5e:2x2", jax.nn.silu), ("v6e:2x2", jax.nn.gelu)])
def test_on_a_tpu_kernels_alone_touch_the_room_for_what_gate_and_up_make(text, activation):
    mesh = make_mesh({"expert": 4}, target_devices(parse_devices(text)))

    def array(dtype, *shape: int):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))

    rows = [array(jnp.bfloat16, 4, 512, 256), array(jnp.bfloat16, 4, 512, 1)]
    matrices = [array(jnp.bfloat16, 4, 384, 256)] * 2 + [array(jnp.bfloat16, 4, 256, 384)]

    def gradients(numbers, *operands):
        def layer(x, weights, *matrices):
            return routed_experts(x, weights, numbers, *matrices, activation=activation)

        out, pull = jax.vjp(layer, *operands)
        return out, *pull(out)

    with jax.set_mesh(mesh):
        lowered = jax.jit(gradients).lower(array(jnp.int32, 4, 512, 1), *rows, *matrices)
        module = parse(lowered.compile().as_text())
    makers = {
        each.opcode
        for computation in module.computations.values()
        for each in computation.instructions
        if each.shapes and each.shapes[0].text == "bf16[2048,384]"
    }
    assert "custom-call" in makers
    assert makers <= {"custom-call", "get-tuple-element", "bitcast", "tuple", "parameter"}


@needs_tpu
def test_and_gate_and_up_again_while_gradients_of_the_result_travel():
    assert any(backward and beside for backward, beside in hops_on("v5e:2x2")[:-3])

"""Costs that can be counted on paper: a two-layer MLP on a few devices, and rings over a network."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from meshloom.core.hardware import chip_named
from meshloom.core.program_report import Collective
from meshloom.core.topology import Level, network, parse_devices
from meshloom.pallas_kernels import routed_experts, top_experts
from meshloom.sharding.collectives import Span, axis_spans, seconds
from meshloom.sharding.cost import OVERLAP, Pricer, split_of
from meshloom.sharding.rules import decide
from meshloom.sharding.work import ROWS, forward_work, training_work

LENGTH, WIDTH, INNER = 16, 32, 128
TOKENS = ROWS * LENGTH


class MLP(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Param(jnp.zeros((INNER, WIDTH))), nnx.Param(jnp.zeros((WIDTH, INNER)))

    def __call__(self, x):
        return x + jax.nn.relu(x @ self.up.T) @ self.down.T


class Mixture(nnx.Module):
    """Every row through two of eight experts."""

    def __init__(self):
        self.router = nnx.Param(jnp.zeros((8, WIDTH)))
        self.gate, self.up = (nnx.Param(jnp.zeros((8, INNER, WIDTH))) for _ in range(2))
        self.down = nnx.Param(jnp.zeros((8, WIDTH, INNER)))

    def __call__(self, x):
        weights, chosen = top_experts(x @ self.router.T, 2)
        matrices = self.gate[...], self.up[...], self.down[...]
        return x + routed_experts(x, weights, chosen, *matrices, activation=jax.nn.silu)


INPUTS = (jax.ShapeDtypeStruct((ROWS, LENGTH, WIDTH), jnp.float32),)


def works(make=MLP):
    module = nnx.eval_shape(make)
    forward, program, roles = forward_work(module, INPUTS)
    return forward, training_work(module, INPUTS, program, roles), program, roles


def test_flops_of_an_mlp_are_two_products_forward_and_three_backward():
    forward, step, *_ = works()
    product = 2 * TOKENS * WIDTH * INNER
    assert forward.total_flops == 2 * product
    # No gradient of the inputs is wanted: one product less than twice the forward pass.
    assert step.total_flops == 5 * product


def test_bytes_of_an_mlp_are_its_operands_and_results():
    forward, *_ = works()
    assert sum(forward.weight_bytes.values()) == 2 * WIDTH * INNER * 4
    assert sum(forward.activation_bytes.values()) == 2 * TOKENS * (WIDTH + INNER) * 4


def test_tensor_halves_the_flops_of_an_mlp_and_costs_one_reduction():
    forward, _, program, roles = works()
    mesh = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 2}
    rules, _ = decide(program, roles, mesh)
    split = split_of(forward, rules, mesh)
    pricer = Pricer(chip_named("h100"), parse_devices("h100:2"), mesh, "float32")
    (group,) = pricer.groups(forward, split, ROWS)
    assert group.flops == forward.total_flops / 2
    (reduction,) = pricer.partial_sums(forward, split, ROWS)
    assert (reduction.kind, reduction.axis, reduction.bytes) == ("all_reduce", "tensor", TOKENS * WIDTH * 4)


def test_fsdp_gathers_each_weight_and_scatters_each_gradient():
    *_, program, roles = works()
    mesh = {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}
    rules, _ = decide(program, roles, mesh)
    pricer = Pricer(chip_named("h100"), parse_devices("h100:8"), mesh, "float32")
    found = pricer.weights_and_gradients(rules)
    moved = pricer.breakdown((), found, 0.0).bytes_by_kind
    weights = 2 * WIDTH * INNER * 4
    assert moved == {"all_gather": weights, "reduce_scatter": weights / 4, "all_reduce": weights / 4}


@pytest.mark.parametrize("which", [0, 1], ids=["forward", "step"])
def test_over_expert_a_device_does_its_experts_part_of_the_rows_of_all(which):
    """No more than where each has all experts for its own rows; the router and what precedes it are not done again."""
    found = works(Mixture)
    work, flops, read = found[which], [], []
    for mesh in ({"fsdp": 8}, {"fsdp": 2, "expert": 4}):
        rules, _ = decide(*found[2:], mesh)
        pricer = Pricer(chip_named("h100"), parse_devices("h100:8"), mesh, "float32")
        split = split_of(work, rules, mesh)
        flops.append({group.name: group.flops for group in pricer.groups(work, split, 1)})
        read.append(sum(split.of_weights(amount, dims) for (_, dims), amount in work.weight_bytes.items()))
    assert flops[0] == flops[1]
    assert read[1] < 0.3 * read[0]  # each reads a quarter of the experts


def test_over_expert_rows_are_gathered_and_sums_scattered_where_rows_lie_over_it():
    forward, _, program, roles = works(Mixture)
    mesh = {"fsdp": 2, "expert": 4}
    rules, _ = decide(program, roles, mesh)
    pricer = Pricer(chip_named("h100"), parse_devices("h100:8"), mesh, "float32")
    own = LENGTH * WIDTH * 4  # of a row of the batch

    def moved(batch):
        costs = pricer.partial_sums(forward, split_of(forward, rules, mesh, batch), 1)
        return pricer.breakdown((), costs, 0.0).bytes_by_kind

    picked = LENGTH * 2 * (4 + 4)  # two weights and two numbers a token
    assert moved(("fsdp", "expert")) == {"reduce_scatter": own, "all_gather": 4 * (own + picked)}
    assert moved(()) == {"all_reduce": own}  # a step of serving


def test_gradients_of_experts_are_complete_over_expert():
    *_, program, roles = works(Mixture)
    mesh = {"data": 2, "expert": 4}
    rules, _ = decide(program, roles, mesh)
    pricer = Pricer(chip_named("h100"), parse_devices("h100:8"), mesh, "float32")
    summed = [each for each in pricer.weights_and_gradients(rules) if each.purpose == "gradients"]
    experts, router = 3 * 8 * WIDTH * INNER * 4 / 4, 8 * WIDTH * 4 / 4
    assert sum(each.bytes for each in summed if each.axis == "data") == experts + router
    assert [(each.kind, each.bytes) for each in summed if each.axis == "expert"] == [("reduce_scatter", router)]


def test_hidden_time_is_never_more_than_compute():
    *_, program, roles = works()
    mesh = {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    rules, _ = decide(program, roles, mesh)
    pricer = Pricer(chip_named("h100"), parse_devices("h100:8"), mesh, "float32")
    found = pricer.weights_and_gradients(rules)
    total = sum(each.seconds for each in found)
    assert pricer.breakdown((), found, 0.0).exposed_s == total
    assert all(0 <= fraction < 1 for fraction in OVERLAP.values())


def test_ring_times_are_those_of_the_formulas():
    ring = (Span("nvlink", 4, 100.0, 0.5),)
    assert seconds("all_gather", 800.0, ring) == 3 / 4 * 800 / 100 + 3 * 0.5
    assert seconds("reduce_scatter", 200.0, ring) == seconds("all_gather", 800.0, ring)
    assert seconds("all_reduce", 800.0, ring) == 2 * seconds("all_gather", 800.0, ring)
    assert seconds("all_to_all", 800.0, ring) == 3 / 4 * 800 / 100 + 0.5
    assert seconds("all_reduce", 800.0, ()) == 0
    assert seconds("collective_permute", 800.0, ring) == 800 / 100 + 0.5
    assert seconds("collective_permute", 800.0, (Span("ici", 4, 100.0, 0.5),)) == 2 * 800 / 100 + 0.5


def test_a_compiled_program_is_priced_by_the_collectives_that_it_has():
    devices = parse_devices("h100:2x8")
    pricer = Pricer(chip_named("h100"), devices, {"fsdp": 2, "tensor": 8}, "bfloat16")
    found = [
        Collective("all_gather", ("fsdp",), 4.0, 4e6, 2e6),
        Collective("all_reduce", ("fsdp", "tensor"), 2.0, 2e6, 2e6),
        Collective("all_reduce", (), 3.0, 1.0, 0.0),
    ]
    gathers, sums = pricer.of_program(found)
    assert gathers == pricer.collective("all_gather", "fsdp", "weights", 1e6, 4)
    spans = axis_spans(devices, network(devices), {"fsdp": 16}, "fsdp")
    assert (sums.axis, sums.purpose, sums.level) == ("fsdp+tensor", "partial sums", "network")
    assert sums.seconds == 2 * seconds("all_reduce", 1e6, spans)


def test_rows_of_experts_that_are_passed_around_take_the_time_of_a_gather():
    """Three hops of what a device has, two of which go at once."""
    pricer = Pricer(chip_named("v5p"), parse_devices("v5p:2x2x1"), {"expert": 4}, "bfloat16")
    (ring,) = pricer.of_program([Collective("collective_permute", ("expert",), 3.0, 3e9, 3e9)])
    gather = pricer.collective("all_gather", "expert", "partial sums", 4e9, 1)
    assert ring.purpose == gather.purpose
    assert ring.seconds == pytest.approx(gather.seconds, rel=1e-3)


def test_axes_side_by_side_have_the_links_of_both():
    """Of v5p:4x4x4 `fsdp` runs along two dimensions and `context` along one; `data` and `context` are two rings."""
    devices = parse_devices("v5p:4x4x4")

    def gather(mesh: dict[str, int], *axes: str) -> float:
        pricer = Pricer(chip_named("v5p"), devices, mesh, "bfloat16")
        return pricer.collective("all_gather", axes, "weights", 1e9, 1).seconds

    both = {"fsdp": 16, "context": 4}
    assert gather(both, "fsdp", "context") == gather({"fsdp": 64}, "fsdp")
    apart = {"data": 4, "fsdp": 4, "context": 4}
    assert gather(apart, "data", "context") > gather(apart, "fsdp", "context")


def test_only_a_share_crosses_the_slow_level():
    spans = (Span("nvlink", 8, 100.0, 0.0), Span("network", 2, 10.0, 0.0))
    assert seconds("all_gather", 800.0, spans) == pytest.approx(7 / 8 * 800 / 100 + 1 / 2 * 100 / 10)


def test_an_axis_along_one_torus_dimension_has_a_third_of_the_links():
    devices, levels = parse_devices("v5p:8x8x16"), (Level("ici", 1024, 540e9, 1e-6),)
    mesh = {"data": 1, "fsdp": 64, "expert": 1, "tensor": 16}
    (tensor,) = axis_spans(devices, levels, mesh, "tensor")
    (fsdp,) = axis_spans(devices, levels, mesh, "fsdp")
    assert tensor.bandwidth == pytest.approx(180e9)
    assert fsdp.bandwidth == pytest.approx(360e9)


def test_dimensions_that_do_not_close_to_a_ring_have_half_of_the_links():
    for text, share in (("v5e:16x16", 1.0), ("v5e:4x4", 0.5), ("v5p:4x4x4", 1.0), ("v5p:2x2x2", 0.5)):
        devices = parse_devices(text)
        levels = network(devices)
        (span,) = axis_spans(devices, levels, {"fsdp": devices.count}, "fsdp")
        assert span.bandwidth == pytest.approx(share * levels[0].bandwidth)


def test_both_devices_of_a_chip_are_inside_of_the_first_dimension():
    devices = parse_devices("tpu7x:4x4x4")
    (tensor,) = axis_spans(devices, network(devices), {"fsdp": 16, "tensor": 8}, "tensor")
    assert tensor.bandwidth == pytest.approx(network(devices)[0].bandwidth / 3)


@pytest.mark.parametrize(
    ("text", "mesh", "ways"),
    [
        ("h100:2x8", {"data": 2, "tensor": 8}, [("nvlink", 8)]),
        ("h100:2x8", {"tensor": 16}, [("nvlink", 8), ("network", 2)]),
        ("h100:3x8", {"data": 4, "tensor": 6}, [("nvlink", 2), ("network", 3)]),
        ("h100:4x7", {"data": 7, "tensor": 4}, [("network", 4)]),
    ],
)
def test_members_in_two_nodes_meet_over_the_network(text, mesh, ways):
    devices = parse_devices(text)
    assert [(span.level, span.ways) for span in axis_spans(devices, network(devices), mesh, "tensor")] == ways

"""What is read from a compiled program is what the program does: collectives with the trips of their loops, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.hlo import parse
from meshloom.core.program_report import axes_of, collectives, compile_and_report, sent
from meshloom.core.topology import make_mesh

ROWS, WIDTH, LAYERS = 16, 32, 5


@pytest.fixture(scope="module")
def layers():
    """Five layers `x @ w` in a scan: rows over data, weights stored over fsdp and gathered where they are used."""
    mesh = make_mesh("data=2,fsdp=4")
    rows, stored = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((("data", "fsdp"),), (None, "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    def run(x, w):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, whole)
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    shapes = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=stored)
    return compile_and_report(jax.jit(run).lower(shapes, weights), dict(mesh.shape))


def test_a_gather_in_a_scan_counts_once_per_layer(layers):
    _, report = layers
    (gather,) = [each for each in report.collectives if each.kind == "all_gather"]
    assert (gather.axes, gather.count) == (("fsdp",), LAYERS)
    assert gather.bytes == LAYERS * WIDTH * WIDTH * 4
    assert gather.sent == gather.bytes * 3 / 4


def test_a_sum_over_both_axes_is_named_by_both(layers):
    _, report = layers
    assert ("data", "fsdp") in [each.axes for each in report.collectives if each.kind == "all_reduce"]


def test_memory_is_arguments_results_and_temporaries(layers):
    compiled, report = layers
    assert report.argument_bytes == ROWS * WIDTH * 4 // 8 + LAYERS * WIDTH * WIDTH * 4 // 4
    assert report.peak_bytes == report.argument_bytes + report.output_bytes + report.temporary_bytes
    padding = report.temporary_bytes - compiled.memory_analysis().temp_size_in_bytes  # a CPU's program shares no space
    assert 0 <= padding < 1024
    assert report.compile_seconds > 0


def test_a_line_of_the_program_is_found_again(layers):
    _, report = layers
    sources = {report.module.source(each) for each in report.module.computations[report.module.entry].instructions}
    assert any(__file__ in source for source in sources)


def test_gathers_are_of_the_axis_that_their_groups_run_along():
    """The same four devices in every notation that XLA has for them."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    for groups, axes in {
        "replica_groups={{0,2},{1,3},{4,6},{5,7}}": ("fsdp",),
        "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ("fsdp",),
        "replica_groups=[4,2]<=[8]": ("tensor",),
        "replica_groups=[2,4]<=[2,4]T(1,0)": ("data", "tensor"),
        "replica_groups=mesh['a'=4,'b'=2] {'a'}": ("data", "fsdp"),
        "replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}": ("fsdp",),
        "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data'}": ("data",),
        "source_target_pairs={{0,1},{1,0}}": ("tensor",),
        "replica_groups={}": ("data", "fsdp", "tensor"),
    }.items():
        text = program(f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {groups}, a=b")
        (instruction,) = parse(text).computations["main"].instructions
        # [2,4]<=[2,4]T(1,0) puts 0, 4, 1, 5 together: data first, then tensor.
        assert axes_of(instruction, mesh) == axes, groups


def program(body: str, called: str = "") -> str:
    return f"HloModule m\n{called}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def test_pieces_of_an_asynchronous_gather_of_a_tpu_count_once():
    piece = "  %g.{n} = bf16[64]{{0}} all-gather(%p), channel_id=7, replica_groups={{{{0,1}}}}, dimensions={{0}}\n"
    start = '  ROOT %c = (bf16[64]{0}) custom-call(%g.0), custom_call_target="AsyncCollectiveStart"\n'
    done = '  ROOT %d = bf16[64]{0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"\n'
    called = (
        "%fused.1 (p: bf16[32]) -> bf16[64] {\n" + piece.format(n=0) + start + "}\n"
        "%async_collective_fusion.2 (p: bf16[32]) -> bf16[64] {\n" + piece.format(n=1).replace("%g", "ROOT %g") + "}\n"
        "%fused.3 (p: bf16[32]) -> bf16[64] {\n" + piece.format(n=2) + done + "}\n"
    )
    body = "".join(
        f"  %f.{n} = bf16[64]{{0}} fusion(%p), kind=kCustom, calls=%{name}\n"
        for n, name in enumerate(("fused.1", "async_collective_fusion.2", "fused.3"))
    )
    (found,) = collectives(parse(program(body, called)), {"fsdp": 2})
    assert (found.kind, found.count, found.bytes, found.sent) == ("all_gather", 1, 128, 64)


def test_a_computation_goes_on_after_a_line_that_begins_with_a_brace():
    body = (
        '  %k = f32[64]{0} custom-call(%p), backend_config={"metadata":\n"{}"\n}}, metadata={op_name="kernel"}\n'
        "  ROOT %r = f32[64]{0} all-reduce(%k), replica_groups={{0,1,2,3}}, to_apply=%add"
    )
    module = parse(program(body, "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}\n"))
    assert module.computations[module.entry].by_name["k"].operation == "kernel"
    assert [each.kind for each in collectives(module, {"fsdp": 4})] == ["all_reduce"]


def test_a_fused_reduction_that_keeps_a_part_is_a_reduce_scatter():
    called = (
        "%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {\n"
        "  %r = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add\n"
        "  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}\n}\n"
        "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}\n"
    )
    body = "  ROOT %f = f32[16]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    (found,) = collectives(parse(program(body, called)), {"fsdp": 4})
    assert (found.kind, found.bytes, found.sent) == ("reduce_scatter", 64, 3 * 64)


@pytest.mark.parametrize(("way", "kind", "result"), [("ag", "all_gather", 8), ("rs", "reduce_scatter", 1)])
def test_a_loop_of_permutes_at_a_product_is_the_collective_that_it_replaces(way, kind, result):
    """Eight devices, seven permutes: four trips of a loop that counts by two, unrolled twice, less the last."""
    name = f"windowed_dot_general_body_{way}"
    permute = (
        "collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}"
    )
    called = (
        f"%{name} (p: (u32[], f32[16])) -> (u32[], f32[16]) {{\n"
        "  %two = u32[] constant(2)\n  %i = u32[] get-tuple-element(%p), index=0\n"
        f"  %x = f32[16]{{0}} get-tuple-element(%p), index=1\n  %y = f32[16]{{0}} {permute}\n"
        "  %n = u32[] add(%i, %two)\n  ROOT %t = (u32[], f32[16]{0}) tuple(%n, %y)\n}\n"
        "%cond (p: (u32[], f32[16])) -> pred[] {\n  %end = u32[] constant(14)\n"
        "  %j = u32[] get-tuple-element(%p), index=0\n  ROOT %l = pred[] compare(%j, %end), direction=LT\n}\n"
    )
    body = f"  %w = (u32[], f32[16]{{0}}) while(%p), condition=%cond, body=%{name}"
    (found,) = collectives(parse(program(body, called)), {"fsdp": 8})
    assert (found.kind, found.count) == (kind, 1)
    np.testing.assert_allclose(found.bytes, 64 * result)
    np.testing.assert_allclose(found.sent, 7 * 64)


def test_operands_that_a_start_carries_do_not_count():
    body = (
        "  %s = ((bf16[32]{0}, bf16[8]{0}), (bf16[128]{0}, bf16[32]{0})) all-gather-start(%p, %q), channel_id=1, "
        "replica_groups={{0,1,2,3}}, dimensions={0}\n"
        "  %d = (bf16[128]{0}, bf16[32]{0}) all-gather-done(%s)"
    )
    (found,) = collectives(parse(program(body)), {"fsdp": 4})
    assert (found.count, found.bytes) == (1, 2 * (128 + 32))


def test_what_is_sent_is_the_same_for_a_reduction_and_for_its_two_halves():
    whole = 1000
    assert sent("all_reduce", whole, 4) == sent("all_gather", whole, 4) + sent("reduce_scatter", whole / 4, 4)

"""`attention` on a mesh that splits tokens is a ring, in models too, and what no ring can do XLA still does right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from meshloom.core.ahead import target_devices
from meshloom.core.errors import MeshloomError
from meshloom.core.hlo import Module, parse
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder
from meshloom.models.sequence import Packed
from meshloom.pallas_kernels import Mask, attention
from meshloom.pallas_kernels.attention import ATTENTION, SPREADING, ring_attention
from meshloom.pallas_kernels.attention.cases import AttentionCase
from meshloom.pallas_kernels.attention.context import to_zigzag
from meshloom.pallas_kernels.attention.context.spreading import SpreadSpec
from meshloom.pallas_kernels.attention.spec import AttentionSpec
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.sharding import derive
from meshloom.sharding.constrain import constrained
from tests.compilers import needs_tpu
from tests.pallas_kernels.schedules import permutes

AXES = {"fsdp": 2, "context": 2, "tensor": 2}
CASE = AttentionCase("mesh", q_len=32, kv_len=32, head_dim=8, value_dim=8, segments=2, window=11, sinks=True)


def in_zigzag(x: jax.Array, dimensions: tuple[int, ...] = (1,)) -> jax.Array:
    """Tokens along these dimensions in the order of a ring of AXES."""
    return functools.reduce(lambda x, axis: to_zigzag(x, AXES["context"], axis), dimensions, jnp.asarray(x))


def value_and_grads(case: AttentionCase, axes: dict[str, int] | None, layout: str = "contiguous"):
    """Output and gradients of `attention` on a mesh or on one device, and the compiled program."""
    q, k, v, mask = case.arrays()
    bias, sinks = case.extras()
    order = in_zigzag if layout == "zigzag" else lambda x, dimensions=(1,): x
    weigh = order(jnp.sin(jnp.arange(q.size).reshape(q.shape)))
    q, k, v = map(order, (q, k, v))
    bias = None if bias is None else order(bias, (2, 3))
    if mask.q_segments is not None:
        mask = dataclasses.replace(mask, q_segments=order(mask.q_segments), kv_segments=order(mask.kv_segments))

    def scalar(arrays):
        q, k, v, bias, sinks, mask = arrays
        out = attention(q, k, v, mask=mask, bias=bias, sinks=sinks, layout=layout)
        return jnp.sum(weigh * out), out

    run = jax.grad(lambda arrays, mask: scalar((*arrays, mask)), has_aux=True)
    arrays = (q, k, v, bias, sinks)
    if axes is None:
        grads, out = jax.jit(run)(arrays, mask)
        return [np.asarray(x) for x in jax.tree.leaves((out, grads))], None
    mesh = make_mesh(axes)
    kv = P("fsdp", "context", "tensor" if case.kv_heads > 1 else None)
    places = P("fsdp", "context", "tensor"), kv, kv, P(), P()
    arrays = tuple(
        None if x is None else jax.device_put(x, NamedSharding(mesh, place))
        for x, place in zip(arrays, places, strict=True)
    )
    with jax.set_mesh(mesh):
        program = jax.jit(run).lower(arrays, mask).compile()
    grads, out = program(arrays, mask)
    return [np.asarray(x) for x in jax.tree.leaves((out, grads))], program


def permuted(program) -> bool:
    return "collective-permute" in program.as_text()


# Kv heads lie over `tensor`; a single one is needed by both of its devices.
@pytest.mark.parametrize(("layout", "kv_heads"), [("contiguous", 2), ("zigzag", 2), ("contiguous", 1)])
def test_attention_on_a_mesh_that_splits_tokens_is_a_ring(layout, kv_heads):
    case = dataclasses.replace(CASE, kv_heads=kv_heads)
    want, _ = value_and_grads(case, None)
    got, program = value_and_grads(case, AXES, layout)
    assert permuted(program)
    assert "all-gather" not in program.as_text()
    rows = [want[0], *want[1:4]]
    if layout == "zigzag":
        rows = map(in_zigzag, rows)
    for one, two in zip([*rows, want[4]], got, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.parametrize(("layout", "shared"), [("contiguous", (1, 4)), ("zigzag", (2, 1))])
def test_a_ring_has_the_bias_of_its_queries_and_its_gradient(layout, shared):
    case = dataclasses.replace(CASE, bias=shared, q_len=16, kv_len=16)
    want, _ = value_and_grads(case, None)
    got, program = value_and_grads(case, AXES, layout)
    assert permuted(program)
    if layout == "zigzag":
        *rows, bias, sinks = want
        want = [*map(in_zigzag, rows), in_zigzag(bias, (2, 3)), sinks]
    for one, two in zip(want, got, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)


@pytest.mark.parametrize(("axes", "rings"), [(AXES, True), ({"fsdp": 4, "tensor": 2}, False)], ids=["context", "rows"])
def test_a_decoder_that_trains_over_context_has_rings_in_both_passes(axes, rings):
    """That its loss, gradients and updates are those of one device is tested in train/test_verify.py."""
    sizes = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    module = nnx.eval_shape(lambda: Decoder(DecoderConfig(**sizes, scan_layers=True, remat="full"), rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    layout = derive(module, make_mesh(axes))
    forward = constrained(module, layout)

    def loss(parameters, tokens, packed):
        return forward(parameters, tokens, packed)[0].sum()

    given = nnx.state(module, nnx.Param), tokens, Packed(tokens, tokens)
    with jax.set_mesh(layout.mesh):
        program = str(jax.make_jaxpr(jax.value_and_grad(loss))(*given))
    # Keys and segments forward, once more in the recomputed layer, and backward; there sums of gradients too, in the
    # loop, in its last step and on their way home.
    assert program.count("= ppermute[") == (2 + 2 + 2 + 3 if rings else 0)


# -- what chooses --


def spec(layout: str = "contiguous", *, length: int = 4096, rows: int = 2, heads: int = 4, kv_heads=2):
    shapes = (rows, length, heads, 128), (rows, length, kv_heads, 128)
    of_call = AttentionSpec(*shapes, 128, "bfloat16", None, Mask())
    return SpreadSpec(of_call, layout)


def test_the_tables_say_why_there_is_no_ring():
    cpu = Target("cpu", "cpu")

    def reason(of_call: SpreadSpec) -> str | None:
        return explain(SPREADING, of_call, cpu)[0].reason

    assert [row.name for row in explain(SPREADING, spec(), cpu)] == ["ring", "no_ring"]
    assert reason(spec()) == "no mesh in scope spreads tokens"
    with jax.set_mesh(make_mesh(AXES)):
        assert reason(spec()) is None
        assert reason(spec(length=31)) == "31 queries do not divide into 2 chunks"
        assert reason(spec("zigzag", length=30)) == "30 queries do not divide into 4 chunks"
        assert reason(spec(rows=3)) == "3 rows of the batch do not divide over 2 devices"
        assert reason(spec(kv_heads=1)) is None
        assert reason(spec(heads=3, kv_heads=1)) == "3 heads do not divide over 2 devices"
        assert explain(SPREADING, spec("zigzag"), cpu)[1].reason == "it takes tokens in order, not in zigzag"

        def inside(x):
            found.append(reason(spec()))
            return x

        found: list[str | None] = []
        jax.eval_shape(jax.shard_map(inside, in_specs=P("context"), out_specs=P("context")), jnp.zeros(8))
        assert "ring_attention is to be called by its name" in found[0]
    q, k, v, _ = CASE.arrays()
    with (
        jax.set_mesh(make_mesh("context=8")),
        pytest.raises(MeshloomError, match=r"ring: 20 queries do not .* 16 chunks; no_ring: it takes tokens in order"),
    ):
        attention(q[:, :20], k, v, mask=Mask(), layout="zigzag")


def test_a_tpus_kernel_declines_where_there_is_no_ring_and_judges_what_one_device_holds():
    def reason(of_call: SpreadSpec) -> str | None:
        return explain(ATTENTION, of_call.attention, Target("tpu", "TPU v6 lite"))[0].reason

    with jax.set_mesh(make_mesh("context=8")):
        assert reason(spec()) is None
        assert reason(spec(length=4095)).startswith("tokens lie over the context axis, and no ring can be made: 4095")
        assert reason(spec(length=2**19)) is None
    assert "the gradient of a head's 524288 queries takes" in reason(spec(length=2**19))


# -- what the compiler for TPUs makes of it --


def travels(module: Module) -> tuple[int, int]:
    """Permutations, and how many of them begin and end without a kernel between."""
    found = permutes(module)
    return len(found), sum(not kernels for _, kernels in found)


def compiled_for_tpus(text: str, run) -> Module:
    """A function of q, k and v, all tokens over `context`."""
    where = parse_devices(text)
    mesh = make_mesh({"context": where.count}, target_devices(where))
    shape = (1, where.count * 256, 2, 128)
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "context")))
    with jax.set_mesh(mesh):
        return parse(jax.jit(run).lower(array, array, array).compile().as_text())


def gradient_of(run):
    return jax.grad(lambda *arrays: jnp.sum(run(*arrays).astype(jnp.float32)), argnums=(0, 1, 2))


@needs_tpu
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_tpus_attend_while_keys_travel(layout):
    module = compiled_for_tpus("v5e:2x4", gradient_of(lambda q, k, v: attention(q, k, v, mask=Mask(), layout=layout)))
    # Forward, keys with values in a loop; backward, these and the sums of their gradients, and both loops' ends: all
    # but the last trip of the sums, which brings them home.
    assert travels(module) == (1 + 2 + 2, 1)


@needs_tpu
@pytest.mark.parametrize(
    ("form", "backward", "expected"), [("halves", True, (2 * 5, 2)), ("queries", False, (3 + 2 * 3, 2))]
)
def test_so_do_they_while_other_things_travel(form, backward, expected):
    """Both halves; queries, and partial results of two arrays, of which those of the last step wait for nothing."""

    def run(q, k, v):
        local = functools.partial(ring_attention, mask=Mask(), form=form)
        return jax.shard_map(local, in_specs=P(None, "context"), out_specs=P(None, "context"), check_vma=False)(q, k, v)

    assert travels(compiled_for_tpus("v5e:2x2", gradient_of(run) if backward else run)) == expected

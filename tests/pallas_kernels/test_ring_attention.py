"""Attention over a sequence that is spread over devices equals attention on one device, in values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.attention import ATTENTION, Mask, attention, context, ring_attention, ulysses_attention
from meshloom.pallas_kernels.attention.cases import AttentionCase
from meshloom.pallas_kernels.attention.context import from_zigzag, to_zigzag
from meshloom.pallas_kernels.attention.context.layouts import critical_path, visited_blocks, zigzag_order
from meshloom.pallas_kernels.attention.context.ring import FORMS, Ring
from meshloom.pallas_kernels.attention.kernel import Kernel, Scoring
from meshloom.pallas_kernels.attention.table import attend

LENGTH = 32
TOKENS, WHOLE = P(None, "context"), P()
SIZES = {"q_len": LENGTH, "kv_len": LENGTH, "head_dim": 8, "value_dim": 8}
CASES = {
    case.name: case
    for case in (
        AttentionCase("causal", **SIZES),
        AttentionCase(
            "everything", **SIZES | {"value_dim": 4}, window=9, segments=2, lens=(29, 20), soft_cap=3.0, sinks=True
        ),
        AttentionCase("both_ways", **SIZES, causal=False, window=6, segments=2),
        AttentionCase("offset", **SIZES | {"q_len": LENGTH // 2}, offset=5),
        AttentionCase("bfloat16", **SIZES, dtype="bfloat16", sinks=True),
        AttentionCase("empty_row", **SIZES, causal=False, lens=(0, 24)),
        AttentionCase("bias", **SIZES | {"q_len": 16, "kv_len": 16}, bias=(1, 4), window=7),
    )
}


def spread(op, mask: Mask, devices: int, layout: str = "contiguous", **options):
    """`op` as a function of whole arrays (q, k, v, bias, sinks), in the order of the sequence."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("context",))
    of_bias = WHOLE if op is ulysses_attention else P(None, None, "context")
    ids = None if mask.q_segments is None else (mask.q_segments, mask.kv_segments)
    if op is not ulysses_attention:
        options |= {"layout": layout}

    def local(q, k, v, bias, sinks, ids):
        own = mask if ids is None else dataclasses.replace(mask, q_segments=ids[0], kv_segments=ids[1])
        return op(q, k, v, mask=own, bias=bias, sinks=sinks, **options)

    inputs = (TOKENS, TOKENS, TOKENS, of_bias, WHOLE, TOKENS)
    over = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=TOKENS, check_vma=False)
    if layout == "contiguous":
        return lambda *arrays: over(*arrays, ids)

    def permuted(q, k, v, bias, sinks):
        q, k, v, placed = jax.tree.map(lambda x: to_zigzag(x, devices), (q, k, v, ids))
        bias = bias if bias is None else to_zigzag(to_zigzag(bias, devices, axis=2), devices, axis=3)
        return from_zigzag(over(q, k, v, bias, sinks, placed), devices)

    return permuted


def value_and_grads(run, arrays) -> list[np.ndarray]:
    """Output, and gradients of a sum that weighs each element differently, float32; bitwise the same in two runs."""

    def scalar(arrays):
        out = run(*arrays).astype(jnp.float32)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size).reshape(out.shape))), out

    program = jax.jit(jax.grad(scalar, has_aux=True)).lower(arrays)
    program = program.compile()
    first, second = ([np.asarray(x, np.float32) for x in jax.tree.leaves(program(arrays)[::-1])] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    return first


def arrays_of(case: AttentionCase):
    q, k, v, mask = case.arrays()
    return (q, k, v, *case.extras()), mask


@functools.cache
def alone(name: str, exactly: bool) -> list[np.ndarray]:
    """What one device makes of a case, in float32 or in the case's own dtype."""
    case = CASES[name]
    arrays, mask = arrays_of(case)
    if exactly:
        arrays = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)

    def run(q, k, v, bias, sinks):
        options = {"bias": bias, "sinks": sinks, "soft_cap": case.soft_cap, "implementation": "reference"}
        return attention(q, k, v, mask=mask, **options)

    return value_and_grads(run, arrays)


def assert_equals_one_device(name: str, got: list[np.ndarray]):
    for one, two, low in zip(alone(name, True), got, alone(name, False), strict=True):
        bound = 2 * np.abs(low - one).max() + 2e-5 * (1 + np.abs(one).max())
        if CASES[name].dtype == "bfloat16":  # the reference computes in float32 whatever it is given
            bound += 2**-7 * np.abs(one).max()
        assert np.abs(two - one).max() <= bound


@pytest.mark.parametrize(
    ("name", "devices", "layout", "form", "implementation"),
    [
        ("everything", 4, "contiguous", "halves", "chunked"),
        ("everything", 2, "zigzag", "keys", "chunked"),
        ("everything", 2, "zigzag", "halves", "reference"),
        ("everything", 2, "contiguous", "queries", "reference"),
        ("causal", 8, "zigzag", "keys", "reference"),
        ("both_ways", 2, "zigzag", "queries", "reference"),
        ("offset", 4, "zigzag", "keys", "reference"),
        ("bfloat16", 2, "zigzag", "keys", "chunked"),
        ("empty_row", 2, "contiguous", "keys", "reference"),
        ("bias", 4, "contiguous", "keys", "chunked"),
        ("bias", 2, "zigzag", "halves", "reference"),
    ],
)
def test_a_ring_equals_one_device(name, devices, layout, form, implementation):
    case = CASES[name]
    arrays, mask = arrays_of(case)
    options = {"form": form, "soft_cap": case.soft_cap, "implementation": implementation}
    assert_equals_one_device(name, value_and_grads(spread(ring_attention, mask, devices, layout, **options), arrays))


@pytest.mark.parametrize(
    ("name", "devices", "kv_heads", "implementation"),
    [
        ("everything", 2, 2, "chunked"),
        ("causal", 4, 2, "chunked"),  # fewer kv heads than devices
        ("bias", 4, 2, "chunked"),
        ("bfloat16", 4, 2, "reference"),
    ],
)
def test_heads_for_tokens_equal_one_device(name, devices, kv_heads, implementation):
    case = CASES[name]
    (q, k, v, *rest), mask = arrays_of(case)
    arrays = (q, k[:, :, :kv_heads], v[:, :, :kv_heads], *rest)
    run = spread(ulysses_attention, mask, devices, soft_cap=case.soft_cap, implementation=implementation)
    if kv_heads == case.kv_heads:
        assert_equals_one_device(name, value_and_grads(run, arrays))
    else:
        plain = functools.partial(attention, mask=mask, implementation="reference")
        want = value_and_grads(lambda q, k, v, *_: plain(q, k, v), arrays)
        for one, two in zip(want, value_and_grads(run, arrays), strict=True):
            np.testing.assert_allclose(two, one, atol=2e-5)


def mosaic_ring(q, k, v, *, mask, bias, sinks, layout="contiguous"):
    """`ring_attention` with the kernel for TPUs, which it chooses only there."""
    (kernel,) = (each.run for each in ATTENTION if each.name == "mosaic_tpu")
    ring = Ring("context", layout, "keys", kernel)
    return attend(Kernel(ring.forward, ring.backward), Scoring(q.shape[-1] ** -0.5), q, k, v, bias, sinks, mask)


@pytest.mark.parametrize(("name", "layout"), [("causal", "zigzag"), ("bias", "contiguous")])
def test_the_kernel_for_tpus_makes_a_ring(name, layout, monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    arrays, mask = arrays_of(CASES[name])
    assert_equals_one_device(name, value_and_grads(spread(mosaic_ring, mask, 2, layout), arrays))


@settings(max_examples=4, deadline=None)
@given(
    chunk=st.integers(1, 4),
    kv_chunk=st.integers(1, 4),
    devices=st.sampled_from([2, 3]),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    form=st.sampled_from(FORMS),
    window=st.none() | st.integers(1, 12),
    causal=st.booleans(),
    group=st.integers(1, 2),
    lens=st.none() | st.tuples(st.integers(0, 24), st.integers(0, 24)),
)
def test_random_shapes_agree(chunk, kv_chunk, devices, layout, form, window, causal, group, lens):
    lengths = (each * devices * 2 for each in (chunk, kv_chunk))
    case = AttentionCase("random", 2, *lengths, 2 * group, 2, 4, 4, causal, window, segments=2, lens=lens)
    arrays, mask = arrays_of(case)
    run = jax.jit(spread(ring_attention, mask, devices, layout, form=form, implementation="reference"))
    run = run.lower(*arrays).compile()
    want = attention(*arrays[:3], mask=mask, implementation="reference")
    np.testing.assert_allclose(run(*arrays), want, atol=2e-5)


# -- how much work there is, and for whom --


def test_zigzag_is_undone():
    assert list(zigzag_order(8, 2)) == [0, 1, 6, 7, 2, 3, 4, 5]
    assert list(zigzag_order(8, 1)) == list(range(8))
    x = jnp.arange(64).reshape(2, 32)
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x, 4), 4), x)


def test_zigzag_takes_little_more_than_half_of_the_contiguous_critical_path():
    contiguous, zigzag = (visited_blocks(layout, 8, 4096, 64, Mask()) for layout in ("contiguous", "zigzag"))
    assert contiguous.sum() == zigzag.sum() == 64 * 65 // 2
    assert critical_path(zigzag) <= critical_path(contiguous) / 1.8
    assert zigzag.sum(axis=1).min() == zigzag.sum(axis=1).max()


@pytest.mark.parametrize(("layout", "window"), [("contiguous", None), ("zigzag", None), ("zigzag", 5)])
def test_the_program_runs_the_chunks_that_are_counted(monkeypatch, layout, window):
    ran = []
    reference = ATTENTION[-1]

    def forward(q, k, *rest):
        jax.debug.callback(lambda: ran.append(k.shape[1]))
        return reference.run.forward(q, k, *rest)

    counted = dataclasses.replace(reference, run=dataclasses.replace(reference.run, forward=forward))
    monkeypatch.setattr(context, "ATTENTION", (counted,))
    arrays, mask = arrays_of(dataclasses.replace(CASES["causal"], window=window))
    jax.block_until_ready(jax.jit(spread(ring_attention, mask, 4, layout))(*arrays))
    jax.effects_barrier()
    chunk = LENGTH // (8 if layout == "zigzag" else 4)
    assert len(ran) == visited_blocks(layout, 4, LENGTH, chunk, mask).sum()


# -- what cannot be done --


def test_what_a_ring_cannot_do_is_named():
    q, k, v, mask = CASES["causal"].arrays()
    with pytest.raises(MeshloomError, match=r"leave their bias behind; form='keys' and form='halves' take one"):
        ring_attention(q, k, v, mask=mask, bias=jnp.zeros((1, 1, LENGTH, LENGTH)), form="queries")
    with pytest.raises(MeshloomError, match="no form 'star'; it has keys, halves, queries"):
        ring_attention(q, k, v, mask=mask, form="star")
    with pytest.raises(MeshloomError, match="no layout 'stripe'; it has contiguous, zigzag"):
        ring_attention(q, k, v, mask=mask, layout="stripe")
    with pytest.raises(MeshloomError, match="31 queries and 32 keys of a device do not divide into the 2 chunks"):
        ring_attention(q[:, 1:], k, v, mask=mask, layout="zigzag")
    with pytest.raises(MeshloomError, match="30 tokens do not divide into 8 chunks"):
        zigzag_order(30, 4)
    with pytest.raises(MeshloomError, match="30 tokens do not divide into 4 chunks of blocks of 4 tokens"):
        visited_blocks("zigzag", 2, 30, 4, mask)
    with pytest.raises(MeshloomError, match="4 heads do not divide over context=8; ring_attention splits no heads"):
        jax.eval_shape(spread(ulysses_attention, mask, 8), q, k, v, None, None)

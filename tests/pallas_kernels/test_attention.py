"""Every implementation of `attention` means what the float32 reference says, in values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh
from meshloom.pallas_kernels import Mask, attention
from meshloom.pallas_kernels.attention import ATTENTION, chunked, reference
from meshloom.pallas_kernels.attention.cases import ATTENTION_CASES, AttentionCase
from meshloom.pallas_kernels.attention.kernel import merge_partials, row_products
from meshloom.pallas_kernels.attention.spec import AttentionSpec
from meshloom.pallas_kernels.attention.visits import ACTIVE, FIRST, LAST, MASKED_IN_PART, Blocks
from meshloom.pallas_kernels.dispatch import Target, explain


def named(name: str) -> AttentionCase:
    return next(case for case in ATTENTION_CASES if case.name == name)


def value_and_grads(case: AttentionCase, implementation: str, dtype=None):
    """Output, and the gradients of a scalar of it by q, k, v, bias and sinks where there are any, float32 numpy."""
    q, k, v, mask = case.arrays()
    bias, sinks = case.extras()
    if dtype is not None:
        q, k, v = (x.astype(dtype) for x in (q, k, v))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(*q.shape[:3], v.shape[-1])), jnp.float32)

    @jax.jit
    def run(arrays):
        def scalar(arrays):
            q, k, v, bias, sinks = arrays
            options = {"bias": bias, "sinks": sinks, "soft_cap": case.soft_cap, "implementation": implementation}
            out = attention(q, k, v, mask=mask, **options)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        return jax.grad(scalar, has_aux=True)(arrays)

    grads, out = run((q, k, v, bias, sinks))
    return [np.asarray(x, np.float32) for x in jax.tree.leaves((out, *grads))]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_chunked_equals_reference_in_values_and_gradients(case):
    exact = value_and_grads(case, "reference", jnp.float32)
    got = value_and_grads(case, "chunked")
    # The reference computes in float32 whatever it is given, so only rounding of inputs and outputs is "naive" error.
    naive = exact if case.dtype == "float32" else value_and_grads(case, "reference")
    for one, two, low in zip(exact, got, naive, strict=True):
        bound = 2 * np.abs(low - one).max() + 2e-5 * (1 + np.abs(one).max())
        if case.dtype == "bfloat16":
            bound += 2**-7 * np.abs(one).max()
        assert np.abs(two - one).max() <= bound


@pytest.mark.parametrize(
    "name", ["causal", "segments_window_cap", "bias_of_rows", "more_queries_than_keys", "keys_after"]
)
def test_the_references_gradients_are_those_of_its_values(name):
    case = named(name)
    q, k, v, mask = case.arrays()
    bias, _ = case.extras()

    def forward(q, k, v, bias):
        return reference.forward(q, k, v, bias, mask, case.scoring, jnp.float32)

    (out, lse), pull = jax.vjp(forward, q, k, v, bias)
    d_out = jnp.asarray(np.random.default_rng(2).normal(size=out.shape), jnp.float32)
    delta = row_products(out, d_out)
    got = reference.backward(q, k, v, bias, mask, case.scoring, lse, delta, d_out, jnp.float32)
    for one, two in zip(jax.tree.leaves(pull((d_out, jnp.zeros_like(lse)))), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.parametrize("module", [reference, chunked], ids=["reference", "chunked"])
@pytest.mark.parametrize("cut", [0, 7, 24])
def test_parts_of_the_keys_merge_into_the_whole(module, cut):
    case = named("causal")
    q, k, v, mask = case.arrays()
    whole, whole_lse = module.forward(q, k, v, None, mask, case.scoring, jnp.float32)
    parts = []
    for start, stop in ((0, cut), (cut, 24)):
        # Padding to equal sizes with keys that lengths rule out, so that an empty part has arrays too.
        keys, values = (jnp.pad(x[:, start:stop], ((0, 0), (0, 24 - stop + start), (0, 0), (0, 0))) for x in (k, v))
        part = Mask(kv_lens=jnp.full(2, stop - start), offset=jnp.int32(-start))
        parts += module.forward(q, keys, values, None, part, case.scoring, jnp.float32)
    out, lse = merge_partials(*parts)
    np.testing.assert_allclose(out, whole, atol=1e-6)
    np.testing.assert_allclose(lse, whole_lse, atol=1e-5)


def test_query_that_may_read_nothing_yields_zero_and_no_gradient():
    out, dq, dk, dv = value_and_grads(named("empty_row"), "chunked")
    for x in (out, dq, dk, dv):
        assert np.all(x[0] == 0)
        assert np.isfinite(x).all()


def test_bias_is_added_after_the_soft_cap():
    q, k, v, mask = AttentionCase("bias", batch=1, q_len=3, kv_len=3, heads=2).arrays()
    bias = jnp.zeros((1, 2, 3, 3)).at[0, :, 2, 0].set(50.0)
    out = attention(q, k, v, mask=mask, bias=bias, soft_cap=1.0)
    np.testing.assert_allclose(out[0, 2], np.broadcast_to(v[0, 0], out[0, 2].shape), atol=1e-5)


def test_a_great_sink_takes_all_and_a_small_one_nothing():
    q, k, v, mask = named("causal").arrays()
    plain = attention(q, k, v, mask=mask)
    np.testing.assert_allclose(attention(q, k, v, mask=mask, sinks=jnp.full(4, -50.0)), plain, atol=1e-6)
    assert np.abs(attention(q, k, v, mask=mask, sinks=jnp.full(4, 50.0))).max() < 1e-6


def test_blocks_the_mask_rules_out_are_not_visited():
    blocks = Blocks(1024, 1024, 256, 256)
    assert len(blocks.pairs(Mask())) == 4 * 5 // 2
    assert len(blocks.pairs(Mask(window=256))) == 4 + 3
    assert len(blocks.pairs(Mask(causal=False))) == 16


DOCUMENTS = jnp.repeat(jnp.arange(1, 5), 256)[None]  # four, one to a block of 256
BY_DATA = (
    (Mask(q_segments=DOCUMENTS, kv_segments=DOCUMENTS), 4),
    (Mask(kv_lens=jnp.asarray([256])), 4),
    (Mask(offset=jnp.int32(-512)), 2 + 1),
)


@pytest.mark.parametrize(("mask", "visits"), BY_DATA, ids=["segments", "lengths", "offset"])
def test_blocks_the_data_rules_out_are_skipped(mask, visits):
    blocks = Blocks(1024, 1024, 256, 256)
    assert blocks.seen(mask, blocks.pairs(mask)).sum() == visits
    q = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)

    def skips() -> bool:
        return "cond[" in str(jax.make_jaxpr(lambda q: attention(q, q, q, mask=mask))(q))

    assert skips()
    with jax.set_mesh(make_mesh("fsdp=8")):  # devices that run one program would have to agree first
        assert not skips()


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize(("mask", "_"), [*BY_DATA, (Mask(window=300), 0), (Mask(causal=False), 0)])
def test_every_block_has_one_run_of_visits(mask, _, by):
    blocks = Blocks(1000, 900, 256, 128)
    seen = np.zeros(blocks.counts, bool)
    mask = dataclasses.replace(mask, **{name: x[:, :n] for name, x, n in segments_of(mask)})
    pairs = blocks.pairs(mask)
    seen[tuple(pairs.T)] = np.broadcast_to(blocks.seen(mask, pairs), (1, len(pairs)))[0]
    allowed = np.asarray(mask.allowed(jnp.arange(1024), jnp.arange(1024), 1000, 900))[0]
    (table,) = np.asarray(blocks.visits(mask, by))
    active = table[table[:, 2] & ACTIVE > 0]
    assert list(active[active[:, 2] & FIRST > 0][:, by]) == list(range(blocks.counts[by]))
    assert list(active[active[:, 2] & LAST > 0][:, by]) == list(range(blocks.counts[by]))
    assert {(i, j) for i, j in zip(*np.nonzero(seen), strict=True)} <= {(i, j) for i, j, _ in active}
    assert len({(i, j) for i, j, _ in active}) == len(active)
    for i, j, bits in active:
        block = allowed[i * 256 : (i + 1) * 256, j * 128 : (j + 1) * 128]
        assert block.any() <= seen[i, j]
        if not bits & MASKED_IN_PART:
            assert block[: 1000 - i * 256].all()
    assert (table[len(active) :, :2] == active[-1, :2]).all()


def segments_of(mask: Mask):
    """Name, ids and length of the segments that `mask` has."""
    lengths = {"q_segments": 1000, "kv_segments": 900}
    return [(name, x, n) for name, n in lengths.items() if (x := getattr(mask, name)) is not None]


@settings(max_examples=8, deadline=None)
@given(
    q_len=st.integers(1, 20),
    extra=st.integers(-10, 20),
    window=st.none() | st.integers(1, 30),
    group=st.integers(1, 3),
    causal=st.booleans(),
)
def test_random_shapes_agree(q_len, extra, window, group, causal):
    sizes = {"q_len": q_len, "kv_len": max(1, q_len + extra), "heads": 2 * group, "kv_heads": 2}
    case = AttentionCase("random", **sizes, window=window, causal=causal)
    q, k, v, mask = case.arrays()

    @jax.jit
    def both(q, k, v):
        return [attention(q, k, v, mask=mask, implementation=name) for name in ("reference", "chunked")]

    np.testing.assert_allclose(*both(q, k, v), atol=2e-5)


def test_selection_is_a_table_with_reasons():
    q, _, _, mask = AttentionCase("table").arrays()
    spec = AttentionSpec(q.shape, q.shape, 16, "float32", bias_shape=None, mask=mask)
    table = explain(ATTENTION, spec, Target())
    assert [row.name for row in table] == ["mosaic_tpu", "mosaic_gpu", "chunked", "reference"]
    assert "it runs on TPUs" in table[0].reason
    assert "it runs on Hopper GPUs" in table[1].reason
    assert table[2].reason is None


def test_unknown_implementations_and_wrong_heads_are_named():
    q, k, v, mask = AttentionCase("errors").arrays()
    names = "mosaic_tpu, mosaic_gpu, chunked, reference"
    with pytest.raises(MeshloomError, match=f"no implementation 'flash'; it has {names}"):
        attention(q, k, v, mask=mask, implementation="flash")
    with pytest.raises(MeshloomError, match="4 query heads are not a multiple of 3 kv heads"):
        attention(q, k[:, :, :1].repeat(3, 2), v[:, :, :1].repeat(3, 2), mask=mask)

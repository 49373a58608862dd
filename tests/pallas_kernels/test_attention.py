"""Every implementation of `attention` means what the float32 reference says, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels import Mask, attention
from meshloom.pallas_kernels.attention import ATTENTION
from meshloom.pallas_kernels.attention.chunked import _Static
from meshloom.pallas_kernels.attention.spec import AttentionSpec
from meshloom.pallas_kernels.dispatch import Target, explain
from tests.pallas_kernels.cases import ATTENTION_CASES, AttentionCase


def value_and_grads(case: AttentionCase, implementation: str, dtype=None):
    """Output, and the gradients of a scalar of it, in float32 numpy."""
    q, k, v, mask = case.arrays()
    if dtype is not None:
        q, k, v = (x.astype(dtype) for x in (q, k, v))
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(*q.shape[:3], v.shape[-1])), jnp.float32)

    @jax.jit
    def run(q, k, v):
        def scalar(q, k, v):
            out = attention(q, k, v, mask=mask, soft_cap=case.soft_cap, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        return jax.grad(scalar, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    grads, out = run(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_chunked_equals_reference_in_values_and_gradients(case):
    exact = value_and_grads(case, "reference", jnp.float32)
    got = value_and_grads(case, "chunked")
    # The reference computes in float32 whatever it is given, so only rounding of inputs and outputs is "naive" error.
    naive = value_and_grads(case, "reference")
    for one, two, low in zip(exact, got, naive, strict=True):
        bound = 2 * np.abs(low - one).max() + 2e-5 * (1 + np.abs(one).max())
        if case.dtype == "bfloat16":
            bound += 2**-7 * np.abs(one).max()
        assert np.abs(two - one).max() <= bound


def test_query_that_may_read_nothing_yields_zero_and_no_gradient():
    case = next(c for c in ATTENTION_CASES if c.name == "empty_row")
    out, dq, dk, dv = value_and_grads(case, "chunked")
    for x in (out, dq, dk, dv):
        assert np.all(x[0] == 0)
        assert np.isfinite(x).all()


def test_bias_is_added_after_the_soft_cap_and_differentiated():
    q, k, v, mask = AttentionCase("bias", batch=1, q_len=3, kv_len=3, heads=2).arrays()
    bias = jnp.zeros((1, 2, 3, 3)).at[0, :, 2, 0].set(50.0)
    out = attention(q, k, v, mask=mask, bias=bias)
    np.testing.assert_allclose(out[0, 2], np.broadcast_to(v[0, 0], out[0, 2].shape), atol=1e-5)
    grad = jax.grad(lambda b: attention(q, k, v, mask=mask, bias=b).sum())(jnp.zeros((1, 2, 3, 3)))
    assert np.abs(grad[0, :, 1:]).max() > 0
    assert np.all(np.asarray(grad[0, :, 0]) == 0)


def test_blocks_the_mask_rules_out_are_not_visited():
    causal = _Static(1.0, None, 1024, 1024, 256).pairs(Mask())
    assert len(causal) == 4 * 5 // 2
    windowed = _Static(1.0, None, 1024, 1024, 256).pairs(Mask(window=256))
    assert len(windowed) == 4 + 3
    assert len(_Static(1.0, None, 1024, 1024, 256).pairs(Mask(causal=False))) == 16


@settings(max_examples=15, deadline=None)
@given(
    q_len=st.integers(1, 20),
    extra=st.integers(0, 20),
    window=st.none() | st.integers(1, 30),
    group=st.integers(1, 3),
    causal=st.booleans(),
)
def test_random_shapes_agree(q_len, extra, window, group, causal):
    case = AttentionCase(
        "random", q_len=q_len, kv_len=q_len + extra, heads=2 * group, kv_heads=2, window=window, causal=causal
    )
    q, k, v, mask = case.arrays()
    outs = [attention(q, k, v, mask=mask, implementation=name) for name in ("reference", "chunked")]
    np.testing.assert_allclose(*outs, atol=2e-5)


def test_selection_is_a_table_with_reasons():
    q, _, _, mask = AttentionCase("table").arrays()
    spec = AttentionSpec(q.shape, q.shape, 16, "float32", has_bias=True, mask=mask)
    table = explain(ATTENTION, spec, Target())
    assert [row.name for row in table] == ["chunked", "reference"]
    assert "bias" in table[0].reason
    assert table[1].reason is None


def test_unknown_and_declining_implementations_are_named():
    q, k, v, mask = AttentionCase("errors").arrays()
    with pytest.raises(MeshloomError, match=r"no implementation 'flash'; it has chunked, reference"):
        attention(q, k, v, mask=mask, implementation="flash")
    with pytest.raises(MeshloomError, match="cannot run this call: an additive bias"):
        attention(q, k, v, mask=mask, bias=jnp.zeros((1, 1, 24, 24)), implementation="chunked")
    with pytest.raises(MeshloomError, match="4 query heads are not a multiple of 3 kv heads"):
        attention(q, k[:, :, :1].repeat(3, 2), v[:, :, :1].repeat(3, 2), mask=mask)

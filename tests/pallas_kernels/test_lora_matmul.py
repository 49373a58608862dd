"""A product with paged adapters gives each row its own adapter and nothing of another's, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels import LoraPages, lora_matmul
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.cases import LORA_CASES, LoraCase
from meshloom.pallas_kernels.matmul.lora import LORA_MATMUL, LoraSpec


def named(name: str) -> LoraCase:
    return next(case for case in LORA_CASES if case.name == name)


@functools.partial(jax.jit, static_argnames="implementation")
def run(x, a, b, lora, adapters, weight, implementation):
    """The product, and the gradients of a weighted sum of it by x and both kinds of pages, float32."""

    def product(x, a, b):
        pages = LoraPages(a, b, lora.table, lora.ranks, lora.scales)
        return lora_matmul(x, pages, adapters, implementation=implementation)

    out, pull = jax.vjp(product, x, a, b)
    return [each.astype(jnp.float32) for each in (out, *pull(weight.astype(out.dtype)))]


def weight_of(case: LoraCase) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(case.rows, case.columns)), case.dtype)


def values_and_gradients(case: LoraCase, implementation: str, dtype=None) -> list[np.ndarray]:
    x, lora, adapters = case.arrays()
    x, a, b = (each.astype(dtype or each.dtype) for each in (x, lora.a, lora.b))
    return [np.asarray(each) for each in run(x, a, b, lora, adapters, weight_of(case), implementation)]


@jax.jit
def naive(x, lora, adapters, weight):
    """The same in the dtype of x, row by row, with a copy of each row's own matrices."""
    count, most_rank = lora.table.shape
    there = (adapters >= 0) & (adapters < count)
    at = jnp.where(there, adapters, 0)
    owned = there[:, None] & (jnp.arange(most_rank) < lora.ranks[at][:, None])
    ids = jnp.where(owned, lora.table[at], 0)

    def product(x, a, b):
        own_a, own_b = (jnp.where(owned[..., None], each[ids], 0) for each in (a, b))
        narrow = jnp.einsum("mk,mrk->mr", x, own_a) * lora.scales[at][:, None].astype(x.dtype)
        return jnp.einsum("mr,mrn->mn", narrow, own_b)

    out, pull = jax.vjp(product, x, lora.a, lora.b)
    return [each.astype(jnp.float32) for each in (out, *pull(weight))]


@pytest.mark.parametrize("case", LORA_CASES, ids=lambda case: case.name)
def test_errors_are_at_most_twice_those_of_a_naive_product(case):
    exact = values_and_gradients(case, "reference", jnp.float32)
    got = values_and_gradients(case, "by_adapter")
    for one, two, low in zip(exact, got, naive(*case.arrays(), weight_of(case)), strict=True):
        assert np.isfinite(two).all()
        assert np.abs(two - one).max() <= 2 * np.abs(low - one).max() + 1e-5 * (1 + np.abs(one).max())


def test_one_adapter_is_the_plain_low_rank_product():
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 10), (3, 10), (12, 3)))
    lora = LoraPages.empty(5, 10, 12, adapters=2, most_rank=4).load(1, jnp.array([4, 0, 2]), a, b, alpha=6)
    out = lora_matmul(x, lora, jnp.ones(6, jnp.int32))
    np.testing.assert_allclose(out, 2 * x @ a.T @ b.T, rtol=1e-5, atol=1e-4)
    assert not np.any(lora_matmul(x, lora, jnp.zeros(6, jnp.int32)))


@pytest.mark.parametrize("implementation", ["reference", "by_adapter"])
def test_rows_without_an_adapter_are_zero_whatever_they_hold(implementation):
    case = named("some_rows_have_none")
    x, lora, adapters = case.arrays()
    x = jnp.where((adapters >= 0)[:, None], x, jnp.nan)
    out = np.asarray(lora_matmul(x, lora, adapters, implementation=implementation))
    assert not np.any(out[np.asarray(adapters) < 0])
    assert np.all(np.any(out[np.asarray(adapters) >= 0], axis=1))


def test_pages_of_adapters_that_no_row_uses_get_no_gradient():
    case = named("more_adapters_than_rows")
    _, lora, adapters = case.arrays()
    _, _, da, db = values_and_gradients(case, "by_adapter")
    used = np.unique(np.asarray(lora.table)[[a for a in np.unique(adapters) if a >= 0]])
    others = np.setdiff1d(np.arange(case.pages), used)
    for gradient in (da, db):
        assert np.all(np.any(gradient[used], axis=1))
        assert not np.any(gradient[others])


def test_a_row_does_not_depend_on_its_neighbours_nor_on_where_pages_lie():
    case = named("ranks_differ")
    x, lora, adapters = case.arrays()
    whole = np.asarray(lora_matmul(x, lora, adapters))
    order = np.random.default_rng(3).permutation(case.rows)
    np.testing.assert_array_equal(lora_matmul(x[order], lora, adapters[order]), whole[order])
    moved = np.random.default_rng(4).permutation(case.pages)
    back = jnp.asarray(np.argsort(moved), jnp.int32)
    table = jnp.where(lora.table >= 0, back[lora.table], lora.table)
    elsewhere = LoraPages(lora.a[moved], lora.b[moved], table, lora.ranks, lora.scales)
    np.testing.assert_array_equal(lora_matmul(x, elsewhere, adapters), whole)


@settings(max_examples=12, deadline=None)
@given(adapters=st.lists(st.integers(-2, 5), min_size=9, max_size=9), rank=st.integers(1, 6))
def test_any_adapters(adapters, rank):
    case = LoraCase("any", (6, rank, 1, 2), tuple(adapters), rows=9)
    one, two = (values_and_gradients(case, name) for name in ("reference", "by_adapter"))
    for exact, got in zip(one, two, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)


def test_the_table_says_why():
    choices = explain(LORA_MATMUL, LoraSpec(0, 8, 8, 1, 1), Target())
    assert [(row.name, row.reason is None) for row in choices] == [("by_adapter", False), ("reference", True)]


def test_what_does_not_fit_is_named():
    x, lora, adapters = named("one_adapter").arrays()
    with pytest.raises(MeshloomError, match="rows of x have 5 numbers, pages of a 20"):
        lora_matmul(x[:, :5], lora, adapters)
    with pytest.raises(MeshloomError, match="2 adapters for 24 rows"):
        LoraSpec.of(x, lora, adapters[:2])
    a, b = jnp.zeros((5, 20)), jnp.zeros((28, 5))
    with pytest.raises(MeshloomError, match="rank 5; there is room for 1 to 4"):
        lora.load(0, jnp.arange(5), a, b, alpha=1)
    with pytest.raises(MeshloomError, match=r"a and b are \(2, 19\) and \(28, 2\), not \(2, 20\) and \(28, 2\)"):
        lora.load(0, jnp.arange(2), a[:2, :19], b[:, :2], alpha=1)

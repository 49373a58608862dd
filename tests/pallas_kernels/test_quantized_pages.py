"""A cache in fewer bits reads back what was written to within its element type's step, in place, and never rescales."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels import KVPages, Ragged, paged_attention
from meshloom.pallas_kernels.attention.paged_cases import PagedCase

SCALED = ("int8", "float8_e4m3fn", "int4")
# The greatest rounding error of one element: half a step of the row's greatest element (int8, int4), or three bits of
# mantissa behind the leading one of the element itself (float8), relative to the row's greatest.
STEP = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127, "float8_e4m3fn": 2**-4, "int4": 0.5 / 7}


def written(element: str, values: np.ndarray) -> tuple[np.ndarray, KVPages]:
    """What one sequence's keys read as after they were written."""
    rows = jnp.asarray(values)
    count = len(values)
    ragged = Ragged(*map(jnp.asarray, (np.int32([count]), np.int32([[2, 0, 1]]), np.int32([0, count]), np.int32(1))))
    pages = KVPages.zeros(4, 4, values.shape[1], values.shape[2], element).write(rows, rows, ragged)
    return np.asarray(pages.gather(ragged.page_table).dequantized()[0][0, :count]), pages


@pytest.mark.parametrize("element", STEP)
def test_keys_read_back_to_within_half_a_step(element):
    values = np.random.default_rng(0).normal(size=(11, 2, 16)).astype(np.float32)
    # One loud token and one loud head must not cost the others a bit: every row has its own scale.
    values[3] *= 1000
    values[:, 1] *= 0.01
    read, _ = written(element, values)
    loudest = np.abs(values).max(axis=-1, keepdims=True)
    assert (np.abs(read - values) <= STEP[element] * loudest * 1.0001).all()
    if element == "float32":
        np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("element", SCALED)
def test_zeros_and_extremes_are_exact(element):
    values = np.zeros((3, 2, 16), np.float32)
    values[1, 0, 3], values[2, 1, 5] = -2.5, 1e-20
    read, _ = written(element, values)
    np.testing.assert_allclose(read, values, rtol=1e-6)


@pytest.mark.parametrize("element", SCALED)
def test_a_cache_in_fewer_bits_takes_fewer_bytes(element):
    sizes = {
        name: jax.eval_shape(lambda name=name: KVPages.zeros(8, 16, 8, 128, name)) for name in ("float32", element)
    }
    plain, small = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages)) for pages in sizes.values())
    bits = 4 if element == "int4" else 8
    assert small == plain * bits / 32 + plain / 128


@pytest.mark.parametrize("element", STEP)
def test_later_writes_leave_earlier_tokens_bitwise_alone(element):
    case = PagedCase((9, 6), (1, 2), element=element)
    _, k, v, pages, ragged = case.step()
    after = pages.write(1000 * k, 1000 * v, ragged)
    position, old = ragged.positions(3), pages.gather(ragged.page_table).k
    new = after.gather(ragged.page_table).k
    changed = {(s, int(p)) for s, p in np.argwhere((np.asarray(old) != np.asarray(new)).any(axis=(2, 3)))}
    assert changed == {(0, int(position[0])), (1, int(position[1])), (1, int(position[2]))}


@functools.cache
def attended(element: str, implementation: str) -> np.ndarray:
    """One ragged step over a cache of `element`s, with every option."""
    case = PagedCase((17, 40), (5, 1), element=element, head_dim=64)
    options = {"window": 21, "soft_cap": 20.0, "sinks": jnp.linspace(-1, 1, 4), "implementation": implementation}
    out, _ = jax.jit(functools.partial(paged_attention, **options))(*case.step())
    return np.asarray(out)[:6]


@pytest.mark.parametrize("element", STEP)
def test_attention_over_fewer_bits_stays_under_its_bound(element):
    # Each of the 64 products of a score errs by at most one step of a loud key (3 sigma), the errors are independent,
    # and q k / 8 has sigma 1: a score errs by about 3 * STEP, a value by 3 * STEP. Twice that bounds the greatest.
    error = np.abs(attended(element, "reference") - attended("float32", "reference")).max()
    assert error <= 2 * (3 + 3) * STEP[element]
    assert (error > 0) == (element != "float32")


@pytest.mark.parametrize("element", STEP)
def test_chunked_reads_what_the_reference_reads(element):
    np.testing.assert_allclose(attended(element, "chunked"), attended(element, "reference"), atol=1e-5)


@pytest.mark.parametrize("element", STEP)
def test_a_donated_cache_is_updated_in_place(element):
    case = PagedCase((17, 40), (5, 1), element=element, page_size=16)
    q, k, v, _, ragged = case.step()
    pages = jax.eval_shape(lambda: KVPages.zeros(4096, 16, 2, 16, element))
    compiled = jax.jit(paged_attention, donate_argnums=3).lower(q, k, v, pages, ragged).compile()
    memory = compiled.memory_analysis()
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == cache
    # The smallest array of the cache as well: a scale.
    assert memory.temp_size_in_bytes < min(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))


def test_types_that_no_cache_keeps_are_named():
    with pytest.raises(MeshloomError, match="a cache keeps float32, bfloat16, int8, float8_e4m3fn, int4; got float16"):
        KVPages.zeros(1, 4, 2, 16, jnp.float16)
    with pytest.raises(MeshloomError, match="packs kv heads in pairs; got 3: take int8"):
        KVPages.zeros(1, 4, 3, 16, "int4")


@pytest.mark.parametrize("element", ["bfloat16", "int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize(("head_dim", "joined"), [(16, True), (12, True), (24, False)])
def test_whole_lanes_hold_the_same_keys_and_values(element, head_dim, joined):
    case = PagedCase((9, 6), (3, 6), kv_heads=2, head_dim=head_dim, element=element)

    def blocks(lanes):
        _, k, v, pages, ragged = dataclasses.replace(case, lanes=lanes).step()
        pages = pages.write(k, v, ragged)
        return pages, pages.gather(ragged.page_table)

    (plain, expected), (whole, got) = blocks(1), blocks(32)
    assert plain.k.shape[-1] == plain.v.shape[-1] == head_dim
    assert whole.k.shape[-1] == 32
    assert whole.joined == joined
    for name in ("k", "v", "k_scale", "v_scale"):
        old, new = getattr(expected, name), getattr(got, name)
        assert (old is None and new is None) or np.array_equal(np.asarray(old, np.float32), np.asarray(new, np.float32))

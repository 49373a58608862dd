"""Keys that lie on several devices: the parts' results merge into attention over the whole cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from meshloom.core.topology import make_mesh
from meshloom.pallas_kernels import paged_attention
from meshloom.pallas_kernels.attention import PagePart, merged, merged_over, paged_attention_part
from meshloom.pallas_kernels.attention.kernel import MASKED
from meshloom.pallas_kernels.attention.paged_cases import PagedCase

CASE = PagedCase((17, 40, 6), (5, 1, 6))


def split(case: PagedCase, owner: np.ndarray, parts: int):
    """The case's step, and per part its own cache and PagePart; page w of sequence s belongs to part owner[s, w]."""
    q, k, v, pages, ragged = case.step()
    table = np.asarray(ragged.page_table)
    sequences, width = table.shape
    held = []
    for part in range(parts):
        index, where = np.full(table.shape, -1, np.int32), np.zeros(table.shape, np.int32)
        # Pages move to other places of a cache of the part's own; place 0 holds nobody's.
        place, sources = 1, [0] * (1 + table.size)
        for s in range(sequences):
            for at, w in enumerate(np.flatnonzero(owner[s, :width] == part)):
                index[s, at], where[s, at], sources[place] = w, place, table[s, w]
                place += 1
        held.append(
            (
                jax.tree.map(functools.partial(_take, np.asarray(sources)), pages),
                PagePart(jnp.asarray(where), jnp.asarray(index)),
            )
        )
    return (q, k, v, pages, ragged), held


def _take(sources: np.ndarray, x: jax.Array) -> jax.Array:
    return x[sources]


def owners(case: PagedCase, parts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, parts, (len(case.lengths) + case.padding, 16))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("element", ["float32", "int8"])
def test_parts_merge_into_the_whole(implementation, element):
    case = PagedCase(CASE.lengths, CASE.counts, element=element)
    (q, k, v, pages, ragged), held = split(case, owners(case, 3), 3)
    sinks = jnp.linspace(-1, 1, 4)
    options = {"window": 19, "soft_cap": 5.0, "distance_bias": jnp.linspace(0, 1, 4 * 9).reshape(4, 9)}
    run = jax.jit(lambda *args: paged_attention_part(*args, **options, implementation=implementation)[:2])
    whole, _ = paged_attention(q, k, v, pages, ragged, **options, sinks=sinks, implementation="reference")
    out, _ = merged([run(q, k, v, own, ragged, part) for own, part in held], sinks)
    np.testing.assert_allclose(out[:12], whole[:12], atol=2e-5)


@functools.cache
def compiled(window: int | None):
    """One program for all parts, and the reference over all pages."""
    part = jax.jit(functools.partial(paged_attention_part, window=window))
    return part, jax.jit(functools.partial(paged_attention, window=window, implementation="reference"))


@settings(max_examples=6, deadline=None)
@given(parts=st.integers(2, 4), seed=st.integers(0, 99), window=st.sampled_from([None, 11]))
def test_any_split_of_the_pages_merges_into_the_whole(parts, seed, window):
    (q, k, v, pages, ragged), held = split(CASE, owners(CASE, parts, seed), parts)
    attend_part, attend_whole = compiled(window)
    run = [attend_part(q, k, v, own, ragged, part) for own, part in held]
    whole, after = attend_whole(q, k, v, pages, ragged)
    np.testing.assert_allclose(merged([each[:2] for each in run])[0][:12], whole[:12], atol=2e-5)
    # Each of the step's 12 rows, of 2 kv heads, was written in exactly one part.
    written = sum(int((new.k != own.k).any(axis=3).sum()) for (_, _, new), (own, _) in zip(run, held, strict=True))
    assert written == int((after.k != pages.k).any(axis=3).sum()) == 2 * 12


def test_a_part_without_keys_in_reach_is_empty():
    (q, k, v, _, ragged), held = split(CASE, np.zeros((5, 16), int), 2)
    out, lse, after = paged_attention_part(q, k, v, held[1][0], ragged, held[1][1])
    assert np.all(np.asarray(out) == 0)
    assert np.all(np.asarray(lse) == np.float32(MASKED))
    np.testing.assert_array_equal(after.k, held[1][0].k)


def test_parts_over_a_mesh_axis_equal_one_device():
    (q, k, v, pages, ragged), held = split(CASE, owners(CASE, 4), 4)
    caches, parts = (jax.tree.map(lambda *xs: jnp.stack(xs), *each) for each in zip(*held, strict=True))
    sinks = jnp.linspace(-1, 1, 4)
    mesh = make_mesh("context=4", jax.devices()[:4])

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("context"), P("context")), out_specs=(P("context"), P("context"))
    )
    def step(rows, cache, part):
        cache, part = (jax.tree.map(lambda x: x[0], each) for each in (cache, part))
        out, lse, cache = paged_attention_part(*rows[:3], cache, rows[3], part)
        out, _ = merged_over("context", out, lse, sinks)
        return out[None], jax.tree.map(lambda x: x[None], cache)

    outs, after = jax.jit(step)((q, k, v, ragged), caches, parts)
    whole, _ = paged_attention(q, k, v, pages, ragged, sinks=sinks)
    np.testing.assert_allclose(outs[0][:12], whole[:12], atol=2e-5)
    for other in np.asarray(outs)[1:]:
        np.testing.assert_array_equal(other[:12], outs[0][:12])
    for i, (own, part) in enumerate(held):
        np.testing.assert_array_equal(after.k[i], own.write(k, v, ragged, part).k)

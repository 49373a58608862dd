"""Paged attention over ragged steps equals attention over whole sequences, whatever the pages and chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.pallas_kernels import KVPages, Mask, Ragged, attention, paged_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@functools.cache
def program(implementation, options):
    """One compiled function for all runs of the same options and shapes."""
    return jax.jit(functools.partial(paged_attention, **dict(options), implementation=implementation))


class PagedRun:
    """Feeds random sequences through `paged_attention` in given steps and compares with attention over whole rows."""

    def __init__(self, lengths, *, page_size, slots=4, capacity=64, seed=0, **options):
        rng = np.random.default_rng(seed)
        self.lengths, self.slots, self.page_size, self.options = lengths, slots, page_size, options
        self.width = -(-capacity // page_size)
        num_pages = 3 * self.width + 3  # whatever the sequences, so that runs share programs
        ids = rng.permutation(num_pages)[: len(lengths) * self.width]
        self.table = ids.reshape(len(lengths), self.width).astype(np.int32)
        self.q, self.k, self.v = (
            [rng.normal(size=(n, heads, HEAD_DIM)).astype(np.float32) for n in lengths]
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        pages = KVPages.zeros(num_pages, page_size, KV_HEADS, HEAD_DIM, jnp.float32)
        # Stale contents must never show: a page freed by another sequence is not cleared.
        self.pages = jax.tree.map(lambda x: x + 7.0, pages)
        self.done = [0] * len(lengths)

    def step(self, counts, rows, implementation):
        """One ragged step: `counts[i]` further rows of sequence i. Returns [(sequence, first, outputs)]."""
        active = [i for i, n in enumerate(counts) if n]
        kv_lens, cu = np.zeros(self.slots, np.int32), np.zeros(self.slots + 1, np.int32)
        table = np.zeros((self.slots, self.width), np.int32)
        inputs = {"q": [], "k": [], "v": []}
        for slot, i in enumerate(active):
            span = slice(self.done[i], self.done[i] + counts[i])
            kv_lens[slot], cu[slot + 1 :] = span.stop, cu[slot] + counts[i]
            table[slot] = self.table[i]
            for name in inputs:
                inputs[name].append(getattr(self, name)[i][span])
        total = int(cu[-1])
        arrays = [
            jnp.asarray(np.pad(np.concatenate(x), ((0, rows - total), (0, 0), (0, 0)), constant_values=np.nan))
            for x in inputs.values()
        ]
        # Padding rows carry NaN into q; k and v padding must be dropped by the write.
        arrays[0] = jnp.nan_to_num(arrays[0])
        ragged = Ragged(jnp.asarray(kv_lens), jnp.asarray(table), jnp.asarray(cu), jnp.asarray(len(active), jnp.int32))
        static = tuple((name, x) for name, x in self.options.items() if name != "distance_bias")
        run = program(implementation, static)
        out, self.pages = run(*arrays, self.pages, ragged, distance_bias=self.options.get("distance_bias"))
        results = []
        for slot, i in enumerate(active):
            results.append((i, self.done[i], np.asarray(out[cu[slot] : cu[slot + 1]])))
            self.done[i] += counts[i]
        return results

    def whole(self, i):
        """Attention over sequence i at once, by the reference."""
        q, k, v = (jnp.asarray(x[i])[None] for x in (self.q, self.k, self.v))
        options = {name: self.options.get(name) for name in ("window", "soft_cap")}
        mask = Mask(causal=True, window=options["window"])
        return np.asarray(attention(q, k, v, mask=mask, soft_cap=options["soft_cap"], implementation="reference")[0])


STEPS = [(5, 0, 1), (1, 17, 1), (1, 1, 1), (9, 2, 0), (1, 1, 30)]
LENGTHS = (17, 21, 33)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("options", "page_size"),
    [({}, 4), ({"window": 6}, 16), ({"soft_cap": 2.0}, 4), ({"window": 6}, 4)],
    ids=["plain", "window", "soft_cap", "window_of_pages"],
)
def test_mixed_steps_equal_whole_sequences(implementation, options, page_size):
    run = PagedRun(LENGTHS, page_size=page_size, **options)
    whole = [run.whole(i) for i in range(len(LENGTHS))]
    for counts in STEPS:
        for i, first, out in run.step(counts, 48, implementation):
            np.testing.assert_allclose(out, whole[i][first : first + len(out)], atol=1e-5)
    assert run.done == list(LENGTHS)


def test_sequences_longer_than_one_block_of_keys():
    run = PagedRun((300, 290), page_size=16, capacity=304)
    whole = [run.whole(i) for i in range(2)]
    for counts in [(200, 289), (99, 0), (1, 1)]:
        for i, first, out in run.step(counts, 512, "chunked"):
            np.testing.assert_allclose(out, whole[i][first : first + len(out)], atol=1e-5)


def test_one_row_bucket_has_no_prefill_loop():
    run = PagedRun((3,), page_size=4)
    whole = run.whole(0)
    for position in range(3):
        [(_, _, out)] = run.step((1,), 1, "chunked")
        np.testing.assert_allclose(out[0], whole[position], atol=1e-5)


def test_distance_bias_is_added_by_how_far_back_a_key_lies():
    table = np.random.default_rng(3).normal(size=(HEADS, 7)).astype(np.float32)
    chunked, reference = (PagedRun(LENGTHS, page_size=4, distance_bias=jnp.asarray(table)) for _ in range(2))
    for counts in STEPS:
        pairs = zip(chunked.step(counts, 48, "chunked"), reference.step(counts, 48, "reference"), strict=True)
        for (_, _, one), (_, _, two) in pairs:
            np.testing.assert_allclose(one, two, atol=1e-5)
    q, k, v = (jnp.asarray(x[0])[None] for x in (reference.q, reference.k, reference.v))
    distance = np.clip(np.subtract.outer(np.arange(17), np.arange(17)), 0, 6)
    whole = attention(q, k, v, mask=Mask(), bias=jnp.asarray(table)[:, distance][None])
    again = PagedRun(LENGTHS, page_size=4, distance_bias=jnp.asarray(table))
    [(_, _, out)] = again.step((17, 0, 0), 32, "chunked")
    np.testing.assert_allclose(out, whole[0], atol=1e-5)


def test_write_leaves_other_pages_alone():
    run = PagedRun((5, 6), page_size=4)
    before = np.asarray(run.pages.k)
    run.step((3, 0), 16, "chunked")
    changed = np.flatnonzero((np.asarray(run.pages.k) != before).any(axis=(1, 2, 3)))
    assert changed.tolist() == [run.table[0, 0]]


@settings(max_examples=4, deadline=None)
@given(data=st.data(), page_size=st.sampled_from([2, 8]), window=st.sampled_from([None, 9]))
def test_any_split_into_steps_gives_the_same_rows(data, page_size, window):
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    run = PagedRun(lengths, page_size=page_size, window=window, capacity=20, seed=len(lengths))
    whole = [run.whole(i) for i in range(len(lengths))]
    while run.done != lengths:
        counts = [data.draw(st.integers(0, n - d)) for n, d in zip(lengths, run.done, strict=True)]
        if not any(counts):
            counts = [n - d for n, d in zip(lengths, run.done, strict=True)]
        for i, first, out in run.step(counts, 64, "chunked"):
            np.testing.assert_allclose(out, whole[i][first : first + len(out)], atol=1e-5)

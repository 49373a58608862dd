"""The TPU kernel over pages: interpreted against the reference, raced, and compiled for every TPU."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.ahead import compiler_missing, target_devices
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import KVPages, Ragged, paged_attention
from meshloom.pallas_kernels.attention import PAGED_ATTENTION, paged_schedule
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.paged_cases import PagedCase
from meshloom.pallas_kernels.attention.paged_mosaic_tpu import paged_attention_mosaic_tpu
from meshloom.pallas_kernels.attention.reference import paged_attention_reference
from meshloom.pallas_kernels.attention.spec import PagedSpec
from meshloom.pallas_kernels.dispatch import Target, explain
from tests.compilers import needs_tpu

TPUS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")
# Decode, a prefill of a tile and a strip, decode at the end of a page and of a block, and a prefill that starts inside
# a page.
MIXED = PagedCase((5, 40, 256, 70), (1, 40, 1, 9), page_size=64, unwritten=float("nan"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks of 256 keys and strips of 16 tokens, so that small cases have several of each.

    Tiles are of one strip and decode rows weigh all that they multiply at a time, which is a third less to compile, but
    where a test asks for `two_of_each`.
    """
    monkeypatch.setattr(paged_schedule, "_BLOCK_TOKENS", 256)
    monkeypatch.setattr(paged_schedule, "_DECODE_ROWS", 256)
    monkeypatch.setattr(paged_schedule, "_STRIP_ROWS", 16)
    monkeypatch.setattr(paged_schedule, "_STRIPS", 1)


@pytest.fixture
def two_of_each(small_tiles, monkeypatch):
    """Strips of a tile, and pieces of what a decode row multiplies at a time."""
    monkeypatch.setattr(paged_schedule, "_STRIPS", 2)
    monkeypatch.setattr(paged_schedule, "_DECODE_ROWS", 512)
    monkeypatch.setattr(paged_schedule, "_PIECE_ROWS", 128)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel as XLA's CPU computes its meaning, without copies and semaphores."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def assert_right(case: PagedCase, tolerance: float = 2e-5, sinks: bool = False, **options):
    """The kernel's rows are those of the reference, which computes in float32, and zeros behind."""
    q, k, v, pages, ragged = case.step()
    pages = jax.jit(KVPages.write)(pages, k, v, ragged)
    scoring = PagedScoring(case.head_dim**-0.5, **options)
    values = jnp.linspace(-2, 2, case.heads) if sinks else None
    exact = jax.jit(lambda q, pages: paged_attention_reference(q, pages, ragged, scoring, values))
    got = jax.jit(lambda q, pages, ragged: paged_attention_mosaic_tpu(q, pages, ragged, scoring, values))
    rows, got = sum(case.counts), np.asarray(got(q, pages, ragged), np.float32)
    np.testing.assert_allclose(got[:rows], exact(q.astype(jnp.float32), pages)[:rows], atol=tolerance)
    assert np.all(got[rows:] == 0)


@pytest.mark.usefixtures("two_of_each")
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (MIXED, {"window": 33, "soft_cap": 3.0, "sinks": True}),
        (PagedCase((130, 40), (1, 9), element="int8", page_size=64, lanes=32), {}),
        (PagedCase((130, 40), (1, 9), 6, 2, 24, element="int4", page_size=128, lanes=32), {"sinks": True}),
    ],
    ids=["window_cap_sinks", "int8_joined", "int4"],
)
def test_no_race_no_unwritten_memory_and_nothing_out_of_bounds(case, options):
    # Fast memory holds NaN until it is written, and a DMA runs as late as its semaphores allow.
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with pltpu.force_tpu_interpret_mode(simulated):
        assert_right(case, **options)


@pytest.mark.usefixtures("interpreted", "two_of_each")
def test_rows_that_are_not_their_own_reach_no_later_ones():
    # The strip of the second sequence ends in rows of the third and in keys that are NaN; the fourth takes its place.
    assert_right(dataclasses.replace(MIXED, lengths=(5, 40, 256, 70), counts=(1, 40, 1, 15)))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), *(pytest.param(*heads, marks=pytest.mark.slow) for heads in ((6, 1), (64, 32)))]
)
def test_bfloat16_heads_are_picked_from_words_of_two(heads, kv_heads):
    case = PagedCase((33, 140), (33, 40), heads, kv_heads, element="bfloat16", dtype="bfloat16", page_size=32, lanes=32)
    assert_right(case, 2 * 3 / 256)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kv_heads", "head_dim"), [(3, 256), pytest.param(2, 16, marks=pytest.mark.slow)], ids=["wide", "narrow"]
)
def test_bfloat16_over_float8_errs_as_bfloat16_does(kv_heads, head_dim):
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "page_size": 128 if head_dim == 256 else 64}
    heads = 3 if kv_heads == 3 else 4  # no power of two, and groups of two
    case = PagedCase((130, 40), (1, 9), heads, element="float8_e4m3fn", dtype="bfloat16", **sizes)
    # Weights and results are rounded to 8 bits: one part in 256 each, of values up to about 3.
    assert_right(case, 2 * 3 / 256)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "lanes"), [(12, 4, 32), pytest.param(6, 6, 24, marks=pytest.mark.slow)], ids=["joined", "six"]
)
def test_int4_in_both_halves_of_a_byte_is_what_the_reference_reads(heads, kv_heads, lanes):
    sizes = {"page_size": 128, "element": "int4", "lanes": lanes}
    assert_right(PagedCase((300, 40, 256), (1, 9, 1), heads, kv_heads, **sizes), window=201, sinks=True)


@pytest.mark.usefixtures("interpreted")
def test_on_a_mesh_every_device_has_its_heads():
    case = PagedCase((130, 40), (1, 9), 8, 4, 24, element="int8", page_size=64, shards=2, lanes=32)
    with jax.set_mesh(make_mesh("tensor=2,data=2", jax.devices()[:4])):
        assert_right(case, sinks=True, window=33)


@functools.cache
def compiled_kernel():
    scoring = PagedScoring(0.25)
    return (
        jax.jit(lambda q, pages, ragged: paged_attention_mosaic_tpu(q, pages, ragged, scoring, None)),
        jax.jit(lambda q, pages, ragged: paged_attention_reference(q, pages, ragged, scoring, None)),
        jax.jit(KVPages.write),
    )


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("element", "page_size"), [("float32", 64), ("int4", 128)])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_lengths(element, page_size, data):
    """One program for all mixes of decode, prefill and padding sequences over up to 192 keys; twice the same bits."""
    run, exact, write = compiled_kernel()
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    lengths = data.draw(
        st.lists(st.sampled_from([1, 63, 64, 65, 127, 128, 129, 192]) | st.integers(1, 192), max_size=4)
    )
    counts = [data.draw(st.just(1) | st.integers(1, min(n, 20))) for n in lengths]
    kv_lens, cu = np.zeros(4, np.int32), np.full(5, sum(counts), np.int32)
    kv_lens[: len(lengths)], cu[: len(lengths) + 1] = lengths, np.cumsum([0, *counts])
    table = rng.permutation(16)[:12].reshape(4, 3).astype(np.int32)
    ragged = Ragged(*map(jnp.asarray, (kv_lens, table, cu, np.int32(len(lengths)))))
    shapes = (80, 4, 16), (16 * page_size, 2, 16), (16 * page_size, 2, 16)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ends = np.array([0, len(k)], np.int32)
    every_page = Ragged(*map(jnp.asarray, (ends[1:], np.arange(16, dtype=np.int32)[None], ends, np.int32(1))))
    pages = write(KVPages.zeros(16, page_size, 2, 16, element, lanes=32), k, v, every_page)
    got = np.asarray(run(q, pages, ragged))
    np.testing.assert_allclose(got[: cu[-1]], np.asarray(exact(q, pages, ragged))[: cu[-1]], atol=2e-5)
    assert np.all(got[cu[-1] :] == 0)
    np.testing.assert_array_equal(got, run(q, pages, ragged))


@pytest.mark.parametrize(
    ("name", "element"),
    [
        *zip(TPUS, ("int8", "bfloat16", "float8_e4m3fn", "int4"), strict=True),
        *(pytest.param(name, "int4", marks=pytest.mark.slow) for name in TPUS[:3]),
        *(pytest.param(name, "float8_e4m3fn", marks=pytest.mark.slow) for name in (TPUS[0], TPUS[3])),
        pytest.param(TPUS[3], "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_it_is_chosen_compiled_and_copies_no_cache(name, element):
    devices = parse_devices(name)
    if (missing := compiler_missing(devices)) is not None:
        pytest.skip(missing)
    mesh = make_mesh("data=1", target_devices(devices)[:1])
    page_size = 128 if element == "int4" or name == TPUS[3] else 16  # the latest has larger temporaries, of the step

    def placed(tree):
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

    def arguments():
        q, kv = jnp.zeros((64, 32, 128), jnp.bfloat16), jnp.zeros((64, 8, 128), jnp.bfloat16)
        lengths = jnp.zeros(64, jnp.int32), jnp.zeros((64, 64), jnp.int32), jnp.zeros(65, jnp.int32), jnp.int32(0)
        return q, kv, kv, KVPages.zeros(1024, page_size, 8, 128, element, lanes=128), Ragged(*lengths)

    args = placed(jax.eval_shape(arguments))
    run = functools.partial(paged_attention, window=4096, soft_cap=30.0)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run, donate_argnums=3).lower(*args).compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory, cache = compiled.memory_analysis(), jax.tree.leaves(args[3])
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in cache)
    assert memory.temp_size_in_bytes < cache[0].size * cache[0].dtype.itemsize / 8


@needs_tpu
@pytest.mark.parametrize(
    ("element", "page_size", "kv_heads", "head_dim"),
    [
        ("bfloat16", 16, 12, 64),
        ("int8", 64, 8, 128),
        ("float8_e4m3fn", 128, 8, 96),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in (
                ("bfloat16", 16, 12, 128),
                ("bfloat16", 16, 8, 80),
                ("bfloat16", 16, 8, 256),
                ("int8", 64, 8, 64),
                ("int8", 128, 4, 64),
                ("float8_e4m3fn", 64, 8, 64),
                ("int4", 128, 8, 128),
                ("int4", 128, 24, 128),
                ("int4", 128, 24, 64),
            )
        ),
    ],
)
def test_on_a_mesh_it_is_chosen_and_neither_copies_the_cache_nor_sends_anything(element, page_size, kv_heads, head_dim):
    # 2 heads of one byte on each device, or 3 of two bytes: no whole tiles of a TPU's memory, which it pads or turns.
    mesh = make_mesh("tensor=4", target_devices(parse_devices("v5e:2x2")))
    num_pages = 2**25 // kv_heads // page_size + 3  # GiBs a device: nothing of it fits fast memory

    def arguments():
        q, kv = (jnp.zeros((64, heads, head_dim), jnp.bfloat16) for heads in (4 * kv_heads, kv_heads))
        lengths = jnp.zeros(64, jnp.int32), jnp.zeros((64, 64), jnp.int32), jnp.zeros(65, jnp.int32), jnp.int32(0)
        return (q, kv, kv, KVPages.zeros(num_pages, page_size, kv_heads, head_dim, element, 4, 128)), Ragged(*lengths)

    def placed(tree, *spec):
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    of_heads, ragged = jax.eval_shape(arguments)
    args = *placed(of_heads, None, "tensor"), placed(ragged)
    with jax.set_mesh(mesh):
        compiled = jax.jit(paged_attention, donate_argnums=3).lower(*args).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert "tpu_custom_call" in text
    assert not re.search(r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", text)
    assert not re.search(rf"\[{num_pages},[\d,]*\]\S* (copy|copy-start|transpose|reshape)\(", text)
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[3])) // 4
    assert memory.alias_size_in_bytes == cache
    assert memory.temp_size_in_bytes < cache / 1000


def test_what_it_declines_is_said():
    def reasons(target: Target, **changes) -> str | None:
        facts = {"q_shape": (64, 32, 128), "kv_heads": 8, "pages_shape": (9, 1, 128, 128), "element": "bfloat16"}
        facts |= {"sequences": 64, "table_width": 8, "dtype": "bfloat16", "window": None, "distance_bias": False}
        return explain(PAGED_ATTENTION, PagedSpec(**(facts | changes)), target)[0].reason

    tpu = Target("tpu", "TPU v5 lite")
    assert reasons(tpu) is None
    assert reasons(Target("cpu", "cpu")) == "it runs on TPUs, not on cpu"
    assert "no mesh in scope" in str(reasons(Target()))
    assert "gather per score" in str(reasons(tpu, distance_bias=True))
    assert "64 scales are no whole rows of 128" in str(reasons(tpu, element="int8", pages_shape=(9, 1, 64, 128)))
    assert "128 scales are no whole rows of 256" in str(reasons(tpu, element="int4", pages_shape=(9, 1, 64, 128)))
    assert reasons(tpu, element="int4") is None
    with jax.set_mesh(make_mesh("fsdp=2,tensor=4")):
        assert reasons(tpu) == "the cache's kv heads are in 1 shard(s), for 4 device(s) of the tensor axis"
        assert reasons(tpu, pages_shape=(9, 4, 32, 128)) is None

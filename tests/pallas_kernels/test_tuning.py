"""Block sizes are data: who is asked first, which calls share an entry, and what no entry can do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshloom.core.ahead import target_devices
from meshloom.core.compile import cache_folder
from meshloom.core.errors import ConfigError, MeshloomError
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import KVPages, Ragged, tuning
from meshloom.pallas_kernels.attention import Mask, mosaic_tpu, paged_schedule
from meshloom.pallas_kernels.attention.kernel import Scoring
from meshloom.pallas_kernels.attention.paged import PagedScoring
from meshloom.pallas_kernels.attention.tuned import attention_key, tuned_blocks
from meshloom.pallas_kernels.dispatch import Target
from meshloom.pallas_kernels.matmul.grouped import GroupedSpec, tiles
from meshloom.pallas_kernels.matmul.grouped.mosaic_tpu import MOSAIC_TPU
from meshloom.pallas_kernels.matmul.quantized import blocks
from meshloom.pallas_kernels.matmul.quantized.spec import MatmulSpec
from meshloom.pallas_kernels.tuning import Found, bucket, key_of, overlay, read, tuned, write
from tests.compilers import needs_tpu

CAUSAL = Mask()
SIZES = {"block_q": 256, "block_kv": 512}
PAGED = {"tokens": 1024, "rows": 256, "decode_rows": 1024}
SPEC = MatmulSpec((512, 1024), (1024, 1024), "bfloat16", "int8", (1, 1024), "int8")


def allow(sizes):
    return None


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A user's folder and a package's, both empty, and nothing read before."""
    monkeypatch.setattr(tuning, "cache_folder", lambda: tmp_path / "user")
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "package")
    tuning._once.cache_clear()
    yield tuning.user_file("v6e"), tuning.shipped_file("v6e")
    tuning._once.cache_clear()


@pytest.fixture
def on_v6e(monkeypatch):
    monkeypatch.setattr(tuning.Target, "of_mesh", classmethod(lambda cls: cls("tpu", "TPU v6 lite")))


def keep(path, op, key, sizes):
    write(path, "v6e", "a test", {op: {key: Found(sizes, 1.5)}})


def test_an_overlay_is_asked_before_the_user_the_user_before_the_package(files, on_v6e):
    user, package = files
    assert tuned("attention_forward", "key", allow) is None
    keep(package, "attention_forward", "key", SIZES)
    tuning._once.cache_clear()
    assert tuned("attention_forward", "key", allow) == SIZES
    keep(user, "attention_forward", "key", SIZES | {"block_q": 128})
    assert tuned("attention_forward", "key", allow) == SIZES  # a process reads a file once
    tuning._once.cache_clear()
    assert tuned("attention_forward", "key", allow) == {"block_q": 128, "block_kv": 512}
    with overlay("attention_forward", {"block_q": 1024, "block_kv": 1024}):
        assert tuned("attention_forward", "key", allow) == {"block_q": 1024, "block_kv": 1024}
        with overlay("attention_forward", None):
            assert tuned("attention_forward", "key", allow) is None
        assert tuned("attention_backward", "key", allow) is None
    assert tuned("attention_forward", "another", allow) is None


def test_what_a_developer_found_decides_nothing_in_tests():
    assert not tuning.user_file("v6e").is_relative_to(cache_folder())
    assert not tuning.user_file("v6e").parent.exists()


def test_without_a_chip_in_scope_no_file_is_asked(files):
    keep(files[1], "attention_forward", "key", SIZES)
    assert tuned("attention_forward", "key", allow) is None


def test_users_files_are_not_read_where_machines_work_as_one(files, on_v6e, monkeypatch):
    user, package = files
    keep(package, "attention_forward", "key", SIZES)
    keep(user, "attention_forward", "key", SIZES | {"block_q": 128})
    monkeypatch.setattr(tuning, "joined", lambda: (1, 4))
    assert tuned("attention_forward", "key", allow) == SIZES


def test_a_program_is_traced_anew_under_other_sizes():
    @jax.jit
    def asked(x):
        sizes = tuned("attention_forward", "key", allow)
        return x + (0 if sizes is None else sizes["block_q"])

    assert asked(0) == 0
    with overlay("attention_forward", SIZES):
        assert asked(0) == 256
    assert asked(0) == 0


@pytest.mark.parametrize(("count", "shared"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)])
def test_counts_up_to_a_power_of_two_share_an_entry(count, shared):
    assert bucket(count) == shared


def test_a_key_names_what_is_set():
    assert key_of(head=128, window=None, causal=True, capped=False) == "head=128 causal"


def test_tokens_of_a_bucket_share_a_key_and_everything_else_is_exact():
    def key(tokens=4096, head=128, dtype="bfloat16", mask=CAUSAL, cap=None):
        x = jax.ShapeDtypeStruct((1, tokens, 8, head), dtype)
        return attention_key(x, x, x, mask, Scoring(1.0, cap))

    assert key(2049) == key() == "head=128 values=128 dtype=bfloat16 queries=4096 keys=4096 causal"
    others = key(2048), key(head=64), key(dtype="float32"), key(mask=Mask(causal=False)), key(cap=50.0)
    assert len({key(), *others, key(mask=Mask(window=1024))}) == 7
    rows = dataclasses.replace(SPEC, x=(300, 1024))
    assert blocks.matmul_key(rows) == blocks.matmul_key(SPEC)
    assert blocks.matmul_key(dataclasses.replace(SPEC, w=(1152, 1024))) != blocks.matmul_key(SPEC)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ("{}", "it has no 'ops'"),
        ('{"ops": {"softmax": {"k": {"gain": 1.1}}}}', "there is no kernel 'softmax'"),
        ('{"ops": {"attention_forward": {"k": {"block_q": 128, "gain": 1.1}}}}', "block_q, block_kv in whole numbers"),
        ('{"ops": {"attention_forward": {"k": {"block_q": 128, "block_kv": 0, "gain": 1.1}}}}', "in whole numbers"),
    ],
)
def test_a_damaged_file_is_refused_by_name(files, on_v6e, text, said):
    user, _ = files
    user.parent.mkdir(parents=True)
    user.write_text(text)
    with pytest.raises(ConfigError, match="does not hold block sizes of kernels") as error:
        tuned("attention_forward", "key", allow)
    assert str(user) in str(error.value)
    assert said in str(error.value)
    assert "meshloom tune" in str(error.value)


def test_writing_keeps_other_entries_renews_its_own_and_takes_out_what_gains_no_more(files):
    path = files[0]
    keep(path, "attention_forward", "a", SIZES)
    keep(path, "attention_forward", "b", SIZES)
    keep(path, "attention_forward", "a", SIZES | {"block_q": 128})
    assert {key: found.sizes["block_q"] for key, found in read(path)["attention_forward"].items()} == {
        "a": 128,
        "b": 256,
    }
    write(path, "v6e", "a test", {"attention_forward": {"b": None}})
    assert list(read(path)["attention_forward"]) == ["a"]
    assert json.loads(path.read_text())["by"] == "a test"


def test_sizes_that_a_call_cannot_have_are_an_error_where_asked_for_and_passed_over_in_a_file(files, on_v6e):
    own = blocks.largest_blocks(SPEC)
    illegal = {"rows": 512, "columns": 512, "chunk": 384}
    with overlay("quantized_matmul", illegal), pytest.raises(MeshloomError, match="chunks are multiples of 128"):
        blocks.blocks_of(SPEC)
    keep(files[1], "quantized_matmul", blocks.matmul_key(SPEC), illegal)
    assert blocks.blocks_of(SPEC) == own
    tuning._once.cache_clear()
    keep(files[1], "quantized_matmul", blocks.matmul_key(SPEC), {"rows": 256, "columns": 256, "chunk": 512})
    assert blocks.blocks_of(SPEC) == blocks.Blocks(256, 256, 512)


def test_names_of_sizes_are_checked():
    with pytest.raises(MeshloomError, match="quantized_matmul: rows, columns, chunk"), overlay("attention", SIZES):
        pass
    with pytest.raises(MeshloomError, match="cannot be"), overlay("attention_forward", {"rows": 1}):
        pass


def test_blocks_of_attention_pad_no_more_than_its_own():
    def chosen(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 8, 128), jnp.bfloat16)
        own = mosaic_tpu.blocks_of(tokens, tokens, 1024, 1024)
        with overlay("attention_forward", {"block_q": 2048, "block_kv": 1024}):
            return tuned_blocks("attention_forward", x, x, x, Mask(), Scoring(1.0), own)

    assert (chosen(4096).block_q, chosen(4096).block_kv) == (2048, 1024)
    assert (chosen(300).block_q, chosen(300).block_kv) == (384, 384)
    with pytest.raises(MeshloomError, match="pads 2049 x 2049 tokens to more"):
        chosen(2049)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((96, 512, 1024, 512), "multiples of 128, or all"),
        ((8192, 512, 1024, 512), "there are 4096 rows"),
        ((512, 4096, 1024, 512), "columns"),
        ((512, 512, 768, 768), "divide"),
        ((512, 512, 1024, 64), "chunks are multiples"),
        ((4096, 2048, 4096, 1024), "bytes of fast memory"),
    ],
)
def test_tiles_that_do_not_divide_or_fit_are_refused(sizes, said):
    spec = GroupedSpec(4096, 8, 4096, 2048, "bfloat16", "bfloat16", transposed=True, spread=False)
    asked = dict(zip(("rows", "columns", "contracted", "chunk"), sizes, strict=True))
    with overlay("grouped_matmul", asked), pytest.raises(MeshloomError, match=said):
        tiles.product_tiles(spec)


def test_a_gradient_of_weights_takes_the_tiles_that_are_known(files, on_v6e):
    call = 4096, 8, 2048, 1024, jnp.bfloat16
    own = tiles.outer_tiles(*call)
    known = tiles.OuterTiles(1024, 512, 1024, 256)
    tuning._once.cache_clear()
    keep(files[1], "grouped_outer", tiles.outer_key(*call), vars(known))
    assert tiles.outer_tiles(*call) == known != own
    assert tiles.outer_tiles(4096, 8, 2048, 1024, jnp.float32).left == own.left
    illegal = ((512, 4096, 512, 512), "all 2048"), ((512, 1024, 512, 384), "chunks"), ((96, 512, 512, 512), "rows")
    for sizes, said in illegal:
        asked = dict(zip(vars(known), sizes, strict=True))
        with overlay("grouped_outer", asked), pytest.raises(MeshloomError, match=said):
            tiles.outer_tiles(*call)


def test_a_call_over_pages_takes_the_sizes_that_are_known(files, on_v6e):
    q, scoring = jax.ShapeDtypeStruct((32, 32, 128), jnp.bfloat16), PagedScoring(1.0)
    pages = jax.eval_shape(lambda: KVPages.zeros(512, 128, 8, 128, "int8"))
    ragged = Ragged(*(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((32,), (32, 16), (33,), ())))
    own = paged_schedule.Sizes.of(q, pages, ragged, scoring)
    assert (own.block, own.decode_tokens, own.tile) == (512, 256, 64)
    keep(files[1], "paged_attention", paged_schedule.paged_key(q, pages, scoring), PAGED)
    tuning._once.cache_clear()
    known = paged_schedule.Sizes.of(q, pages, ragged, scoring)
    assert (known.block, known.decode_tokens, known.tile) == (1024, 128, 64)
    short = dataclasses.replace(ragged, page_table=jax.ShapeDtypeStruct((32, 2), jnp.int32))
    assert paged_schedule.Sizes.of(q, pages, short, scoring).block == 256
    with overlay("paged_attention", PAGED | {"tokens": 96}), pytest.raises(MeshloomError, match="multiples of 128"):
        paged_schedule.Sizes.of(q, pages, ragged, scoring)


def test_values_do_not_depend_on_the_blocks():
    from meshloom.pallas_kernels.matmul.quantized.formats import quantize
    from meshloom.pallas_kernels.matmul.quantized.mosaic_tpu import quantized_matmul_mosaic

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    w = quantize(jnp.asarray(rng.normal(size=(256, 256)), jnp.float32), "int8")
    own = quantized_matmul_mosaic(x, w, activations="int8", interpret=True)
    with overlay("quantized_matmul", {"rows": 32, "columns": 128, "chunk": 128}):
        other = quantized_matmul_mosaic(x, w, activations="int8", interpret=True)
    np.testing.assert_array_equal(np.asarray(own, np.float32), np.asarray(other, np.float32))


def test_a_gradient_of_weights_does_not_depend_on_its_tiles():
    # A tile of one group, tiles that groups share, a group of no rows and rows of none.
    counts, (rows, left, right) = jnp.asarray([128, 100, 0, 60], jnp.int32), (300, 512, 256)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.integers(-4, 5, size=(rows, side)), jnp.bfloat16) for side in (left, right))
    with overlay("grouped_outer", {"rows": 128, "left": 256, "right": 128, "chunk": 128}):
        got = MOSAIC_TPU.outer(a, b, counts, jnp.float32, Target(), interpret=True)
    ends = np.cumsum(counts)
    for group, (first, end) in enumerate(zip(ends - counts, ends, strict=True)):
        exact = np.asarray(a[first:end], np.float32).T @ np.asarray(b[first:end], np.float32)
        np.testing.assert_array_equal(got[group], exact)


@needs_tpu
def test_the_chip_of_the_mesh_names_the_file(files):
    keep(files[1], "attention_forward", "key", SIZES)
    devices = target_devices(parse_devices("v6e:1x1"))
    with jax.set_mesh(make_mesh({"fsdp": 1}, devices[:1])):
        assert tuned("attention_forward", "key", allow) == SIZES

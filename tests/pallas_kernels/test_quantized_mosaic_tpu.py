"""The TPU's quantized products mean what the reference says, read only what was written, and compile for every chip."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from meshloom.core.ahead import target_devices
from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import quantize, quantized_matmul
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.cases import QUANTIZED_CASES, QuantizedCase
from meshloom.pallas_kernels.matmul.quantized import QUANTIZED_MATMUL, MatmulSpec, blocks
from meshloom.pallas_kernels.matmul.quantized.blocks import blocks_of
from meshloom.pallas_kernels.matmul.quantized.mosaic_tpu import mosaic_why_not, quantized_matmul_mosaic
from meshloom.pallas_kernels.matmul.quantized.reference import quantized_matmul_reference
from tests.compilers import needs_tpu

TPU = Target("tpu", "TPU v5 lite")
SIMULATED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")


def spec_of(case: QuantizedCase) -> MatmulSpec:
    return MatmulSpec.of(*case.arrays(), case.activations, TPU)


CASES = (
    *(case for case in QUANTIZED_CASES if mosaic_why_not(spec_of(case), TPU) is None),
    QuantizedCase("w8a8_many_blocks", "int8", "int8", rows=70, contracted=100, columns=300, dtype="bfloat16", zeros=3),
    QuantizedCase("w8a16_many_blocks", "int8", "float", rows=70, contracted=100, columns=300, dtype="bfloat16"),
    QuantizedCase("w4a16_many_blocks", "int4_32", "float", rows=70, contracted=384, columns=300, dtype="bfloat16"),
    QuantizedCase("w4a16_many_groups", "int4_32", "float", contracted=8192, columns=40, dtype="bfloat16"),
    QuantizedCase("w4a8_one_scale_a_row", "int4_128", "int8", contracted=128, dtype="bfloat16"),
    QuantizedCase("w4a8_many_blocks", "int4_128", "int8", rows=40, columns=200, dtype="bfloat16"),
    QuantizedCase("fp8_many_blocks", "fp8_row", "fp8", rows=40, contracted=100, columns=200, dtype="bfloat16", zeros=3),
    QuantizedCase("fp8_blocks_many", "fp8_block", "fp8", rows=40, columns=256, dtype="bfloat16"),
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 32 rows, 128 columns and 128 numbers, so that small arrays have many."""
    monkeypatch.setattr(blocks, "MOST_ROWS", 32)
    monkeypatch.setattr(blocks, "MOST_COLUMNS", 128)
    monkeypatch.setattr(blocks, "MOST_PRODUCTS", 32 * 128 * 128)


def exact_and_got(case: QuantizedCase, interpret) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By the reference, by the kernel, and by how much a plain bfloat16 product of the same numbers errs at most."""
    x, w = case.arrays()
    exact = np.asarray(quantized_matmul_reference(x, w, activations=case.activations))
    got = quantized_matmul_mosaic(x, w, activations=case.activations, interpret=interpret)
    # Products of w's numbers in bfloat16, and what rounding the result to bfloat16 does in any case.
    naive = np.asarray(jnp.einsum("ri,oi->ro", x, w[...]), np.float32)
    error = np.abs(naive - np.asarray(quantized_matmul_reference(x, w, activations="float"))).max(initial=0.0)
    if case.activations == "fp8":
        # What lies in the middle between two float8 numbers may go either way, by the last bit of x / scale.
        error += float(jnp.max(jnp.abs(x)) * jnp.max(jnp.abs(w[...]))) / 16
    return exact, np.asarray(got, np.float32), error


def test_the_list_has_all_that_the_kernels_take():
    taken = {(case.format.split("_")[0], case.activations) for case in CASES}
    pairs = {"int8": "int8", "int4": "int8", "fp8": "fp8"}
    assert taken == {(weights, rows) for weights, own in pairs.items() for rows in (own, "float")}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_errors_are_at_most_twice_those_of_a_naive_product(case):
    exact, got, error = exact_and_got(case, True)
    assert np.abs(got - exact).max(initial=0.0) <= 2 * error + 1e-5


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["w8a8_many_blocks", "w4a16_many_blocks", "w4a8_groups_of_32", "fp8_blocks_many"])
def test_kernels_race_with_nothing_and_read_only_what_was_written(name):
    case = next(case for case in CASES if case.name == name)
    exact, got, error = exact_and_got(case, SIMULATED)
    assert np.abs(got - exact).max() <= 2 * error
    np.testing.assert_array_equal(got, exact_and_got(case, SIMULATED)[1])


@pytest.mark.parametrize("format", ["int4_32", "fp8_block"])
def test_with_many_rows_scales_of_groups_go_to_the_values(format):
    exact, got, error = exact_and_got(QuantizedCase("any", format, "float", rows=144, dtype="bfloat16"), True)
    assert np.abs(got - exact).max() <= 2 * error


@pytest.mark.parametrize("interpret", [True, SIMULATED], ids=["interpreted", "simulated"])
def test_rows_that_no_strip_divides_are_rounded_in_strips_that_overlap(interpret, monkeypatch):
    monkeypatch.setattr(blocks, "STRIP", 64)
    monkeypatch.setattr(blocks, "MOST_COLUMNS", 128)
    case = QuantizedCase("strips", "int8", "int8", rows=96, contracted=700, columns=256, dtype="bfloat16", zeros=3)
    assert blocks_of(spec_of(case)).rows % blocks.STRIP
    exact, got, error = exact_and_got(case, interpret)
    assert np.abs(got - exact).max() <= 2 * error


@needs_tpu
@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:2x1x1", "v6e:1x1", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "call",
    [
        ("int8", "int8"),
        ("int8", "float"),
        ("int4_64", "float"),
        ("int4_32", "int8"),
        ("fp8_block", "fp8"),
    ],
    ids="_".join,
)
def test_tpus_compile_it_with_its_gradient(chip, call):
    format, activations = call
    mesh = jax.sharding.Mesh(np.array(target_devices(parse_devices(chip))[:1]), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    x = abstract(jax.ShapeDtypeStruct((300, 640), jnp.bfloat16))
    w = jax.eval_shape(functools.partial(quantize, format=format), jax.ShapeDtypeStruct((384, 640), jnp.bfloat16))
    w = jax.tree.map(abstract, w)

    def both(x, w):
        out, pull = jax.vjp(lambda x: quantized_matmul(x, w, activations=activations), x)
        return out, pull(out)

    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(x, w).compile().as_text()
    assert text.count("tpu_custom_call") == 1


def test_the_table_says_why():
    spec = MatmulSpec((64, 512), (256, 512), "bfloat16", "int4", (1, 128), "float")

    def reason(target=TPU, **changes):
        changed = MatmulSpec(**(vars(spec) | changes))
        return explain(QUANTIZED_MATMUL, changed, target)[0].reason

    assert reason() is None
    assert "not on cpu" in reason(Target("cpu"))
    assert "TPU v4 has too little fast memory" in reason(Target("tpu", "TPU v4"))
    assert "inside shard_map" in reason(spread=True)
    assert reason(activations="int16") == "it has no product of weights in int4 and rows in int16"
    assert reason(activations="int8") is None
    assert reason(dtype="float32") == "x is bfloat16; got float32"
    assert reason(x=(0, 512)) == "there is nothing to multiply"
    assert "no multiple of 128" in reason(x=(64, 96), w=(256, 96), block=(1, 32))
    assert "do not fit fast memory" in reason(x=(64, 2**20), w=(256, 2**20))
    with pytest.raises(MeshloomError, match="'mosaic_tpu' cannot run this call: it runs on TPUs, not on"):
        quantized_matmul(jnp.ones((1, 128), jnp.bfloat16), quantize(jnp.ones((8, 128))), implementation="mosaic_tpu")


def test_weights_over_devices_are_left_to_xla():
    x, w = QuantizedCase("any", "int4_32", "float", dtype="bfloat16").arrays()
    with jax.set_mesh(make_mesh("tensor=8")):
        spec = MatmulSpec.of(x, w, None, TPU)
    chosen = next(row.name for row in explain(QUANTIZED_MATMUL, spec, TPU) if row.reason is None)
    assert chosen == "xla"


@pytest.mark.parametrize("call", [("int8", "int8", None), ("int4", "float", 128), ("int4", "float", 32)])
def test_blocks_cut_rows_into_whole_chunks(call):
    values, activations, group = call
    sizes = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (28672, 8192), (1536, 576)]
    for (size, columns), rows in itertools.product(sizes, (1, 16, 300, 512, 2048)):
        spec = MatmulSpec((rows, size), (columns, size), "bfloat16", values, (1, group or size), activations)
        chosen = blocks_of(spec)
        assert chosen is not None
        assert size % chosen.chunk == 0
        assert chosen.chunk == size or chosen.chunk % blocks.LANES == 0
        assert chosen.rows % (32 if values == "int8" else 16) == 0
        assert chosen.columns % blocks.LANES == 0
        if group and size > blocks.LANES * group:  # the scales of a chunk lie in one register of 128
            assert (blocks.LANES * group) % chosen.chunk == 0


def test_rows_that_no_chunk_divides_are_left_to_xla():
    spec = MatmulSpec((512, 9000), (512, 9000), "bfloat16", "int8", (1, 9000), "int8")
    assert "no multiple of 128 divides them" in mosaic_why_not(spec, TPU)

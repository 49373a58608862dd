"""The GPU's quantized products mean what the reference says: simulated with races, compiled and chosen for Hopper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import quantize, quantized_matmul
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.hopper import CORES, SHARED_LIMIT, bits_of
from meshloom.pallas_kernels.matmul.cases import QUANTIZED_CASES, QuantizedCase
from meshloom.pallas_kernels.matmul.quantized import FORMATS, QUANTIZED_MATMUL, MatmulSpec
from meshloom.pallas_kernels.matmul.quantized.hopper_blocks import blocks_of
from meshloom.pallas_kernels.matmul.quantized.mosaic_gpu import hopper_product_why_not, quantized_matmul_hopper
from meshloom.pallas_kernels.matmul.quantized.reference import quantized_matmul_reference
from tests.compilers import needs_cuda
from tests.pallas_kernels.simulated_gpu import simulated_gpu

HOPPER = Target("gpu", "NVIDIA H100 80GB HBM3")


def spec_of(case: QuantizedCase) -> MatmulSpec:
    return MatmulSpec.of(*jax.eval_shape(case.arrays), case.activations, HOPPER)


OF_THE_LIST = [dataclasses.replace(case, dtype="bfloat16") for case in QUANTIZED_CASES]
CASES = (
    QuantizedCase("w4a16_splits", "int4_32", "float", rows=3, contracted=1024, columns=72, dtype="bfloat16", zeros=1),
    QuantizedCase("w8a8_rounds", "int8", "int8", rows=33, contracted=640, columns=72, dtype="bfloat16", zeros=1),
    QuantizedCase("w8a16_many_blocks", "int8", "float", rows=300, contracted=448, columns=264, dtype="float16"),
    QuantizedCase("w4a16_many_blocks", "int4_64", "float", rows=70, contracted=448, columns=264, dtype="bfloat16"),
    QuantizedCase("fp8_many_blocks", "fp8_row", "fp8", rows=150, contracted=448, columns=264, dtype="bfloat16"),
    *(case for case in OF_THE_LIST if hopper_product_why_not(spec_of(case), HOPPER) is None),
)
QUICK = ("w4a16_splits", "w8a8_rounds")


def exact_and_got(case: QuantizedCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By the reference, by the kernel, and by how much a plain product of the same numbers in 16 bits errs at most."""
    x, w = case.arrays()
    exact = np.asarray(quantized_matmul_reference(x, w, activations=case.activations))
    with simulated_gpu():
        run = functools.partial(quantized_matmul_hopper, activations=case.activations)
        got = np.asarray(jax.jit(lambda x, w: run(x, w))(x, w), np.float32)
    naive = np.asarray(jnp.einsum("ri,oi->ro", x, w[...]), np.float32)
    error = np.abs(naive - np.asarray(quantized_matmul_reference(x, w, activations="float"))).max(initial=0.0)
    return exact, got, error


def test_the_list_has_all_that_the_kernel_takes():
    taken = {(case.format, case.activations) for case in CASES}
    four_bits = {(f"int4_{group}", "float") for group in (32, 64, 128)}
    assert taken == {("int8", "int8"), ("int8", "float"), *four_bits, *((f, "fp8") for f in FORMATS if f[:3] == "fp8")}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else pytest.mark.slow) for c in CASES]
)
def test_errors_are_at_most_twice_those_of_a_naive_product_and_nothing_races(case):
    exact, got, error = exact_and_got(case)
    assert np.abs(got - exact).max(initial=0.0) <= 2 * error + 1e-5


@pytest.mark.slow
def test_twice_the_same_bits():
    np.testing.assert_array_equal(exact_and_got(CASES[0])[1], exact_and_got(CASES[0])[1])


def test_the_table_says_why_not():
    spec = MatmulSpec((64, 512), (256, 512), "bfloat16", "int4", (1, 128), "float")

    def reason(target=HOPPER, **changes):
        table = explain(QUANTIZED_MATMUL, MatmulSpec(**(vars(spec) | changes)), target)
        return next(row.reason for row in table if row.name == "mosaic_gpu")

    assert reason() is None
    assert reason(values="int8", block=(1, 512)) is None
    assert reason(values="float8_e4m3fn", block=(128, 128), activations="fp8") is None
    assert "wgmma, which Hopper has and NVIDIA A100-SXM4-80GB has not" in reason(Target("gpu", "NVIDIA A100-SXM4-80GB"))
    assert "NVIDIA B200 has not" in reason(Target("gpu", "NVIDIA B200"))
    assert "it runs on Hopper GPUs, not on cpu" in reason(Target("cpu"))
    assert "inside shard_map" in reason(spread=True)
    assert "no product of weights in int4 and rows in int8" in reason(activations="int8")
    assert "x is bfloat16 or float16; got float32" in reason(dtype="float32")
    assert "nothing to multiply" in reason(x=(0, 512))
    assert "rows of 96 numbers are no multiple of 64" in reason(x=(64, 96), w=(256, 96), block=(1, 32))
    assert "13 columns are no multiple of 8" in reason(w=(13, 512))


@pytest.mark.parametrize("rows", [1, 16, 64, 65, 300, 512, 8192])
@pytest.mark.parametrize(
    ("values", "activations", "group"),
    [("int8", "float", None), ("int8", "int8", None), ("int4", "float", 32), ("float8_e4m3fn", "fp8", 128)],
)
def test_blocks_fit_memory_and_few_rows_fill_the_cores(rows, values, activations, group):
    for columns, size in ((4096, 4096), (1024, 4096), (4096, 14336), (576, 1536), (151_936, 896)):
        block = (128 if values == "float8_e4m3fn" else 1, group or size)
        spec = MatmulSpec((rows, size), (columns, size), "bfloat16", values, block, activations)
        blocks = blocks_of(spec)
        assert blocks.depth * blocks.steps * blocks.splits == size
        assert max(blocks.depth, blocks.group) % min(blocks.depth, blocks.group) == 0
        assert blocks.rows % 8 == 0
        x_bits = 16 if activations == "float" else 8
        held = blocks.stages * blocks.depth * (128 * bits_of(values) + blocks.rows * x_bits) // 8
        assert blocks.stages >= 3
        assert held + 128 * (64 * 2 if blocks.rows > 64 else blocks.rows * 4) <= SHARED_LIMIT
        if rows == 16 and columns >= 4096:
            assert blocks.splits * -(-columns // 128) > CORES / 2


def compiled_for(chip: str, rows: int, format: str, activations: str) -> str:
    """`quantized_matmul` with its gradient."""
    where = parse_devices(chip)
    whole = jax.NamedSharding(make_mesh("fsdp=1", target_devices(where)), jax.P())

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    x = abstract(jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16))
    w = jax.eval_shape(functools.partial(quantize, format=format), jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16))

    def both(x, w):
        out, pull = jax.vjp(lambda x: quantized_matmul(x, w, activations=activations), x)
        return out, pull(out)

    with jax.set_mesh(whole.mesh):
        return jax.jit(both).lower(x, jax.tree.map(abstract, w)).compile(compiler_options(where)).as_text()


@needs_cuda
@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize(
    "call",
    [("int8", "float"), ("int8", "int8"), ("int4_32", "float"), ("int4_128", "float"), ("fp8_block", "fp8")],
    ids="_".join,
)
def test_hopper_compiles_it_nothing_spills_and_no_product_waits_for_another(rows, call, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    assert "quantized_matmul" in compiled_for("h100:1", rows, *call)
    (report,) = [each.read_text(errors="replace") for each in tmp_path.glob("*.ptxas")]
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    assert "serialized" not in report


@needs_cuda
def test_ampere_takes_xla():
    assert "mosaic_gpu" not in compiled_for("a100:1", 16, "int8", "float")

"""Products around a ring are those after a gather or before a scatter, and their shards travel while they run."""

import dataclasses
import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, NamedSharding
from jax.sharding import PartitionSpec as P

from meshloom.core.ahead import target_devices
from meshloom.core.counting import count_flops
from meshloom.core.errors import MeshloomError
from meshloom.core.hlo import parse
from meshloom.core.program_report import compile_and_report
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import all_gather_matmul, matmul_reduce_scatter
from meshloom.pallas_kernels.dispatch import Target, explain
from meshloom.pallas_kernels.matmul.collective import (
    ALL_GATHER_MATMUL,
    MATMUL_REDUCE_SCATTER,
    mosaic_tpu,
    mosaic_tpu_scatter,
)
from meshloom.pallas_kernels.matmul.collective.spec import CollectiveSpec
from tests.compilers import needs_tpu

# What each function takes and gives on a mesh of `data` and `tensor`: x, w and the result.
SPECS = {
    all_gather_matmul: ((P("data", "tensor"), P("tensor")), P("data", None, "tensor")),
    matmul_reduce_scatter: ((P("data", None, "tensor"), P(None, "tensor")), P("data", "tensor")),
}
BOTH = pytest.mark.parametrize("op", SPECS, ids=lambda op: op.__name__)


def normal(*shape: int, seed: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def on_mesh(op, mesh, *, implementation: str | None, check_vma: bool = True):
    """The op on whole arrays x [batch, rows, I] and w [O, I]."""
    inside, outside = SPECS[op]
    run = functools.partial(op, axis="tensor", implementation=implementation)
    return jax.shard_map(run, mesh=mesh, in_specs=inside, out_specs=outside, check_vma=check_vma)


def value_and_grads(product, x, w):
    """The product and the gradients of a sum that weighs each of its elements differently."""
    weigh = normal(*x.shape[:-1], w.shape[0], seed=9)

    def total(x, w):
        y = product(x, w)
        return jnp.sum(weigh * y.astype(jnp.float32)), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, w)
    return [np.asarray(each, np.float32) for each in (y, *grads)]


def plain(x, w):
    return jnp.einsum("bri,oi->bro", x, w)


@BOTH
@pytest.mark.parametrize(("devices", "rows"), [(2, 1), (2, 3), (4, 2), (8, 3)])
@pytest.mark.parametrize("implementation", ["ring", "reference"])
def test_a_ring_equals_the_plain_product_in_values_and_gradients(op, devices, rows, implementation):
    mesh = make_mesh({"data": 8 // devices, "tensor": devices})
    x = normal(8 // devices, devices * rows, 3 * devices, seed=1)
    w = normal(2 * devices, 3 * devices, seed=2)
    got = value_and_grads(on_mesh(op, mesh, implementation=implementation), x, w)
    for one, two in zip(got, value_and_grads(plain, x, w), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * (1 + np.abs(two).max()))


@BOTH
def test_bfloat16_sums_are_rounded_once_on_each_device(op):
    devices = 4
    mesh = make_mesh({"data": 2, "tensor": devices})
    x, w = (normal(*shape, seed=i, dtype=jnp.bfloat16) for i, shape in enumerate([(2, 32, 64), (16, 64)]))
    exact = value_and_grads(plain, x.astype(jnp.float32), w.astype(jnp.float32))
    product = on_mesh(op, mesh, implementation="ring")
    for two, one, low in zip(value_and_grads(product, x, w), exact, value_and_grads(plain, x, w), strict=True):
        naive = np.abs(low - one).max()
        assert naive > 0
        assert np.abs(two - one).max() <= devices * naive


@BOTH
def test_two_runs_are_bitwise_the_same(op):
    x, w = normal(2, 8, 16, seed=3, dtype=jnp.bfloat16), normal(16, 16, seed=4, dtype=jnp.bfloat16)
    product = on_mesh(op, make_mesh({"data": 2, "tensor": 4}), implementation="ring")
    for one, two in zip(*(value_and_grads(product, x, w) for _ in range(2)), strict=True):
        np.testing.assert_array_equal(one, two)


@BOTH
def test_flops_are_those_of_the_plain_product(op):
    x, w = normal(1, 16, 8, seed=3), normal(16, 8, seed=4)
    product = on_mesh(op, make_mesh({"data": 1, "tensor": 8}), implementation="ring")
    assert count_flops(product, x, w).flops == 2 * 16 * 8 * 16


# -- what the compiler makes of it --


def abstract(mesh, op, rows: int, contracted: int, outputs: int, dtype=jnp.bfloat16):
    shapes = ((mesh.shape["data"], rows, contracted), (outputs, contracted))
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, SPECS[op][0], strict=True)
    ]


@BOTH
def test_forward_and_backward_send_shards_both_ways_and_gather_nothing(op):
    mesh = make_mesh({"data": 1, "tensor": 8})
    rows, size, outputs = 64, 32, 16
    product = on_mesh(op, mesh, implementation="ring")
    arrays = abstract(mesh, op, rows, size, outputs, jnp.float32)

    def backward(x, w, dy):
        return jax.vjp(product, x, w)[1](dy)

    dy = jax.ShapeDtypeStruct((1, rows, outputs), jnp.float32, sharding=NamedSharding(mesh, SPECS[op][1]))
    forward, both = (
        compile_and_report(jax.jit(run).lower(*given), dict(mesh.shape))[1]
        for run, given in ((product, arrays), (backward, [*arrays, dy]))
    )
    # Rows of x are gathered and sums of results scattered; backward does the other with their gradients. Products with
    # the weight's gradient need what is gathered forward again, and share what is gathered backward.
    x_bytes, y_bytes = (4 * 7 * rows // 8 * each for each in (size, outputs))
    expected = {all_gather_matmul: (x_bytes, 2 * x_bytes), matmul_reduce_scatter: (y_bytes, y_bytes)}[op]
    for report, amount in zip((forward, both), expected, strict=True):
        assert {each.kind: each.bytes for each in report.collectives if "tensor" in each.axes} == {
            "collective_permute": amount
        }
    sent = {"{{0,1},": 0, "{{0,7},": 0}
    for computation in forward.module.computations.values():
        for each in computation.instructions:
            if each.opcode.startswith("collective-permute"):
                (direction,) = (key for key in sent if f"source_target_pairs={key}" in each.attributes)
                sent[direction] += each.bytes
    assert sent["{{0,1},"] == sent["{{0,7},"] > 0


@needs_tpu
@BOTH
def test_a_tpu_multiplies_while_every_shard_travels(op):
    where = parse_devices("v5e:2x4")
    mesh = make_mesh({"data": 1, "tensor": where.count}, target_devices(where))
    lowered = jax.jit(on_mesh(op, mesh, implementation="ring")).lower(*abstract(mesh, op, 2048, 1024, 1024))
    module = parse(lowered.compile().as_text())
    schedule = module.computations[module.entry].instructions
    multiplies = {
        name
        for name, computation in module.computations.items()
        if any(each.opcode in ("convolution", "dot") for each in computation.instructions)
    }
    products = [i for i, each in enumerate(schedule) if set(each.called.get("calls", ())) & multiplies]
    begun = {each.name: i for i, each in enumerate(schedule) if each.opcode == "collective-permute-start"}
    done = {each.operands[0]: i for i, each in enumerate(schedule) if each.opcode == "collective-permute-done"}
    assert len(begun) == len(done) == 2 * 7
    assert not [each for each in schedule if each.opcode.startswith(("all-gather", "reduce-scatter", "all-reduce"))]
    for name, start in begun.items():
        assert any(start < product < done[name] for product in products), f"{name} travels alone"


# -- the kernels for TPUs --


@pytest.mark.parametrize(
    ("op", "axes", "dtype", "outputs"),
    [
        (all_gather_matmul, {"data": 1, "tensor": 4}, "bfloat16", 384),
        (all_gather_matmul, {"data": 2, "tensor": 2}, "float32", 128),
        (all_gather_matmul, {"data": 1, "tensor": 3}, "float32", 128),
        (matmul_reduce_scatter, {"data": 1, "tensor": 4}, "bfloat16", 384),
        (matmul_reduce_scatter, {"data": 2, "tensor": 2}, "float32", 256),
        (matmul_reduce_scatter, {"data": 1, "tensor": 3}, "float32", 128),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_the_kernels_equal_the_plain_product_without_races(op, axes, dtype, outputs):
    devices = axes["data"] * axes["tensor"]
    mesh = make_mesh(axes, jax.devices()[:devices])
    rows, shard = (axes["data"], 32 * axes["tensor"]), 128 * axes["tensor"]
    shapes = {
        all_gather_matmul: ((*rows, 128), (outputs * axes["tensor"], 128)),
        matmul_reduce_scatter: ((*rows, shard), (outputs, shard)),
    }
    placed = [
        jax.device_put(normal(*shape, seed=i, dtype=dtype), NamedSharding(mesh, spec))
        for i, (shape, spec) in enumerate(zip(shapes[op], SPECS[op][0], strict=True))
    ]
    # A simulation needs to know which TPU it is of.
    of_tpu = mesh.abstract_mesh.update(abstract_device=AbstractDevice("TPU v5 lite", None, "tpu"))
    product = on_mesh(op, of_tpu, implementation="mosaic_tpu", check_vma=False)
    # Fast memory holds NaN until it is written, and a DMA runs as late as its semaphores allow.
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with pltpu.force_tpu_interpret_mode(simulated):
        got = value_and_grads(product, *placed)
    naive = {"bfloat16": 2**-8, "float32": 2**-18}[dtype]
    exact = value_and_grads(plain, *(each.astype(jnp.float32) for each in placed))
    for one, two in zip(got, exact, strict=True):
        np.testing.assert_allclose(one, two, atol=axes["tensor"] * naive * np.abs(two).max())


@needs_tpu
@BOTH
@pytest.mark.parametrize("text", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_the_kernels_compile_and_leave_xla_no_collective(op, text):
    where = parse_devices(text)
    mesh = make_mesh({"data": 1, "tensor": where.count}, target_devices(where))
    product = on_mesh(op, mesh, implementation="mosaic_tpu", check_vma=False)
    sizes = {all_gather_matmul: (512, 256 * where.count), matmul_reduce_scatter: (256 * where.count, 512)}[op]
    lowered = jax.jit(product).lower(*abstract(mesh, op, 64 * where.count, *sizes))
    _, report = compile_and_report(lowered, dict(mesh.shape))
    assert report.collectives == ()
    calls = [
        each for c in report.module.computations.values() for each in c.instructions if each.opcode == "custom-call"
    ]
    assert any("tpu_custom_call" in each.attributes for each in calls)


# -- what chooses --


def test_selection_is_a_table_with_reasons():
    tpu = Target("tpu", "TPU v5 lite")
    good = CollectiveSpec((512, 4096), (1792, 4096), "bfloat16", 8)
    assert [row.name for row in explain(ALL_GATHER_MATMUL, good, tpu)] == ["ring", "mosaic_tpu", "reference"]
    scatter = CollectiveSpec((4096, 1792), (4096, 1792), "bfloat16", 8)
    assert [row.name for row in explain(MATMUL_REDUCE_SCATTER, scatter, tpu)] == ["ring", "mosaic_tpu", "reference"]
    reasons = {
        None: (good, tpu),
        "it runs on TPUs, not on cpu": (good, Target("cpu")),
        "TPU v4 has too little fast memory": (good, Target("tpu", "TPU v4")),
        "kernels that address other devices need shard_map(..., check_vma=False)": (
            dataclasses.replace(good, checked=True),
            tpu,
        ),
        "one device has no ring": (CollectiveSpec((512, 4096), (1792, 4096), "bfloat16", 1), tpu),
        "it takes the rows of one batch, not of 3": (CollectiveSpec((3, 32, 128), (128, 128), "bfloat16", 8), tpu),
        "it takes rows in 32s, and features in 128s; here are 48 rows, 128 to 128": (
            CollectiveSpec((48, 128), (128, 128), "bfloat16", 8),
            tpu,
        ),
        "it multiplies bfloat16 and float32, not float16": (CollectiveSpec((32, 128), (128, 128), "float16", 8), tpu),
        "its shards and blocks take 70 MiB of fast memory or more, of 48": (
            CollectiveSpec((2048, 8192), (1024, 8192), "bfloat16", 8),
            tpu,
        ),
    }
    for reason, (spec, target) in reasons.items():
        assert mosaic_tpu.why_not(spec, target) == reason
    assert mosaic_tpu_scatter.why_not(scatter, tpu) is None
    assert mosaic_tpu_scatter.why_not(scatter, Target("cpu")) == "it runs on TPUs, not on cpu"
    few = dataclasses.replace(scatter, x=(128, 1792))
    assert "here are 16 rows, 1792 to 4096" in str(mosaic_tpu_scatter.why_not(few, tpu))
    many = dataclasses.replace(scatter, x=(32768, 1792))
    assert "its sums and blocks take 95 MiB of fast memory or more" in str(mosaic_tpu_scatter.why_not(many, tpu))


def test_what_cannot_run_is_refused():
    mesh = make_mesh({"data": 1, "tensor": 8})
    x, w = normal(1, 12, 8, seed=1), normal(8, 8, seed=2)
    with pytest.raises(MeshloomError, match="12 rows do not divide over tensor = 8 devices"):
        on_mesh(matmul_reduce_scatter, mesh, implementation=None)(x, w)
    with pytest.raises(MeshloomError, match="'mosaic_tpu' cannot run this call: it runs on TPUs"):
        on_mesh(all_gather_matmul, mesh, implementation="mosaic_tpu")(x[:, :8], w)


def test_sizes_that_differ_are_named():
    check = importlib.import_module("meshloom.pallas_kernels.matmul.collective")._check
    with pytest.raises(MeshloomError, match="rows of x have 7 numbers, rows of w 8"):
        check("all_gather_matmul", (4, 7), (8, 8))
    with pytest.raises(MeshloomError, match=r"x has shape \(7,\); rows are its last dimension but one"):
        check("all_gather_matmul", (7,), (8, 7))

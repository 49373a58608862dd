"""Cross entropy over blocks of a vocabulary is that of all its logits, on one device and on meshes, in less memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from meshloom.core.ahead import target_devices
from meshloom.core.counting import count_flops
from meshloom.core.errors import MeshloomError
from meshloom.core.program_report import compile_and_report
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels.cross_entropy import CROSS_ENTROPY, Split, _check, linear_cross_entropy, spec
from meshloom.pallas_kernels.cross_entropy.cases import CROSS_ENTROPY_CASES, CrossEntropyCase
from meshloom.pallas_kernels.cross_entropy.spec import CrossEntropySpec
from meshloom.pallas_kernels.dispatch import Target, explain
from tests.compilers import needs_tpu

# How the same call may lie on eight devices: with the vocabulary split, stored, both, over one axis of rows or several.
SPLITS = {
    "tensor": ({"fsdp": 2, "tensor": 4}, P("fsdp"), P("tensor", "fsdp")),
    "context": ({"data": 2, "context": 2, "tensor": 2}, P("data", "context"), P("tensor", None)),
    "stored_by_columns": ({"data": 2, "fsdp": 4}, P(("data", "fsdp")), P(None, "fsdp")),
    "stored_by_rows": ({"data": 2, "fsdp": 4}, P(("data", "fsdp")), P("fsdp", None)),
    "whole": ({"data": 8}, P("data"), P()),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """16 rows of the weight at a time, or less."""
    monkeypatch.setattr(spec, "BLOCK_LOGITS", 1)
    monkeypatch.setattr(spec, "CPU_BLOCK_LOGITS", 1)


def value_and_grads(case: CrossEntropyCase, implementation: str, dtype=None, split: Split | None = None):
    """Both results and the gradients of x, weight and bias, of a sum that weighs every row and result differently."""
    x, weight, bias, targets = case.arrays()
    arrays = [a if dtype is None else a.astype(dtype) for a in (x, weight, *([] if bias is None else [bias]))]
    weigh = np.random.default_rng(1).normal(size=(2, *case.rows)).astype(np.float32)

    def loss(x, weight, *bias):
        nll, lse = linear_cross_entropy(
            x,
            weight,
            targets,
            bias=bias[0] if bias else None,
            soft_cap=case.soft_cap,
            split=split,
            implementation=implementation,
        )
        return jnp.sum(weigh[0] * nll + weigh[1] * lse), (nll, lse)

    run = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(arrays))), has_aux=True))
    (_, results), grads = run(*arrays)
    return [np.asarray(a, np.float32) for a in (*results, *grads)]


def split_of(name: str) -> Split:
    axes, rows, weight = SPLITS[name]
    return Split(make_mesh(axes), rows, weight)


def assert_within_naive_error(case: CrossEntropyCase, split: Split | None = None) -> None:
    """No further from float32 than twice what rounding the inputs and results to the case's dtype does."""
    exact = value_and_grads(case, "reference", jnp.float32)
    naive = value_and_grads(case, "reference")
    for one, two, low in zip(exact, value_and_grads(case, "chunked", split=split), naive, strict=True):
        bound = 2 * np.abs(low - one).max() + 1e-5 * (1 + np.abs(one).max())
        if case.dtype == "bfloat16":  # the gradient of a logit is rounded before it is multiplied
            bound += 2**-7 * np.abs(one).max()
        assert np.abs(two - one).max() <= bound


@pytest.mark.parametrize("case", CROSS_ENTROPY_CASES, ids=lambda case: case.name)
def test_blocks_equal_all_logits_in_values_and_gradients(case):
    assert_within_naive_error(case)


@pytest.mark.parametrize("name", SPLITS)
def test_a_mesh_changes_rounding_only(name):
    case = CrossEntropyCase(f"mesh_{name}", rows=(8, 4), vocab=1056, bias=True, soft_cap=5.0, ignored=3)
    assert_within_naive_error(case, split_of(name))


def test_the_reference_is_what_optax_computes():
    x, weight, _, targets = CrossEntropyCase("optax").arrays()
    nll, lse = linear_cross_entropy(x, weight, targets, implementation="reference")
    logits = x @ weight.T
    np.testing.assert_allclose(nll, optax.softmax_cross_entropy_with_integer_labels(logits, targets), rtol=1e-5)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_ignored_rows_are_exactly_zero_and_move_nothing(implementation):
    case = CrossEntropyCase("zero", ignored=2)
    *_, targets = case.arrays()
    ignored = np.asarray((targets < 0) | (targets >= case.vocab))
    nll, lse, dx, _ = value_and_grads(case, implementation)
    for rows in (nll, lse, dx):
        assert np.all(rows[ignored] == 0)
        assert np.all(rows[~ignored] != 0)
    *_, dw = value_and_grads(CrossEntropyCase("none", ignored=1), implementation)
    assert np.all(dw == 0)


def test_two_runs_are_bitwise_the_same():
    case = CrossEntropyCase("again", rows=(8, 4), vocab=1024, dtype="bfloat16", bias=True)
    for split in (None, split_of("tensor")):
        for one, two in zip(*(value_and_grads(case, "chunked", split=split) for _ in range(2)), strict=True):
            np.testing.assert_array_equal(one, two)


@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 9), vocab=st.integers(17, 300), cap=st.none() | st.floats(0.5, 30.0), bias=st.booleans())
def test_any_vocabulary_agrees(rows, vocab, cap, bias):
    case = CrossEntropyCase("random", rows=(rows,), vocab=vocab, soft_cap=cap, bias=bias, ignored=4)
    for one, two in zip(value_and_grads(case, "reference"), value_and_grads(case, "chunked"), strict=True):
        np.testing.assert_allclose(two, one, atol=2e-5 * (1 + np.abs(one).max()))


# -- what the compiler makes of it --


def compiled(implementation: str, split: Split | None, *, rows: int, model: int, vocab: int, devices=None):
    """Forward and backward in bfloat16 for abstract arrays, and its report."""

    def placed(shape, dtype, entry):
        sharding = jax.sharding.SingleDeviceSharding(devices[0]) if split is None else NamedSharding(split.mesh, entry)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    stored, by_rows = (P(), P()) if split is None else (split.weight, split.rows)
    arrays = (
        placed((rows, model), jnp.bfloat16, by_rows),
        placed((vocab, model), jnp.bfloat16, stored),
        placed((rows,), jnp.int32, by_rows),
    )

    def loss(x, weight, targets):
        return jnp.sum(linear_cross_entropy(x, weight, targets, split=split, implementation=implementation)[0])

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    mesh = {"data": 1} if split is None else dict(split.mesh.shape)
    return compile_and_report(run.lower(*arrays), mesh)[1]


def largest_array(report) -> int:
    """Elements of the largest array that any instruction makes."""
    sizes = [0]
    for computation in report.module.computations.values():
        for instruction in computation.instructions:
            for shape in instruction.shapes:
                dims = shape.text.partition("[")[2].rstrip("]")
                sizes.append(math.prod(int(d) for d in dims.split(",") if d))
    return max(sizes)


def test_a_mesh_gathers_no_vocabulary_and_makes_no_logits_of_others():
    axes, rows, weight = SPLITS["tensor"]
    report = compiled("chunked", Split(make_mesh(axes), rows, weight), rows=1024, model=32, vocab=2048)
    # A device has 512 rows, 512 of the vocabulary and makes 128 of it at a time; the largest is its part of the weight.
    assert largest_array(report) <= max(512 * 128, 2048 // 4 * 32)
    by_axes = {(each.kind, each.axes): each.bytes for each in report.collectives}
    assert not [axes for kind, axes in by_axes if kind in ("all_gather", "all_to_all") and "tensor" in axes]
    # In float32 on a CPU: the gradient of x, and for each row of a device its maximum, sum and target's logit.
    assert by_axes["all_reduce", ("tensor",)] == 4 * 512 * 32 + 3 * 4 * 512


@pytest.mark.parametrize("name", ["stored_by_columns", "stored_by_rows"])
def test_no_device_holds_a_weight_that_others_store_or_its_gradient(name):
    axes, rows, weight = SPLITS[name]
    report = compiled("chunked", Split(make_mesh(axes), rows, weight), rows=1024, model=256, vocab=4096)
    assert largest_array(report) <= 4096 * 256 // 4  # what a device stores
    gathered = {each.axes: each.bytes for each in report.collectives if each.kind == "all_gather"}
    assert gathered.keys() == {("fsdp",)}
    passes, block = 2 * 4096 * 256 * 4, 16 * 256 * 4  # bytes, in float32 on a CPU
    assert passes < gathered["fsdp",] <= passes + 2 * block


def test_blocks_take_a_fraction_of_the_memory_of_the_logits():
    sizes = {"rows": 512, "model": 32, "vocab": 8192, "devices": jax.devices()}
    chunked, reference = (compiled(name, None, **sizes).temporary_bytes for name in ("chunked", "reference"))
    assert reference > 4 * 512 * 8192
    assert chunked < reference / 8


@needs_tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_a_tpu_keeps_a_block_of_logits(chip, monkeypatch):
    monkeypatch.setattr(spec, "BLOCK_LOGITS", 2**20)
    devices = target_devices(parse_devices(f"{chip}:{'2x2x1' if chip == 'v5p' else '2x2'}"))
    rows, vocab = 512, 2**14
    report = compiled("chunked", None, rows=rows, model=256, vocab=vocab, devices=devices)
    assert report.temporary_bytes < 1.25 * 4 * spec.BLOCK_LOGITS  # with the gradient of x, an eighth of it
    assert 4 * rows * vocab > 4 * report.temporary_bytes  # of the logits alone


# -- what chooses and counts --


def test_one_block_of_logits_is_left_to_the_compiler(monkeypatch):
    monkeypatch.undo()
    assert CrossEntropySpec(2048, 49152).block(Target("cpu")) == 2048
    assert CrossEntropySpec(4096, 128256).block(Target("tpu")) == 8016
    assert CrossEntropySpec(4096, 151936).block(Target("tpu")) == 8000
    table = explain(CROSS_ENTROPY, CrossEntropySpec(2048, 2048), Target("cpu"))
    assert [row.name for row in table] == ["chunked", "reference"]
    assert table[0].reason == ("a device's logits take 16 MiB, one block: computing them again would save nothing")
    assert explain(CROSS_ENTROPY, CrossEntropySpec(2048, 2064), Target("cpu"))[0].reason is None


def test_flops_are_those_of_four_products_and_of_three_without_recomputation():
    case = CrossEntropyCase("flops", rows=(8, 4), vocab=1024)
    x, weight, _, targets = case.arrays()
    one = 2 * 32 * case.model * case.vocab
    for implementation, products in (("reference", 3), ("chunked", 4)):
        for split in (None, split_of("tensor")):

            def loss(x, weight, name=implementation, split=split):
                return linear_cross_entropy(x, weight, targets, split=split, implementation=name)[0].sum()

            assert count_flops(jax.grad(loss, argnums=(0, 1)), x, weight).flops == products * one


def test_sizes_that_differ_are_named():
    with pytest.raises(MeshloomError, match="rows of x have 15 numbers, rows of the weight 16"):
        _check((2, 15), (384, 16), (2,), None)
    with pytest.raises(MeshloomError, match=r"x has rows \(2, 12\), targets are \(1, 12\)"):
        _check((2, 12, 16), (384, 16), (1, 12), None)
    with pytest.raises(MeshloomError, match="the weight has 384 rows, the bias 383 numbers"):
        _check((2, 16), (384, 16), (2,), (383,))


def test_what_cannot_run_is_refused():
    x, weight, _, targets = CrossEntropyCase("errors").arrays()
    with pytest.raises(MeshloomError, match="2 does not divide over data = 8 devices"):
        linear_cross_entropy(x, weight, targets, split=split_of("whole"))
    with pytest.raises(MeshloomError, match="no implementation 'mosaic'; it has chunked, reference"):
        linear_cross_entropy(x, weight, targets, implementation="mosaic")

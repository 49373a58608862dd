"""The TPU's attention kernels mean what the reference says: interpreted, simulated with races, compiled for chips."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from meshloom.core.ahead import target_devices
from meshloom.core.topology import make_mesh, parse_devices, parse_mesh
from meshloom.pallas_kernels import Mask, attention
from meshloom.pallas_kernels.attention import (
    ATTENTION,
    chunked,
    mosaic_tpu,
    mosaic_tpu_backward,
    mosaic_tpu_bias,
    reference,
    spread,
)
from meshloom.pallas_kernels.attention.cases import ATTENTION_CASES, AttentionCase
from meshloom.pallas_kernels.attention.kernel import Kernel, row_products
from meshloom.pallas_kernels.attention.spec import AttentionSpec
from meshloom.pallas_kernels.attention.spread import over_mesh
from meshloom.pallas_kernels.dispatch import Target, explain
from tests.compilers import needs_tpu

CASES = [case for case in ATTENTION_CASES if not case.sinks or case.bias is not None]
# One feature alone, which another case has beside others: interpreted under `make test-slow` only.
_ALONE = {
    "one_head_each",
    "one_kv_head",
    "window_within_block",
    "window_both_ways",
    "segments",
    "keys_before",
    "soft_cap",
    "bias_of_rows",
    "value_dim_differs",
    "head_dim_64",
    "head_dim_80",
    "bfloat16",
}
INTERPRETED = [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in _ALONE else ())
    for case in CASES
    if case.name != "bias_skips_blocks"  # below
]
# On a simulated TPU, and whether it takes half a minute.
_SIMULATED = {
    "several_blocks": False,
    "no_key_in_reach": False,
    "bias_of_heads": False,
    "segments_skip_blocks": True,
    "bias_skips_blocks": True,
    "bias_of_both_in_blocks": True,
}
SIMULATED = [
    pytest.param(case, id=case.name, marks=pytest.mark.slow if _SIMULATED[case.name] else ())
    for case in CASES
    if case.name in _SIMULATED
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 256 queries and keys with strips of 128, so that small cases have several of each."""
    for module in (mosaic_tpu, mosaic_tpu_backward):
        for name in ("BLOCK_Q", "BLOCK_KV"):
            monkeypatch.setattr(module, name, 256)
    for module in (mosaic_tpu, mosaic_tpu_backward, mosaic_tpu_bias):
        monkeypatch.setattr(module, "STRIP", 128)


def program(kernel, case: AttentionCase):
    """out, lse, dq, dk, dv and dbias of one kernel, float32 numpy; backward is fed by the reference's forward."""
    q, k, v, mask = case.arrays()
    bias, _ = case.extras()

    @jax.jit
    def forward(q, k, v, bias):
        return reference.forward(q, k, v, bias, mask, case.scoring, jnp.float32)

    want, lse = forward(q, k, v, bias)
    d_out = jnp.asarray(np.random.default_rng(3).normal(size=want.shape), case.dtype)
    delta = row_products(want, d_out)

    @jax.jit
    def run(q, k, v, bias, lse, delta, d_out):
        forth = kernel.forward(q, k, v, bias, mask, case.scoring, jnp.float32)
        back = kernel.backward(q, k, v, bias, mask, case.scoring, lse, delta, d_out, jnp.float32)
        return forth, back

    arrays = q, k, v, bias, lse, delta, d_out
    return lambda: [np.asarray(x, np.float32) for x in jax.tree.leaves(run(*arrays))]


def passes(kernel, case: AttentionCase) -> list[np.ndarray]:
    return program(kernel, case)()


@functools.cache
def exact(case: AttentionCase) -> list[np.ndarray]:
    return passes(reference, case)


def assert_close(case: AttentionCase, got: list[np.ndarray]):
    # bfloat16: weights and score gradients are rounded to 8 bits before their products.
    bound = 2e-5 if case.dtype == "float32" else 2**-6
    for one, two in zip(exact(case), got, strict=True):
        np.testing.assert_allclose(two, one, atol=bound * (1 + np.abs(one).max()), rtol=0)


def kernel_pair():
    return next(each.run for each in ATTENTION if each.name == "mosaic_tpu")


@pytest.mark.parametrize("case", INTERPRETED)
def test_both_passes_equal_the_references(case, small_blocks, monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    assert_close(case, passes(kernel_pair(), case))


@pytest.mark.parametrize("case", SIMULATED)
def test_nothing_races_and_nothing_is_read_before_it_is_written(case, small_blocks):
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    with pltpu.force_tpu_interpret_mode(checks):
        assert_close(case, passes(kernel_pair(), case))


def test_two_runs_are_bitwise_the_same_and_a_bias_that_no_pair_reads_has_no_gradient(small_blocks, monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    case = next(case for case in CASES if case.name == "bias_skips_blocks")
    run = program(kernel_pair(), case)
    got = run()
    assert_close(case, got)
    for one, two in zip(got, run(), strict=True):
        np.testing.assert_array_equal(one, two)
    d_bias = got[-1]
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 0)):
        assert not np.any(d_bias[:, :, 256 * i : 256 * (i + 1), 256 * j : 256 * (j + 1)])
    assert np.any(d_bias[:, :, 256:512, :256])


def compiled_for(chip: str, case: AttentionCase, axes: str = "fsdp=1", by_bias: bool = True):
    """The gradient of `attention`, compiled for chips: what was chosen there is what is in the program."""
    where = parse_devices(chip)
    mesh = make_mesh(axes, target_devices(where)[: math.prod(parse_mesh(axes).values())])
    by_rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    q, k, v, mask = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows), case.arrays())
    bias = None
    if case.bias is not None:
        whole = jax.NamedSharding(mesh, jax.P())
        bias = jax.ShapeDtypeStruct((*case.bias, case.q_len, case.kv_len), jnp.float32, sharding=whole)

    def loss(q, k, v, bias, mask):
        return jnp.sum(attention(q, k, v, mask=mask, bias=bias, soft_cap=case.soft_cap).astype(jnp.float32))

    arguments = (0, 1, 2, 3) if by_bias else (0, 1, 2)
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=arguments)).lower(q, k, v, bias, mask).compile().as_text()


EVERYTHING = {"segments": 2, "soft_cap": 20.0, "dtype": "bfloat16"}


@needs_tpu
@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_all_kernels_compile_for_each_chip_and_are_chosen_there(chip):
    # Blocks of 512, of the 1024 that long sequences have and test_bench.py compiles: the time to compile is theirs.
    sizes = {"q_len": 512, "kv_len": 512, "head_dim": 128, "value_dim": 128, "lens": (300, 512)}
    text = compiled_for(chip, AttentionCase("all", window=200, bias=(1, 4), **sizes, **EVERYTHING))
    for kernel in ("attention_forward", "attention_backward", "attention_bias_gradient"):
        assert kernel in text


@needs_tpu
def test_a_bias_whose_gradient_nobody_asks_for_costs_no_gradient(small_blocks):
    case = AttentionCase("constant", q_len=256, kv_len=256, head_dim=128, value_dim=128, bias=(1, 4))
    text = compiled_for("v6e:1x1", case, by_bias=False)
    assert "attention_backward" in text
    assert "attention_bias_gradient" not in text


@needs_tpu
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_head_size_compiles(head_dim, value_dim, dtype, small_blocks):
    sizes = {"q_len": 256, "kv_len": 384, "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    assert "attention_backward" in compiled_for("v6e:1x1", AttentionCase("head", **sizes))


def test_the_table_says_why_not():
    q = (1, 4096, 8, 128)
    on_tpu = Target("tpu", "TPU v6 lite")

    def reason(target: Target, **changes) -> str | None:
        spec = AttentionSpec(**{"q_shape": q, "kv_shape": q, "value_dim": 128, "dtype": "bfloat16"} | changes)
        return next(row.reason for row in explain(ATTENTION, spec, target) if row.name == "mosaic_tpu")

    plain = {"bias_shape": None, "mask": Mask()}
    assert reason(on_tpu, **plain) is None
    assert "it runs on TPUs, not on cpu" in reason(Target("cpu", "cpu"), **plain)
    assert reason(on_tpu, bias_shape=(1, 8, 4096, 4096), mask=Mask()) is None
    assert "takes 536,870,912 bytes" in reason(on_tpu, **plain, q_shape=(1, 2**20, 8, 128))
    long = {"q_shape": (1, 2**16, 8, 128)}
    assert reason(on_tpu, **plain, **long) is None
    assert "of at most 16,777,216" in reason(on_tpu, **plain, **long, dtype="float32")
    assert "not float16" in reason(on_tpu, **plain, dtype="float16")
    assert "TPU v4 has too little fast memory" in reason(Target("tpu", "TPU v4"), **plain)
    with jax.set_mesh(make_mesh("fsdp=4,tensor=2")):
        assert "1 rows of the batch do not divide over 4 devices" in reason(on_tpu, **plain)
        assert reason(on_tpu, **plain, q_shape=(4, 4096, 8, 128)) is None
        assert reason(on_tpu, **plain, q_shape=(4, 4096, 8, 128), kv_shape=(4, 4096, 1, 128)) is None
        assert "9 heads do not divide over 2" in reason(
            on_tpu, **plain, q_shape=(4, 4096, 9, 128), kv_shape=(4, 4096, 3, 128)
        )
    with jax.set_mesh(make_mesh("context=8")):
        assert "context axis" in reason(on_tpu, **plain | {"q_shape": (1, 4095, 8, 128)})


MESHES = ("fsdp=2", "data=2,fsdp=2,tensor=2", "fsdp=2,expert=2,tensor=2", "tensor=2")


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        *((mesh, "segments_window_cap") for mesh in MESHES),
        *(("data=2,fsdp=2,tensor=2", name) for name in ("bidirectional_lens", "offset_window")),
        *(("data=2,fsdp=2,tensor=2", f"bias_of_{shared}") for shared in ("heads", "rows", "both_in_blocks")),
        ("fsdp=2", "bias_skips_blocks"),
    ],
)
def test_a_kernel_over_a_mesh_is_the_kernel(mesh, name, monkeypatch):
    case = dataclasses.replace(next(case for case in CASES if case.name == name), batch=4, q_len=24, kv_len=24)
    case = dataclasses.replace(case, lens=None if case.lens is None else (5, 24, 0, 9))
    if case.bias is not None:
        case = dataclasses.replace(case, bias=(4 if case.bias[0] > 1 else 1, case.bias[1]))
    kernel = Kernel(chunked.forward, chunked.backward)
    axes = parse_mesh(mesh)
    with jax.set_mesh(make_mesh(axes, jax.devices()[: math.prod(axes.values())])):
        assert spread.why_not(AttentionSpec((4, 24, 4, 16), (4, 24, 2, 16), 16, "float32", None, Mask())) is None
        got = passes(over_mesh(kernel), case)
    assert_close(case, got)


@needs_tpu
def test_on_a_mesh_of_tpus_the_kernels_run_on_each_ones_heads(small_blocks):
    sizes = {"batch": 4, "q_len": 512, "kv_len": 512, "heads": 8, "kv_heads": 4, "head_dim": 128, "value_dim": 128}
    text = compiled_for("v5e:2x4", AttentionCase("mesh", **sizes, **EVERYTHING), "fsdp=4,tensor=2")
    assert "attention_backward" in text
    assert "bf16[1,4,512,128]" in text  # one row, half of the heads

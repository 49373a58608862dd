"""The GPU's attention kernels mean what the reference says: simulated with races, compiled for Hopper, chosen there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshloom.core.ahead import compiler_options, target_devices
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import Mask, attention
from meshloom.pallas_kernels.attention import ATTENTION, mosaic_gpu, mosaic_gpu_backward, reference
from meshloom.pallas_kernels.attention.cases import ATTENTION_CASES, AttentionCase
from meshloom.pallas_kernels.attention.kernel import row_products
from meshloom.pallas_kernels.attention.reach import Reach
from meshloom.pallas_kernels.attention.spec import AttentionSpec
from meshloom.pallas_kernels.dispatch import Target, explain
from tests.compilers import needs_cuda
from tests.pallas_kernels.simulated_gpu import simulated_gpu

HOPPER = Target("gpu", "NVIDIA H100 80GB HBM3")


def of_its_sizes(case: AttentionCase) -> AttentionCase:
    """The case with two heads of a size that the kernel has, in bfloat16."""
    head_dim, value_dim = {192: (192, 128), 128: (128, 128)}.get(case.head_dim, (64, 64))
    heads, kv_heads = (2, 2) if case.kv_heads == case.heads else (2, 1)
    sizes = {"head_dim": head_dim, "value_dim": value_dim, "heads": heads, "kv_heads": kv_heads}
    return dataclasses.replace(case, dtype="bfloat16", **sizes)


ALL_AT_ONCE = AttentionCase("all_at_once", batch=1, q_len=100, kv_len=140, window=90, segments=2, soft_cap=4.0)
CASES = [of_its_sizes(case) for case in (ALL_AT_ONCE, *ATTENTION_CASES) if case.bias is None and not case.sinks]


def rows_of(case: AttentionCase, dtype) -> list[np.ndarray]:
    """out and lse of the kernel on the simulated GPU, float32 numpy."""
    q, k, v, mask = case.arrays()
    with simulated_gpu():
        # A function of its own for each run: what was traced on another target is not taken again.
        run = jax.jit(lambda q, k, v, mask: mosaic_gpu.forward(q, k, v, None, mask, case.scoring, dtype))
        return [np.asarray(x, np.float32) for x in run(q, k, v, mask)]


def gradients_of(case: AttentionCase, dtype) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """dq, dk, dv of the kernels on the simulated GPU, and those of the reference; both after its forward pass."""
    q, k, v, mask = case.arrays()
    out, lse = reference.forward(q, k, v, None, mask, case.scoring, jnp.float32)
    d_out = jnp.asarray(np.random.default_rng(3).normal(size=out.shape), case.dtype)
    arrays = q, k, v, lse, row_products(out, d_out), d_out

    def run(backward, dtype):
        def gradients(q, k, v, lse, delta, d_out):
            return backward(q, k, v, None, mask, case.scoring, lse, delta, d_out, dtype)[:3]

        return [np.asarray(x, np.float32) for x in jax.jit(gradients)(*arrays)]

    with simulated_gpu():
        got = run(mosaic_gpu_backward.backward, dtype)
    return got, run(reference.backward, jnp.float32)


def each_case(quick: tuple[str, ...]):
    return [pytest.param(case, id=case.name, marks=[] if case.name in quick else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", each_case(("all_at_once", "several_blocks")))
def test_rows_equal_the_references_and_nothing_races(case):
    q, k, v, mask = case.arrays()
    want, want_lse = reference.forward(q, k, v, None, mask, case.scoring, jnp.float32)
    out, lse = rows_of(case, jnp.float32)
    # Weights are rounded to 8 bits before they multiply values; nothing else is.
    np.testing.assert_allclose(out, want, atol=2**-8 * (1 + np.abs(want).max()), rtol=0)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("case", each_case(("all_at_once",)))
def test_gradients_equal_the_references_and_nothing_races(case):
    for got, want in zip(*gradients_of(case, jnp.float32), strict=True):
        np.testing.assert_allclose(got, want, atol=2**-8 * (1 + np.abs(want).max()), rtol=0)


@pytest.mark.slow
def test_results_leave_in_the_type_of_the_queries_and_twice_the_same():
    case = dataclasses.replace(of_its_sizes(AttentionCase("own", q_len=200, kv_len=200, batch=1)), dtype="float16")
    (one, want), (two, _) = gradients_of(case, jnp.float16), gradients_of(case, jnp.float16)
    for got, again in zip(rows_of(case, jnp.float16) + one, rows_of(case, jnp.float16) + two, strict=True):
        np.testing.assert_array_equal(got, again)
    for got, exact in zip(one, want, strict=True):
        np.testing.assert_array_equal(got, got.astype(np.float16))
        np.testing.assert_allclose(got, exact, atol=2**-9 * (1 + np.abs(exact).max()))


SEGMENTS = jnp.repeat(jnp.arange(1, 6), 100)[None]
MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=130),
    Mask(causal=False, window=300),
    Mask(causal=False, kv_lens=jnp.asarray([0])),
    Mask(kv_lens=jnp.asarray([129])),
    Mask(offset=jnp.int32(-70), window=50),
    Mask(q_segments=SEGMENTS[:, 40:], kv_segments=SEGMENTS),
    Mask(q_segments=SEGMENTS[:, ::-1][:, :460], kv_segments=SEGMENTS, causal=False),
    Mask(q_segments=SEGMENTS[:, 40:] % 2, kv_segments=SEGMENTS % 2, window=200),
)


@pytest.mark.parametrize("by", [0, 1], ids=["queries", "keys"])
@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_a_block_reads_all_it_may_and_masks_wherever_it_must(mask, by):
    totals, sizes = (460, 500), (128, 64)
    positions = [jnp.arange(512), jnp.arange(512)]
    allowed = np.array(mask.allowed(*positions, *totals)[0])
    allowed[totals[0] :] = False
    padding = np.arange(512) >= totals[0]  # queries that there are none of may be read unmasked: they are zeros
    free = (allowed | padding[:, None]) if by else allowed
    table = np.asarray(Reach.table(mask, *totals, *sizes, 1, by=by))[0]
    for index, fields in enumerate(table):
        reach = Reach(*fields)
        first = totals[1] - totals[0]
        if mask.is_static and by == 0:
            alone = Reach.of(mask, index * sizes[0] + first, sizes[0], totals[1], sizes[1])
            assert dataclasses.astuple(alone) == dataclasses.astuple(reach)
        elif mask.is_static:
            alone = Reach.of_keys(mask, index * sizes[1], sizes[1], first, totals[0], totals[1], sizes[0])
            assert dataclasses.astuple(alone) == dataclasses.astuple(reach)
        own = slice(index * sizes[by], (index + 1) * sizes[by])
        rows, may = (x[own] if by == 0 else x[:, own].T for x in (allowed, free))
        read = sizes[1 - by]
        assert 0 <= reach.start < reach.stop <= -(-totals[1 - by] // read)
        assert not rows[:, : reach.start * read].any()
        assert not rows[:, reach.stop * read :].any()
        if by == 0:
            may = may | (np.arange(own.start, own.stop) >= totals[0])[:, None]
        assert may[:, reach.whole_start * read : reach.whole_stop * read].all()
        if mask.q_segments is None:
            blocks = rows.reshape(len(rows), -1, read).any(axis=(0, 2))
            assert reach.stop - reach.start == max(1, blocks.sum())


def reason(target: Target = HOPPER, **changes) -> str | None:
    shape = (4, 4096, 8, 128)
    facts = {"q_shape": shape, "kv_shape": shape, "value_dim": 128, "dtype": "bfloat16", "bias_shape": None}
    spec = AttentionSpec(**facts | {"mask": Mask()} | changes)
    return next(row.reason for row in explain(ATTENTION, spec, target) if row.name == "mosaic_gpu")


def test_the_table_says_why_not():
    assert reason() is None
    assert reason(Target("gpu", "NVIDIA H200")) is None
    assert reason(Target("gpu", "NVIDIA GH200 480GB")) is None
    assert "wgmma, which Hopper has and NVIDIA A100-SXM4-80GB has not" in reason(Target("gpu", "NVIDIA A100-SXM4-80GB"))
    assert "NVIDIA B200 has not" in reason(Target("gpu", "NVIDIA B200"))
    assert "it runs on Hopper GPUs, not on tpu" in reason(Target("tpu", "TPU v6 lite"))
    assert "that no mesh in scope names" in reason(Target())
    assert "not float32" in reason(dtype="float32")
    assert "no additive bias" in reason(bias_shape=(1, 8, 4096, 4096))
    assert "not 80 with values of 80" in reason(q_shape=(4, 4096, 8, 80), kv_shape=(4, 4096, 8, 80), value_dim=80)
    with jax.set_mesh(make_mesh("fsdp=8")):
        assert "4 rows of the batch do not divide over 8 devices" in reason()


def compiled_for(chip: str, case: AttentionCase, axes: str) -> str:
    """The gradient of `attention`, compiled for chips."""
    where = parse_devices(chip)
    mesh = make_mesh(axes, target_devices(where))
    by_rows = jax.NamedSharding(mesh, jax.P("fsdp"))
    q, k, v, mask = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows), case.arrays())

    def loss(q, k, v, mask):
        return jnp.sum(attention(q, k, v, mask=mask, soft_cap=case.soft_cap).astype(jnp.float32))

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, mask)
        return lowered.compile(compiler_options(where)).as_text()


SIZES = {"batch": 4, "q_len": 512, "kv_len": 512, "heads": 8, "kv_heads": 4, "dtype": "bfloat16"}


@needs_cuda
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("plain", **SIZES, head_dim=64, value_dim=64),
        AttentionCase("full", **SIZES, head_dim=192, value_dim=128, causal=False),
        AttentionCase(
            "all", **SIZES, head_dim=128, value_dim=128, segments=2, soft_cap=20.0, window=200, lens=(3,) * 4
        ),
        AttentionCase("odd", **SIZES | {"q_len": 301, "kv_len": 77}, head_dim=128, value_dim=128),
    ],
    ids=lambda case: case.name,
)
def test_the_kernels_compile_for_hopper_and_are_chosen_on_each_ones_heads(case):
    text = compiled_for("h100:4", case, "fsdp=2,tensor=2")
    rows = case.q_len + -case.q_len % 8
    assert all(name in text for name in ("attention_forward", "attention_backward_of_queries"))
    assert "attention_backward_of_keys" in text
    assert f"bf16[2,{rows},4,{case.value_dim}]" in text  # half of the rows, half of the heads


@needs_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nothing_spills_and_no_product_waits_for_another(head_dim, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    sizes = SIZES | {"q_len": 1024, "kv_len": 1024}
    compiled_for("h100:1", AttentionCase("plain", **sizes, head_dim=head_dim, value_dim=head_dim), "fsdp=1")
    reports = [each.read_text(errors="replace") for each in tmp_path.glob("*.ptxas")]
    assert len(reports) == 3
    for report in reports:
        assert "0 bytes spill stores, 0 bytes spill loads" in report
        assert "serialized" not in report


@needs_cuda
def test_ampere_takes_xla():
    text = compiled_for("a100:2", AttentionCase("plain", **SIZES, head_dim=64, value_dim=64), "fsdp=2")
    assert "attention_forward" not in text

"""A forward pass through Pallas kernels has the layout of the same forward pass in plain XLA."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import megablox
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from meshloom.sharding.classes import find
from meshloom.sharding.roles import infer
from meshloom.sharding.trace import trace
from tests.sharding.modules import HIDDEN, D, F, H, attend, layout_of, norm, weight

ROWS, MESH = 12, {"fsdp": 2, "tensor": 2}  # 2 x 6 tokens


def added(x, y):
    """`x + y` of [B, T, D], a block of 3 tokens and 16 features at a time."""

    def body(x_ref, y_ref, out_ref):
        out_ref[...] = x_ref[...] + y_ref[...]

    block = pl.BlockSpec((None, 3, 16), lambda b, t, d: (b, t, d))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, shape, grid=(2, 2, 2), in_specs=[block] * 2, out_specs=block, interpret=True)(x, y)


def rows_times(x, w):
    """`x @ w` of [M, K] and [K, N], blocks of rows and columns; every program sees all of K."""

    def body(x_ref, w_ref, out_ref):
        out_ref[...] = jnp.dot(x_ref[...], w_ref[...])

    return pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
        grid=(x.shape[0] // 4, w.shape[1] // 16),
        in_specs=[
            pl.BlockSpec((4, x.shape[1]), lambda i, j: (i, 0)),
            pl.BlockSpec((x.shape[1], 16), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((4, 16), lambda i, j: (i, j)),
        interpret=True,
    )(x, w)


def tiles_times(x, w):
    """`x @ w` in square tiles, summed over K in an accumulator."""

    def body(x_ref, w_ref, out_ref, sum_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += x_ref[...] @ w_ref[...]

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = sum_ref[...]

    return pl.pallas_call(
        body,
        jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype),
        grid=(x.shape[0] // 4, w.shape[1] // 4, x.shape[1] // 4),
        in_specs=[pl.BlockSpec((4, 4), lambda i, j, k: (i, k)), pl.BlockSpec((4, 4), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((4, 4), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((4, 4), jnp.float32)],
        interpret=True,
    )(x, w)


def attended(q, k, v):
    """Attention of [B, T, N, H] to [B, S, K, H]: programs over batch, heads, 3 queries at a time; a loop over keys."""
    group = q.shape[2] // k.shape[2]

    def body(q_ref, k_ref, v_ref, out_ref):
        def step(index, carry):
            total, weights = carry
            keys = pl.ds(index * 2, 2)
            scores = jnp.exp(jnp.dot(q_ref[...], k_ref[keys, :].T))
            return total + scores @ v_ref[keys, :], weights + scores.sum(-1)

        empty = jnp.zeros((3, q_ref.shape[1])), jnp.zeros(3)
        total, weights = jax.lax.fori_loop(0, k_ref.shape[0] // 2, step, empty)
        out_ref[...] = total / weights[:, None]

    queries = pl.BlockSpec((None, 3, None, q.shape[3]), lambda b, n, t: (b, t, n, 0))
    keys = pl.BlockSpec((None, k.shape[1], None, k.shape[3]), lambda b, n, t: (b, 0, n // group, 0))
    return pl.pallas_call(
        body,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(q.shape[0], q.shape[2], q.shape[1] // 3),
        in_specs=[queries, keys, keys],
        out_specs=queries,
        interpret=True,
    )(q, k, v)


def streamed(q, k, v):
    """The same with blocks of 2 keys on the grid, and what was summed so far in scratch memory."""
    group, blocks = q.shape[2] // k.shape[2], k.shape[1] // 2

    def body(q_ref, k_ref, v_ref, out_ref, total_ref, weights_ref):
        @pl.when(pl.program_id(3) == 0)
        def _():
            total_ref[...] = jnp.zeros_like(total_ref)
            weights_ref[...] = jnp.zeros_like(weights_ref)

        scores = jnp.exp(jnp.dot(q_ref[...], k_ref[...].T))
        total_ref[...] += scores @ v_ref[...]
        weights_ref[:, 0] = weights_ref[:, 0] + scores.sum(-1)

        @pl.when(pl.program_id(3) == blocks - 1)
        def _():
            out_ref[...] = total_ref[...] / weights_ref[...]

    queries = pl.BlockSpec((None, 3, None, q.shape[3]), lambda b, n, t, s: (b, t, n, 0))
    keys = pl.BlockSpec((None, 2, None, k.shape[3]), lambda b, n, t, s: (b, s, n // group, 0))
    return pl.pallas_call(
        body,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(q.shape[0], q.shape[2], q.shape[1] // 3, blocks),
        in_specs=[queries, keys, keys],
        out_specs=queries,
        scratch_shapes=[pltpu.VMEM((3, q.shape[3]), jnp.float32), pltpu.VMEM((3, 1), jnp.float32)],
        interpret=True,
    )(q, k, v)


def plain_times(x, w):
    return x @ w


def plain_added(x, y):
    return x + y


class MLP(nnx.Module):
    def __init__(self, times=plain_times, added=plain_added):
        self.up, self.down = weight(D, F), weight(F, D)
        self.times, self.added = times, added

    def __call__(self, x):
        rows = x.reshape(-1, D)
        y = self.times(jax.nn.relu(self.times(norm(rows), self.up[...])), self.down[...])
        return self.added(x, y.reshape(x.shape))


class Attention(nnx.Module):
    def __init__(self, kv_heads, attend=attend):
        self.q, self.o = weight(8 * H, D), weight(D, 8 * H)
        self.k, self.v = weight(kv_heads * H, D), weight(kv_heads * H, D)
        self.attend = attend

    def __call__(self, x):
        q, k, v = ((norm(x) @ each.T).reshape(*x.shape[:2], -1, H) for each in (self.q, self.k, self.v))
        return x + self.attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T


def assert_same_layout(make, plain, axes):
    layout, expected = layout_of(make, HIDDEN, **axes), layout_of(plain, HIDDEN, **axes)
    assert [(row.name, row.spec, row.roles) for row in layout.rows] == [
        (row.name, row.spec, row.roles) for row in expected.rows
    ]
    assert any(axis for row in expected.rows for axis in row.spec)
    assert not layout.unknown
    assert layout.kv_heads_spec == expected.kv_heads_spec


@pytest.mark.parametrize("axes", [MESH, {"fsdp": 4}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("times", [rows_times, tiles_times, plain_times])
@pytest.mark.parametrize("add", [added, plain_added])
def test_an_mlp_of_kernels(add, times, axes):
    assert_same_layout(lambda: MLP(times, add), MLP, axes)


@pytest.mark.parametrize("axes", [MESH, {"fsdp": 4}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("kernel", [attended, streamed])
def test_an_attention_kernel(kernel, kv_heads, axes):
    assert_same_layout(lambda: Attention(kv_heads, kernel), lambda: Attention(kv_heads), axes)


class Experts(nnx.Module):
    """Rows sorted by expert, through a grouped product."""

    def __init__(self, grouped):
        self.router, self.up, self.down = weight(256, 4), weight(4, 256, 512), weight(4, 512, 256)
        self.grouped = grouped

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1])
        scores = jax.nn.softmax(rows @ self.router)
        best = jnp.argmax(scores, -1)
        order, sizes = jnp.argsort(best), jnp.bincount(best, length=4).astype(jnp.int32)
        y = self.grouped(jax.nn.silu(self.grouped(rows[order], self.up[...], sizes)), self.down[...], sizes)
        return x + (y[jnp.argsort(order)] * scores.max(-1, keepdims=True)).reshape(x.shape)


LONG = jax.ShapeDtypeStruct((2, 256, 256), jnp.float32)  # the kernels of JAX want blocks of 128


def test_jax_s_own_grouped_product():
    axes = {"fsdp": 2, "tensor": 2, "expert": 2}
    layout = layout_of(lambda: Experts(megablox.gmm), LONG, **axes)
    plain = layout_of(lambda: Experts(jax.lax.ragged_dot), LONG, **axes)
    assert [row.spec for row in layout.rows] == [row.spec for row in plain.rows]
    assert tuple(layout.row("up").spec) == ("expert", "fsdp", "tensor")
    assert not layout.unknown


def flash(q, k, v):
    q, k, v = (jnp.swapaxes(each, 1, 2) for each in (q, k, v))
    return jnp.swapaxes(flash_attention(q, k, v, causal=True), 1, 2)


def splash(q, k, v):
    """Programs over kv heads by vmap, blocks of keys picked by data that a mask makes."""
    group, length = q.shape[2] // k.shape[2], q.shape[1]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * group)
    kernel = splash_attention_kernel.make_splash_mqa_single_device(mask=mask)
    q, k, v = (jnp.swapaxes(each, 1, 2) for each in (q, k, v))
    out = jax.vmap(jax.vmap(kernel))(q.reshape(q.shape[0], k.shape[1], group, *q.shape[2:]), k, v)
    return jnp.swapaxes(out.reshape(q.shape), 1, 2)


@pytest.mark.parametrize(("kernel", "kv_heads"), [(flash, 8), (splash, 8), (splash, 2)])
def test_jax_s_own_attention(kernel, kv_heads):
    class Wide(nnx.Module):
        def __init__(self, attend):
            self.q, self.o = weight(8 * 128, 256), weight(256, 8 * 128)
            self.k, self.v = weight(kv_heads * 128, 256), weight(kv_heads * 128, 256)
            self.attend = attend

        def __call__(self, x):
            q, k, v = ((norm(x) @ each.T).reshape(*x.shape[:2], -1, 128) for each in (self.q, self.k, self.v))
            return x + self.attend(q, k, v).reshape(*x.shape[:2], -1) @ self.o.T

    layout, plain = (layout_of(lambda f=f: Wide(f), LONG, **MESH) for f in (kernel, attend))
    assert [(row.spec, row.roles) for row in layout.rows] == [(row.spec, row.roles) for row in plain.rows]
    assert not layout.unknown


def test_the_kernels_compute_what_they_stand_for():
    keys = jax.random.split(jax.random.key(0), 6)
    x, y = jax.random.normal(keys[0], (2, 6, D)), jax.random.normal(keys[1], (2, 6, D))
    w = jax.random.normal(keys[2], (D, F))
    assert jnp.array_equal(added(x, y), x + y)
    for times in (rows_times, tiles_times):
        assert jnp.allclose(times(x.reshape(ROWS, D), w), x.reshape(ROWS, D) @ w, atol=1e-4)
    q, k, v = (jax.random.normal(key, (2, 6, n, H)) for key, n in zip(keys[3:], (8, 2, 2), strict=True))
    for kernel in (attended, streamed):
        assert jnp.allclose(kernel(q, k, v), attend(q, k, v), atol=1e-5)


def test_blocks_refine_nothing():
    # 16 columns at a time of 64: the dimension stays one, and 4 blocks of it are no heads.
    roles = infer(trace(nnx.eval_shape(lambda: MLP(rows_times, added)), [HIDDEN]))
    assert {leaf.size for leaf in roles.by_leaf} == {2, 6, D, F}


def test_blocks_picked_by_data_tie_no_rows():
    class Paged(nnx.Module):
        """Looks 3 pages of 4 rows up in a table of as many, by numbers that the grid reads first."""

        def __init__(self):
            self.table = weight(12, D)

        def __call__(self, pages):
            def body(pages_ref, table_ref, out_ref):
                out_ref[...] = table_ref[...]

            grid = pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(3,),
                in_specs=[pl.BlockSpec((4, D), lambda i, pages_ref: (pages_ref[i], 0))],
                out_specs=pl.BlockSpec((4, D), lambda i, pages_ref: (i, 0)),
            )
            shape = jax.ShapeDtypeStruct((12, D), jnp.float32)
            return pl.pallas_call(body, shape, grid_spec=grid, interpret=True)(pages, self.table[...])

    program = trace(nnx.eval_shape(Paged), [jax.ShapeDtypeStruct((3,), jnp.int32)])
    (table,), (found,) = program.parameters, program.outputs
    assert find(table.dims[1]) is find(found.dims[1])
    assert find(table.dims[0]) is not find(found.dims[0])

"""FLOPs are counted from the jaxpr: what runs n times counts n times."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from meshloom.core.counting import count_flops
from meshloom.core.topology import make_mesh
from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder


def abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_is_two_flops_per_multiply_add():
    assert count_flops(jnp.matmul, abstract(3, 5), abstract(5, 7)).flops == 2 * 3 * 5 * 7


def test_a_scan_body_counts_as_often_as_it_runs():
    def scanned(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    assert count_flops(scanned, abstract(4, 8), abstract(6, 8, 8)).flops == 6 * 2 * 4 * 8 * 8


def test_jit_remat_and_grad_are_seen_through():
    forward = jax.jit(jax.checkpoint(lambda x, w: jnp.sin(x @ w).sum()))
    once = 2 * 4 * 8 * 8
    assert count_flops(forward, abstract(4, 8), abstract(8, 8)).flops == once
    # Forward, its recomputation, and two backward products.
    assert count_flops(jax.grad(forward, argnums=(0, 1)), abstract(4, 8), abstract(8, 8)).flops in (3 * once, 4 * once)


def test_a_cond_counts_its_costlier_branch():
    def branch(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x, x)

    assert count_flops(branch, jax.ShapeDtypeStruct((), bool), abstract(4, 4)).flops == 2 * 4**3


def test_a_loop_with_unknown_trips_is_counted_once_and_reported():
    def loop(n, x):
        return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    count = count_flops(loop, jax.ShapeDtypeStruct((), jnp.int32), abstract(4, 4))
    assert (count.flops, count.unknown_loops) == (2 * 4**3, 1)


def test_custom_derivatives_are_seen_through():
    plain = jnp.matmul
    with_vjp = jax.custom_vjp(plain)
    with_vjp.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    with_jvp = jax.custom_jvp(plain)
    with_jvp.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    for product in (with_vjp, with_jvp):
        assert count_flops(product, abstract(4, 8), abstract(8, 8)).flops == 2 * 4 * 8 * 8
        both = jax.grad(lambda a, b, product=product: jnp.sin(product(a, b)).sum(), argnums=(0, 1))
        assert count_flops(both, abstract(4, 8), abstract(8, 8)).flops == 3 * 2 * 4 * 8 * 8


def test_a_mapped_body_counts_once_per_shard():
    mesh = make_mesh("data=4,tensor=2")
    a, b = abstract(16, 8), abstract(8, 4)
    rows = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})
    assert count_flops(rows, a, b).flops == 2 * 16 * 8 * 4

    def product(a, b):
        return jax.lax.psum(a @ b, "tensor")

    specs = {"in_specs": (P("data", "tensor"), P("tensor")), "out_specs": P("data")}
    assert count_flops(jax.shard_map(product, mesh=mesh, **specs), a, b).flops == 2 * 16 * 8 * 4
    # What every shard does is done that many times.
    copies = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"})
    assert count_flops(copies, a, b).flops == 4 * 2 * 16 * 8 * 4


def test_ragged_and_convolution_products():
    def ragged(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes)

    arguments = (abstract(6, 4), abstract(3, 4, 5), jax.ShapeDtypeStruct((3,), jnp.int32))
    once = 2 * 6 * 4 * 5
    assert count_flops(ragged, *arguments).flops == once
    # The rows of a weight's gradient are dealt out to the groups, not repeated for each.
    pullback = jax.grad(lambda *arguments: jnp.sin(ragged(*arguments)).sum(), argnums=(0, 1))
    assert count_flops(pullback, *arguments).flops == 3 * once

    def convolve(x, w):
        return jax.lax.conv(x, w, (1, 1), "VALID")

    assert count_flops(convolve, abstract(1, 3, 8, 8), abstract(16, 3, 3, 3)).flops == 2 * 16 * 6 * 6 * 27


def test_scanned_and_unrolled_models_cost_the_same_and_match_the_formula():
    counts = []
    for scan in (False, True):
        config = DecoderConfig(
            vocab_size=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, scan_layers=scan
        )
        module = nnx.eval_shape(lambda config=config: Decoder(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(module)
        tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        counts.append(count_flops(lambda s, t, g=graphdef: nnx.merge(g, s)(t)[0], state, tokens).flops)
    per_token = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 64 * 32
    attention = 3 * 2 * 2 * 4 * 16 * 16 * 8 * 2
    assert counts[0] == counts[1] == 2 * 32 * per_token + attention

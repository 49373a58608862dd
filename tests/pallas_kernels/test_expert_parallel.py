"""Experts spread over devices give what one device gives, in values and gradients, and no row is lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from meshloom.core.ahead import target_devices
from meshloom.core.errors import MeshloomError
from meshloom.core.topology import make_mesh, parse_devices
from meshloom.pallas_kernels import expert_parallel, grouped_matmul
from meshloom.pallas_kernels.dispatch import Implementation, recorded
from meshloom.pallas_kernels.matmul.experts import exchange as module
from tests.compilers import needs_tpu

EXPERTS, D, F = 16, 12, 20


def moe(x, sizes, up, down):
    inner = jax.nn.silu(grouped_matmul(x, up, sizes, transposed=True))
    return grouped_matmul(inner, down, sizes, transposed=True)


def alone(x, expert, up, down):
    """The same on one device, with rows of no expert past the last group."""
    order = jnp.argsort(jnp.where(expert < 0, EXPERTS, expert), stable=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(EXPERTS), axis=0, dtype=jnp.int32)
    return moe(x[order], sizes, up, down)[jnp.argsort(order)]


def spread(x, expert, up, down, *, mesh, implementation=None):
    def local(x, expert, up, down):
        compute = functools.partial(moe, up=up, down=down)
        return expert_parallel(x, expert, compute, experts=EXPERTS, implementation=implementation)

    run = jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False)
    return run(x, expert, up, down)


def arrays(rows: int, chosen: str):
    rng = np.random.default_rng(0)
    shapes = ((rows, D), (EXPERTS, F, D), (EXPERTS, D, F))
    x, up, down = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    expert = {
        "any": rng.integers(0, EXPERTS, rows),
        "all_of_one": np.full(rows, 5),
        "some_of_none": rng.integers(-1, 3, rows),
    }[chosen]
    return x, jnp.asarray(expert, jnp.int32), up, down


@pytest.mark.parametrize(("devices", "chosen"), [(8, "any"), (8, "all_of_one"), (2, "some_of_none")])
def test_spread_experts_equal_one_device(devices, chosen):
    mesh = make_mesh({"expert": devices}, jax.devices()[:devices])
    x, expert, up, down = arrays(40, chosen)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def gradients(function):
        @jax.jit
        def run(x, up, down):
            out, pull = jax.vjp(lambda x, up, down: function(x, expert, up, down), x, up, down)
            return out, *pull(weight)

        return run(x, up, down)

    for one, two in zip(gradients(alone), gradients(functools.partial(spread, mesh=mesh)), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)


def exchanged(x, room, first, sent, at, received, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, of collectives that CPUs have; -1e6 if sizes disagree."""
    mine = jax.lax.axis_index(axis_name)
    from_all = jax.lax.all_gather(x, axis_name)
    first, sent, at = (jax.lax.all_gather(each, axis_name)[:, mine] for each in (first, sent, at))
    row = jnp.arange(room.shape[0])
    for device in range(from_all.shape[0]):
        own = (row >= at[device]) & (row < at[device] + sent[device])
        rows = from_all[device].at[row - at[device] + first[device]].get(mode="clip")
        room = jnp.where(own.reshape(-1, *[1] * (room.ndim - 1)), rows, room)
    return jnp.where(jnp.all(received == sent), room, -(10**6)).astype(room.dtype)


def test_ragged_exchanges_bring_every_row_there_and_back(monkeypatch):
    (ragged, *_) = module.EXPERT_PARALLEL
    usable = Implementation("ragged", ragged.run, lambda spec, target: None)
    monkeypatch.setattr(module, "EXPERT_PARALLEL", (usable,))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchanged)
    x, expert, up, down = arrays(40, "some_of_none")
    mesh = make_mesh({"expert": 4}, jax.devices()[:4])
    got = jax.jit(functools.partial(spread, mesh=mesh))(x, expert, up, down)
    np.testing.assert_allclose(got, alone(x, expert, up, down), rtol=1e-4, atol=1e-4)


@needs_tpu
def test_tpus_exchange_no_more_rows_than_there_are():
    mesh = make_mesh({"expert": 4}, target_devices(parse_devices("v5e:2x2")))
    over = jax.sharding.NamedSharding(mesh, P("expert"))
    shapes = ((64, 128), jnp.bfloat16), ((64,), jnp.int32), ((EXPERTS, 256, 128), jnp.bfloat16)
    x, expert, up = (jax.ShapeDtypeStruct(*each, sharding=over) for each in shapes)
    down = jax.ShapeDtypeStruct((EXPERTS, 128, 256), jnp.bfloat16, sharding=over)

    def loss(x, up, down, expert):
        return spread(x, expert, up, down, mesh=mesh).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(x, up, down, expert)
        text = lowered.compile().as_text()
    assert "ragged-all-to-all" in text
    assert text.count("tpu_custom_call") == 2 + 4


def test_how_rows_are_exchanged_is_told_with_the_kernels():
    mesh = make_mesh({"expert": 4}, jax.devices()[:4])
    with recorded() as found:
        jax.eval_shape(functools.partial(spread, mesh=mesh), *arrays(40, "any"))
    (told,) = [each for each in found if each.op == "expert_parallel"]
    assert (told.chosen, told.call) == ("padded", "devices=4")


def test_experts_that_do_not_divide_are_named():
    x, expert, up, down = arrays(8, "any")
    mesh = make_mesh({"expert": 8})

    def local(x, expert):
        return expert_parallel(x, expert, lambda rows, sizes: rows, experts=12)

    with pytest.raises(MeshloomError, match="12 experts do not divide over expert=8"):
        jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))(x, expert)
    with pytest.raises(MeshloomError, match="ragged exchanges for TPUs and GPUs only"):
        spread(x, expert, up, down, mesh=mesh, implementation="ragged")

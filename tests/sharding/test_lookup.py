"""A table whose columns are stored on different devices gives the rows and the gradient of one that is whole."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.program_report import compile_and_report
from meshloom.core.topology import make_mesh
from meshloom.sharding import lookup as module
from meshloom.sharding.lookup import Table, lookup

ROWS, MODEL = 24, 16
MESHES = {
    "stored": ({"fsdp": 8}, ("fsdp", None), (), ("fsdp",)),
    "and_split": ({"data": 2, "fsdp": 2, "tensor": 2}, (("data", "fsdp"), None), ("tensor",), ("fsdp",)),
    "tokens_too": ({"fsdp": 2, "context": 4}, ("fsdp", "context"), (), ("fsdp",)),
    "over_both": ({"fsdp": 2, "context": 4}, ("fsdp", "context"), (), ("fsdp", "context")),
}


def table_of(name: str, fill: float | None = None) -> Table:
    axes, ids, rows, columns = MESHES[name]
    return Table(make_mesh(axes), PartitionSpec(*ids), rows, columns, fill)


def rows_and_gradient(take, table, ids, dtype=jnp.float32):
    weigh = jnp.asarray(np.random.default_rng(1).normal(size=(*ids.shape, MODEL)), dtype)

    def loss(table):
        rows = take(table, ids)
        return jnp.sum((rows * weigh).astype(jnp.float32)), rows

    return jax.jit(jax.grad(loss, has_aux=True))(table)


def arrays(dtype=jnp.float32):
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.normal(size=(ROWS, MODEL)), dtype), jnp.asarray(generator.integers(0, ROWS, (8, 4)))


@pytest.mark.parametrize("parts", [1, 3, 4])
@pytest.mark.parametrize("name", MESHES)
def test_rows_are_exact_and_the_gradient_is_the_sum_over_all_devices(name, parts, monkeypatch):
    static = table_of(name)
    per_device = 32 // (8 // np.prod([static.mesh.shape[axis] for axis in static.rows], dtype=int))
    storing = math.prod(static.mesh.shape[axis] for axis in static.columns)
    monkeypatch.setattr(module, "ROWS_IN_FLIGHT", -(-per_device * storing // parts))
    table, ids = arrays()
    gradient, rows = rows_and_gradient(lambda table, ids: lookup(static, table, ids), table, ids)
    wanted, wanted_rows = rows_and_gradient(lambda table, ids: table[ids], table, ids)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_row_that_all_want_is_summed_in_float32():
    static, (table, _) = table_of("stored"), arrays(jnp.bfloat16)
    ids = jnp.zeros((512, 4), jnp.int32)
    ones = jax.grad(lambda table: jnp.sum(lookup(static, table, ids).astype(jnp.float32)))(table)
    assert float(ones[0, 0]) == 2048  # bfloat16 would have stopped at 256
    assert not ones[1:].any()


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(-3, ROWS + 3), min_size=8, max_size=8), st.sampled_from([None, 0.0, float("nan")]))
def test_ids_that_the_table_lacks_are_filled_or_the_nearest(ids, fill):
    table, ids = arrays()[0], jnp.asarray(ids)
    axes, _, rows, _ = MESHES["and_split"]
    static = Table(make_mesh(axes), PartitionSpec(("data", "fsdp")), rows, ("fsdp",), fill)
    found = lookup(static, table, ids)
    has = (ids >= 0) & (ids < ROWS)
    near = table[jnp.clip(ids, 0, ROWS - 1)]
    np.testing.assert_array_equal(found, near if fill is None else jnp.where(has[:, None], near, fill))


def test_only_rows_and_their_gradients_are_sent():
    static, (table, ids) = table_of("stored"), arrays()
    placed = NamedSharding(static.mesh, static.spec), NamedSharding(static.mesh, static.ids)
    run = jax.jit(
        jax.grad(lambda table, ids: jnp.sum(lookup(static, table, ids) ** 2)),
        in_shardings=placed,
        out_shardings=placed[0],
    )
    _, report = compile_and_report(run.lower(table, ids), dict(static.mesh.shape))
    of_a_device = 4 * MODEL * ids.size // 8
    assert report.bytes_by_kind["all_to_all"] == 2 * of_a_device
    assert report.bytes_by_kind.keys() <= {"all_to_all", "all_gather"}
    assert report.bytes_by_kind["all_gather"] <= 2 * 8 * ids.size  # ids

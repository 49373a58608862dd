"""Checkpoints: complete or absent, safe from donation, readable under any sharding."""

import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshloom.core.checkpoint import Checkpointer, check_writable, tree_bytes
from meshloom.core.errors import CheckpointError
from meshloom.core.topology import make_mesh


def on_mesh(axes, spec):
    return NamedSharding(make_mesh(axes), PartitionSpec(*spec))


def a_tree(sharding):
    return {"layers": {0: {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding)}}, "count": jnp.asarray(3)}


def abstract_of(tree, sharding, dtype=None):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding if x.ndim else one), tree
    )


def test_arrays_come_back_under_another_sharding(tmp_path):
    tree = a_tree(on_mesh("fsdp=8", ("fsdp", None)))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(5, {"params": tree, "data": {"next": [1, "two"]}})
    target = on_mesh("data=2,tensor=4", (None, "tensor"))
    back = Checkpointer(tmp_path).restore(5, {"params": abstract_of(tree, target), "data": None})
    jax.tree.map(np.testing.assert_array_equal, back["params"], tree)
    assert back["params"]["layers"][0]["w"].sharding == target
    assert back["data"] == {"next": [1, "two"]}


def test_params_alone_in_another_dtype(tmp_path):
    sharding = on_mesh("fsdp=8", ("fsdp", None))
    tree = a_tree(sharding)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": tree, "opt": {"big": jnp.zeros(7)}})
    shutil.rmtree(tmp_path / "1" / "opt")  # proves that nothing else is read
    back = Checkpointer(tmp_path).restore_params(abstract_of(tree, sharding, jnp.bfloat16))
    assert back["layers"][0]["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(back["layers"][0]["w"].astype(float), tree["layers"][0]["w"])


def test_only_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, {"params": {"w": jnp.full(4, step)}})
    assert Checkpointer(tmp_path).steps() == [3, 4]


def test_donating_the_arrays_after_save_changes_nothing(tmp_path):
    sharding = on_mesh("fsdp=8", ("fsdp",))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jax.device_put(jnp.arange(2.0**22), sharding)
    expected = np.array(x)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"x": x}})
        for _ in range(3):
            x = overwrite(x)
        x.block_until_ready()
    abstract = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
    np.testing.assert_array_equal(Checkpointer(tmp_path).restore_params(abstract)["x"], expected)


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(4)}})
    leftover = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", leftover)
    assert Checkpointer(tmp_path).latest_step() == 1
    assert leftover.exists()  # reading removes nothing: another process may be writing it
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(2, {"params": {"w": jnp.ones(4)}})
    assert not leftover.exists()
    assert Checkpointer(tmp_path).steps() == [1, 2]


FILLS_UP = """
import resource, sys
import jax, jax.numpy as jnp
from meshloom.core.checkpoint import Checkpointer
from meshloom.core.errors import CheckpointError
with Checkpointer(sys.argv[1]) as checkpoints:
    checkpoints.save(1, {"params": {"w": jnp.ones(10)}}, wait=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints.save(2, {"params": {"w": jax.random.normal(jax.random.key(0), (300_000,))}})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
"""


def test_a_save_that_fails_in_the_background_is_one_error_and_costs_no_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILLS_UP, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"a checkpoint could not be written to {tmp_path}: ")
    assert "File too large" in done.stdout
    assert done.stderr == ""
    assert Checkpointer(tmp_path).steps() == [1]


def test_every_misfit_is_named(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"a": jnp.ones(4), "b": jnp.ones(2)}})
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one) for name in ("a", "c")}
    with pytest.raises(CheckpointError) as failure:
        Checkpointer(tmp_path).restore_params(wanted)
    for part in ("a is (4,), expected (3,)", "missing c", "unexpected b"):
        assert part in str(failure.value)


def test_absent_checkpoints_are_refused(tmp_path):
    assert Checkpointer(tmp_path / "none").latest_step() is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Checkpointer(tmp_path / "none").restore_params({})
    with pytest.raises(CheckpointError, match="step 7; there are: none"):
        Checkpointer(tmp_path).restore(7, {"params": {}})


def test_a_file_in_the_folders_place_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to"):
        check_writable(tmp_path / "file" / "run", 0)


def test_a_full_disk_is_reported_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40, 2**29))
    with pytest.raises(CheckpointError, match=r"0\.5 GiB free, but checkpoints need 3 GiB"):
        check_writable(tmp_path, 3 * 2**30)
    check_writable(tmp_path, 2**28)


def test_bytes_are_counted_once():
    assert tree_bytes({"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": np.zeros(5, np.float32)}) == 24 + 20

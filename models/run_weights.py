"""Weights of a training run's newest checkpoint, restored straight into their places."""

import pathlib
from typing import Any

import jax
from flax import nnx

from meshloom.core.checkpoint import Checkpointer


def read_run(folder: pathlib.Path, module: nnx.Module, shardings: Any = None) -> nnx.Module:
    """A concrete copy of the abstract `module` with the parameters of the newest step; optimizer state stays on disk.

    Raises:
        CheckpointError: there is no complete checkpoint, or it does not fit the module.
    """
    graphdef, state = nnx.split(module)
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, state)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    params = Checkpointer(folder).restore_params(nnx.to_pure_dict(wanted))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)

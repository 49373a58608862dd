"""Weights in Meshloom's own form: the newest checkpoint of a training run, or a folder written to look like one."""

import pathlib
from typing import Any

import jax
from flax import nnx

from meshloom.core.checkpoint import Checkpointer
from meshloom.models.config import ModelConfig
from meshloom.models.config_dict import config_to_dict
from meshloom.models.tokenizer import Tokenizer
from meshloom.models.weights import replacing, write_json

FORMAT = 1


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


def write_run(folder: str | pathlib.Path, module: nnx.Module, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """A folder that `load` reads like that of a run of 0 steps: configuration, tokenizer and an orbax checkpoint.

    Raises:
        CheckpointError: the folder holds other things, such as a run, or cannot be written; it is left as it was.
    """
    with replacing(folder) as partial:
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer")
        with Checkpointer(partial / "checkpoints") as checkpoints:
            checkpoints.save(0, {"params": nnx.to_pure_dict(nnx.state(module, nnx.Param))}, wait=True)
        dtype = jax.tree.leaves(nnx.state(module, nnx.Param))[0].dtype.name
        description = {"format": FORMAT, "family": config.family, "model": config_to_dict(config), "weights": dtype}
        write_json(partial / "meshloom.json", description)

"""Rows sent to the devices that hold their experts, computed there, and sent back: the two exchanges around a MoE.

Called inside `jax.shard_map`, on one device's rows and experts. No row is dropped: every device has room for the rows
of all devices, should they all want its experts. What in that room is no row takes memory but no products, which end
with the last group. `ragged` does not send it either; `padded` does, since XLA for CPUs exchanges equal parts only.

Shape legend: n devices on the axis, R rows of one device, E experts in all, e = E / n of one device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import Implementation, Target, select
from meshloom.pallas_kernels.matmul.experts.rows import RowsSpec

__all__ = ["expert_parallel"]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Where rows go and where they come from. Rows from device s arrive at [s R, s R + received[s]).

    Attributes:
        axis: of the mesh.
        first, sent: `[n]`, rows [first, first + sent) of this device, sorted by expert, are for each device.
        theirs: `[n]`, `first` of each device for this one: where its rows go back to.
        received: `[n]`, rows from each device.
    """

    axis: str
    first: Int[Array, "n"]
    sent: Int[Array, "n"]
    theirs: Int[Array, "n"]
    received: Int[Array, "n"]


def _ragged_out(x, exchange: Exchange):
    rows, devices = x.shape[0], exchange.sent.shape[0]
    room = jnp.zeros((devices * rows, *x.shape[1:]), x.dtype)
    at = jnp.full(devices, jax.lax.axis_index(exchange.axis) * rows, jnp.int32)
    sizes = (exchange.first, exchange.sent, at, exchange.received)
    return jax.lax.ragged_all_to_all(x, room, *sizes, axis_name=exchange.axis)


def _ragged_back(y, exchange: Exchange):
    devices = exchange.sent.shape[0]
    rows = y.shape[0] // devices
    room = jnp.zeros((rows, *y.shape[1:]), y.dtype)
    sizes = (jnp.arange(devices, dtype=jnp.int32) * rows, exchange.received, exchange.theirs, exchange.sent)
    return jax.lax.ragged_all_to_all(y, room, *sizes, axis_name=exchange.axis)


def _padded_out(x, exchange: Exchange):
    rows, devices = x.shape[0], exchange.sent.shape[0]
    row = jnp.arange(rows)
    at = exchange.first[:, None] + row
    valid = (row < exchange.sent[:, None]).reshape(devices, rows, *[1] * (x.ndim - 1))
    parts = jnp.where(valid, x.at[at].get(mode="clip"), 0)
    return jax.lax.all_to_all(parts, exchange.axis, 0, 0, tiled=True).reshape(devices * rows, *x.shape[1:])


def _padded_back(y, exchange: Exchange):
    devices = exchange.sent.shape[0]
    rows = y.shape[0] // devices
    parts = jax.lax.all_to_all(y.reshape(devices, rows, *y.shape[1:]), exchange.axis, 0, 0, tiled=True)
    row = jnp.arange(rows)
    device = jnp.searchsorted(exchange.first + exchange.sent, row, side="right")
    return parts.at[device, row - exchange.first.at[device].get(mode="clip")].get(mode="fill", fill_value=0)


def _ragged_why_not(spec: RowsSpec, target: Target) -> str | None:
    return None if target.platform in ("tpu", "gpu", "cuda") else "XLA has ragged exchanges for TPUs and GPUs only"


EXPERT_PARALLEL = (
    Implementation("ragged", (_ragged_out, _ragged_back), _ragged_why_not),
    Implementation("padded", (_padded_out, _padded_back), lambda spec, target: None),
)


@jax.named_scope("expert_parallel")
def expert_parallel(
    x: Float[Array, "R D"],
    expert: Int[Array, "R"],
    compute: Callable[[Any, Any], Any],
    *,
    experts: int,
    axis: str = "expert",
    implementation: str | None = None,
) -> Float[Array, "R F"]:
    """Each row through its expert, wherever that is; differentiable in x and in what `compute` multiplies it with.

    Args:
        expert: of each row, counted over all devices: device i of the axis holds those from i e to (i + 1) e. Rows with
            a number outside of [0, E) go nowhere and come back as zeros.
        compute: (rows `[n R, D]` sorted by expert, int32 group sizes `[e]`) -> `[n R, F]`, row by row, as of
            `grouped_matmul`; rows past the groups are no rows and must not matter.
        experts: E.
        axis: the axis of the mesh over which experts are split.
        implementation: "ragged" or "padded", for tests and benches; None chooses.
    Returns:
        The results, in the order of x.
    Source: Lepikhin et al. 2020, GShard, section 3.2 (all-to-all); Gale et al. 2022, MegaBlocks (no row dropped).
    Raises MeshloomError when experts do not divide over the axis, or the requested implementation declines.
    """
    devices = jax.lax.axis_size(axis)
    if experts % devices:
        raise MeshloomError(f"expert_parallel: {experts} experts do not divide over {axis}={devices}")
    own = experts // devices
    send, give_back = select(
        "expert_parallel", EXPERT_PARALLEL, RowsSpec(devices), Target.of_mesh(), implementation
    ).run

    keys = jnp.where((expert >= 0) & (expert < experts), expert, experts).astype(jnp.int32)
    order = jnp.argsort(keys, stable=True)
    per_device = jnp.bincount(keys, length=experts + 1)[:experts].reshape(devices, own).sum(1).astype(jnp.int32)
    first = jnp.cumsum(per_device) - per_device
    theirs, received = (jax.lax.all_to_all(each, axis, 0, 0, tiled=True) for each in (first, per_device))
    exchange = Exchange(axis, first, per_device, theirs, received)

    arrived = send(x[order], exchange)
    # Numbers of experts travel as rows do; where no row came there is none. They come sorted by device, then expert.
    numbers = send(keys[order] - keys[order] // own * own, exchange)
    came = (jnp.arange(x.shape[0]) < received[:, None]).reshape(-1)
    local = jnp.where(came, numbers, own)
    by_expert = jnp.argsort(local, stable=True)
    sizes = jnp.bincount(local, length=own + 1)[:own].astype(jnp.int32)
    y = compute(arrived[by_expert], sizes)
    y = jnp.where(came[:, None], y[jnp.argsort(by_expert)], 0)
    return give_back(y, exchange)[jnp.argsort(order)]

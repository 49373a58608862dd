"""Which tile of rows meets which group, in what order: computed on the device, read by a kernel's index maps.

A tile is visited once for each group that has rows in it, so M rows take at most M / tile + groups visits, however the
groups lie. Rows past the last group are one more group, number E, of which nothing is read.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from meshloom.pallas_kernels.matmul.grouped.spec import bounds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """What a kernel prefetches, int32; arrays over visits `[V]` hold more entries than there are visits.

    Attributes:
        first, end: `[E + 1]`, rows [first, end) are those of a group; the last entry is for rows past all groups.
        group, tile: `[V]`, of each visit.
        read_group, read_tile: `[V]`, where it reads; a visit to no group stays where the last was.
    """

    first: Any  # arrays, or references to them in a kernel
    end: Any
    group: Any
    tile: Any
    read_group: Any
    read_tile: Any


def visits(
    group_sizes: Int[Array, "E"], rows: int, tile: int, *, groups_all: bool = False, rest: bool = True
) -> tuple[Visits, Int[Array, ""]]:
    """The visits to tiles of `tile` rows, in the order of rows, and how many there are.

    Args:
        groups_all: visit every group, empty ones once, and no rows past the last. Else no empty group.
        rest: and all rows past the last group. Without, at least one visit is left.
    """
    groups = group_sizes.shape[0]
    first, end = bounds(group_sizes, rows)
    first = jnp.append(first, end[-1])
    end = jnp.append(end, rows if rest and not groups_all else end[-1]).astype(jnp.int32)
    first_tile = jnp.minimum(first // tile, max(0, -(-rows // tile) - 1))
    tiles = jnp.where(end > first, -(-end // tile) - first_tile, 0)
    if groups_all:
        tiles = tiles.at[:groups].max(1)
    done = jnp.cumsum(tiles)
    visit = jnp.arange(-(-rows // tile) + groups)
    group = jnp.minimum(jnp.sum(done[:, None] <= visit, axis=0), groups).astype(jnp.int32)
    position = jnp.minimum(visit, done[-1] - 1) - (done - tiles)[group]
    at = (first_tile[group] + jnp.maximum(position, 0)).astype(jnp.int32)
    of_group = group < groups
    plan = Visits(
        first=first,
        end=end,
        group=group,
        tile=at,
        read_group=jax.lax.cummax(jnp.where(of_group, group, 0)),
        read_tile=jax.lax.cummax(jnp.where(of_group, at, 0)),
    )
    return plan, jnp.maximum(done[-1], 1).astype(jnp.int32)

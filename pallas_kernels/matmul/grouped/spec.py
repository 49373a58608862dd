"""What a grouped product is told about its arrays, and what every implementation of it does.

Shape legend: M rows, sorted by group, E groups, K contracted, N columns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from meshloom.core.errors import MeshloomError
from meshloom.pallas_kernels.dispatch import may_be_spread
from meshloom.pallas_kernels.matmul.qarray import QArray


@dataclasses.dataclass(frozen=True)
class GroupedSpec:
    """What the choice of an implementation may look at.

    Attributes:
        x: dtype of the rows. weight: dtype of the weights as they are stored.
        transposed: weights are `[E, N, K]`, not `[E, K, N]`.
        spread: XLA may spread the arrays over devices, so that a device sees parts of groups.
    """

    rows: int
    groups: int
    contracted: int
    columns: int
    x: str
    weight: str
    transposed: bool
    spread: bool

    @classmethod
    def of(cls, x: Any, w: Any, group_sizes: Any, transposed: bool) -> "GroupedSpec":
        """The spec of a call, from its arrays.

        Raises:
            MeshloomError: sizes differ, or group sizes are no int32.
        """
        groups, contracted, columns = w.shape if not transposed else (w.shape[0], w.shape[2], w.shape[1])
        if x.shape[1] != contracted:
            side = "last" if transposed else "middle"
            raise MeshloomError(
                f"grouped_matmul: rows of x have {x.shape[1]} numbers, the {side} dimension of the weights {contracted}"
            )
        if group_sizes.shape[0] != groups:
            raise MeshloomError(f"grouped_matmul: {group_sizes.shape[0]} group sizes for {groups} weights")
        if group_sizes.dtype != jnp.int32:
            raise MeshloomError(f"grouped_matmul: group sizes are int32; got {group_sizes.dtype}")
        stored = w.values.dtype if isinstance(w, QArray) else w.dtype
        sizes = (x.shape[0], groups, contracted, columns)
        return cls(*sizes, str(x.dtype), str(stored), transposed, may_be_spread())


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The two products of one implementation. The gradient of x is a `product` as well, with the other `transposed`.

    Attributes:
        product: (x [M, K], w, group_sizes, transposed, target) -> [M, N], zeros for rows past the last group; in the
            common dtype of x and w.
        outer: (a [M, A], b [M, B], group_sizes, dtype, target) -> [E, A, B] in `dtype`: sums of a^T b over the rows of
            each group, zeros for an empty one.
        own_rows: as `product`, but that rows past the last group may hold anything; None where these cost nothing.
    """

    product: Callable[..., Any]
    outer: Callable[..., Any]
    own_rows: Callable[..., Any] | None = None


def bounds(group_sizes: Int[Array, "E"], rows: int) -> tuple[Int[Array, "E"], Int[Array, "E"]]:
    """First row of each group and the row after its last; no group reaches past `rows`."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), rows).astype(jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def in_rows(first: Any, end: Any, rows: int) -> Bool[Array, "rows 1"]:
    """Which of the rows lie in [first, end)."""
    row = jnp.arange(rows)[:, None]
    return (row >= first) & (row < end)

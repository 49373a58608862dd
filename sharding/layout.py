"""A layout: for every parameter of a module, over which mesh axes its dimensions are split, by which rule, and why.

`Layout` is what training and serving use: specs, shardings, placement, and the layout of batches, optimizer state and
KV pages. It holds what was decided and does not decide anything (`rules.py` does).
"""

import dataclasses
import difflib
import functools
import math
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from meshloom.core.errors import ShardingError
from meshloom.core.topology import AXES, BATCH_AXES, axes_of
from meshloom.sharding.roles import Role

Rule = Literal["pair", "store"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was decided for one dimension: split over `axes` by `rule`, or left whole (none, None), and the reason."""

    size: int
    role: Role
    axes: tuple[str, ...]
    rule: Rule | None
    reason: str

    @property
    def entry(self) -> str | tuple[str, ...] | None:
        """Of a PartitionSpec."""
        return self.axes if len(self.axes) > 1 else next(iter(self.axes), None)


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of a layout.

    Attributes:
        bytes_per_device: what one device holds of it.
        is_vector: one value for each feature, too small to be worth a gather: never stored in pieces.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    choices: tuple[Choice, ...]
    bytes_per_device: int
    is_vector: bool = False

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(*(choice.entry for choice in self.choices))

    @property
    def stored(self) -> tuple[str, ...]:
        """The axes over which the store rule splits it."""
        return next((choice.axes for choice in self.choices if choice.rule == "store"), ())

    @property
    def paired(self) -> tuple[str, ...]:
        """The axes over which the pair rule splits it."""
        return tuple(axis for choice in self.choices if choice.rule == "pair" for axis in choice.axes)

    @property
    def rule(self) -> str:
        """The rules that split it, or "replicated"."""
        return " + ".join(dict.fromkeys(choice.rule for choice in self.choices if choice.rule)) or "replicated"

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(choice.role for choice in self.choices)

    @property
    def bytes_total(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """The derived layout of one module on one mesh.

    Attributes:
        mesh: with Auto axes, whatever the axis types of the mesh that was given.
        rows: one per parameter, in the order of `jax.tree.leaves` of the parameters.
        kv_heads_spec: the axis over which KV pages are split by kv head, or None.
        unknown: primitives of the program that the derivation has no rule for, and how often they occur.
        treedef: structure of the parameters: `nnx.state(module, nnx.Param)`, or the `params` of Linen's `init`.
        miscompiled: name of a weight -> what XLA is known to compute wrongly with it on this mesh.
    """

    mesh: Mesh | AbstractMesh
    rows: tuple[Row, ...]
    kv_heads_spec: str | None
    unknown: dict[str, int]
    treedef: Any
    miscompiled: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def specs(self) -> Any:
        """A PartitionSpec per parameter, as a pytree like the parameters."""
        return jax.tree.unflatten(self.treedef, [row.spec for row in self.rows])

    @functools.cached_property
    def shardings(self) -> Any:
        """A NamedSharding per parameter, as a pytree like the parameters."""
        return jax.tree.unflatten(self.treedef, [NamedSharding(self.mesh, row.spec) for row in self.rows])

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole, such as a step counter."""
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def batch_spec(self) -> PartitionSpec:
        """The spec of token batches `[B, T]`: rows over `data`, `fsdp` and `expert`, tokens over `context`, where the
        mesh has them."""
        axes = tuple(axis for axis in BATCH_AXES if self.mesh.shape.get(axis, 1) > 1)
        return PartitionSpec(axes or None, "context" if self.context_ways > 1 else None)

    @property
    def batch_ways(self) -> int:
        """Over how many devices the rows of a batch are spread."""
        return math.prod(self.mesh.shape.get(axis, 1) for axis in BATCH_AXES)

    @property
    def context_ways(self) -> int:
        """Over how many devices the tokens of a row are spread."""
        return self.mesh.shape.get("context", 1)

    def batch_sharding(self, batch: int, length: int | None = None) -> NamedSharding:
        """The sharding of token batches `[batch, length]`; None leaves the length unchecked.

        Raises:
            ShardingError: `batch` rows do not divide over the axes of batches, or `length` over `context`.
        """
        if batch % self.batch_ways:
            raise _uneven(f"a batch of {batch} rows", batch, " x ".join(axes_of(self.batch_spec[0])), self.batch_ways)
        if length is not None and length % self.context_ways:
            raise _uneven(f"a row of {length} tokens", length, "context", self.context_ways)
        return NamedSharding(self.mesh, self.batch_spec)

    def follow(self, tree: Any) -> Any:
        """Shardings for a tree that holds copies of the parameters, such as optimizer state.

        A leaf whose path ends in a parameter's path and that has its shape gets its sharding; every other leaf is
        replicated.
        """
        parameters, _ = jax.tree_util.tree_flatten_with_path(self.shardings)
        by_path = {
            _keys(path): (row.shape, sharding) for row, (path, sharding) in zip(self.rows, parameters, strict=True)
        }

        def sharding_of(path: Any, leaf: Any) -> NamedSharding:
            keys = _keys(path)
            for start in range(len(keys)):
                shape, sharding = by_path.get(keys[start:], (None, None))
                if sharding is not None and shape == tuple(leaf.shape):
                    return sharding
            return self.replicated

        return jax.tree_util.tree_map_with_path(sharding_of, tree)

    def place(self, state: Any) -> Any:
        """Puts `nnx.state(module, nnx.Param)` onto the devices of the mesh.

        Raises:
            ShardingError: the mesh is abstract and has no devices.
        """
        if isinstance(self.mesh, AbstractMesh):
            raise ShardingError(
                "an abstract mesh has no devices to place weights on; derive the layout on a jax.sharding.Mesh"
            )
        return jax.device_put(state, self.shardings)

    def row(self, name: str) -> Row:
        """The row of the parameter `name`.

        Raises:
            ShardingError: there is none; the message lists the nearest names.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise ShardingError(f"no parameter is named {name!r}; nearest are {', '.join(near)}")

    @functools.cached_property
    def warnings(self) -> tuple[str, ...]:
        """What XLA would compute wrongly, large weights that every device holds whole, unknown operations: with names,
        reasons and what would help."""
        from meshloom.sharding.lint import warnings_of  # reads layouts, so it imports this module

        return warnings_of(self)

    def table(self) -> Table:
        """All parameters as `meshloom plan` shows them."""
        from meshloom.sharding.explain import table  # explains layouts, so it imports this module

        return table(self)

    @property
    def bytes_per_device(self) -> int:
        """What one device holds of all parameters."""
        return sum(row.bytes_per_device for row in self.rows)


def automatic(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The same mesh with Auto axes: XLA places activations, whatever axis types `jax.make_mesh` chose.

    Raises:
        ShardingError: an axis that Meshloom does not know.
    """
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise ShardingError(
            f"mesh axis {unknown[0]!r} is unknown; axes are any of {', '.join(AXES)} (got {dict(mesh.shape)})"
        )
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _uneven(what: str, size: int, axes: str, ways: int) -> ShardingError:
    lower = size // ways * ways
    nearest = f"{lower} or {lower + ways}" if lower else f"{ways}"
    return ShardingError(f"{what} does not divide over {axes} = {ways} devices; use {nearest}, or a mesh with fewer")


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)

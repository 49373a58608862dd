"""Reads Pallas kernels: what their grid and their body say about the dimensions of whole arrays.

The body is read like any other program, over blocks. A block as long as its array stands for the array's own dimension.
Blocks that the same grid axis counts, of one size and out of equally long dimensions, are blocks of one dimension; so
are heads and the kv heads that a grid axis divided by the group counts. What the body says of a block holds for the
dimension that it is cut from. Where blocks lie is a choice of the kernel: no dimension is ever refined by a block's
size, and neither a grid nor a block says how to split.

It does not know kernels that move their own data (DMAs): what is copied so ties nothing, and is reported as unknown.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from meshloom.sharding.classes import Dim, find, leaves, leaves_of, part, product, regroup, unify, window
from meshloom.sharding.values import Dims, Lookup, Product, Step, Value

Axis = int  # of the grid
_BY_DATA = -1  # stands for the axis where data says which block


@dataclasses.dataclass(frozen=True)
class _Count:
    """Block `i // group` along a dimension, where `i` is the place on grid axis `axis`."""

    axis: Axis
    group: int


class Blocks:
    """How the blocks of one kernel lie in its arrays.

    Attributes:
        counted: the grid axes that count blocks of a result.
    """

    def __init__(self) -> None:
        self.counted: set[Axis] = set()
        self._shared: dict[tuple[_Count, int, int], tuple[Dim, Dim]] = {}  # count, sizes -> block, whole
        self._arrays: list[Dim] = []
        self._outer: dict[Value, dict[Axis, Dim]] = {}  # blocks of one element, which the body does not see

    def block_of(self, array: Value, mapping: Any, shape: tuple[int, ...], is_result: bool) -> Value:
        """The block of `array` that the body sees, of this shape, as one of its operands."""
        from jax.experimental import pallas as pl  # loaded already, for the program has a kernel

        self._arrays += array.dims
        dims: list[Dim] = []
        outer: dict[Axis, Dim] = {}
        for position, (whole, block) in enumerate(zip(array.dims, mapping.block_shape, strict=True)):
            size = getattr(block, "block_size", 1)
            where = _place(mapping.index_map_jaxpr, position)
            if isinstance(where, _Count) and is_result:
                self.counted.add(where.axis)
            if size == whole.size:
                inside = whole
            elif size == 1 and where is None:
                inside, outer[_BY_DATA] = Dim(1), whole
            elif not isinstance(block, pl.Blocked | pl.Squeezed) or where is None:
                inside = window(whole, size)
            elif isinstance(where, int):
                inside = part(whole, where * size, size)
            else:
                inside, shared = self._shared.setdefault((where, size, whole.size), (Dim(size), whole))
                unify(shared, whole)
                if size == 1:
                    outer[where.axis] = whole
            if not isinstance(block, pl.Squeezed):
                dims.append(inside)
        if tuple(dim.size for dim in dims) != shape:  # the kernel sees the block transformed
            dims = [Dim(size) for size in shape]
        value = dataclasses.replace(array, dims=tuple(dims))
        self._outer[value] = outer
        return value

    def tie_groups(self) -> None:
        """Declares the kv heads that `head // group` counts the outer factor of the heads."""
        for (count, size, kv_heads), (_, kv_whole) in list(self._shared.items()):
            if count.group > 1:
                heads = self._shared.get((_Count(count.axis, 1), size, kv_heads * count.group))
                if heads is not None:
                    unify(regroup([heads[1]], [kv_heads, count.group])[0], kv_whole)

    def lifted(self, steps: Iterable[Step]) -> list[Step]:
        """What the steps of the body say, said of whole dimensions."""
        # Scratch as wide as a vector register ties blocks to whole dimensions of that size: those stay themselves.
        own_leaves = leaves_of(self._arrays)
        wholes = {
            find(block): whole
            for block, whole in self._shared.values()
            if block.size > 1 and find(block) not in own_leaves
        }

        def lift(dim: Dim) -> Dim:
            own = leaves(dim)
            return product([wholes.get(leaf, leaf) for leaf in own]) if any(leaf in wholes for leaf in own) else dim

        def lift_all(dims: Dims) -> Dims:
            return tuple(map(lift, dims))

        values: dict[Value, Value] = {}

        def lift_value(value: Value) -> Value:
            if value not in values:
                dims = lift_all(value.dims)
                values[value] = value if dims == value.dims else dataclasses.replace(value, dims=dims)
            return values[value]

        result = []
        for step in steps:
            match fact := step.fact:
                case Product(contracted, batch, lhs_free, rhs_free):
                    sides = map(lift_all, (contracted, batch, lhs_free, rhs_free))
                    fact = self._with_outer(Product(*sides), *step.inputs[:2])
                case Lookup(rows, columns):
                    fact = Lookup(lift_all(rows), lift_all(columns))
            for value in step.outputs:
                seen = self._outer.setdefault(value, {})
                for each in step.inputs:
                    seen.update(self._outer.get(each, {}))
            inputs, outputs = (tuple(map(lift_value, group)) for group in (step.inputs, step.outputs))
            result.append(dataclasses.replace(step, inputs=inputs, outputs=outputs, fact=fact))
        return result

    def _with_outer(self, fact: Product, lhs: Value, rhs: Value) -> Product:
        """The product over all programs of the grid: what both sides have along an axis is a batch, or is summed over
        where no result has it. What data picks one of, as the expert of a row, is a batch as well."""
        extra: dict[str, list[Dim]] = collections.defaultdict(list)
        left, right = self._outer.get(lhs, {}), self._outer.get(rhs, {})
        for axis in sorted(left.keys() | right.keys()):
            ours, theirs = (leaves(side[axis]) if axis in side else () for side in (left, right))
            if axis == _BY_DATA:
                extra["batch"] += [*ours, *theirs]
                continue
            extra["batch" if axis in self.counted else "contracted"] += [leaf for leaf in ours if leaf in theirs]
            extra["lhs_free"] += [leaf for leaf in ours if leaf not in theirs]
            extra["rhs_free"] += [leaf for leaf in theirs if leaf not in ours]
        return dataclasses.replace(fact, **{name: (*getattr(fact, name), *dims) for name, dims in extra.items()})


def _place(index_map: Any, position: int) -> _Count | int | None:
    """Which block of a dimension a program of the grid sees; None where that is not known before the run."""
    atom = index_map.outvars[position]
    if hasattr(atom, "val"):
        return int(atom.val)
    if atom in index_map.invars:
        return _Count(index_map.invars.index(atom), 1)
    for equation in index_map.eqns:
        # `i // group` of JAX's numbers is a jitted function of that name.
        divides = equation.primitive.name == "div" or equation.params.get("name") == "floor_divide"
        if atom in equation.outvars and divides:
            dividend, divisor = equation.invars
            if hasattr(divisor, "val") and not hasattr(dividend, "val") and dividend in index_map.invars:
                return _Count(index_map.invars.index(dividend), int(divisor.val))
    return None


def window_of(reference: Dims, indexers: Sequence[Any], shape: tuple[int, ...]) -> Dims | None:
    """The dimensions that a kernel reads or writes of a reference; None where it reshapes or gathers.

    Args:
        indexers: what the primitive says about the place: for each dimension an index or a start, size and stride.
        shape: of what is read.
    """
    dims = list(reference)
    for indexer in indexers:
        if getattr(indexer, "int_indexer_shape", None) != ():
            return None
        kept = []
        for dim, index in zip(dims, indexer.indices, strict=True):
            if not hasattr(index, "stride"):
                window(dim, 1)
            elif index.size == dim.size:
                kept.append(dim)
            elif isinstance(index.start, int) and index.stride == 1:
                kept.append(part(dim, index.start, index.size))
            else:
                kept.append(window(dim, index.size))
        dims = kept
    return tuple(dims) if tuple(dim.size for dim in dims) == shape else None

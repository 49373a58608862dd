"""A mixture of experts over the mesh in scope: no weight moves to another expert's device, and one sum ends each pass.

Batches lie over `data`, `fsdp`, `expert` and `context` and are whole over `tensor`, as in every layout that is derived.
The devices along `expert`, which hold different experts, gather each other's rows (`rows.py` has how); each computes
what all of these want of its own experts, and a sum that is scattered over `expert` gives every device its own rows
back: that and the sum over `tensor` are the pair rule's one reduction. The scatter comes first, so that the sum over
`tensor` moves a part in n of the rows. Rows are sorted where they are, so that none is sent over `data`, `fsdp` or
`context`. Weights that are stored in parts arrive gathered, and their gradients leave summed over those three and split
as they are stored: all rows along `expert` are where an expert is. A batch that does not divide over `expert`, and rows
of a step of serving, are whole over it: nothing is gathered then, and one sum over both axes ends the pass.

Between the passes a device keeps its own rows, and what its experts' gate and up made, with room for all rows along
`expert`, should they all want them. Rows are gathered again in the backward pass: kept, they would take n times the
memory of a layer's input.

Why not an exchange of rows (`exchange.py`)? In units of what a device's own rows take, over n devices, gather and
scatter send 2 (n - 1). An exchange sends each of a row's k copies to where its expert is and back: 2 k (n - 1) / n,
less for k < n. It would halve what a forward pass of Mixtral (k = 2) sends over expert=4 and leave a quarter over
expert=8, where Qwen's k = 8 gains nothing. It is not done: it needs XLA's ragged all-to-all, which CPUs do not have and
whose padded stand-in sends k (n - 1) each way, and copies of a row that meet in one device are sent one by one. Room
for rows is as large either way.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from meshloom.core.topology import BATCH_AXES, STORE_AXES
from meshloom.pallas_kernels.dispatch import Target, may_be_spread, select
from meshloom.pallas_kernels.matmul.experts.local import flat
from meshloom.pallas_kernels.matmul.experts.rows import EXCHANGES, RowsSpec
from meshloom.pallas_kernels.matmul.qarray import QArray

_TOKENS, _EXPERT, _INNER = "context", "expert", "tensor"


def _mesh() -> AbstractMesh | None:
    """The mesh in scope, if it leaves it to us to spread arrays over all of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if may_be_spread() and not mesh.manual_axes else None


def _that_split(mesh: AbstractMesh, size: int, axes: tuple[str, ...]) -> tuple[str, ...]:
    axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _axes_of_rows(mesh: AbstractMesh, shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split a batch and its tokens; a batch of too few rows is whole over `expert`. Rows without a batch
    are those of a step of serving, which all devices have."""
    if len(shape) < 3:
        return (), ()
    others = tuple(axis for axis in BATCH_AXES if axis != _EXPERT)
    batch = _that_split(mesh, shape[0], BATCH_AXES) or _that_split(mesh, shape[0], others)
    return batch, _that_split(mesh, shape[1], (_TOKENS,))


def _spec_of_rows(batch: tuple[str, ...], tokens: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(batch or None, tokens or None) if batch or tokens else PartitionSpec()


def _scattered(spec: PartitionSpec, stored: tuple[int, tuple[str, ...]]) -> PartitionSpec:
    dimension, axes = stored
    return PartitionSpec(*(axes if d == dimension else axis for d, axis in enumerate(spec))) if axes else spec


def by_rows(run: Callable[..., Any], values: Any) -> Any:
    """`run` on every device's own rows of the mesh in scope."""
    mesh = _mesh()
    if mesh is None:
        return run(values)
    spec = _spec_of_rows(*_axes_of_rows(mesh, values.shape))
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)(values)


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the arrays of one call lie.

    Attributes:
        batch, tokens: axes that split the first and the second dimension of the rows.
        expert, inner: axes that split E and F, or None. Over an `expert` that is one of `batch`, rows are gathered.
    """

    mesh: AbstractMesh
    batch: tuple[str, ...]
    tokens: tuple[str, ...]
    expert: str | None
    inner: str | None

    @classmethod
    def of(cls, x: Any, gate: Any, up: Any, down: Any) -> "Spread | None":
        """For the mesh in scope; None where there is nothing to spread over, or only some axes are left to us.

        What does not divide stays whole.
        """
        mesh = _mesh()
        if mesh is None:
            return None
        (expert,) = _that_split(mesh, gate.shape[0], (_EXPERT,)) or (None,)
        # Scales in blocks along F have to divide as F does.
        sizes = [leaf.shape[1] for leaf in jax.tree.leaves((gate, up))]
        sizes += [leaf.shape[2] for leaf in jax.tree.leaves(down)]
        divides = all(size == 1 or _that_split(mesh, size, (_INNER,)) for size in sizes)
        return cls(mesh, *_axes_of_rows(mesh, x.shape), expert, _INNER if divides else None)

    @property
    def rows(self) -> PartitionSpec:
        """Of x and whatever else has its rows."""
        return _spec_of_rows(self.batch, self.tokens)

    @property
    def kept(self) -> PartitionSpec:
        """Of the sorted rows between the passes: every device's own, one after the other."""
        axes = tuple(dict.fromkeys((*self.batch, *self.tokens, *filter(None, [self.expert]))))
        return PartitionSpec(axes or None, self.inner)

    def matrices(self, *matrices: Any) -> tuple[Any, ...]:
        """Specs of gate, up and down, or of those that are no QArray, as their gradients."""

        def spec_of(dimension: int) -> Callable[[Any], PartitionSpec]:
            def spec(leaf: Any) -> PartitionSpec:
                axes = {0: self.expert, dimension: self.inner}
                return PartitionSpec(*(axes.get(d) if size > 1 else None for d, size in enumerate(leaf.shape)))

            return spec

        return tuple(jax.tree.map(spec_of(inner), each) for inner, each in zip((1, 1, 2), matrices, strict=True))

    def forward(self, run: Callable[..., Any], x, weights, chosen, gate, up, down) -> tuple[Any, ...]:
        """`local.forward` on every device, and the sum of what they give."""
        experts = gate.shape[0]

        def own(x, weights, chosen, *matrices):
            rows = self._gathered((x, weights, chosen))
            out, *kept = flat(run, *rows, *matrices, first=self._first(matrices[0]), experts=experts)
            return self._sum(out), *kept

        inputs = (*[self.rows] * 3, *self.matrices(gate, up, down))
        return self._mapped(own, inputs, (self.rows, self.kept, self.kept))(x, weights, chosen, gate, up, down)

    def backward(self, run: Callable[..., Any], x, weights, chosen, gate, up, down, *kept_and_out) -> tuple[Any, ...]:
        """`local.backward` on every device; gradients of rows are summed over experts, those of matrices over rows."""
        experts, matrices = gate.shape[0], (gate, up, down)
        learns = [not isinstance(each, QArray) for each in matrices]
        specs = self.matrices(*matrices)
        stored = [self._stored(each, spec) for each, spec, has in zip(matrices, specs, learns, strict=True) if has]

        def own(x, weights, chosen, *others):
            *held, d_out = others
            *rows, d_out = self._gathered((x, weights, chosen, d_out))
            dx, d_weights, *found = flat(run, *rows, *held, d_out, first=self._first(others[0]), experts=experts)
            learned = (each for each in found if each is not None)
            return *self._sum((dx, d_weights)), *map(self._sum_over_rows, learned, stored)

        inputs = (*[self.rows] * 3, *specs, self.kept, self.kept, self.rows)
        whole = [spec for spec, has in zip(specs, learns, strict=True) if has]
        outputs = (self.rows, self.rows, *map(_scattered, whole, stored))
        mapped = self._mapped(own, inputs, outputs)
        dx, d_weights, *found = mapped(x, weights, chosen, *matrices, *kept_and_out)
        rest = iter(found)
        return dx, d_weights, *(next(rest) if has else None for has in learns)

    def _first(self, gate: Any) -> Any:
        """Number of this device's first expert."""
        return 0 if self.expert is None else jax.lax.axis_index(self.expert) * gate.shape[0]

    @property
    def _gathers(self) -> bool:
        """Whether devices with different experts have different rows."""
        return self.expert in self.batch

    @property
    def _exchange(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """How rows are gathered over `expert`, and their sums scattered."""
        spec = RowsSpec(self.mesh.shape[self.expert])
        return select("rows of experts", EXCHANGES, spec, Target.of_mesh()).run

    def _gathered(self, rows: Any) -> Any:
        """The rows of all devices along `expert`."""
        if not self._gathers:
            return rows
        gather, _ = self._exchange
        return tuple(gather(each, self.expert) for each in rows)

    def _sum(self, summands: Any) -> Any:
        """Over experts and parts of F, for the rows that this device has."""
        axes = tuple(filter(None, (self.expert, self.inner)))
        if self._gathers:
            _, scatter = self._exchange
            summands = jax.tree.map(lambda each: scatter(each, self.expert), summands)
            axes = axes[1:]
        return jax.lax.psum(summands, axes) if axes else summands

    def _stored(self, matrix: Any, spec: PartitionSpec) -> tuple[int, tuple[str, ...]]:
        """A dimension and the axes over which the store rule splits it, none if it splits no dimension: the largest
        that is left and divides.

        Where the layout has another one, XLA moves the parts. Columns it may still sum whole and slice: 60 GB in a step
        of Mixtral on v5p:4x4x4 (896 for each of 16 devices, transposed or not), beside 4 for a scatter of rows.
        """
        storing = tuple(axis for axis in STORE_AXES if axis in self._others)
        alone = sorted(((axis,) for axis in storing), key=self._ways, reverse=True)
        for axes in (storing, *alone):
            left = [d for d, axis in enumerate(spec) if axis is None and matrix.shape[d] % self._ways(axes) == 0]
            if left:
                return max(left, key=lambda d: matrix.shape[d]), axes
        return 0, ()

    def _ways(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _sum_over_rows(self, gradient: Any, stored: tuple[int, tuple[str, ...]]) -> Any:
        dimension, axes = stored
        if axes:
            gradient = jax.lax.psum_scatter(gradient, axes, scatter_dimension=dimension, tiled=True)
        over = tuple(axis for axis in self._others if axis not in axes)
        return jax.lax.psum(gradient, over) if over else gradient

    @property
    def _others(self) -> tuple[str, ...]:
        """Axes over which devices with the same experts have different rows."""
        return tuple(axis for axis in (*self.batch, *self.tokens) if axis != self.expert)

    def _mapped(self, run: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        # The bodies hold Pallas calls, which do not say over which axes their results vary.
        return jax.shard_map(run, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

"""Element by element over the first rows of arrays that have room for more, and sums of such rows.

A device has room for every row that its experts may be wanted by, n times what they are wanted by on average over n
devices. XLA would read and write all of it between two grouped products; a kernel whose grid ends with the rows that
are there does not.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Int, Num

from meshloom.pallas_kernels.dispatch import Implementation, Target, may_be_spread, select, tpu_why_not

LANES = 128
# Of a block; its columns are the most that divide, or all of no more than so many. 256 x 1,024 of three arrays take v6e
# 1,680 cycles to copy.
_ROWS, _COLUMNS = 256, 1024
# What Mosaic has, of what activations and their gradients are made of; it has no erf.
_KNOWN = frozenset(
    """add add_any sub mul div neg abs max min exp exp2 log1p logistic tanh sqrt rsqrt integer_pow square
    one_minus_square lt gt le ge eq ne select_n convert_element_type broadcast_in_dim""".split()  # noqa: SIM905
)


@dataclasses.dataclass(frozen=True)
class RowwiseSpec:
    """What the choice of an implementation may look at.

    Attributes:
        rows, columns: of the arrays.
        unknown: an operation of the function that is none of an activation's, or None.
        spread: XLA may spread the arrays over devices.
    """

    rows: int
    columns: int
    unknown: str | None
    spread: bool


def map_rows(
    function: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]],
    count: Int[Array, ""],
    *arrays: Num[Array, "R _"],
    in_place: bool = False,
) -> tuple[tuple[Num[Array, "R F"], ...], tuple[Num[Array, "R"], ...]]:
    """What `function` makes of arrays [R, F] and columns [R, 1], for the first `count` rows: others may hold anything.

    Args:
        function: of blocks of them, element by element: (results, summands), both of [R, F]. Results are stored in the
            dtype of the first array, of summands the sums over columns, float32. A TPU hands it float32.
        in_place: results take the memory of the first arrays, one each, which are copied if they are still needed.
    """
    shapes = [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in arrays]
    unknown = sorted(set(_primitives(jax.make_jaxpr(function)(*shapes).jaxpr)) - _KNOWN)
    rows, columns = arrays[0].shape
    spec = RowwiseSpec(rows, columns, unknown[0] if unknown else None, may_be_spread())
    return select("map_rows", MAP_ROWS, spec, Target.of_mesh()).run(function, count, *arrays, in_place=in_place)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        inner = [each for each in equation.params.values() if isinstance(each, ClosedJaxpr)]
        for each in inner:
            yield from _primitives(each.jaxpr)
        if not inner:
            yield equation.primitive.name


def _whole(
    function: Callable[..., Any], count: Any, *arrays: Any, in_place: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """All rows, as XLA fuses it."""
    results, summands = function(*arrays)
    return tuple(results), tuple(jnp.sum(each, axis=1) for each in summands)


def tiled(
    function: Callable[..., Any], count: Any, *arrays: Any, in_place: bool, interpret: Any = False
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Block by block on a TPU; `interpret` runs it without one. Sums of blocks of columns are added by XLA."""
    (rows, size), dtype = arrays[0].shape, arrays[0].dtype
    at_once, columns = min(rows, _ROWS), _columns(size)
    assert columns is not None  # or it has declined
    wide = pl.BlockSpec((at_once, columns), lambda j, i: (i, j))
    narrow = pl.BlockSpec((at_once, 1), lambda j, i: (i, 0))
    results, summands = jax.eval_shape(function, *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arrays))

    def body(*refs):
        read, written = refs[: len(arrays)], refs[len(arrays) :]
        made, added = function(*(ref[...].astype(jnp.float32) for ref in read))
        for ref, each in zip(written, (*made, *map(_sums_along_lanes, added)), strict=True):
            ref[...] = each.astype(ref.dtype)

    shapes = [jax.ShapeDtypeStruct((rows, size), dtype)] * len(results)
    shapes += [jax.ShapeDtypeStruct((size // columns, 1, rows), jnp.float32)] * len(summands)
    moved = sum(each.size * each.dtype.itemsize for each in (*arrays, *shapes))
    out = pl.pallas_call(
        body,
        out_shape=shapes,
        grid=(size // columns, jnp.maximum(pl.cdiv(count, at_once), 1)),
        in_specs=[narrow if each.shape[1] == 1 else wide for each in arrays],
        out_specs=[wide] * len(results) + [pl.BlockSpec((None, 1, at_once), lambda j, i: (j, 0, i))] * len(summands),
        input_output_aliases={n: n for n in range(len(results))} if in_place else {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # For XLA's scheduler, as if all rows were there: how much may travel beside it.
        cost_estimate=pl.CostEstimate(flops=10 * rows * size, bytes_accessed=moved, transcendentals=rows * size),
        interpret=interpret,
        name="map_rows",
    )(*arrays)
    return tuple(out[: len(results)]), tuple(jnp.sum(each, axis=(0, 1)) for each in out[len(results) :])


def _sums_along_lanes(x: Any) -> Any:
    """[R, C] -> [1, R]."""
    return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), (x.shape[0], LANES)).T[:1]


def _columns(size: int) -> int | None:
    """Of a block: the most lanes that divide, or all of a few."""
    most = min(size, _COLUMNS) // LANES * LANES
    return next((c for c in range(most, 0, -LANES) if size % c == 0), size if size <= _COLUMNS else None)


def _tiled_why_not(spec: RowwiseSpec, target: Target) -> str | None:
    if reason := tpu_why_not(target):
        return reason
    if spec.spread:
        return "XLA cannot spread a kernel over devices; call it inside shard_map"
    if spec.unknown is not None:
        return f"Mosaic may not have {spec.unknown}"
    if spec.rows < _ROWS:
        return f"there are {spec.rows} rows: XLA takes no longer"
    return None if _columns(spec.columns) is not None else f"{spec.columns} columns are no multiple of {LANES}"


MAP_ROWS = (
    Implementation("mosaic_tpu", tiled, _tiled_why_not),
    Implementation("whole", _whole, lambda spec, target: None),
)

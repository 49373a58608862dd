"""What every operator implies on one axis of the mesh: which placements of its operands give which placement of its
results without any communication.

A matrix product, for instance, has `S(0), B -> S(0)`, `B, S(1) -> S(1)`, `S(1), S(0) -> P` and `B, B -> B`: OneFlow's
signatures (Yuan et al. 2021, table 1). Dimensions are told apart by their position in the array and not by their class,
since queries and keys have the same class of tokens and only one of them may be split in scores.

Reshapes are not here (`reshaping.py`): whether a split survives one depends on the other axes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from meshloom.sharding.algebra import BROADCAST, PARTIAL, Split, State
from meshloom.sharding.classes import Dim, find
from meshloom.sharding.operators import ELEMENTWISE
from meshloom.sharding.trace import Step
from meshloom.sharding.values import Product


@dataclasses.dataclass(frozen=True)
class Signature:
    """The states of operands and results on one axis.

    Attributes:
        eager: a partial result is not a sum (a maximum): it is reduced on the spot.
    """

    operands: tuple[State, ...]
    results: tuple[State, ...]
    eager: bool = False


Along = Sequence[tuple[int, int]]  # (operand, its dimension) pairs that are split together


def signatures(step: Step) -> list[Signature]:
    """All signatures of a step but the one where everything broadcasts."""
    return list(dict.fromkeys(_found(step)))


def _found(step: Step) -> Iterator[Signature]:
    name = step.equation.primitive.name if step.equation is not None else None
    if name in _RULES and _is_whole(step):
        yield from _RULES[name](step)
    elif isinstance(step.fact, Product):
        yield from _by_class_of_product(step, step.fact)
    elif name is None or not _is_whole(step):
        yield from _by_class(step)


def _is_whole(step: Step) -> bool:
    """Whether the values have the shapes of the equation; those of a kernel are whole arrays, and the equation's are
    blocks."""
    variables = (*step.equation.invars, *step.equation.outvars)
    values = (*step.inputs, *step.outputs)
    return len(variables) == len(values) and all(
        getattr(var.aval, "shape", ()) == tuple(dim.size for dim in value.dims)
        for var, value in zip(variables, values, strict=True)
    )


def _signature(step: Step, along: Along, results: Sequence[int | None] | None, *, eager: bool = False) -> Signature:
    """Operands split `along` give results that are split along a dimension each, or broadcast (None); partial ones if
    `results` is None."""
    operands: list[State] = [BROADCAST] * len(step.inputs)
    for operand, dimension in along:
        operands[operand] = Split(dimension)
    if results is None:
        return Signature(tuple(operands), (PARTIAL,) * len(step.outputs), eager)
    return Signature(tuple(operands), tuple(BROADCAST if d is None else Split(d) for d in results))


# -- element by element --


def _elementwise(step: Step, but: Sequence[int] = ()) -> Iterator[Signature]:
    """The same dimension of all, where its size is that of the result; operands that are broadcast stay whole."""
    for dimension, size in enumerate(dim.size for dim in step.outputs[0].dims):
        along = [
            (index, dimension)
            for index, value in enumerate(step.inputs)
            if len(value.dims) > dimension and len(value.dims) == len(step.outputs[0].dims)
            if value.dims[dimension].size == size
        ]
        if along and dimension not in but:
            yield _signature(step, along, [dimension] * len(step.outputs))


def _linear(step: Step) -> Iterator[Signature]:
    """Sums of sums: every operand may be partial."""
    yield from _elementwise(step)
    yield Signature((PARTIAL,) * len(step.inputs), (PARTIAL,) * len(step.outputs))


def _along_an_axis(parameter: str, step: Step) -> Iterator[Signature]:
    axis = step.equation.params[parameter]
    yield from _elementwise(step, [axis % len(step.inputs[0].dims)])


def _padded(step: Step) -> Iterator[Signature]:
    yield from _elementwise(
        step, [d for d, amounts in enumerate(step.equation.params["padding_config"]) if any(amounts)]
    )


def _updated(step: Step) -> Iterator[Signature]:
    """A stretch is written: along what it has whole."""
    whole, written = step.inputs[0].dims, step.inputs[1].dims
    cut = (d for d, (all_of, some) in enumerate(zip(whole, written, strict=True)) if all_of.size != some.size)
    yield from _elementwise(step, list(cut))


def _moved(mapping: Callable[[Step], dict[int, int]], step: Step) -> Iterator[Signature]:
    """One operand, whose dimensions go to other places."""
    for before, after in mapping(step).items():
        if step.inputs[0].dims[before].size == step.outputs[0].dims[after].size:
            yield _signature(step, [(0, before)], [after])


def _turned(mapping: Callable[[Step], dict[int, int]], step: Step) -> Iterator[Signature]:
    """As before, with the same elements: linear."""
    yield from _moved(mapping, step)
    yield Signature((PARTIAL,), (PARTIAL,))


def _kept(step: Step, dropped: Sequence[int]) -> dict[int, int]:
    kept = [axis for axis in range(len(step.inputs[0].dims)) if axis not in set(map(int, dropped))]
    return {before: after for after, before in enumerate(kept)}


def _stacked(step: Step) -> Iterator[Signature]:
    axis = step.equation.params["axis"]
    for dimension in range(len(step.inputs[0].dims)):
        along = [(index, dimension) for index in range(len(step.inputs))]
        yield _signature(step, along, [dimension + (dimension >= axis)])


def _unstacked(step: Step) -> Iterator[Signature]:
    for before, after in _kept(step, [step.equation.params["axis"]]).items():
        yield _signature(step, [(0, before)], [after] * len(step.outputs))


# -- reductions --


def _reduce(step: Step, axes: str = "axes", *, is_sum: bool = False) -> Iterator[Signature]:
    dropped = tuple(int(axis) for axis in step.equation.params[axes])  # Flax leaves NumPy integers there
    for before, after in _kept(step, dropped).items():
        yield _signature(step, [(0, before)], [after])
    for axis in map(int, dropped):
        yield _signature(step, [(0, axis)], None, eager=not is_sum)


# -- products --


def _dot(step: Step) -> Iterator[Signature]:
    (left, right), (left_batch, right_batch) = step.equation.params["dimension_numbers"]
    yield from _product(step, left, right, left_batch, right_batch)


def _product(step: Step, left: Any, right: Any, left_batch: Any, right_batch: Any) -> Iterator[Signature]:
    lhs, rhs = (range(len(value.dims)) for value in step.inputs[:2])
    result = 0
    for a, b in zip(left_batch, right_batch, strict=True):
        yield _signature(step, [(0, a), (1, b)], [result])
        result += 1
    for operand, free in ((0, [*left, *left_batch]), (1, [*right, *right_batch])):
        for dimension in (lhs, rhs)[operand]:
            if dimension not in free:
                yield _signature(step, [(operand, dimension)], [result])
                result += 1
    for a, b in zip(left, right, strict=True):
        yield _signature(step, [(0, a), (1, b)], None)


def _ragged(step: Step) -> Iterator[Signature]:
    """Groups dealt out: each device multiplies the rows of its groups, and has zeros elsewhere."""
    numbers = step.equation.params["ragged_dot_dimension_numbers"]
    if len(step.outputs[0].dims) != 2 or len(numbers.rhs_group_dimensions) != 1:
        return
    (left, right), _ = numbers.dot_dimension_numbers
    group = int(numbers.rhs_group_dimensions[0])
    (free,) = [d for d in range(3) if d not in (group, *right)]
    yield _signature(step, [(1, free)], [1])
    yield _signature(step, [(0, left[0]), (1, right[0])], None)
    yield _signature(step, [(1, group)], None)


def _convolution(step: Step) -> Iterator[Signature]:
    params = step.equation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1:
        return
    yield _signature(step, [(0, numbers.lhs_spec[0])], [numbers.out_spec[0]])
    channels = (0, numbers.lhs_spec[1])
    if groups == 1:
        yield _signature(step, [(1, numbers.rhs_spec[0])], [numbers.out_spec[1]])
        yield _signature(step, [channels, (1, numbers.rhs_spec[1])], None)
    elif groups == step.inputs[1].dims[numbers.rhs_spec[0]].size:
        yield _signature(step, [channels, (1, numbers.rhs_spec[0])], [numbers.out_spec[1]])


# -- indexing by data --


def _gather(step: Step) -> Iterator[Signature]:
    numbers, sizes = step.equation.params["dimension_numbers"], step.equation.params["slice_sizes"]
    table, indices = (value.dims for value in step.inputs[:2])
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    columns = [axis for axis in range(len(table)) if axis not in dropped]
    picked = [axis for axis in range(len(step.outputs[0].dims)) if axis not in numbers.offset_dims]
    for axis, result in zip(columns, numbers.offset_dims, strict=True):
        if sizes[axis] == table[axis].size and axis not in numbers.start_index_map:
            yield _signature(step, [(0, axis)], [result])
    batched = dict(zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True))
    for index, result in zip(range(len(indices) - 1), picked, strict=True):
        own = [(0, batched[index])] if index in batched else []
        yield _signature(step, [*own, (1, index)], [result])
    if not numbers.operand_batching_dims:
        for axis in numbers.collapsed_slice_dims:  # rows that a device does not have are zeros on it
            yield _signature(step, [(0, axis)], None)


def _scatter(step: Step) -> Iterator[Signature]:
    """Columns that are written whole."""
    numbers = step.equation.params["dimension_numbers"]
    operand, updates = step.inputs[0].dims, step.inputs[2].dims
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(operand)) if axis not in dropped]
    for axis, update in zip(kept, numbers.update_window_dims, strict=True):
        if operand[axis].size == updates[update].size:
            yield _signature(step, [(0, axis), (2, update)], [axis])
    for axis, index in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        written = [d for d in range(len(updates)) if d not in numbers.update_window_dims][index]
        yield _signature(step, [(0, axis), (1, index), (2, written)], [axis])


# -- where an equation has no rule of its own --


def _by_class(step: Step) -> Iterator[Signature]:
    """Values that are handed on: into a loop and out of it, element by element but for what the loop runs over."""
    for dimension, dim in enumerate(step.outputs[0].dims):
        along = [(index, place) for index in range(len(step.inputs)) if (place := _place(step, index, dimension, dim))]
        if along:
            yield _signature(step, [pair for _, pair in along], [dimension])
    if len(step.inputs) > 1:
        return
    if len(step.inputs[0].dims) == len(step.outputs[0].dims):
        yield Signature((PARTIAL,), (PARTIAL,))


def _place(step: Step, operand: int, dimension: int, dim: Dim) -> tuple[int, int] | None:
    own, whole = step.inputs[operand].dims, step.outputs[0].dims
    shift = len(own) - len(whole) if step.equation is None else 0
    if 0 <= dimension + shift < len(own) and own[dimension + shift].size == dim.size:
        return operand, dimension + shift
    same = [place for place, each in enumerate(own) if find(each) is find(dim)]
    return (operand, same[0]) if len(same) == 1 else None


def _by_class_of_product(step: Step, product: Product) -> Iterator[Signature]:
    """A product over whole arrays that a kernel makes block by block."""
    lhs, rhs = ([find(dim) for dim in value.dims] for value in step.inputs[:2])
    result = [find(dim) for dim in step.outputs[0].dims]
    for dim in map(find, (*product.batch, *product.lhs_free, *product.rhs_free)):
        along = [(operand, side.index(dim)) for operand, side in enumerate((lhs, rhs)) if dim in side]
        if along and dim in result:
            yield _signature(step, along, [result.index(dim)])
    for dim in map(find, product.contracted):
        if dim in lhs and dim in rhs:
            yield _signature(step, [(0, lhs.index(dim)), (1, rhs.index(dim))], None)


_Rule = Callable[[Step], Iterator[Signature]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(("slice", "dynamic_slice", "device_put", "pbroadcast", "pvary"), _elementwise),
    "pad": _padded,
    "dynamic_update_slice": _updated,
    **dict.fromkeys(("convert_element_type", "copy", "neg", "add", "add_any", "sub", "reduce_precision"), _linear),
    **{name: functools.partial(_along_an_axis, "axis") for name in ("cumsum", "cumprod", "cummax", "cummin")},
    **{name: functools.partial(_along_an_axis, "axis") for name in ("cumlogsumexp", "split")},
    "top_k": lambda step: _elementwise(step, [step.equation.params.get("axis", -1) % len(step.inputs[0].dims)]),
    **dict.fromkeys(("sort", "concatenate"), functools.partial(_along_an_axis, "dimension")),
    "rev": lambda step: _elementwise(step, step.equation.params["dimensions"]),
    "transpose": functools.partial(
        _turned, lambda step: {before: after for after, before in enumerate(step.equation.params["permutation"])}
    ),
    "squeeze": functools.partial(_turned, lambda step: _kept(step, step.equation.params["dimensions"])),
    "broadcast_in_dim": functools.partial(
        _moved, lambda step: dict(enumerate(map(int, step.equation.params["broadcast_dimensions"])))
    ),
    "stack": _stacked,
    "unstack": _unstacked,
    "tile": lambda step: _elementwise(step, [d for d, times in enumerate(step.equation.params["reps"]) if times > 1]),
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"), _reduce),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    "reduce_sum": functools.partial(_reduce, is_sum=True),
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"), _scatter),
}

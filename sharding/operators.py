"""What each primitive says about dimensions: which dimensions of its results are those of its operands.

One small rule per primitive (or family), kept in the table `RULES` by primitive name. A rule unifies the classes of its
operands, returns the dimensions of its results, and may state a `Fact` that roles are read from: a product, a lookup, a
meeting. Control flow is not here (`trace.py`), nor any judgement of what a dimension is for (`roles.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from meshloom.sharding.classes import Dim, joined, part, product, regroup, strided, unify, window
from meshloom.sharding.values import Dims, Fact, Lookup, Meeting, Product, Value


@dataclasses.dataclass(frozen=True)
class Operation:
    """One equation as a rule sees it."""

    operands: tuple[Value, ...]
    shapes: tuple[tuple[int, ...], ...]
    params: Mapping[str, Any]

    def dims(self, index: int = 0) -> Dims:
        return self.operands[index].dims


Outcome = tuple[list[Dims], Fact | None]
RULES: dict[str, Callable[[Operation], Outcome]] = {}

# Operands have the rank of the result, with size 1 where they are broadcast, or rank 0.
ELEMENTWISE = """
    abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil clamp clz
    complex conj convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi
    name ne neg nextafter not one_minus_square or polygamma polynomial population_count pow real reduce_precision
    rem reshard round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign
    reciprocal sin sinh sqrt square stop_gradient tan tanh xor zeros_like zeta layout_constraint
""".split()  # noqa: SIM905 (one name per line would take a page)


def rule(*names: str):
    """Registers a rule for the primitives of these names."""

    def register(function: Callable[[Operation], Outcome]) -> Callable[[Operation], Outcome]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def fresh(shape: tuple[int, ...]) -> Dims:
    """New classes, tied to nothing."""
    return tuple(Dim(size) for size in shape)


def _without(dims: Dims, axes) -> Dims:
    dropped = {int(axis) for axis in axes}
    return tuple(dim for axis, dim in enumerate(dims) if axis not in dropped)


# -- the same dimensions, element by element --


@rule(*ELEMENTWISE)
def _elementwise(op: Operation) -> Outcome:
    dims = fresh(op.shapes[0])
    for operand in op.operands:
        if len(operand.dims) == len(dims):
            for result, own in zip(dims, operand.dims, strict=True):
                unify(result, own)
    return [dims], None


@rule("add", "add_any", "sub")
def _sum(op: Operation) -> Outcome:
    outs, _ = _elementwise(op)
    return outs, Meeting()


@rule("optimization_barrier", "psum", "psum_invariant", "pmax", "pmin", "ppermute", "pbroadcast", "pvary", "preduced")
@rule("device_put", "random_clone")
def _each_as_it_was(op: Operation) -> Outcome:
    return [operand.dims for operand in op.operands], None


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev")
def _along_an_axis(op: Operation) -> Outcome:
    return [op.dims()], None


@rule("sort")
def _sort(op: Operation) -> Outcome:
    for operand in op.operands[1:]:
        for first, own in zip(op.dims(), operand.dims, strict=True):
            unify(first, own)
    return [op.dims()] * len(op.operands), None


@rule(
    "iota",
    "random_bits",
    "random_seed",
    "random_wrap",
    "random_unwrap",
    "random_fold_in",
    "random_split",
    "random_gamma",
)
@rule(
    "rng_bit_generator",
    "rng_uniform",
    "empty",
    "empty2",
    "axis_index",
    "platform_index",
    "debug_print",
    "debug_callback",
)
@rule("program_id", "num_programs")
def _made_here(op: Operation) -> Outcome:
    return [fresh(shape) for shape in op.shapes], None


@rule("SearchSorted")
def _search(op: Operation) -> Outcome:
    """A place among sorted values for each that is sought."""
    return [op.dims(1)], None


@rule("fft")
def _fourier(op: Operation) -> Outcome:
    """Frequencies are not positions: the transformed dimensions are new ones."""
    kept = len(op.shapes[0]) - len(op.params["fft_lengths"])
    return [(*op.dims()[:kept], *fresh(op.shapes[0][kept:]))], None


# -- moved, merged, split --


@rule("transpose")
def _transpose(op: Operation) -> Outcome:
    return [tuple(op.dims()[axis] for axis in op.params["permutation"])], None


@rule("reshape")
def _reshape(op: Operation) -> Outcome:
    return [tuple(regroup(op.dims(), op.shapes[0]))], None


@rule("squeeze")
def _squeeze(op: Operation) -> Outcome:
    return [_without(op.dims(), op.params["dimensions"])], None


@rule("broadcast_in_dim")
def _broadcast(op: Operation) -> Outcome:
    dims = list(fresh(op.shapes[0]))
    for own, axis in zip(op.dims(), op.params["broadcast_dimensions"], strict=True):
        if own.size == dims[axis].size:
            dims[axis] = own
    return [tuple(dims)], None


@rule("tile")
def _tile(op: Operation) -> Outcome:
    return [tuple(product([Dim(times), own]) for times, own in zip(op.params["reps"], op.dims(), strict=True))], None


@rule("stack")
def _stack(op: Operation) -> Outcome:
    axis = op.params["axis"]
    shared, _ = _elementwise(dataclasses.replace(op, shapes=(tuple(dim.size for dim in op.dims()),)))
    return [(*shared[0][:axis], Dim(len(op.operands)), *shared[0][axis:])], None


@rule("unstack")
def _unstack(op: Operation) -> Outcome:
    return [_without(op.dims(), [op.params["axis"]])] * len(op.shapes), None


# -- parts of dimensions --


@rule("slice")
def _slice(op: Operation) -> Outcome:
    starts, sizes = map(int, op.params["start_indices"]), op.shapes[0]  # NumPy integers in the transpose of a pad
    strides = op.params["strides"] or (1,) * len(sizes)
    return [
        tuple(
            part(own, start, size) if stride == 1 else strided(own, start, size, stride)
            for own, start, size, stride in zip(op.dims(), starts, sizes, strides, strict=True)
        )
    ], None


@rule("split")
def _split(op: Operation) -> Outcome:
    axis, start, outs = op.params["axis"], 0, []
    for size in map(int, op.params["sizes"]):
        outs.append((*op.dims()[:axis], part(op.dims()[axis], start, size), *op.dims()[axis + 1 :]))
        start += size
    return outs, None


@rule("concatenate")
def _concatenate(op: Operation) -> Outcome:
    axis = op.params["dimension"]
    dims = list(op.dims())
    for operand in op.operands[1:]:
        for other, (mine, own) in enumerate(zip(dims, operand.dims, strict=True)):
            if other != axis:
                unify(mine, own)
    dims[axis] = joined([operand.dims[axis] for operand in op.operands])
    return [tuple(dims)], None


@rule("pad")
def _pad(op: Operation) -> Outcome:
    untouched = [not any(amounts) for amounts in op.params["padding_config"]]
    return [
        tuple(own if keep else Dim(size) for own, keep, size in zip(op.dims(), untouched, op.shapes[0], strict=True))
    ], None


@rule("dynamic_slice")
def _dynamic_slice(op: Operation) -> Outcome:
    return [tuple(window(own, size) for own, size in zip(op.dims(), op.shapes[0], strict=True))], None


@rule("dynamic_update_slice")
def _dynamic_update_slice(op: Operation) -> Outcome:
    for own, update in zip(op.dims(), op.dims(1), strict=True):
        if not unify(own, update):
            window(own, update.size)
    return [op.dims()], None


# -- reductions --


@rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"
)
def _reduce(op: Operation) -> Outcome:
    return [_without(op.dims(), op.params["axes"])], None


@rule("reduce")
def _reduce_general(op: Operation) -> Outcome:
    return [_without(op.dims(i), op.params["dimensions"]) for i in range(len(op.shapes))], None


@rule("top_k", "approx_top_k")
def _top_k(op: Operation) -> Outcome:
    dims = list(op.dims())
    axis = op.params["axis"] if "axis" in op.params else op.params["reduction_dimension"]
    dims[axis] = Dim(op.shapes[0][axis])
    return [tuple(dims)] * len(op.shapes), None


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _pooling(op: Operation) -> Outcome:
    keeps = [
        span == stride == 1
        for span, stride in zip(op.params["window_dimensions"], op.params["window_strides"], strict=True)
    ]
    dims = (
        own if keep and own.size == size else Dim(size)
        for own, keep, size in zip(op.dims(), keeps, op.shapes[0], strict=True)
    )
    return [tuple(dims)], None


# -- products --


def _product(lhs: Dims, rhs: Dims, contracting, batching) -> Product:
    """Ties contracted and batch dimensions of the two sides together."""
    for pairs in (contracting, batching):
        for left, right in zip(*pairs, strict=True):
            unify(lhs[left], rhs[right])
    return Product(
        contracted=tuple(lhs[axis] for axis in contracting[0]),
        batch=tuple(lhs[axis] for axis in batching[0]),
        lhs_free=_without(lhs, (*contracting[0], *batching[0])),
        rhs_free=_without(rhs, (*contracting[1], *batching[1])),
    )


@rule("dot_general")
def _dot_general(op: Operation) -> Outcome:
    fact = _product(op.dims(0), op.dims(1), *op.params["dimension_numbers"])
    return [(*fact.batch, *fact.lhs_free, *fact.rhs_free)], fact


@rule("ragged_dot_general")
def _ragged_dot(op: Operation) -> Outcome:
    numbers = op.params["ragged_dot_dimension_numbers"]
    contracting, batching = numbers.dot_dimension_numbers
    lhs, rhs, group_sizes = op.dims(0), op.dims(1), op.dims(2)
    fact = _product(lhs, rhs, contracting, batching)
    groups = tuple(rhs[axis] for axis in numbers.rhs_group_dimensions)
    if not groups:  # the ragged dimension is contracted (gradient of a weight): the result gains the groups in front
        return [(group_sizes[-1], *fact.batch, *fact.lhs_free, *fact.rhs_free)], fact
    unify(groups[0], group_sizes[-1])
    rhs_free = _without(rhs, (*contracting[1], *batching[1], *numbers.rhs_group_dimensions))
    fact = dataclasses.replace(fact, batch=(*fact.batch, *groups), rhs_free=rhs_free)
    return [(*fact.batch[: -len(groups)], *fact.lhs_free, *rhs_free)], fact


@rule("conv_general_dilated")
def _convolution(op: Operation) -> Outcome:
    numbers, lhs, rhs = op.params["dimension_numbers"], op.dims(0), op.dims(1)
    out_features = rhs[numbers.rhs_spec[0]]
    channels = lhs[numbers.lhs_spec[1]]
    dims = list(fresh(op.shapes[0]))
    if op.params["batch_group_count"] == 1:
        dims[numbers.out_spec[0]] = lhs[numbers.lhs_spec[0]]
    dims[numbers.out_spec[1]] = out_features
    if op.params["feature_group_count"] == 1:
        unify(channels, rhs[numbers.rhs_spec[1]])
        return [tuple(dims)], Product((channels,), (), _without(lhs, [numbers.lhs_spec[1]]), (out_features,))
    unify(
        channels, out_features
    )  # depthwise: channel by channel, like an elementwise product; other groupings differ in size
    return [tuple(dims)], None


# -- indexing by data --


@rule("gather")
def _gather(op: Operation) -> Outcome:
    numbers, table, indices = op.params["dimension_numbers"], op.dims(0), op.dims(1)
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for own, index in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(table[own], indices[index])
    columns = {
        axis: window(table[axis], op.params["slice_sizes"][axis]) for axis in range(len(table)) if axis not in dropped
    }
    kept, picked = iter(columns.values()), iter(indices[:-1])
    dims = tuple(next(kept) if axis in numbers.offset_dims else next(picked) for axis in range(len(op.shapes[0])))
    rows = tuple(table[axis] for axis in numbers.collapsed_slice_dims)
    return [dims], Lookup(rows, tuple(columns.values())) if rows else None


@rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(op: Operation) -> Outcome:
    numbers, operand, indices, updates = op.params["dimension_numbers"], op.dims(0), op.dims(1), op.dims(2)
    for own, index in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        unify(operand[own], indices[index])
    kept = _without(operand, (*numbers.inserted_window_dims, *numbers.operand_batching_dims))
    for own, axis in zip(kept, numbers.update_window_dims, strict=True):
        if not unify(own, updates[axis]):
            window(own, updates[axis].size)
    for index, update in zip(indices[:-1], _without(updates, numbers.update_window_dims), strict=True):
        unify(index, update)
    return [operand], None


def outcome(name: str, op: Operation) -> Outcome | None:
    """Applies the rule of primitive `name`; None where there is none."""
    return RULES[name](op) if name in RULES else None

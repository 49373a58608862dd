"""A module's forward pass as a list of steps over dimension classes, traced with abstract values.

`trace` never runs the module and never allocates its weights. The body of a scan or loop appears once, its carry tied
to itself. Bodies of jit, remat, custom derivatives and shard_map are read in place. A primitive without a rule ties
nothing and is counted in `unknown`.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen, nnx

from meshloom.sharding.classes import Dim, unify
from meshloom.sharding.kernels import Blocks, window_of
from meshloom.sharding.module import pure, untraceable
from meshloom.sharding.operators import Operation, fresh, outcome
from meshloom.sharding.values import Dims, Kind, Meeting, Region, Source, Step, Value

# Operations of `pallas_kernels` that spread themselves over a mesh, by the names of their bodies: those that every
# device does with its own rows of the batch and its own part of the weights, until one sum ends them, ...
_ONE_SUM = ("meshloom.routed_experts", "meshloom.routed_experts_backward")
# ... and the one whose queries, keys and values may lie over the tokens.
_ATTENTION = "meshloom.attention"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the module. `name` is for people; nothing is decided by it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    dims: Dims


@dataclasses.dataclass(frozen=True)
class Program:
    """What a traced forward pass says about dimensions.

    Attributes:
        parameters: in the order of `jax.tree.leaves` of the module's parameters; `treedef` rebuilds their tree.
        inputs, outputs: arrays that enter and leave.
        steps: in program order.
        regions, attended: of the steps, in program order, none in another: what one sum ends; attention, whose first
            three inputs are queries, keys and values.
        stacks: leading dimensions of weights that a scan runs over.
        unknown: how often each primitive without a rule was met.
        jaxpr: what was read; it takes the leaves of the state and of the inputs.
        result: structure of what the module returns.
    """

    parameters: tuple[Parameter, ...]
    treedef: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    regions: tuple[Region, ...]
    attended: tuple[Region, ...]
    stacks: tuple[Dim, ...]
    unknown: collections.Counter
    jaxpr: Any
    result: Any


def trace(
    module: nnx.Module | linen.Module, example_inputs: Sequence[Any], keywords: Mapping[str, Any] | None = None
) -> Program:
    """Traces `module(*example_inputs, **keywords)`.

    Args:
        module: concrete or abstract (`nnx.eval_shape`), or of Linen.
        example_inputs: positional arguments; arrays, `jax.ShapeDtypeStruct`s, or pytrees of them; flags are constants.
    Raises:
        ShardingError: the forward pass cannot be traced with these inputs.
    """
    forward = pure(module, example_inputs, keywords or {})
    try:
        jaxpr, returned = jax.make_jaxpr(forward.apply, return_shape=True)(
            forward.parameters, forward.rest, *forward.inputs
        )
    except Exception as error:
        raise untraceable(forward.name, forward.inputs, error) from error

    named, treedef = jax.tree_util.tree_flatten_with_path(forward.parameters)
    described = tuple(Parameter(_name(path), leaf.shape, leaf.dtype, fresh(leaf.shape)) for path, leaf in named)
    weights = [Value(each.dims, Kind.WEIGHT, frozenset([i])) for i, each in enumerate(described)]
    n_rest = len(jax.tree.leaves(forward.rest))
    arguments: list[Any] = jaxpr.invars[len(weights) :]
    shapes = [var.aval.shape for var in arguments]
    others = [Value(fresh(shape)) for shape in shapes[:n_rest]]
    entering = tuple(Value(fresh(shape), Kind.ACTIVATION) for shape in shapes[n_rest:])

    reader = _Reader()
    reader.steps.append(Step((), entering, Source()))
    leaving = reader.run(jaxpr, [*weights, *others, *entering])
    return Program(
        described,
        treedef,
        entering,
        tuple(leaving),
        tuple(reader.steps),
        tuple(reader.regions),
        tuple(reader.attended),
        tuple(reader.stacks),
        reader.unknown,
        jaxpr,
        jax.tree.structure(returned),
    )


def _name(path: Sequence[Any]) -> str:
    """`layers.0.mlp.up.weight` for the path of a leaf; the `.value` of the variable that holds it is left out."""
    keys = [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path]
    return ".".join(keys[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else keys)


def _derived(dims: Dims, inputs: Sequence[Value]) -> Value:
    """A result of these inputs; a weight made of weights remembers which."""
    kind = max((value.kind for value in inputs), default=Kind.CONSTANT)
    parameters = frozenset().union(*(value.parameters for value in inputs)) if kind == Kind.WEIGHT else frozenset()
    return Value(dims, kind, parameters)


def _tie(a: Value, b: Value) -> None:
    for left, right in zip(a.dims, b.dims, strict=True):
        unify(left, right)


class _Reader:
    """Walks a jaxpr, and those inside it, and writes down the steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.regions: list[Region] = []
        self.attended: list[Region] = []
        self.stacks: list[Dim] = []
        self.unknown: collections.Counter = collections.Counter()
        self._control = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "shard_map": self._shard_map,
            "pallas_call": self._kernel,
            "get": self._read,
            "swap": self._write,
            "addupdate": self._write,
        }

    def run(self, jaxpr: Any, arguments: Sequence[Value]) -> list[Value]:
        """Reads the equations of `jaxpr` called with `arguments`; returns its results."""
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        values.update((var, Value(fresh(var.aval.shape))) for var in jaxpr.constvars)

        def read(atom: Any) -> Value:
            # A literal carries its value instead of a binding.
            return Value(fresh(atom.aval.shape)) if hasattr(atom, "val") else values[atom]

        for equation in jaxpr.eqns:
            inputs = [read(atom) for atom in equation.invars]
            values.update(zip(equation.outvars, self._equation(equation, inputs), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if "_prim" in params:  # all operations that are a class of their own are called `call_hi_primitive`
            name = type(params["_prim"]).__name__
        if name == "jit" and params["name"] in (*_ONE_SUM, _ATTENTION):
            return self._region(equation, inputs)
        if name in self._control:
            return self._control[name](equation, inputs)
        shapes = tuple(getattr(var.aval, "shape", ()) for var in equation.outvars)
        result = outcome(name, Operation(tuple(inputs), shapes, params))
        if result is None:
            body = getattr(params.get("jaxpr", params.get("call_jaxpr")), "jaxpr", None)
            if body is not None and (len(body.invars), len(body.outvars)) == (len(inputs), len(shapes)):
                return self.run(body, inputs)
            self.unknown[name] += 1
            result = [fresh(shape) for shape in shapes], None
        dims, fact = result
        outputs = [_derived(each, inputs) for each in dims]
        self.steps.append(Step(tuple(inputs), tuple(outputs), fact, equation))
        return outputs

    def _region(self, equation: Any, inputs: list[Value]) -> list[Value]:
        first = len(self.steps)
        results = self.run(equation.params["jaxpr"].jaxpr, inputs)
        region = Region(first, len(self.steps), tuple(inputs), tuple(results), equation)
        (self.regions if region.name in _ONE_SUM else self.attended).append(region)
        return results

    def _loop(
        self, body: Any, constants: list[Value], initial: list[Value], sliced: list[Value]
    ) -> tuple[list[Value], list[Value]]:
        """Reads a loop body once. Returns the final carry and whatever else the body yields."""
        first = len(constants)
        fixed = [body.outvars[i] is body.invars[first + i] for i in range(len(initial))]
        # A carry that the body changes may depend on anything that the loop reads.
        kind = max((value.kind for value in [*constants, *initial, *sliced]), default=Kind.CONSTANT)
        carry = [
            value if same else Value(value.dims, kind, value.parameters if kind == Kind.WEIGHT else frozenset())
            for value, same in zip(initial, fixed, strict=True)
        ]
        self.steps += [
            Step((old,), (new,), Source()) for old, new, same in zip(initial, carry, fixed, strict=True) if not same
        ]
        results = self.run(body, [*constants, *carry, *sliced])
        final = []
        for before, after, same in zip(carry, results[: len(carry)], fixed, strict=True):
            _tie(before, after)
            final.append(before if same else _derived(after.dims, [before, after]))
            if not same:
                self.steps.append(Step((before, after), (final[-1],), Meeting()))
        return final, results[len(carry) :]

    def _scan(self, equation: Any, inputs: list[Value]) -> list[Value]:
        n_constants, n_carry, _ = (len(group) for group in equation.params["ft_in"].unpack())
        constants, rest = inputs[:n_constants], inputs[n_constants:]
        carry, scanned = rest[:n_carry], rest[n_carry:]
        trips = Dim(equation.params["length"])
        sliced = []
        for whole in scanned:
            unify(trips, whole.dims[0])
            if whole.kind == Kind.WEIGHT:
                self.stacks.append(whole.dims[0])
            sliced.append(Value(whole.dims[1:], whole.kind, whole.parameters))
            self.steps.append(Step((whole,), (sliced[-1],)))
        final, yielded = self._loop(equation.params["jaxpr"].jaxpr, constants, carry, sliced)
        stacked = [Value((trips, *each.dims), each.kind, each.parameters) for each in yielded]
        self.steps += [Step((each,), (whole,)) for each, whole in zip(yielded, stacked, strict=True)]
        return [*final, *stacked]

    def _while(self, equation: Any, inputs: list[Value]) -> list[Value]:
        n_cond, n_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        constants, carry = inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :]
        final, _ = self._loop(equation.params["body_jaxpr"].jaxpr, constants, carry, [])
        self.run(equation.params["cond_jaxpr"].jaxpr, [*inputs[:n_cond], *final])
        return final

    def _cond(self, equation: Any, inputs: list[Value]) -> list[Value]:
        branches = [self.run(branch.jaxpr, inputs[1:]) for branch in equation.params["branches"]]
        results = []
        for choices in zip(*branches, strict=True):
            for other in choices[1:]:
                _tie(choices[0], other)
            results.append(_derived(choices[0].dims, [inputs[0], *choices]))
            self.steps.append(Step(choices, (results[-1],)))
        return results

    def _shard_map(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """Inside, a dimension that is split by hand is shorter and a new class; the others stay what they are."""
        body = equation.params["jaxpr"].jaxpr
        inside = [self._resized(value, var.aval.shape) for value, var in zip(inputs, body.invars, strict=True)]
        results = self.run(body, inside)
        return [self._resized(value, var.aval.shape) for value, var in zip(results, equation.outvars, strict=True)]

    def _kernel(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """The body of a Pallas kernel, read over blocks, and said of whole arrays."""
        grid, body, blocks = equation.params["grid_mapping"], equation.params["jaxpr"], Blocks()
        bounds, numbers = grid.num_dynamic_grid_bounds, grid.num_index_operands
        prefetched, arrays = inputs[bounds : bounds + numbers], inputs[bounds + numbers :]
        results = [_derived(fresh(var.aval.shape), inputs) for var in equation.outvars]
        for given, result in equation.params["input_output_aliases"]:
            _tie(inputs[bounds + given], results[result])
        shapes = [var.aval.shape for var in body.invars[numbers:]]
        mappings = grid.block_mappings
        described = list(zip([*arrays, *results], mappings, shapes[: len(mappings)], strict=True))
        read = [blocks.block_of(*each, is_result=False) for each in described[: len(arrays)]]
        written = [blocks.block_of(*each, is_result=True) for each in described[len(arrays) :]]
        blocks.tie_groups()
        scratch = [_derived(fresh(shape), inputs) for shape in shapes[len(mappings) :]]
        first = len(self.steps)
        self.steps += [Step((array,), (block,)) for array, block in zip(arrays, read, strict=True)]
        self.run(body, [*prefetched, *read, *written, *scratch])
        self.steps += [Step((block,), (result,)) for block, result in zip(written, results, strict=True)]
        self.steps[first:] = blocks.lifted(self.steps[first:])
        return results

    def _read(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """What a kernel reads of a reference, or what stood where it writes."""
        reference, places = inputs[0], inputs[1:] if equation.primitive.name == "get" else inputs[2:]
        shape = equation.outvars[0].aval.shape
        dims = window_of(reference.dims, jax.tree.unflatten(equation.params["tree"], places), shape)
        read = _derived(fresh(shape) if dims is None else dims, [reference])
        self.steps.append(Step((reference,), (read,)))
        return [read]

    def _write(self, equation: Any, inputs: list[Value]) -> list[Value]:
        reference, written, *places = inputs
        shape = equation.invars[1].aval.shape
        dims = window_of(reference.dims, jax.tree.unflatten(equation.params["tree"], places), shape)
        if dims is not None:
            _tie(Value(dims), written)
        # Where all is overwritten, nothing remains of what stood there.
        replaced = equation.primitive.name == "swap" and len(written.dims) == len(reference.dims) and not places
        self.steps.append(Step((written,) if replaced else (reference, written), (reference,)))
        return self._read(equation, inputs) if equation.outvars else []

    def _resized(self, value: Value, shape: tuple[int, ...]) -> Value:
        dims = tuple(dim if dim.size == size else Dim(size) for dim, size in zip(value.dims, shape, strict=True))
        resized = Value(dims, value.kind, value.parameters)
        self.steps.append(Step((value,), (resized,)))
        return resized

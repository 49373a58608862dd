"""A forward pass under JAX's explicit sharding types, so that JAX itself refuses what would be resharded silently.

The traced program runs equation by equation on a mesh whose axes are all explicit: every array has its sharding in its
type, and JAX raises where operands disagree, or where it would have to choose. What the rules intend is put in by hand,
where `flow` has it: a stored weight is resharded at its use, and products and reshapes are told how their results lie.
What `flow` calls silent is not put in, so that JAX refuses it, unless it is small. `flow` judges by Meshloom's own
signatures; of all other equations JAX is a second judge.

JAX's types do not reach everything: a lookup in a table that is split, what spreads itself over a mesh by shard_map as
experts do and attention over `context`, an axis that splits kv heads and the queries of each. These run with automatic
axes between the types that `flow` knows, and are counted as trusted.

It does not know the backward pass.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Jaxpr, Literal, jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from meshloom.core.errors import ShardingError
from meshloom.core.topology import axes_of
from meshloom.sharding.algebra import PARTIAL, Split
from meshloom.sharding.flow import SMALL_BYTES, Flow, flow
from meshloom.sharding.layout import Layout
from meshloom.sharding.module import is_array
from meshloom.sharding.provenance import Conversion, source_of
from meshloom.sharding.trace import trace
from meshloom.sharding.values import Lookup, Step, Value
from meshloom.sharding.work import bodies_of

# Primitives whose body runs as a part of the program around it, and the parameter that holds it.
_BODIES = {"jit": "jaxpr", "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
# Those that JAX has no explicit types for, or that need to be told a type which depends on what the mesh is.
_TRUSTED = {"while", "cond", "shard_map", "pallas_call", "ragged_dot_general"}


@dataclasses.dataclass(frozen=True)
class Typed:
    """How many equations of a forward pass JAX typed, and how many of each primitive are trusted to Meshloom."""

    typed: int
    trusted: collections.Counter

    def __str__(self) -> str:
        said = ", ".join(f"{count} x {name}" for name, count in sorted(self.trusted.items()))
        return f"{self.typed} equations typed by JAX" + (f"; trusted to Meshloom's signatures: {said}" if said else "")


def check(module: nnx.Module, layout: Layout, inputs: Sequence[Any]) -> Typed:
    """Types a forward pass without devices.

    Args:
        layout: derived for this module. inputs: abstract arrays or pytrees, batch first.
    Raises:
        ShardingError: JAX refuses an equation; names its line, the types of its operands and what JAX says.
    """
    counted: list[_Types] = []
    mesh = _explicit(layout.mesh)

    def placed(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    state = jax.tree.map(placed, nnx.state(module, nnx.Param), layout.specs)
    given = jax.tree.map(lambda leaf: placed(leaf, _of_batch(leaf, layout)), tuple(inputs))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(explicit(module, layout, counted.append), state, *given)
    return Typed(counted[0].typed, counted[0].trusted)


def explicit(module: nnx.Module, layout: Layout, seen: Callable[["_Types"], Any] | None = None) -> Callable[..., Any]:
    """`constrain.plain(module)` with types: a function of `nnx.state(module)` and inputs that lie as the layout says.

    It runs inside `jax.set_mesh` of the layout's mesh with explicit axes.

    Raises:
        ShardingError: when called; as `check`.
    """
    graphdef, _ = nnx.split(module)

    def forward(state: Any, *inputs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # kernels that see a mesh spread themselves over it
            merged = nnx.merge(graphdef, state)
            program = trace(merged, inputs)
        types = _Types(flow(program, layout))
        _, *states = nnx.split(merged, nnx.Param, ...)
        results = types.run(program.jaxpr, list(filter(is_array, jax.tree.leaves((*states, inputs)))))
        if seen is not None:
            seen(types)
        return jax.tree.unflatten(program.result, results)

    return forward


class _Types:
    """One evaluation of a program, and what it met.

    Attributes:
        typed: equations that JAX typed. trusted: primitives that it did not, and how many of each.
    """

    def __init__(self, known: Flow):
        self.typed = 0
        self.trusted: collections.Counter = collections.Counter()
        self._known = known
        self._steps: dict[int, tuple[int, Step]] = {}
        for index, step in enumerate(known.program.steps):
            if step.equation is not None:
                self._steps.setdefault(id(step.equation), (index, step))
        rings = known.program.attended if known.layout.context_ways > 1 else ()
        for region in (*known.program.regions, *rings):
            whole = Step(region.inputs, region.outputs, equation=region.equation)
            self._steps[id(region.equation)] = region.end - 1, whole
        self._regions = {id(region.equation) for region in (*known.program.regions, *rings)}
        self._wanted: dict[int, list[Conversion]] = collections.defaultdict(list)
        self._unwanted_sums: set[str] = set()  # lines
        self._around: list[str] = []  # lines of the equations whose bodies are run, outermost first
        for each in known.conversions:
            if each.origin.cause != "silent" or each.total_bytes <= SMALL_BYTES:
                self._wanted[each.step].append(each)
            elif each.before == PARTIAL:
                self._unwanted_sums.add(each.origin.source)

    def run(self, closed: Any, arguments: Sequence[Any]) -> list[Any]:
        """The results of a program, equation by equation."""
        jaxpr: Jaxpr = getattr(closed, "jaxpr", closed)
        values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = self._converted(equation, [read(atom) for atom in equation.invars])
            # What was gathered stays so.
            values |= {var: x for var, x in zip(equation.invars, operands, strict=True) if not isinstance(var, Literal)}
            values |= dict(zip(equation.outvars, self._equation(equation, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _converted(self, equation: Any, operands: list[Any]) -> list[Any]:
        """The operands as the rules want them here; sums were made with the products, whole if they are to be split."""
        index, step = self._steps.get(id(equation), (-1, None))
        if step is None or id(equation) in self._regions:  # which move what they need themselves
            return operands
        for each in self._wanted[index]:
            for place, value in enumerate(step.inputs[: len(operands)]):
                if value == each.value and (each.before != PARTIAL or isinstance(each.after, Split)):
                    operands[place] = jax.sharding.reshard(operands[place], _moved(operands[place], each))
        return operands

    def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        name, (_, step) = equation.primitive.name, self._steps.get(id(equation), (-1, None))
        # Data picks rows of weights: JAX would have to be told the types.
        by_data = step is not None and isinstance(step.fact, Lookup)
        if id(equation) in self._regions or name in _TRUSTED or by_data:
            return self._trust(equation, operands, () if step is None else step.outputs)
        body = _BODIES.get(name)
        if name == "custom_vjp_call" and self._beyond_types(equation.params[body]):
            return self._trust(equation, operands, self._results(equation.params[body]))
        self._around.append(source_of(equation)[0])
        try:
            if body is not None:
                return self.run(equation.params[body], operands)
            if name == "scan":
                return self._scan(equation, operands)
            return self._bind(equation, operands, step)
        finally:
            self._around.pop()

    def _bind(self, equation: Any, operands: list[Any], step: Step | None) -> list[Any]:
        """One equation by JAX's rules; products and reshapes are told what becomes of split dimensions."""
        params = dict(equation.params)
        spec = None if step is None else self._spec(step.outputs[0])
        if spec is not None:  # what is whole, or was gathered, may be cut as the result is, which moves nothing
            shape = equation.outvars[0].aval.shape
            operands = [
                jax.sharding.reshard(x, spec) if jnp.shape(x) == shape and _cut(x, spec) else x for x in operands
            ]
        for name in ("out_sharding", "sharding"):
            told = name in params and params[name] is None and operands
            if told and spec is not None and self._line() not in self._unwanted_sums:
                params[name] = NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        try:
            found = equation.primitive.bind(*operands, **params)
        except Exception as error:  # JAX's ShardingTypeError is not public, and some of its rules raise others
            raise self._refused(equation, operands, error) from error
        self.typed += 1
        return list(found) if equation.primitive.multiple_results else [found]

    def _scan(self, equation: Any, operands: list[Any]) -> list[Any]:
        params = equation.params
        n_constants, n_carry, _ = (len(group) for group in params["ft_in"].unpack())
        constants, carry = operands[:n_constants], operands[n_constants : n_constants + n_carry]
        scanned = operands[n_constants + n_carry :]
        counted = self.typed, self.trusted.copy()

        def body(carry: Any, each: Any) -> Any:
            self.typed, self.trusted = counted[0], counted[1].copy()
            results = self.run(params["jaxpr"], [*constants, *carry, *each])
            return results[:n_carry], results[n_carry:]

        # What begins whole and is split by the body begins split: that moves nothing.
        first = [jax.eval_shape(lambda x: x[0], x) for x in scanned]
        after, _ = jax.eval_shape(body, carry, first)
        kinds = zip(carry, after, strict=True)
        carry = [jax.sharding.reshard(x, kind.sharding.spec) if _whole(x) else x for x, kind in kinds]
        options = {"length": params["length"], "reverse": params["reverse"]}
        try:
            final, stacked = jax.lax.scan(body, carry, scanned, **options)
        except ShardingError:
            raise
        except Exception as error:  # the body changes how its carry lies
            raise self._refused(equation, carry, error) from error
        return [*final, *stacked]

    def _beyond_types(self, closed: Any) -> bool:
        """Whether one axis is on two dimensions in there, as on kv heads and the queries of each."""
        for equation in getattr(closed, "jaxpr", closed).eqns:
            _, step = self._steps.get(id(equation), (-1, None))
            if step is not None and any(self._spec(value) is None for value in step.outputs):
                return True
            if any(self._beyond_types(body) for body, _ in bodies_of(equation)):
                return True
        return False

    def _results(self, closed: Any) -> list[Value]:
        """The results of a body, where steps of its own made them all."""
        jaxpr = getattr(closed, "jaxpr", closed)
        made: dict[Any, Value] = {}
        for equation in jaxpr.eqns:
            _, step = self._steps.get(id(equation), (-1, None))
            body = _BODIES.get(equation.primitive.name)
            values = self._results(equation.params[body]) if body else () if step is None else step.outputs
            made |= dict(zip(equation.outvars, values, strict=False))
        return [made[var] for var in jaxpr.outvars if var in made]

    def _trust(self, equation: Any, operands: list[Any], values: Sequence[Value]) -> list[Any]:
        self.trusted[equation.params.get("name", equation.primitive.name).removeprefix("meshloom.")] += 1
        specs = [spec for value in values if (spec := self._spec(value)) is not None]
        if len(specs) != len(equation.outvars):
            line, name = source_of(equation)[0] or self._line() or "the forward pass", equation.primitive.name
            raise ShardingError(f"{line}: explicit types do not cover `{name}`: how its results lie has no type")

        body = _BODIES.get(equation.primitive.name)

        def run(*operands: Any) -> Any:
            if body is not None:
                return tuple(jaxpr_as_fun(equation.params[body])(*operands))
            found = equation.primitive.bind(*operands, **equation.params)
            return tuple(found) if equation.primitive.multiple_results else (found,)

        return list(jax.sharding.auto_axes(run, out_sharding=tuple(specs))(*operands))

    def _line(self) -> str:
        """The innermost line of the module that is being run."""
        return next(filter(None, reversed(self._around)), "")

    def _refused(self, equation: Any, operands: Sequence[Any], error: Exception) -> ShardingError:
        types, (said, *_) = ", ".join(str(jax.typeof(x)) for x in operands), (str(error) or repr(error)).splitlines()
        line, name = self._line() or "the forward pass", equation.primitive.name
        return ShardingError(
            f"{line}: JAX refuses to type `{name}` of {types}: {said}. "
            "The layout splits what the program needs otherwise; keep the dimension whole there, or reshard it in the "
            "module"
        )

    def _spec(self, value: Value) -> PartitionSpec | None:
        """How a value lies when its sums are made; None where one axis is on two dimensions, which no type can say."""
        dims: list[tuple[str, ...]] = [()] * len(value.dims)
        for axis, state in self._known.placements.get(value, {}).items():
            if "." in axis:
                return None
            if isinstance(state, Split):
                dims[state.dimension] += (axis,)
        return PartitionSpec(*(axes or None for axes in dims))


def _moved(x: Any, each: Conversion) -> PartitionSpec:
    """The spec of an operand after a conversion."""
    dims = [tuple(axis for axis in axes_of(entry) if axis not in each.axes) for entry in jax.typeof(x).sharding.spec]
    if isinstance(each.after, Split):
        dims[each.after.dimension] += each.axes
    return PartitionSpec(*(axes or None for axes in dims))


def _cut(x: Any, spec: PartitionSpec) -> bool:
    """Whether a slice of what each device has of `x` lies as `spec` says."""
    pairs = zip(map(axes_of, jax.typeof(x).sharding.spec), map(axes_of, spec), strict=True)
    return all(after[: len(before)] == before for before, after in pairs)


def _whole(x: Any) -> bool:
    return not any(map(axes_of, jax.typeof(x).sharding.spec))


def _explicit(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    return AbstractMesh(
        tuple(mesh.shape.values()), tuple(mesh.shape), axis_types=(AxisType.Explicit,) * len(mesh.shape)
    )


def _of_batch(leaf: Any, layout: Layout) -> PartitionSpec:
    ways = (layout.batch_ways, layout.context_ways)
    held = zip(leaf.shape, layout.batch_spec, ways, strict=False)
    lying = [axes if size % count == 0 else None for size, axes, count in held]
    return PartitionSpec(*lying, *[None] * (leaf.ndim - len(lying)))

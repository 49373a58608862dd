"""A forward pass that also returns what each layer makes: every value where a weight first meets an activation.

Works on the traced program, so the module needs no hooks and its scanned layers stay scanned: each repeat of a scan
gives values of its own. What stands inside a loop, a branch, a kernel or a custom derivative counts as one operation.
It is for finding where two programs part, not for speed: all values stay alive to the end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

# Primitives whose body runs as a part of the program around it.
_INLINE = ("jit", "remat2", "closed_call")
# Stands in a weight's name for the repeat of the scan that slices it, while inside the scan.
_REPEAT = "[*]"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """The first result of an operation that takes a weight and an activation.

    Attributes:
        name: of the weight; `name[i]` of one that a scan slices, in repeat i. The first by name where several meet.
    """

    name: str = dataclasses.field(metadata={"static": True})
    value: Any


def tapped(forward: Callable[..., Any], names: Sequence[str]) -> Callable[..., list[Tap]]:
    """`forward` with its taps as its result, in forward order; to be jitted.

    Args:
        forward: `(params, *inputs) -> outputs`.
        names: of the leaves of `params`.
    """

    def run(params: Any, *inputs: Any) -> list[Tap]:
        program = jax.make_jaxpr(forward)(params, *inputs)
        weights = [_Traced(x, frozenset([name])) for x, name in zip(jax.tree.leaves(params), names, strict=True)]
        others = [_Traced(x, activation=True) for x in jax.tree.leaves(inputs)]
        met: list[_Met] = []
        _run(program, [*weights, *others], met)
        return [Tap(min(names), value) for names, value in met]

    return run


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A value of the program: made of `weights` alone, or also of inputs (`activation`), or of neither."""

    value: Any
    weights: frozenset[str] = frozenset()
    activation: bool = False


# The weights that met an activation, and what came of it.
_Met = tuple[frozenset[str], Any]


def _run(program: Any, arguments: Sequence[_Traced], met: list[_Met]) -> list[_Traced]:
    """Evaluates a jaxpr, closed or not, and appends to `met`."""
    jaxpr = getattr(program, "jaxpr", program)
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    known.update((var, _Traced(x)) for var, x in zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True))

    def read(atom: Any) -> _Traced:
        return _Traced(atom.val) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive.name in _INLINE:
            results = _run(equation.params["jaxpr"], inputs, met)
        elif equation.primitive.name == "scan":
            results = _scan(equation, inputs, met)
        else:
            results = _apply(equation, inputs, met)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: Any, inputs: Sequence[_Traced], met: list[_Met]) -> list[_Traced]:
    primitive = equation.primitive
    with equation.ctx.manager:
        values = primitive.bind(*(x.value for x in inputs), **primitive.get_bind_params(equation.params))
    values = values if primitive.multiple_results else [values]
    weights = frozenset[str]().union(*(x.weights for x in inputs))
    if not any(x.activation for x in inputs):
        return [_Traced(value, weights) for value in values]
    if weights:
        met.append((weights, values[0]))
    return [_Traced(value, activation=True) for value in values]


def _scan(equation: Any, inputs: Sequence[_Traced], met: list[_Met]) -> list[_Traced]:
    params = equation.params
    n_constants, n_carry, _ = (len(group) for group in params["ft_in"].unpack())
    constants, carry = inputs[:n_constants], inputs[n_constants : n_constants + n_carry]
    sliced = inputs[n_constants + n_carry :]
    body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
    fixed = [body.outvars[i] is body.invars[n_constants + i] for i in range(n_carry)]
    names: list[frozenset[str]] = []
    yielded: list[_Traced] = []

    def step(carried: Sequence[Any], slices: Sequence[Any]) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        inner: list[_Met] = []
        # A carry that the body changes may hold anything that the body reads.
        starts = [
            dataclasses.replace(before, value=value) if same else _Traced(value, activation=True)
            for before, value, same in zip(carry, carried, fixed, strict=True)
        ]
        parts = [
            _Traced(value, frozenset(name + _REPEAT for name in whole.weights), whole.activation)
            for whole, value in zip(sliced, slices, strict=True)
        ]
        results = _run(params["jaxpr"], [*constants, *starts, *parts], inner)
        names[:] = [weights for weights, _ in inner]
        yielded[:] = results[n_carry:]
        return [x.value for x in results[:n_carry]], ([x.value for x in yielded], [value for _, value in inner])

    options = {"length": params["length"], "reverse": params["reverse"], "unroll": params["unroll"]}
    final, (stacked, values) = jax.lax.scan(step, [x.value for x in carry], [x.value for x in sliced], **options)
    repeats = range(params["length"])
    for repeat in reversed(repeats) if params["reverse"] else repeats:
        for weights, value in zip(names, values, strict=True):
            met.append((frozenset(name.replace(_REPEAT, f"[{repeat}]", 1) for name in weights), value[repeat]))
    carried = [
        before if same else _Traced(value, activation=True)
        for before, value, same in zip(carry, final, fixed, strict=True)
    ]
    return carried + [dataclasses.replace(x, value=value) for x, value in zip(yielded, stacked, strict=True)]

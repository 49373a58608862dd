"""FLOPs of a traced program, counted from its jaxpr.

XLA's `cost_analysis` counts a scan's body once; here it counts as often as it runs. Products count 2 FLOPs per
multiply-add; elementwise work is left out, as in every published MFU. The count is of the whole program, over all
devices. It knows no Pallas kernels: what one of those multiplies is not seen.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call, and the loops whose trip count is data and was taken as 1."""

    flops: float
    unknown_loops: int

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(self.flops + other.flops, self.unknown_loops + other.unknown_loops)

    def times(self, count: int) -> "FlopCount":
        """The same work `count` times over; a loop in it is still one loop."""
        return FlopCount(self.flops * count, self.unknown_loops)


NOTHING = FlopCount(0.0, 0)


def count_flops(function: Callable[..., Any], *arguments: Any) -> FlopCount:
    """FLOPs of `function(*arguments)`; arguments may be `jax.ShapeDtypeStruct`s. Nothing is compiled or run."""
    return _count_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count_jaxpr(jaxpr: jex.Jaxpr) -> FlopCount:
    return sum((_count_equation(equation) for equation in jaxpr.eqns), NOTHING)


def _count_equation(equation: jex.JaxprEqn) -> FlopCount:
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(v.aval, "shape", ()) for v in equation.invars]
    out: tuple[int, ...] = getattr(equation.outvars[0].aval, "shape", ()) if equation.outvars else ()
    match name:
        case "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            return FlopCount(2.0 * math.prod(out) * math.prod(shapes[0][i] for i in contract), 0)
        case "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"]
            (contract, _), _ = numbers.dot_dimension_numbers
            contracted = math.prod(shapes[0][i] for i in contract)
            # Each row meets one group's weights. Where rows are contracted, as in the weights' gradient, they are dealt
            # out to the groups, which lead the output.
            groups = out[0] if set(numbers.lhs_ragged_dimensions) <= set(contract) else 1
            return FlopCount(2.0 * math.prod(out) * contracted / groups, 0)
        case "conv_general_dilated":
            kernel = params["dimension_numbers"].rhs_spec
            taps = math.prod(shapes[1][i] for i in kernel[2:]) * shapes[1][kernel[1]]
            return FlopCount(2.0 * math.prod(out) * taps, 0)
        case "scan":
            return _count_jaxpr(params["jaxpr"].jaxpr).times(params["length"])
        case "shard_map":
            # The body is one device's share; axes that an outer shard_map split are counted there.
            shards = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            return _count_jaxpr(params["jaxpr"]).times(shards)
        case "while":
            once = _count_jaxpr(params["body_jaxpr"].jaxpr)
            return once + FlopCount(0.0, 1)
        case "cond":
            return max((_count_jaxpr(branch.jaxpr) for branch in params["branches"]), key=lambda count: count.flops)
        case _:
            return sum((_count_jaxpr(inner) for inner in _called(params)), NOTHING)


def _called(params: dict[str, Any]) -> list[jex.Jaxpr]:
    """The jaxpr that an equation such as jit, remat or custom_vjp_call runs once."""
    for key in ("call_jaxpr", "jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if inner is not None:
            return [getattr(inner, "jaxpr", inner)]
    return []

"""How `attention` lies over the mesh in scope: as a ring where an axis splits the tokens, or without."""

import dataclasses

import jax

from meshloom.pallas_kernels.attention import spread
from meshloom.pallas_kernels.attention.context.layouts import chunks_per_device
from meshloom.pallas_kernels.attention.context.ring import Ring
from meshloom.pallas_kernels.attention.kernel import Kernel
from meshloom.pallas_kernels.attention.spec import AttentionSpec
from meshloom.pallas_kernels.dispatch import Implementation, Target, may_be_spread


@dataclasses.dataclass(frozen=True)
class SpreadSpec:
    """The static facts of one `attention` call on a mesh.

    Attributes:
        layout: in which the tokens lie over the `context` axis, see layouts.py.
    """

    attention: AttentionSpec
    layout: str


def token_order(length: int, heads: int) -> str:
    """The order of a row's tokens in which causal attention takes least time on the mesh in scope.

    "zigzag" where `attention` will be a ring over them, for arrays of which each device has some rows; or "contiguous".
    """
    ways, tensor = spread.token_ways(), jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return "zigzag" if ways > 1 and length % (2 * ways) == 0 and heads % tensor == 0 else "contiguous"


def _ring(kernel: Kernel, layout: str) -> Kernel:
    # One way round: a step sends 4 T K H bytes of bfloat16 and multiplies 4 T^2 N H, so that even on v5e (45 GB/s one
    # way, 197 TFLOP/s) what travels is hidden from 4,400 K / N tokens of a device on.
    ring = Ring(spread.TOKENS, layout, "keys", kernel)
    return spread.over_mesh(Kernel(ring.forward, ring.backward), tokens=spread.TOKENS)


def _ring_why_not(spec: SpreadSpec, target: Target) -> str | None:
    return spread.ring_why_not(spec.attention, chunks_per_device(spec.layout))


def _no_ring(kernel: Kernel, layout: str) -> Kernel:
    return spread.over_mesh(kernel) if may_be_spread() and not kernel.by_xla else kernel


def _no_ring_why_not(spec: SpreadSpec, target: Target) -> str | None:
    in_order = spread.token_ways() == 1 or spec.layout == "contiguous"
    return None if in_order else f"it takes tokens in order, not in {spec.layout}"


# `run(kernel, layout)` is the kernel over the mesh in scope.
SPREADING = (
    Implementation("ring", _ring, _ring_why_not),
    Implementation("no_ring", _no_ring, _no_ring_why_not),
)

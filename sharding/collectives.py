"""Seconds that a collective takes: rings with a latency and a bandwidth (alpha-beta), level by level of the network.

An axis of a mesh may lie within a node or slice, or span several. A collective over it is done level by level: a
gather first brings each shard across the slow network and then spreads it inside; a reduction goes the other way. So
only one part in n of the bytes crosses the slow level, n being the devices of the group inside.

Bytes are counted as a compiled program's are: those of the result on one device. It knows nothing of models.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

from meshloom.core.topology import AXES, Devices, Level, closed

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "collective_permute"]


@dataclasses.dataclass(frozen=True)
class Span:
    """The part of an axis inside one level: `ways` members, and bytes/s per device that they have among them."""

    level: str
    ways: int
    bandwidth: float
    latency: float


def axis_spans(devices: Devices, levels: Sequence[Level], mesh: dict[str, int], *axes: str) -> tuple[Span, ...]:
    """Where an axis lies when all are laid out in the order of `AXES`, the last one over neighbours; or several axes
    that are next to each other, taken as one.

    On a torus an axis has the links of the dimensions that it runs along: 16 devices in a row of an 8x8x16 slice have
    a third of a chip's links. Members of which some lie in two nodes meet over the network: of 6 neighbours on nodes
    of 8, pairs are sure to share a node, and no more.
    """
    inside = AXES[max(map(AXES.index, axes)) + 1 :]
    stride = math.prod(mesh.get(inner, 1) for inner in inside)
    size = math.prod(mesh.get(axis, 1) for axis in axes)
    spans, done = [], 1
    for level in levels:
        reach = 1 if level.devices % stride else math.gcd(size, level.devices // stride)
        ways = reach // done
        if ways > 1:
            share = _links(devices, stride * done, stride * done * ways) if level.name == "ici" else 1.0
            spans.append(Span(level.name, ways, level.bandwidth * share, level.latency))
            done *= ways
    return tuple(spans)


def _links(devices: Devices, inner: int, outer: int) -> float:
    """Share of a chip's links on the dimensions of the torus that neighbours between two strides run along.

    A dimension that does not close to a ring counts half.
    """
    used, stride = 0.0, devices.count // (devices.slices * math.prod(devices.shape))
    for size, ring in zip(reversed(devices.shape), reversed(closed(devices)), strict=True):
        if inner < stride * size and stride < outer:
            used += 1.0 if ring else 0.5
        stride *= size
    return max(used, 0.5) / len(devices.shape)


def seconds(kind: Kind, result_bytes: float, spans: Sequence[Span]) -> float:
    """Time of one collective whose result has `result_bytes` on each device."""
    ways = math.prod(span.ways for span in spans)
    if ways == 1:
        return 0.0
    match kind:
        case "all_gather":
            return _gather(result_bytes, spans)
        case "reduce_scatter":
            return _gather(result_bytes * ways, spans)
        case "all_reduce":  # a reduce-scatter and an all-gather
            return 2 * _gather(result_bytes, spans)
        case "all_to_all":
            return _exchange(result_bytes, spans, ways)
        case "collective_permute":
            return max(map(functools.partial(_hop, result_bytes), spans))


def _gather(whole: float, spans: Sequence[Span]) -> float:
    """Each level's ring moves all but one part of what its members have together; outer levels only their share."""
    time = 0.0
    for span in spans:
        time += (span.ways - 1) / span.ways * whole / span.bandwidth + (span.ways - 1) * span.latency
        whole /= span.ways
    return time


def _hop(amount: float, span: Span) -> float:
    """To the next member of a ring, one way: of a torus, half of the links that a gather has along its dimensions."""
    return amount / span.bandwidth * (2 if span.level == "ici" else 1) + span.latency


def _exchange(local: float, spans: Sequence[Span], ways: int) -> float:
    """Every device sends an equal part to each member; what goes to members beyond a level crosses the next one."""
    time, inside = 0.0, 1
    for span in spans:
        reach = inside * span.ways
        time += (reach - inside) / ways * local / span.bandwidth + span.latency
        inside = reach
    return time

"""What moves between devices in a forward pass, and why; and a strict mode that refuses what nobody asked for.

Every array of the traced program has a placement: on each axis of the mesh split, broadcast or partial (`algebra.py`).
Where two operands of an operator disagree, one is converted (`walk.py`), for a reason (`provenance.py`). On dense
decoders the bytes are those of the collectives in XLA's compiled program. What is silent may cost more there: a
loop over blocks of a split sequence gathers what it carries in every trip, which is not counted here.

It does not know the backward pass.
"""

import collections
import dataclasses
from collections.abc import Mapping

from meshloom.core.errors import ShardingError
from meshloom.sharding.algebra import Placement, State
from meshloom.sharding.collectives import Kind as Collective
from meshloom.sharding.explain import bytes_text
from meshloom.sharding.layout import Layout
from meshloom.sharding.provenance import Conversion
from meshloom.sharding.submesh import merged
from meshloom.sharding.trace import Program
from meshloom.sharding.values import Value
from meshloom.sharding.walk import Walk

# A silent conversion below this, all its repetitions together, is not worth an error: a few scores, or row indices.
SMALL_BYTES = 2**16


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """All placements and conversions of a forward pass.

    Attributes:
        placements: of every value as it was made, by mesh axis. Where one axis splits two dimensions (kv heads and
            query groups), the keys are its prime factors, as `tensor.0`.
        conversions: in program order.
    """

    program: Program
    layout: Layout
    placements: Mapping[Value, Placement]
    conversions: tuple[Conversion, ...]

    def bytes_by_kind(self) -> dict[Collective, float]:
        """Bytes of results on one device in one forward pass, by kind of collective."""
        total: dict[Collective, float] = collections.defaultdict(float)
        for each in self.conversions:
            total[each.collective] += each.total_bytes
        return dict(total)

    @property
    def total_bytes(self) -> float:
        """Bytes of all results on one device in one forward pass."""
        return sum((each.total_bytes for each in self.conversions), 0.0)

    @property
    def silent(self) -> tuple[Conversion, ...]:
        """Conversions that no rule intends, the largest first."""
        found = (each for each in self.conversions if each.origin.cause == "silent")
        return tuple(sorted(found, key=lambda each: -each.total_bytes))


def flow(program: Program, layout: Layout) -> Flow:
    """The placements and conversions of a forward pass whose parameters lie as in `layout`, and inputs as batches do.

    Args:
        layout: derived for the module that `program` was traced from; its rows are in the order of the parameters.
    """
    carries: dict[Value, dict[str, State]] = {}
    again = True
    while again:
        walk = Walk(program, layout, carries)
        walk.run()
        again = walk.settle()
    placements = {value: merged(placement, walk.mesh) for value, placement in walk.made.items()}
    return Flow(program, layout, placements, tuple(walk.conversions))


def strict(program: Program, layout: Layout, above: int = SMALL_BYTES) -> Flow:
    """The flow, if nothing moves that no rule intends.

    Args:
        above: bytes on one device in one forward pass that a silent conversion may take.
    Raises:
        ShardingError: a silent conversion; names the line, what disagrees there and what it costs.
    """
    result = flow(program, layout)
    found = [each for each in result.silent if each.total_bytes > above]
    if found:
        raise ShardingError(_complaint(found))
    return result


def _complaint(found: list[Conversion]) -> str:
    first = found[0]
    times = "" if first.trips == 1 else f", {first.trips:g} times"
    more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
    return (
        f"{first.origin.source or 'the forward pass'}: {first.origin.reason}. That is an {first.collective} over "
        f"{', '.join(first.axes)} of {bytes_text(round(first.bytes))} on each device{times}, which no rule of the "
        f"layout intends{more}. Keep the dimension whole there; in Python, "
        f"strict(..., above={round(first.total_bytes)}) lets it pass"
    )

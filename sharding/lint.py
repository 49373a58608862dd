"""What to know about a layout before renting devices for it: what XLA would compute wrongly, large weights that every
device holds whole, and operations that the derivation does not know. All come with the reason and with what would help.

It changes nothing. Vectors are never reported: they are whole on purpose.
"""

import math

from meshloom.sharding.explain import bytes_text
from meshloom.sharding.layout import Layout, Row

# A weight below this is not worth a warning: on all devices together it takes less than one activation.
LARGE_BYTES = 2**20


def warnings_of(layout: Layout) -> tuple[str, ...]:
    """A few sentences for each finding: what would be wrong, then weights, the largest in front, then operations."""
    splits = any(layout.mesh.shape.get(axis, 1) > 1 for axis in ("fsdp", "expert", "tensor"))
    whole = [row for row in layout.rows if splits and row.rule == "replicated" and _is_large_matrix(row)]
    whole.sort(key=lambda row: -row.bytes_total)
    unknown = sorted(layout.unknown.items())
    wrong = (f"{name}: {defect}" for name, defect in layout.miscompiled.items())
    return (*wrong, *(_whole(row, layout) for row in whole), *(_unknown(name, count) for name, count in unknown))


def _is_large_matrix(row: Row) -> bool:
    return row.bytes_total >= LARGE_BYTES and not row.is_vector


def _whole(row: Row, layout: Layout) -> str:
    wide = [d for d, choice in enumerate(row.choices) if choice.size > 1 and choice.role != "stack"]
    reasons = "; ".join(
        f"dimension {d} ({row.choices[d].size}, {row.choices[d].role}): {row.choices[d].reason}" for d in wide
    )
    return (
        f"{row.name}, {row.dtype}{list(row.shape)}, {bytes_text(row.bytes_total)}, lies whole on every device. "
        f"{reasons}. What would help: {_help(row, wide, layout.mesh.shape.get('fsdp', 1))}"
    )


def _help(row: Row, wide: list[int], ways: int) -> str:
    largest = max(wide, key=lambda d: row.shape[d])
    size = row.shape[largest]
    if ways == 1:
        even = [d for d in wide if row.shape[d] % 2 == 0]
        axis = f"an fsdp axis, over which dimension {max(even, key=lambda d: row.shape[d])} divides" if even else None
        return axis or f"an fsdp axis, and dimension {largest} padded from {size} to {size + 1}"
    padded = f"dimension {largest} padded from {size} to {math.ceil(size / ways) * ways}"
    fewer = max(math.gcd(row.shape[d], ways) for d in wide)
    return padded + (f", or fsdp={fewer}" if fewer > 1 else "")


def _unknown(name: str, count: int) -> str:
    times = "once" if count == 1 else f"{count} times"
    return (
        f"the operation {name} occurs {times} and is not known: dimensions before and after it count as different, "
        "so that weights beside it may be split without their pair, or stay whole. "
        "What would help: look at their rows with explain(layout, name)"
    )

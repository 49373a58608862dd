"""Collectives of a compiled program, read from its text: result bytes on one device, loops counted by their trips."""

import collections
import math
import re

import jax

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
COLLECTIVE = re.compile(rf"= (.*?) ({KINDS})(?:-start)?\(")
LOOP = re.compile(r" while\(.*body=%?([\w.\-]+)")
CALL = re.compile(r" call\(.*to_apply=%?([\w.\-]+)")
TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def bytes_by_kind(program: jax.stages.Compiled) -> dict[str, float]:
    """Kind of collective, named as in `collectives.py`, to bytes."""
    bodies, entry = _computations(program.as_text())
    total: collections.Counter = collections.Counter()

    def count(name: str, trips: int) -> None:
        for line in bodies[name]:
            if found := COLLECTIVE.search(line):
                total[found[2].replace("-", "_")] += trips * _bytes(found[1])
            if loop := LOOP.search(line):
                known = TRIPS.search(line)
                assert known, f"a loop without a known number of trips: {line}"
                count(loop[1], trips * int(known[1]))
            if call := CALL.search(line):
                count(call[1], trips)

    count(entry, 1)
    return dict(total)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _bytes(shapes: str) -> int:
    return sum(
        ITEM_BYTES[dtype] * math.prod(map(int, filter(None, sizes.split(","))))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )

"""Which splits a row-major reshape keeps.

A split that is the outermost of what a dimension is made of goes on: `[B, N * H]` split by heads becomes `[B, N, H]`
split by heads, and the other way round. One that would cut across (of `[B * T]` by tokens, with rows whole) does not.
"""

import math
from collections.abc import Mapping, Sequence

from meshloom.sharding.algebra import BROADCAST, Placement, Split, State


def reshaped(
    placement: Placement, before: Sequence[int], after: Sequence[int], mesh: Mapping[str, int]
) -> tuple[Placement, Placement]:
    """What the operand has to be placed like, and how the result then is.

    Args:
        before, after: the shapes.
        mesh: axis -> number of devices; the axes that split one dimension do so in this order.
    """
    result: dict[str, State] = {axis: state for axis, state in placement.items() if not isinstance(state, Split)}
    needed, axes = dict(result), list(mesh)
    for first, last, to_first, to_last in _blocks(before, after):
        cut = {dimension: 1 for dimension in range(to_first, to_last)}  # ways so far of each new dimension
        for dimension in range(first, last):
            passed = math.prod(before[first:dimension])
            for axis, ways in mesh.items():
                if placement.get(axis) != Split(dimension):
                    continue
                found = _holder(passed, ways, after, cut)
                inner = axes[axes.index(axis) + 1 :]
                if found is not None and any(result.get(other) == Split(found) for other in inner):
                    found = None  # the axes would split the result in another order than that of the mesh
                needed[axis] = BROADCAST if found is None else Split(dimension)
                if found is not None:
                    result[axis] = Split(found)
                    cut[found] *= ways
                    passed *= ways
    return needed, result


def _holder(passed: int, ways: int, sizes: Sequence[int], cut: dict[int, int]) -> int | None:
    """The dimension whose next cut in `ways` is the cut of what comes after `passed` outer elements."""
    outer = 1
    for dimension, done in cut.items():
        if outer * done == passed and sizes[dimension] % (done * ways) == 0:
            return dimension
        outer *= sizes[dimension]
    return None


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The shortest stretches of both shapes with equal products: (first, last) of the one, and of the other."""
    blocks, i, j = [], 0, 0
    if 0 in before:
        return []
    while i < len(before) and j < len(after):
        start, other = i, j
        have, want = before[i], after[j]
        i, j = i + 1, j + 1
        while have != want:
            if have < want:
                have, i = have * before[i], i + 1
            else:
                want, j = want * after[j], j + 1
        blocks.append((start, i, other, j))
    return blocks

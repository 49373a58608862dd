"""What rounding explains: values of one device with a measured tolerance, and how far those of a mesh lie from them.

Another order of additions changes a sum of products about as much as another last bit in each of its factors does. So
one device repeats its computation with every weight moved to the next float32 above or below, at random. How far that
moves a value is what rounding does to it; `FACTOR` times that, and `FLOOR` units in the last place of the largest
element beside it, is the tolerance. Of `DRAWS` repeats the median counts: in one of them a router may change its mind.

Measured with eleven models on 34 meshes: right programs stay below 0.42 of the tolerance. One layer's weight that is
too large by 1 part in 1000 exceeds it 117 times, by 1 part in 100,000 still 1.2 times.

Every copy of a value that devices hold is compared, not one of them, and so is what the other processes hold.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from meshloom.train.verify_report import Difference

DRAWS, FACTOR, FLOOR = 3, 8, 4
ULP = float(np.finfo(np.float32).eps)

# Arrays on the host by name, in an order that means something.
Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Expected:
    """Values of one device, and by how much rounding may move each.

    Attributes:
        tree: the values, on the host. named: cuts a tree like it into `Values`. tolerance: by name.
    """

    tree: Any
    named: Callable[[Any], Values]
    tolerance: dict[str, float]

    @classmethod
    def of(cls, tree: Any, moved: Sequence[Any], named: Callable[[Any], Values] = dict) -> "Expected":
        """From values, and what they were when last bits differed."""
        repeats = [named(each) for each in moved]
        tolerance = {}
        for name, value in named(tree).items():
            natural = np.median([np.abs(each[name] - value).max(initial=0) for each in repeats])
            tolerance[name] = float(FACTOR * natural + FLOOR * ULP * np.abs(value).max(initial=0))
        return cls(tree, named, tolerance)

    def differences(self, tree: Any) -> list[Difference]:
        """For each name, in order, the element that differs most in any copy that any process holds.

        Args:
            tree: of arrays, wherever they are. All processes must call this, and all get the same answer.
        """
        seen = self.named(jax.tree.map(farthest_copy, tree, self.tree))
        pairs = [_farthest(value, seen[name]) for name, value in self.named(self.tree).items()]
        here = [Difference(name, *pair, self.tolerance[name]) for name, pair in zip(self.tolerance, pairs, strict=True)]
        if jax.process_count() == 1:
            return here
        figures = [[each.excess, each.one_device, each.on_mesh, each.tolerance] for each in here]
        everywhere = process_allgather(np.asarray(figures, np.float32))  # [process, name, figure]
        first = np.argmax(everywhere[:, :, 0], axis=0)
        return [
            Difference(each.where, *map(float, everywhere[process, place, 1:]))
            for place, (each, process) in enumerate(zip(here, first, strict=True))
        ]


def last_bits_moved(tree: Any, draws: np.random.Generator) -> Any:
    """Every element one float32 up or down."""

    def move(x: np.ndarray) -> np.ndarray:
        return np.nextafter(x, np.where(draws.random(x.shape) < 0.5, -np.inf, np.inf).astype(x.dtype))

    return jax.tree.map(move, tree)


def farthest_copy(array: jax.Array, expected: np.ndarray) -> np.ndarray:
    """`array` on the host; of copies, each element that lies farthest from `expected`, which fills what is not here."""
    found = np.array(expected)
    farthest = np.full(found.shape, -1.0)
    for shard in array.addressable_shards:
        copy = np.asarray(shard.data)
        distance = _distance(copy, expected[shard.index])
        farther = distance > farthest[shard.index]
        found[shard.index] = np.where(farther, copy, found[shard.index])
        farthest[shard.index] = np.where(farther, distance, farthest[shard.index])
    return found


def _farthest(expected: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    place = np.unravel_index(np.argmax(_distance(seen, expected)), seen.shape)
    return float(expected[place]), float(seen[place])


def _distance(one: np.ndarray, other: Any) -> np.ndarray:
    """Absolute differences; infinite where one is no number."""
    with np.errstate(invalid="ignore"):  # inf - inf
        distance = np.abs(one.astype(np.float64) - other)
    return np.asarray(np.where(np.isnan(distance), np.inf, distance))

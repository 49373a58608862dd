"""What the choice of a collective product's implementation may look at."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CollectiveSpec:
    """One call on one device.

    Attributes:
        x, w: shapes `[..., rows, I]` and `[O, I]`. dtype: of x. devices: along the axis.
        checked: `shard_map` follows which arrays vary over which axes (its `check_vma`).
    """

    x: tuple[int, ...]
    w: tuple[int, int]
    dtype: str
    devices: int
    checked: bool = False

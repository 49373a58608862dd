"""How much of a cross entropy one device computes, in blocks of which size, and how its arrays lie on a mesh."""

import dataclasses
import math

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from meshloom.core.errors import MeshloomError
from meshloom.core.topology import axes_of
from meshloom.pallas_kernels.dispatch import Target

# Logits that exist at a time. A block of the vocabulary reads x and adds to the gradient of x, so that few large blocks
# are best until they no longer stay in fast memory. On two CPU cores, 2,048 tokens of 576, 49,152 vocabulary, bfloat16:
# 1.77 s with 2**21 logits, 1.98 with 2**24. XLA's cost model of TPU v5e, 4,096 tokens of 4,096: 1.88, 1.49 and 1.26 of
# the time that the products take at peak, with 2**23, 2**24 and 2**25.
BLOCK_LOGITS = 2**25
CPU_BLOCK_LOGITS = 2**22
# Rows of the weight in a block are a multiple of this, a TPU's tile of a bfloat16 array, so that slices are aligned.
TILE_ROWS = 16


@dataclasses.dataclass(frozen=True)
class CrossEntropySpec:
    """What the choice of an implementation may look at: tokens and vocabulary of one device."""

    tokens: int
    vocab: int

    def block(self, target: Target) -> int:
        """Rows of the weight that are multiplied at a time: all of them, or a multiple of 16.

        A shorter last block is a second copy of the program, with memory of its own (115 MiB for 4,096 tokens on TPU
        v5e), so that up to twice as many blocks are taken where they divide the vocabulary.
        """
        most = CPU_BLOCK_LOGITS if target.platform == "cpu" else BLOCK_LOGITS
        least = min(-(-self.tokens * self.vocab // most), -(-self.vocab // TILE_ROWS))
        if least <= 1:
            return self.vocab
        even = (blocks for blocks in range(least, 2 * least) if self.vocab % (blocks * TILE_ROWS) == 0)
        blocks = next(even, least)
        return -(-self.vocab // (blocks * TILE_ROWS)) * TILE_ROWS


@dataclasses.dataclass(frozen=True)
class Split:
    """How x and the weight of a cross entropy lie on a mesh.

    An axis of `weight` that also splits rows only stores: the weight is gathered over it, its gradient scattered. The
    others split the vocabulary.

    Attributes:
        rows: spec of x without its last dimension, which is whole.
        weight: spec of the weight `[V, D]`, as it is stored.
    """

    mesh: Mesh | AbstractMesh
    rows: PartitionSpec
    weight: PartitionSpec

    @property
    def target(self) -> Target:
        """What the mesh is made of."""
        if isinstance(self.mesh, AbstractMesh):
            device = self.mesh.abstract_device
            return Target() if device is None else Target(device.platform, device.device_kind)
        device = self.mesh.devices.flat[0]
        return Target(device.platform, device.device_kind)

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axes over which tokens are spread."""
        return tuple(axis for entry in self.rows for axis in axes_of(entry))

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """Axes over which the products of one row are spread."""
        entries = [*self.weight, None]
        return tuple(axis for axis in axes_of(entries[0]) if axis not in self.row_axes)

    @property
    def storing(self) -> tuple[tuple[str, ...], ...]:
        """For V and D, the axes over which the weight is only stored."""
        entries = [*self.weight, None, None][:2]
        return tuple(tuple(axis for axis in axes_of(entry) if axis in self.row_axes) for entry in entries)

    def local(self, x: tuple[int, ...], weight: tuple[int, ...]) -> CrossEntropySpec:
        """What one device has of x and of the weight it computes with.

        Raises:
            MeshloomError: a dimension does not divide over its axes.
        """
        pairs = [(size, axes_of(entry)) for size, entry in zip(x, self.rows, strict=False)]
        for size, axes in [*pairs, (weight[0], self.vocab_axes)]:
            if size % self.ways(axes):
                raise MeshloomError(
                    f"linear_cross_entropy: {size} does not divide over {' x '.join(axes)} = {self.ways(axes)} devices"
                )
        return CrossEntropySpec(math.prod(x[:-1]) // self.ways(self.row_axes), weight[0] // self.ways(self.vocab_axes))

    def ways(self, axes: tuple[str, ...]) -> int:
        """Devices along these axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

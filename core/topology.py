"""Device strings and meshes: from "cpu:8" and "fsdp=4,tensor=2" to devices in a grid.

Axis names are the whole runtime's vocabulary; nothing here knows what a model does with them.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from meshloom.core.config import nearest
from meshloom.core.device_order import arranged
from meshloom.core.errors import ConfigError, ShardingError
from meshloom.core.hardware import CHIPS, Chip, chip_named, chip_of_kind, cpu_chip
from meshloom.core.measure import measured_cpu
from meshloom.core.processes import joined

# Outermost first: `data` may span slow links, `tensor` must not.
AXES = ("data", "fsdp", "expert", "context", "tensor")
# Those over which rows of a batch lie, the outermost first.
BATCH_AXES = ("data", "fsdp", "expert")
# Those over which weights are stored in parts and gathered at use: they split tokens, and `data` keeps copies.
STORE_AXES = ("fsdp", "expert", "context")
# The same in serving: the rows of a step are whole over `expert`, and each would gather all weights for few rows.
SERVED_STORE_AXES = ("fsdp", "context")


@dataclasses.dataclass(frozen=True)
class Devices:
    """A parsed device string: `platform` "local", "cpu" or a chip of the table, and the shape of each slice or node.

    Attributes:
        shape: chips of one slice, or nodes x GPUs of all islands; () for "local", whose devices are whatever JAX finds.
        slices: how many slices ("2xv5e:16x16" has 2).
        islands: clusters of GPUs that only a line joins ("2xh100:16x8@25" has 2, of 16 nodes each).
        link: bytes/s, one direction, that all devices of an island or slice have together to the others; None for what
            the table says of slices.
    """

    platform: str
    shape: tuple[int, ...] = ()
    slices: int = 1
    islands: int = 1
    link: float | None = None

    @property
    def count(self) -> int:
        """Number of devices as JAX counts them, or 0 for "local"."""
        per_chip = CHIPS[self.platform].devices_per_chip if self.platform in CHIPS else 1
        return self.slices * math.prod(self.shape) * per_chip if self.shape else 0


def parse_devices(text: str) -> Devices:
    """Reads "local", "cpu:8", "v5e:4x4", "2xv5e:16x16", "h100:8", "h100:16x8" (nodes x GPUs) or "2xh100:16x8@25".

    The last is two islands of 16 nodes, each with a line of 25 GB/s to the other for all of its GPUs together. "@" says
    the same of TPU slices, "2xv5e:16x16@100", in place of the table's figure.

    Raises:
        ConfigError: the string has another form, names a chip that is not in the table, or a line that joins nothing.
    """
    if text == "local":
        return Devices("local")
    if "+" in text:
        raise ConfigError(
            "a plan is for devices of one kind in equal groups, because shards of an array are equal; write equal "
            f'islands of the slower chip and the smaller group, as in "2xa100:8x8@25"; got {text!r}'
        )
    match = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9-]*):(\d+(?:x\d+)*)(?:@(\d+(?:\.\d+)?))?", text)
    if not match:
        raise ConfigError(
            'devices are "local", "cpu:8", "v5e:4x4", "2xv5e:16x16", "h100:8", "h100:16x8" or "2xh100:16x8@25"; '
            f"got {text!r}"
        )
    slices, platform, shape = int(match[1] or 1), match[2], tuple(int(n) for n in match[3].split("x"))
    if platform not in ("cpu", *CHIPS):
        raise ConfigError(f"unknown chip {platform!r} in {text!r}; {nearest(platform, ('cpu', *CHIPS))}")
    if min(slices, *shape) < 1:
        raise ConfigError(f"device counts must be at least 1; got {text!r}")
    link = None if match[4] is None else float(match[4]) * 1e9
    if link is not None and (slices == 1 or platform not in CHIPS or link == 0):
        raise ConfigError(
            '"@" is the GB/s of the line between islands or slices, as in "2xh100:16x8@25", and more than 0; '
            f"got {text!r}"
        )
    devices = Devices(platform, shape, slices, link=link)
    if platform in CHIPS and (problem := _impossible(CHIPS[platform], devices)):
        raise ConfigError(f"{problem}; got {text!r}")
    if link is not None and CHIPS[platform].node_devices is not None:
        nodes, gpus = (1, *shape)[-2:]
        return Devices(platform, (slices * nodes, gpus), islands=slices, link=link)
    return devices


# What Google Cloud rents of the chips whose slices are flat.
_FLAT_SLICES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def _impossible(chip: Chip, devices: Devices) -> str | None:
    """Why there are no such slices or nodes, and what there is; or None."""
    shape, node = devices.shape, chip.node_devices
    if node is not None:
        fits = len(shape) <= 2 and shape[-1] <= node
        if fits and (devices.slices == 1 or devices.link is not None):
            return None
        example = f"{max(devices.count // node, 2)}x{node}"
        if fits:
            islands = f"{devices.slices}x{chip.name}:{'x'.join(map(str, shape))}@25"
            return (
                f"no data sheet has the line between islands; say its GB/s, as in {islands}; on one network, write "
                f"nodes x GPUs, as in {chip.name}:{example}"
            )
        return f"a node has at most {node} x {chip.name}; write nodes x GPUs, as in {chip.name}:{example}"
    if chip.torus == 2 and shape not in _FLAT_SLICES:
        return f"slices of {chip.name} are {', '.join('x'.join(map(str, each)) for each in _FLAT_SLICES)}"
    if chip.torus == 3 and (
        len(shape) != 3 or math.prod(shape) > chip.pod_chips or any(size > 2 and size % 4 for size in shape)
    ):
        return f"slices of {chip.name} are AxBxC, each 1, 2 or a multiple of 4, of at most {chip.pod_chips} chips"
    return None


def closed(devices: Devices) -> tuple[bool, ...]:
    """For each dimension of a TPU slice, whether its ends are linked to a ring.

    Slices of cubes of 4x4x4 chips close in all three dimensions; of flat slices, the dimensions of 16 chips do.
    Source: Google Cloud's pages of TPU v4, v5p, v5e and v6e; Austin et al. 2025, How to Scale Your Model, part 2.
    """
    if len(devices.shape) == 2:
        return tuple(size == 16 for size in devices.shape)
    return (all(size % 4 == 0 for size in devices.shape),) * len(devices.shape)


# Seconds from a collective's start to its first byte, per step of a ring: assumed, of the order that vendors' own
# latency tests report. They matter for small messages only. A line between islands: 200 km of fibre, 5 us each.
_LATENCY = {"ici": 1e-6, "nvlink": 3e-6, "network": 1e-5, "dcn": 1e-5, "line": 1e-3}


@dataclasses.dataclass(frozen=True)
class Level:
    """Devices that reach each other at one speed.

    Attributes:
        name: "ici" (a TPU slice), "dcn" (between slices), "nvlink" (a node, of any maker), "network" (between nodes) or
            "line" (between islands).
        devices: how many devices reach each other without leaving this level, inner levels included.
        bandwidth: bytes/s of one device, one direction. latency: seconds per message.
    """

    name: str
    devices: int
    bandwidth: float
    latency: float


def network(devices: Devices, chip: Chip | None = None) -> tuple[Level, ...]:
    """The levels of the network that joins `devices`, innermost first; the last one reaches all of them.

    Args:
        chip: other figures than the table's; for "cpu:8", whose devices share one memory, it has to be given.
    Raises:
        ConfigError: devices with no known network ("local", and "cpu:8" without `chip`).
    """
    chip = chip or chip_named(devices.platform)
    if devices.platform == "cpu":
        return (Level("memory", devices.count, chip.link_bandwidth, _LATENCY["ici"]),)
    inner, outer = ("ici", "dcn") if chip.node_devices is None else ("nvlink", "network")
    nodes = devices.slices * (1 if chip.node_devices is None else math.prod(devices.shape[:-1]))
    node, island = devices.count // nodes, devices.count // devices.islands
    levels = [Level(inner, node, chip.link_bandwidth, _LATENCY[inner])]
    if island > node:
        between = chip.network_bandwidth
        if devices.islands == 1 and devices.link is not None:
            between = devices.link / node
        levels.append(Level(outer, island, between, _LATENCY[outer]))
    if devices.islands > 1 and devices.link is not None:
        levels.append(Level("line", devices.count, devices.link / island, _LATENCY["line"]))
    return tuple(levels)


def describe_devices(devices: list[jax.Device], text: str = "local") -> Devices:
    """What a device string would say of devices that are attached, or "local" for a chip that is not in the table.

    Args:
        text: what the user calls them, which may say more than can be seen: islands, and the line between them.
    """
    if text != "local":
        return parse_devices(text)
    if devices[0].platform == "cpu":
        return Devices("cpu", (len(devices),))
    chip = chip_of_kind(devices[0].device_kind)
    if chip is None:
        return Devices("local")
    if chip.node_devices is not None:
        nodes = -(-len(devices) // chip.node_devices)
        return Devices(chip.name, (nodes, len(devices) // nodes) if nodes > 1 else (len(devices),))
    places = np.array([device.coords for device in devices])
    shape = tuple(int(size) for size in places.max(axis=0) - places.min(axis=0) + 1)[: chip.torus]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Devices(chip.name, shape, slices)


def simulate_cpu_devices(count: int) -> None:
    """Makes this process's CPU count as `count` devices. Call it before anything has used JAX.

    Raises:
        ConfigError: a backend already runs with another number of devices.
    """
    from jax._src import xla_bridge  # no public way to ask whether a backend runs without starting one

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
        return
    running = jax.local_device_count()
    if running != count or jax.default_backend() != "cpu":
        raise ConfigError(
            f"JAX already runs with {running} {jax.default_backend()} device(s), too late to simulate {count}; "
            f"simulate devices before the first use of JAX, or start again with JAX_NUM_CPU_DEVICES={count}"
        )


def measured_chip(devices: Devices) -> Chip | None:
    """The figures of "cpu:N", measured on this machine once per process; None for others, whose are the table's."""
    if devices.platform != "cpu":
        return None
    # Measuring starts JAX, and a plan may be compiled for its devices after that. Where JAX runs already, with another
    # number of them, the processor is the same.
    with contextlib.suppress(ConfigError):
        simulate_cpu_devices(devices.count)
    return cpu_chip(devices.count, measured_cpu())


def use_devices(text: str) -> list[jax.Device]:
    """The devices that a string names, on this machine; "cpu:N" simulates N if JAX has not started yet.

    Raises:
        ConfigError: the string is malformed, or names devices that this process does not have.
    """
    wanted = parse_devices(text)
    if wanted.platform == "local":
        return jax.devices()
    if wanted.platform == "cpu":
        simulate_cpu_devices(_of_this_process(wanted.count, text))
        return jax.devices()
    found = jax.devices()
    kinds = CHIPS[wanted.platform].kinds
    if len(found) != wanted.count or found[0].device_kind.lower() not in kinds:
        raise ConfigError(
            f"{text} is {wanted.count} x {wanted.platform}, but this process has {len(found)} x {found[0].device_kind}"
        )
    return found


def _of_this_process(count: int, text: str) -> int:
    """This process's equal share of `count` devices."""
    _, processes = joined()
    if count % processes:
        raise ConfigError(f"{text}: {count} devices do not divide over {processes} processes")
    return count // processes


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "fsdp=4,tensor=2" into {"fsdp": 4, "tensor": 2}; one size may be -1, "the rest".

    Raises:
        ShardingError: not of that form, an unknown or repeated axis, or a size that is not positive.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"-1|\d+", size):
            raise ShardingError(
                f'a mesh is axis=size pairs such as "fsdp=4,tensor=2"; got {part.strip()!r} in {text!r}'
            )
        if name in sizes:
            raise ShardingError(f"axis {name!r} stands twice in {text!r}")
        sizes[name] = int(size)
    return sizes


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes that an entry of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def mesh_text(sizes: Mapping[str, int]) -> str:
    """What `parse_mesh` reads, "fsdp=4,tensor=2": axes of more than one device, "" if there are none."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def make_mesh(axes: str | dict[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of JAX's), laid out along their network.

    Args:
        axes: sizes by axis name, as a dict or "fsdp=4,tensor=2"; names out of data, fsdp, expert, tensor; one size
            may be -1 and takes the remaining devices.
    Raises:
        ShardingError: unknown axis, or sizes whose product is not the number of devices; names both.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(axes, len(devices))
    return Mesh(arranged(devices, list(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def abstract_mesh(axes: str | dict[str, int], count: int) -> AbstractMesh:
    """A mesh over `count` devices that need not exist, to plan for; axes and errors as in `make_mesh`."""
    sizes = _sizes(axes, count)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(axes: str | dict[str, int], count: int) -> dict[str, int]:
    """Checked sizes by axis name, outermost first, whose product is `count`."""
    sizes = parse_mesh(axes) if isinstance(axes, str) else dict(axes)
    for name, size in sizes.items():
        if name not in AXES:
            raise ShardingError(f"unknown mesh axis {name!r}; {nearest(name, AXES)}")
        if size < 1 and size != -1:
            raise ShardingError(f"mesh axis {name!r} must have at least 1 device; got {size}")
    sizes = _fill_rest(sizes, count)
    product = math.prod(sizes.values())
    if product != count:
        raise ShardingError(
            f"mesh {sizes} needs {product} devices; there are {count}: the product must be {count}; one may be -1"
        )
    return {name: sizes[name] for name in AXES if name in sizes}


def _fill_rest(sizes: dict[str, int], count: int) -> dict[str, int]:
    rest = [name for name, size in sizes.items() if size == -1]
    if not rest:
        return sizes
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1 or count % known:
        raise ShardingError(f"mesh {sizes}: one axis may be -1, and the others' product must divide {count} devices")
    return {**sizes, rest[0]: count // known}

"""Block sizes of kernels as data: what a search found for a chip, and how a kernel asks for it.

A kernel has a rule of its own, and asks here whether better sizes are known for its call: those of `overlay`, in which
a search tries its candidates, else the user's file for this chip, which `meshloom tune` writes, else the file that the
package has for it. A call that no file knows takes the kernel's own rule, silently. Sizes that a call cannot have are
an error in an overlay, which somebody asked for, and passed over in a file. Whether an implementation runs at all never
depends on a file.

One process reads a file once, so that all its programs agree. Where several processes work as one, the users' files are
not read: they might differ from machine to machine, and the programs with them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from meshloom.core.compile import cache_folder
from meshloom.core.errors import ConfigError, MeshloomError
from meshloom.core.hardware import chip_of_kind
from meshloom.core.processes import joined
from meshloom.pallas_kernels.dispatch import Target

# The sizes that a kernel may be given.
SIZES = {
    "attention_forward": ("block_q", "block_kv"),
    "attention_backward": ("block_q", "block_kv"),
    "quantized_matmul": ("rows", "columns", "chunk"),
    "grouped_matmul": ("rows", "columns", "contracted", "chunk"),
    "grouped_outer": ("rows", "left", "right", "chunk"),
    "paged_attention": ("tokens", "rows", "decode_rows"),
}
SHIPPED = pathlib.Path(__file__).parent / "tuned"

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found for one call.

    Attributes:
        gain: how many times as fast as the kernel's own rule, by whatever the search went by.
    """

    sizes: dict[str, int]
    gain: float


# By op and key.
Table = dict[str, dict[str, Found]]
# (op, its sizes or None for its own rule), part of what JAX caches programs by.
_overlay = jax.make_user_context(())


@contextlib.contextmanager
def overlay(op: str, sizes: Sizes | None) -> Iterator[None]:
    """All calls of a kernel that are traced inside take these sizes; with None those of its own rule, and no file's."""
    if op not in SIZES or (sizes is not None and set(sizes) != set(SIZES[op])):
        known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in SIZES.items())
        raise MeshloomError(f"block sizes of {op} cannot be {sizes}; there are {known}")
    others = tuple(pair for pair in _overlay.value if pair[0] != op)
    with _overlay((*others, (op, None if sizes is None else tuple(sorted(sizes.items()))))):
        yield


def tuned(op: str, key: str, refuse: Callable[[Sizes], str | None]) -> Sizes | None:
    """The sizes that are known for a call on the mesh in scope, or None for the kernel's own rule.

    Args:
        key: of the call, from `key_of`.
        refuse: why the call cannot have these sizes, or None.
    Raises:
        MeshloomError: the call cannot have the sizes of the overlay; says why.
        ConfigError: the user's file is damaged; names it.
    """
    for name, asked in _overlay.value:
        if name == op:
            if asked is not None and (reason := refuse(dict(asked))) is not None:
                raise MeshloomError(f"{op} cannot have the block sizes {dict(asked)}: {reason}")
            return None if asked is None else dict(asked)
    kind = Target.of_mesh().device_kind
    chip = None if kind is None else chip_of_kind(kind)
    if chip is None:
        return None
    alone = joined()[1] in (None, 1)
    for path in (user_file(chip.name), shipped_file(chip.name)) if alone else (shipped_file(chip.name),):
        found = _once(path).get(op, {}).get(key)
        if found is not None and refuse(found.sizes) is None:
            return found.sizes
    return None


def key_of(**facts: Any) -> str:
    """A call by what its sizes depend on, as text: "head=128 tokens=4096 causal"; facts that are unset are left out."""
    words = []
    for name, value in facts.items():
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f"{name}={value}")
    return " ".join(words)


def bucket(count: int) -> int:
    """Numbers of tokens and rows that share an entry are those up to a power of two, and more than the one before."""
    return 1 << max(count - 1, 0).bit_length()


def user_file(chip: str) -> pathlib.Path:
    """Where `meshloom tune` keeps what it found for a chip; need not exist."""
    return cache_folder() / "tuned" / f"{chip}.json"


def shipped_file(chip: str) -> pathlib.Path:
    """What the package has for a chip; need not exist."""
    return SHIPPED / f"{chip}.json"


def read(path: pathlib.Path) -> Table:
    """The entries of a file, none if there is no file.

    Raises:
        ConfigError: it holds anything but entries; names the file and what is wrong.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(_damaged(path, str(error))) from error
    try:
        content = json.loads(text)
        return {op: {key: _found(op, key, each) for key, each in calls.items()} for op, calls in content["ops"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(_damaged(path, reason)) from error


def write(path: pathlib.Path, chip: str, by: str, table: Mapping[str, Mapping[str, Found | None]]) -> None:
    """Adds entries to a file, or takes them out (None); the file is whole at any time."""
    merged: dict[str, dict[str, Found | None]] = {op: dict(calls) for op, calls in read(path).items()}
    for op, calls in table.items():
        merged[op] = merged.get(op, {}) | calls
    ops = {
        op: {key: {**found.sizes, "gain": round(found.gain, 4)} for key, found in sorted(calls.items()) if found}
        for op, calls in sorted(merged.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    content = {"chip": chip, "by": by, "ops": {op: calls for op, calls in ops.items() if calls}}
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def _damaged(path: pathlib.Path, reason: str) -> str:
    return f"{path} does not hold block sizes of kernels: {reason}; delete it, or write it anew with `meshloom tune`"


def _found(op: str, key: str, entry: Any) -> Found:
    if op not in SIZES:
        raise ValueError(f"there is no kernel {op!r}")
    sizes, gain = {name: value for name, value in entry.items() if name != "gain"}, entry["gain"]
    whole = all(type(value) is int and value > 0 for value in sizes.values())
    if set(sizes) != set(SIZES[op]) or not whole or not isinstance(gain, int | float):
        raise ValueError(f"{op}, {key!r}: {entry} is not {', '.join(SIZES[op])} in whole numbers, and gain")
    return Found(sizes, float(gain))


@functools.cache
def _once(path: pathlib.Path) -> Table:
    return read(path)

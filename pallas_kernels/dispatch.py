"""Which implementation of an op runs, as a table that can be printed.

Every op lists its implementations in order of preference. Each one answers `why_not(spec, target)` with a reason or
None; the first that has no reason runs. Selection happens while tracing, from shapes and the mesh alone; it never
looks at `jax.devices()`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from meshloom.core.errors import MeshloomError


@dataclasses.dataclass(frozen=True)
class Target:
    """The hardware a program is traced for; `platform` None means that any backend may compile it."""

    platform: str | None = None
    device_kind: str | None = None

    @classmethod
    def of_mesh(cls) -> "Target":
        """The target of the mesh in scope (`jax.set_mesh`, or explicit sharding types); unknown when there is none."""
        device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
        if device is None:
            return cls()
        return cls(getattr(device, "platform", None), device.device_kind)


# They have 16 MiB of fast (vector) memory; v5p and TPU7x 64, v5e and v6e 128.
_LITTLE_MEMORY = ("TPU v2", "TPU v3", "TPU v4")


def tpu_why_not(target: Target) -> str | None:
    """Why a kernel for TPUs, which holds tens of megabytes in fast memory, cannot run there, or None."""
    if target.platform != "tpu":
        return f"it runs on TPUs, not on {target.platform or 'a device that no mesh in scope names'}"
    if str(target.device_kind).startswith(_LITTLE_MEMORY):
        return f"{target.device_kind} has too little fast memory"
    return None


def may_be_spread() -> bool:
    """Whether the mesh in scope leaves it to XLA to spread arrays over devices; not inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in (*mesh.auto_axes, *mesh.explicit_axes))


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        run: what the op calls; ops say with what.
        why_not: (spec, target) -> the reason it cannot compute that there, or None.
    """

    name: str
    run: Any
    why_not: Callable[[Any, Target], str | None]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One row of the selection table: an implementation, and why it was passed over (None for a usable one)."""

    name: str
    reason: str | None


def explain(implementations: Sequence[Implementation], spec: Any, target: Target) -> list[Choice]:
    """The selection table for one call: the first row whose `reason` is None is what runs."""
    return [Choice(each.name, each.why_not(spec, target)) for each in implementations]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What one call of an op took, in words: nothing of the program that was traced is held.

    Attributes:
        call: static facts of the call. target: what it runs on, as far as a mesh in scope says.
        chosen: name of what runs. declined: those before it, and why.
    """

    op: str
    call: str
    target: Target
    chosen: str
    declined: tuple[Choice, ...]


_recording: contextvars.ContextVar[list[Selection] | None] = contextvars.ContextVar("selections", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Selection]]:
    """Collects every selection of programs traced inside; what JAX has traced before it does not trace again."""
    found: list[Selection] = []
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


def select(
    op: str, implementations: Sequence[Implementation], spec: Any, target: Target, requested: str | None = None
) -> Implementation:
    """The first implementation that can compute `spec` on `target`, or the `requested` one.

    Raises:
        MeshloomError: nothing fits, the requested name is unknown, or the requested implementation declines; says why.
    """
    by_name = {each.name: each for each in implementations}
    if requested is not None:
        if requested not in by_name:
            raise MeshloomError(f"{op} has no implementation {requested!r}; it has {', '.join(by_name)}")
        reason = by_name[requested].why_not(spec, target)
        if reason is not None:
            raise MeshloomError(f"{op}: implementation {requested!r} cannot run this call: {reason}")
        return by_name[requested]
    choices = explain(implementations, spec, target)
    for index, choice in enumerate(choices):
        if choice.reason is None:
            if (found := _recording.get()) is not None:
                found.append(Selection(op, _facts(spec), target, choice.name, tuple(choices[:index])))
            return by_name[choice.name]
    reasons = "; ".join(f"{choice.name}: {choice.reason}" for choice in choices)
    raise MeshloomError(f"no implementation of {op} can run this call ({reasons})")


def as_one(function: Callable[..., Any], *arrays: Any) -> Any:
    """`function(*arrays)`: in programs that are traced one equation, by whose name derivations know what is in it.

    The name is `meshloom.` and that of the function, which no function of a user's has.
    """

    def named(*arrays: Any) -> Any:
        return function(*arrays)

    named.__name__ = f"meshloom.{function.__name__}"
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))
    return (jax.jit(named) if traced else function)(*arrays)


def _facts(spec: Any) -> str:
    """A spec's fields that are set, without arrays."""
    words = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            words.append(f"{field.name}=({facts})" if (facts := _facts(value)) else "")
        elif value is True:
            words.append(field.name)
        elif value is not None and value is not False and not isinstance(value, jax.Array):
            words.append(f"{field.name}={value}".replace(" ", ""))
    return " ".join(filter(None, words))

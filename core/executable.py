"""Compiled programs as files: compiled once, here or for devices that are elsewhere, and run where those devices are.

A file is a JSON header and then what `jax.experimental.serialize_executable` makes of the program. The header says what
the program is (a hash of its StableHLO, its arguments, the settings that it has inside as constants) and what it was
compiled for. All of it is compared with the program and the devices at hand before a byte of the rest is interpreted:
whoever loads lowers the program again, which takes no compiler, and gets exactly that program or an error that says
what differs. The structure of arguments and results comes from there too, never from the file.

**Load only files that you trust.** The payload is a pickle around machine code; either can do whatever the process can.
The checks find files that are damaged, outdated or of something else. They find nobody who forges a header, and a
format without pickle would not either, for machine code stays machine code.

What is not known: environment variables such as XLA_FLAGS, under which the program was compiled.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import platform
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from meshloom.core.errors import MeshloomError
from meshloom.core.topology import mesh_text

_MAGIC = b"meshloom executable\n"
_FORMAT = 1
_LENGTH_BYTES, _HASH_BYTES = 8, 32  # of the header: its length, little-endian, and its SHA-256; then the header
_AGAIN = "compile it again with what is installed here, for these devices"

# What pickle raises for functions of Python that a program calls, such as those of `jax.pure_callback`.
_UNPICKLABLE = pickle.PicklingError, AttributeError, TypeError

Settings = Mapping[str, str | int | float | None]


class ExecutableError(MeshloomError):
    """A file of a compiled program that cannot be written, or that does not belong to the program and devices here."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of the program in it.

    Attributes:
        format: version of the file's form. jax, jaxlib: versions. compiler: package and version that compiled it.
        platform, device_kind: of the devices, as JAX names them. processor: hash of a CPU's model and instructions.
        mesh: axis -> size. devices: of the mesh in its order, each its id, and in a TPU's torus its coordinates.
        processes: over how many the devices are spread.
        program: SHA-256 of the StableHLO. arguments: name -> "float32[16,32]".
        settings: what is inside the program as constants, by name; to say what differs, not to decide whether.
        payload_sha256: of what follows the header.
    """

    format: int
    jax: str
    jaxlib: str
    compiler: str
    platform: str
    device_kind: str
    processor: str | None
    mesh: dict[str, int]
    devices: list[list[int]]
    processes: int
    program: str
    arguments: dict[str, str]
    settings: dict[str, str | int | float | None]
    payload_sha256: str


def save_executable(
    path: str | pathlib.Path,
    compiled: jax.stages.Compiled,
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    settings: Settings | None = None,
) -> Header:
    """Writes a compiled program to a file, which appears complete or not at all.

    Args:
        compiled: of `lowered`, and not read from JAX's persistent cache.
        mesh: the devices that it is for, attached or not.
        settings: constants inside the program, by the names that their user knows.
    Raises:
        ExecutableError: the file cannot be written, or JAX cannot serialize this program.
    """
    path = pathlib.Path(path)
    try:
        payload, _, _ = serialize_executable.serialize(compiled)
    except (ValueError, NotImplementedError, *_UNPICKLABLE, jax.errors.JaxRuntimeError) as error:
        raise ExecutableError(f"this program cannot be saved to {path}: {error}") from error
    header = _header(lowered, mesh, settings or {}, payload)
    text = json.dumps(dataclasses.asdict(header)).encode()
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC + len(text).to_bytes(_LENGTH_BYTES, "little") + hashlib.sha256(text).digest())
            file.write(text)
            file.write(payload)
        os.replace(partial, path)
    except OSError as error:
        raise ExecutableError(f"cannot write the compiled program to {path}: {error.strerror}") from error
    return header


def load_executable(
    path: str | pathlib.Path, lowered: jax.stages.Lowered, mesh: Mesh, settings: Settings | None = None
) -> jax.stages.Compiled:
    """The program of a file, ready to be called on the devices of `mesh`; nothing is compiled.

    Read the module's warning: a file can run code, so it must come from somebody you trust.

    Args:
        lowered: the program that it has to be, lowered for `mesh`.
        settings: as in `save_executable`, of the program wanted.
    Raises:
        ExecutableError: no such file, a damaged one, or one of another program, other devices or other versions; the
            message says what the file has, what there is here and what to do.
    """
    path = pathlib.Path(path)
    header, payload = _read(path)
    check_header(path, header, _header(lowered, mesh, settings or {}, payload))
    structure = jax.tree.structure(lowered.args_info)
    devices = list(mesh.devices.flat)
    try:
        return serialize_executable.deserialize_and_load(
            payload, structure, lowered.out_tree, devices[0].client, execution_devices=devices
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ExecutableError(f"{path}: the runtime here does not take it ({reason}); {_AGAIN}") from error


def read_header(path: str | pathlib.Path) -> Header:
    """What a file says of itself, once it has been found to be complete and undamaged; nothing in it is run.

    Raises:
        ExecutableError: it cannot be read, is no such file, or is damaged.
    """
    return _read(pathlib.Path(path))[0]


def check_header(path: pathlib.Path, file: Header, here: Header) -> None:
    """Compares a file with what it is wanted for.

    Raises:
        ExecutableError: at the first difference.
    """
    for name in ("jax", "jaxlib", "compiler"):
        stated, present = getattr(file, name), getattr(here, name)
        if stated != present:
            raise ExecutableError(f"{path} was compiled with {name} {stated}, and here is {present}; {_AGAIN}")
    if (file.platform, file.device_kind) != (here.platform, here.device_kind):
        raise ExecutableError(f"{path} is for {_where(file)}, and here are {_where(here)}; {_AGAIN}")
    if file.processor != here.processor:
        raise ExecutableError(f"{path} was compiled for a CPU with other instructions than this one; {_AGAIN}")
    for name in ("mesh", "devices", "processes"):
        stated, present = getattr(file, name), getattr(here, name)
        # Order counts: it is the order in which the mesh is laid over the devices.
        if stated != present or (name == "mesh" and list(stated) != list(present)):
            raise ExecutableError(
                f"{path} is for {name} {_short(stated)} ({_where(file)}), and here is {_short(present)} "
                f"({_where(here)}); {_AGAIN}"
            )
    if file.program != here.program:
        raise ExecutableError(
            f"{path} holds another program: {_differences(file, here)}; use what it has, or compile it again"
        )


def _header(lowered: jax.stages.Lowered, mesh: Mesh, settings: Settings, payload: bytes) -> Header:
    first, devices = mesh.devices.flat[0], list(mesh.devices.flat)
    arguments, _ = jax.tree_util.tree_flatten_with_path(lowered.args_info[0])
    return Header(
        format=_FORMAT,
        jax=importlib.metadata.version("jax"),
        jaxlib=importlib.metadata.version("jaxlib"),
        compiler=_compiler(first.platform),
        platform=first.platform,
        device_kind=first.device_kind,
        processor=_processor() if first.platform == "cpu" else None,
        mesh=dict(mesh.shape),
        devices=[[device.id, *(device.coords if device.platform == "tpu" else ())] for device in devices],
        processes=len({device.process_index for device in devices}),
        program=hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        arguments={
            jax.tree_util.keystr(path, simple=True, separator="."): f"{info.dtype.name}{list(info.shape)}"
            for path, info in arguments
        },
        settings=dict(settings),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
    )


def _read(path: pathlib.Path) -> tuple[Header, bytes]:
    """Header and payload of a file that is what it says it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExecutableError(f"cannot read the compiled program {path}: {error.strerror}") from error
    sized = len(_MAGIC) + _LENGTH_BYTES
    start = sized + _HASH_BYTES
    if not content.startswith(_MAGIC) or len(content) < start:
        raise ExecutableError(f"{path} is no compiled program; `meshloom plan ... --executable FILE` writes one")
    end = start + int.from_bytes(content[len(_MAGIC) : sized], "little")
    damaged = ExecutableError(f"{path} is damaged or not complete: copy it again, or {_AGAIN}")
    if hashlib.sha256(content[start:end]).digest() != content[sized:start]:
        raise damaged
    values = json.loads(content[start:end])
    if values["format"] != _FORMAT:
        raise ExecutableError(f"{path} is of format {values['format']}, and this Meshloom reads {_FORMAT}; {_AGAIN}")
    header = Header(**values)
    payload = content[end:]
    if hashlib.sha256(payload).hexdigest() != header.payload_sha256:
        raise damaged
    return header, payload


def _compiler(platform: str) -> str:
    """`libtpu 0.0.50`: the package that compiles for a platform, and its version."""
    for package in {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin")}.get(platform, ()):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"jaxlib {importlib.metadata.version('jaxlib')}"


def _processor() -> str:
    """Hash of this machine's kind of CPU and its instructions."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    text = "\n".join([platform.machine(), *(told or [platform.processor()])])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _where(header: Header) -> str:
    """`8 x cpu, mesh fsdp=4,tensor=2`."""
    return f"{len(header.devices)} x {header.device_kind}, mesh {mesh_text(header.mesh) or 'of one device'}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _differences(file: Header, here: Header) -> str:
    """What explains another program best: settings, else arguments, else the code."""
    for what, before, now in (("", file.settings, here.settings), ("argument ", file.arguments, here.arguments)):
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if changed:
            shown = [f"{what}{name} is {before.get(name)} in it and {now.get(name)} here" for name in changed[:4]]
            more = f", and {len(changed) - 4} more differ" if len(changed) > 4 else ""
            return ", ".join(shown) + more
    return "arguments and settings are the same, so the model, its layout or the code differ"

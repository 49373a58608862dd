"""Many processes as one program: how a process learns of the others and joins them, before JAX is first used.

Every process runs the same command. Each is told where it belongs by three variables of its environment:

    JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 meshloom train ...
    JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 meshloom train ...

The address is that of process 0, which opens the port. Under `srun` and `mpirun` with more than one task, nothing need
be set: JAX reads it from their variables. `JAX_COORDINATOR_ADDRESS=auto` has JAX ask wherever else it knows to ask
(Cloud TPU metadata, Kubernetes). Otherwise there is one process.

A process that waits longer than MESHLOOM_JOIN_SECONDS (default 300) for the others ends with an error. One that dies
later takes the others with it, when its heartbeat has been missing for 100 seconds.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from meshloom.core.errors import ConfigError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TIMEOUT = "MESHLOOM_JOIN_SECONDS"
# Launchers that JAX reads by itself, and where they say how many processes there are.
_LAUNCHERS = {"SLURM_PROCID": "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one process belongs: the address of process 0, how many processes there are, and which of them this is."""

    host: str
    port: int
    count: int
    index: int


def join_processes() -> None:
    """Joins the other processes if the environment tells of any; does nothing the second time.

    Raises:
        ConfigError: the variables are incomplete or make no sense, JAX has been used before, or the others did not
            come in time.
    """
    if jax.distributed.is_initialized():
        return
    place = place_of(os.environ)
    seconds = _number(os.environ, TIMEOUT, 1, default="300")
    # Without a method, JAX would ask a launcher which devices are this process's; the three variables say all.
    arguments: dict[str, Any] = {"cluster_detection_method": "deactivate"}
    if isinstance(place, Place):
        if place.count == 1:
            return
        meet(place, seconds)
        arguments |= {"coordinator_address": f"{place.host}:{place.port}"}
        arguments |= {"num_processes": place.count, "process_id": place.index}
    elif place == "detected":
        arguments = {}
    else:
        return
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=seconds)
    except Exception as error:  # RuntimeError where JAX is in use, ValueError and XLA's own elsewhere
        raise ConfigError(f"could not join the other processes: {str(error).strip().splitlines()[0]}") from error


def place_of(environment: Mapping[str, str]) -> Place | str | None:
    """What the environment says: a place, "detected" (JAX knows how to find out), or None for a single process.

    Raises:
        ConfigError: the variables are incomplete, or no whole numbers in range.
    """
    address = environment.get(ADDRESS, "")
    if address == "auto":
        return "detected"
    given = [name for name in (ADDRESS, COUNT, INDEX) if environment.get(name)]
    if not given:
        return "detected" if any(_tasks(environment, *names) > 1 for names in _LAUNCHERS.items()) else None
    if missing := [name for name in (ADDRESS, COUNT, INDEX) if name not in given]:
        raise ConfigError(f"{', '.join(given)} set without {', '.join(missing)}; several processes need all three")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f'{ADDRESS} must be "auto" or host:port of process 0; got {address!r}')
    count, index = _number(environment, COUNT, 1), _number(environment, INDEX, 0)
    if index >= count:
        raise ConfigError(f"{INDEX} must lie in 0..{count - 1} with {COUNT}={count}; got {index}")
    return Place(host, int(port), count, index)


def meet(place: Place, seconds: float) -> None:
    """Returns when all processes are there, on the port that JAX will use next.

    JAX waits too, but when a process stays away it aborts the others without a word that a person would understand.

    Raises:
        ConfigError: some did not come within `seconds`; process 0 names them.
    """
    deadline = time.monotonic() + seconds
    if place.index == 0:
        _await_others(place, seconds, deadline)
    else:
        _call_on_first(place, seconds, deadline)


def joined() -> tuple[int, int]:
    """Which process of how many this is; unlike `jax.process_index`, it starts no backend, so devices can follow."""
    from jax._src.distributed import global_state  # nothing public says it without a backend

    return global_state.process_id, global_state.num_processes


def any_process(here: bool) -> bool:
    """Whether it holds in any process; all must ask, and all get the same answer."""
    return here if jax.process_count() == 1 else bool(np.any(process_allgather(np.bool_(here))))


def check_agreement(values: Mapping[str, Any]) -> None:
    """Returns when all processes have come here with the same values.

    Args:
        values: JSON.
    Raises:
        ConfigError: they differ; names which.
    """
    if jax.process_count() == 1:
        return
    hashes = [zlib.crc32(json.dumps(value, sort_keys=True).encode()) for value in values.values()]
    gathered = process_allgather(np.asarray(hashes, np.uint32))
    if different := [name for name, column in zip(values, gathered.T, strict=True) if np.any(column != column[0])]:
        raise ConfigError(
            f"the processes do not agree about {', '.join(different)}; start all of them with the same command, on the "
            "same files (run_dir on a file system that all of them see)"
        )


def _await_others(place: Place, seconds: float, deadline: float) -> None:
    missing = set(range(1, place.count))
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with contextlib.ExitStack() as open_sockets:
        try:
            server = socket.create_server(("", place.port), family=family, dualstack_ipv6=dual, backlog=place.count)
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot open port {place.port} of {ADDRESS}: {error.strerror}; choose another port"
            ) from error
        open_sockets.enter_context(server)
        others = []
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                names = ", ".join(map(str, sorted(missing)))
                raise ConfigError(
                    f"of {place.count} processes, {names} did not come within {seconds:g} s. Start each with its own "
                    f"{INDEX} and the same {ADDRESS}, which must reach this machine: it was told "
                    f"{place.host}:{place.port}"
                ) from None
            open_sockets.enter_context(connection)
            connection.settimeout(5)
            with contextlib.suppress(OSError):  # whoever says nothing is none of ours
                missing.discard(int.from_bytes(connection.recv(4), "big"))
                others.append(connection)
        for connection in others:
            with contextlib.suppress(OSError):
                connection.sendall(b"!")


def _call_on_first(place: Place, seconds: float, deadline: float) -> None:
    reason = "the others did not come"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((place.host, place.port), timeout=left) as connection:
                connection.sendall(place.index.to_bytes(4, "big"))
                if connection.recv(1) == b"!":
                    return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.1, max(left, 0)))  # process 0 may not have started yet
    raise ConfigError(
        f"process {place.index} could not meet process 0 at {place.host}:{place.port} within {seconds:g} s: {reason}. "
        f"Is process 0 running, is {ADDRESS} its address, and is the port open between the machines?"
    )


def _tasks(environment: Mapping[str, str], present: str, count: str) -> int:
    """Tasks that a launcher started; a batch script outside `srun` has a count but is one process."""
    return int(environment[count]) if present in environment and environment.get(count, "").isdecimal() else 1


def _number(environment: Mapping[str, str], name: str, smallest: int, default: str = "") -> int:
    text = environment.get(name) or default
    if not text.isdecimal() or int(text) < smallest:
        raise ConfigError(f"{name} must be a whole number of at least {smallest}; got {text!r}")
    return int(text)

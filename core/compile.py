"""Compilation as something to be seen: a persistent cache, compiling ahead of time, and a guard that counts compiles.

A compile after warm-up is a stall for somebody; `CompileGuard` makes it an error in tests and a number in production.
"""

import contextlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from meshloom.core.errors import MeshloomError

# Recorded once per XLA module that is compiled or read from the persistent cache; either way somebody waited.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def cache_folder() -> pathlib.Path:
    """Meshloom's folder in the user's cache, `$XDG_CACHE_HOME/meshloom` or `~/.cache/meshloom`; not created."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "meshloom"


def enable_compilation_cache(folder: str | pathlib.Path | None = None) -> pathlib.Path:
    """Keeps compiled programs on disk, so that a restart does not compile again. Returns the folder.

    A folder that JAX_COMPILATION_CACHE_DIR already names is kept. Programs that took less than 0.2 s are not worth a
    file.
    """
    current = jax.config.jax_compilation_cache_dir
    target = pathlib.Path(folder or current or cache_folder() / "xla")
    jax.config.update("jax_compilation_cache_dir", str(target))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return target


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compiles inside are not read from the persistent cache and not written to it.

    For devices that are elsewhere: JAX writes their programs to the cache and cannot read them back.
    """
    folder = jax.config.jax_compilation_cache_dir
    if folder is None:
        yield
        return
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def compile_ahead(function: Callable[..., Any], *arguments: Any, **jit_options: Any) -> jax.stages.Compiled:
    """Compiles `function` for arguments given as arrays or `ShapeDtypeStruct`s; calling the result never compiles."""
    return jax.jit(function, **jit_options).lower(*arguments).compile()


class _Counter:
    """Counts compiles in this process, from the first time somebody asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening = False
        self.count = 0

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1

    def listen(self) -> None:
        with self._lock:
            if not self._listening:
                jax.monitoring.register_event_duration_secs_listener(self._heard)
                self._listening = True


_COUNTER = _Counter()


def compile_count() -> int:
    """Programs compiled (or loaded from the persistent cache) in this process since this was first called."""
    _COUNTER.listen()
    return _COUNTER.count


class CompileGuard:
    """Counts the compiles inside a `with` block and, unless `allowed`, raises at its end when there were any."""

    def __init__(self, allowed: bool = False):
        self.allowed = allowed
        self.compiles = 0

    def __enter__(self) -> "CompileGuard":
        self._start = compile_count()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.compiles = compile_count() - self._start
        if kind is None and self.compiles and not self.allowed:
            raise MeshloomError(f"{self.compiles} program(s) compiled where none may: a shape was not warmed up")

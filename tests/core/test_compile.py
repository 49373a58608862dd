"""The guard sees every compile, and only compiles."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from meshloom.core.compile import CompileGuard, cache_folder, compile_ahead, enable_compilation_cache
from meshloom.core.errors import MeshloomError


def test_guard_raises_on_a_new_shape_and_not_on_a_known_one():
    double = jax.jit(lambda x: x * 2 + 1)
    known, new = jnp.ones(17), jnp.ones(18)
    double(known)
    with CompileGuard():
        double(known)
    with pytest.raises(MeshloomError, match=r"1 program\(s\) compiled where none may"), CompileGuard():
        double(new)


def test_guard_can_count_instead_of_raising():
    x = jnp.ones(19)
    with CompileGuard(allowed=True) as guard:
        jax.jit(lambda x: x * 3)(x)
    assert guard.compiles == 1


def test_compiled_ahead_of_time_never_compiles():
    compiled = compile_ahead(lambda x: x + 1, jax.ShapeDtypeStruct((5,), jnp.float32))
    x = jnp.ones(5)
    with CompileGuard():
        y = compiled(x)
    assert y.tolist() == [2.0] * 5


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "meshloom"


FIRST_COMPILES_THEN_ENABLES_THE_CACHE = """
import jax, jax.numpy as jnp
from meshloom.core.compile import CompileGuard, enable_compilation_cache
x = jnp.ones(3) + 1  # compiled before there was a cache
print(enable_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
heard = []
jax.monitoring.register_event_listener(lambda event, **_: heard.append(event))
with CompileGuard(allowed=True) as guard:
    jax.jit(lambda x: jnp.sin(x) * 2)(x)
print(guard.compiles, heard.count("/jax/compilation_cache/cache_hits"))
"""


def test_a_restart_reads_what_was_compiled_and_the_guard_still_sees_the_wait(tmp_path):
    outside = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    for hits in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", FIRST_COMPILES_THEN_ENABLES_THE_CACHE],
            env=outside | {"XDG_CACHE_HOME": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.split() == [str(tmp_path / "meshloom" / "xla"), "1", str(hits)], done.stderr


def test_a_cache_that_was_chosen_already_is_kept(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
        assert enable_compilation_cache() == tmp_path / "chosen"
        assert enable_compilation_cache(tmp_path / "named") == tmp_path / "named"
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])

"""The guard sees every compile, and only compiles."""

import jax
import jax.numpy as jnp
import pytest

from meshloom.core.compile import CompileGuard, cache_folder, compile_ahead
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

"""Compilers in tests: `jax.jit` for many small programs, and marks where a compiler for other hardware is asked."""

import functools
import importlib.util

import jax
import pytest

# Most of the time of a small case is LLVM's optimization, which is no part of what a program means or sends.
QUICK = {"xla_backend_optimization_level": 0}
quickly = functools.partial(jax.jit, compiler_options=QUICK)

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin (4.7 GB with its libraries) is not installed",
)

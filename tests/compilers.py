"""Marks of tests that ask a compiler for other hardware."""

import importlib.util

import pytest

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin (4.7 GB with its libraries) is not installed",
)

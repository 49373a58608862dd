"""Marks for tests that ask a compiler for other hardware, and the reason where it is not installed; and what a program
for TPUs runs while arrays travel."""

import importlib.util

import pytest

from meshloom.core.hlo import Instruction, Module

needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="JAX's CUDA plugin (4.7 GB with its libraries) is not installed",
)


def kernels_of(module: Module, instruction: Instruction) -> int:
    """Kernels for TPUs that an instruction may run."""
    found = int(instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes)
    called = [name for names in instruction.called.values() for name in names]
    return found + sum(kernels_of(module, each) for name in called for each in module.computations[name].instructions)


def permutes(module: Module) -> list[tuple[Instruction, int]]:
    """What begins each permutation, and how many kernels may run before it ends."""
    found = []
    for computation in module.computations.values():
        order = computation.instructions
        done = {each.operands[0]: i for i, each in enumerate(order) if each.opcode == "collective-permute-done"}
        for start, each in enumerate(order):
            if each.opcode == "collective-permute-start":
                between = order[start + 1 : done[each.name]]
                found.append((each, sum(kernels_of(module, other) for other in between)))
    return found

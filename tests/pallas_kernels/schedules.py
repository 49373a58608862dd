"""What a TPU runs while arrays travel, read from scheduled programs."""

from meshloom.core.hlo import Instruction, Module


def permutes(module: Module) -> list[tuple[Instruction, int]]:
    """What begins each permutation, and how many kernels may run before it ends."""
    found = []
    for computation in module.computations.values():
        order = computation.instructions
        done = {each.operands[0]: i for i, each in enumerate(order) if each.opcode == "collective-permute-done"}
        for start, each in enumerate(order):
            if each.opcode == "collective-permute-start":
                between = order[start + 1 : done[each.name]]
                found.append((each, sum(_kernels_of(module, other) for other in between)))
    return found


def _kernels_of(module: Module, instruction: Instruction) -> int:
    """Kernels for TPUs that an instruction may run."""
    found = int(instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes)
    called = [name for names in instruction.called.values() for name in names]
    return found + sum(_kernels_of(module, each) for name in called for each in module.computations[name].instructions)

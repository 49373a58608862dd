"""Which arrays are in memory when a compiled program needs most of it, and where in the model they come from.

XLA says how much it needs, not of what. The scheduled program says the rest: an array lives from the instruction that
makes it to the last one that reads it, and loops carry theirs in place. The sum is an estimate, 0.7 to 1.2 of the
compiler's own figure on training steps for TPU and GPU, because what it shares and pads is not in the text; which
arrays are largest, and whose they are, is.
"""

import dataclasses

from meshloom.core.hlo import Computation, Instruction, Module

# What these give out is (part of) what they are given, in place.
_SAME = {
    "tuple", "get-tuple-element", "bitcast", "while", "optimization-barrier", "dynamic-update-slice", "scatter",
    "add-dependency", "call", "conditional", "domain",
}  # fmt: skip


# Scopes that JAX adds between those of the model.
_FRAMES = {
    "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "eval_jaxpr", "step", "remat2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array at the peak: `operation` is its path of scopes in the model, `source` the line that makes it."""

    bytes: int
    shape: str
    operation: str
    source: str


@dataclasses.dataclass(frozen=True)
class _Live:
    """Arrays at the fullest moment of a computation; its own only, not what it is given."""

    bytes: int
    made: tuple[tuple[Instruction, int], ...]  # the instruction, and which of its results


def largest_buffers(module: Module, limit: int = 10) -> tuple[Buffer, ...]:
    """The largest temporaries at the peak, largest first. Arguments of the program are not among them."""
    live = _Peak(module).of(module.entry)
    made = sorted(live.made, key=lambda each: -each[0].shapes[each[1]].bytes)
    found = []
    for instruction, index in made[:limit]:
        shape, named = instruction.shapes[index], _named(module, instruction)
        found.append(Buffer(shape.bytes, shape.text, module_path(named.operation), module.source(named)))
    return tuple(found)


def peak_bytes(module: Module) -> int:
    """Bytes of all temporaries at the peak."""
    return _Peak(module).of(module.entry).bytes


def _named(module: Module, instruction: Instruction) -> Instruction:
    """The instruction that says what an array is for: the one that makes it, or the first to write to it in a loop."""
    if _is_named(instruction) and instruction.opcode not in ("broadcast", "copy"):
        return instruction
    computation = next(each for each in module.computations.values() if instruction.name in each.by_name)
    carried = {instruction.name}
    for each in computation.instructions:
        if each.opcode == "tuple" and carried & set(each.operands):
            place = next(place for place, name in enumerate(each.operands) if name in carried)
            loops = (one for one in computation.instructions if one.opcode == "while" and each.name in one.operands)
            for loop in loops:
                body = module.computations[loop.called["body"][0]]
                inner = body.by_name.get(body.root.operands[place])
                if inner is not None and _is_named(stored := _stored(module, body, inner)):
                    return stored
        elif carried & set(each.operands):
            if _is_named(each) and each.opcode not in ("bitcast", "copy"):
                return each
            carried.add(each.name)
    return instruction


def _is_named(instruction: Instruction) -> bool:
    """Whether the model's scopes stand in its name; XLA names its own after an instruction: `broadcast.105`."""
    return "/" in instruction.operation


def _stored(module: Module, computation: Computation, instruction: Instruction) -> Instruction:
    """What an instruction that writes one layer's part into a stack of them puts there; else the instruction."""
    while (
        instruction.opcode in ("bitcast", "get-tuple-element", "copy")
        and instruction.operands[0] in computation.by_name
    ):
        instruction = computation.by_name[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
        return _maker(computation, computation.by_name[instruction.operands[1]]) or instruction
    if instruction.opcode != "fusion":
        return instruction
    inner = module.computations[instruction.called["calls"][0]]
    writes = [each for each in inner.instructions if each.opcode == "dynamic-update-slice"]
    for write in writes:
        made = inner.by_name[write.operands[1]]
        while made.opcode in ("bitcast", "reshape", "copy") or (made.opcode != "parameter" and not _is_named(made)):
            made = inner.by_name[made.operands[0]]
        if made.opcode != "parameter":
            return made
        outer = computation.by_name.get(instruction.operands[int(made.arguments)])
        if outer is not None and (found := _maker(computation, outer)) is not None:
            return found
    return instruction


def _maker(computation: Computation, instruction: Instruction) -> Instruction | None:
    """The first instruction with a name of the model's on the way that an array came."""
    while not _is_named(instruction) or instruction.opcode in ("bitcast", "get-tuple-element", "copy"):
        if not instruction.operands or instruction.operands[0] not in computation.by_name:
            return None
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def module_path(operation: str) -> str:
    """The model's own scopes: `mlp/dot_general` of `jit(step)/while/body/jvp()/checkpoint/mlp/dot_general`."""
    inner = []
    for part in operation.split("/"):
        name = part
        while name.endswith(")") and "(" in name:
            name = name[name.index("(") + 1 : -1]
        if name and name not in _FRAMES and not name.startswith("_"):
            inner.append(name)
    backward = "backward of " if "transpose(" in operation else ""
    return backward + "/".join(inner)


class _Peak:
    """Fullest moments of computations, each looked at once."""

    def __init__(self, module: Module):
        self.module = module
        self.known: dict[str, _Live] = {}

    def of(self, name: str) -> _Live:
        if name not in self.known:
            self.known[name] = self._peak(self.module.computations[name])
        return self.known[name]

    def _peak(self, computation: Computation) -> _Live:
        instructions = computation.instructions
        owners = self._owners(computation)
        returned = set().union(*owners[computation.root.name]) if computation.root.name in owners else set()
        last: dict[tuple[str, int], int] = {}
        for position, each in enumerate(instructions):
            for name in (each.name, *each.operands):
                for owner in (owner for result in owners.get(name, ()) for owner in result):
                    last[owner] = position
        # What a loop's body returns takes the place of what it was given; a program's results are allocated apart.
        ending: dict[int, list[tuple[str, int]]] = {}
        for owner, position in last.items():
            ending.setdefault(position, []).append(owner)
        live: dict[tuple[str, int], int] = {}
        total = 0
        best = _Live(0, ())
        for position, each in enumerate(instructions):
            for index, shape in enumerate(each.shapes):
                owner = (each.name, index)
                if owner in last and owner not in returned and shape.in_memory:
                    live[owner] = shape.bytes
                    total += shape.bytes
            inner = max((self.of(name) for name in self._bodies(each)), key=lambda one: one.bytes, default=_Live(0, ()))
            if total + inner.bytes > best.bytes:
                here = tuple((computation.by_name[name], index) for name, index in live)
                best = _Live(total + inner.bytes, here + inner.made)
            for owner in ending.get(position, ()):
                total -= live.pop(owner, 0)
        return best

    def _bodies(self, instruction: Instruction) -> list[str]:
        """Computations that run with memory of their own; a fusion or a reduction has none."""
        if instruction.opcode not in ("while", "call", "conditional", "async-start"):
            return []
        return [name for role, names in instruction.called.items() if role != "condition" for name in names]

    def _owners(self, computation: Computation) -> dict[str, list[set[tuple[str, int]]]]:
        """Per instruction and result, which arrays of this computation it is: (instruction that makes it, which)."""
        owners: dict[str, list[set[tuple[str, int]]]] = {}
        for each in computation.instructions:
            given = [owners.get(name, []) for name in each.operands]
            if each.opcode in ("parameter", "constant"):
                owners[each.name] = [set() for _ in each.shapes]
            elif each.opcode == "tuple":
                owners[each.name] = [one for results in given for one in results]
            elif each.opcode == "get-tuple-element":
                owners[each.name] = self._element(computation, each, given[0] if given else [])
            elif each.opcode in _SAME or each.opcode.endswith("-done") or self._updates(each):
                first = given[0] if given else []
                fits = len(first) == len(each.shapes)
                owners[each.name] = first if fits else [set().union(*first) for _ in each.shapes]
            else:
                owners[each.name] = [{(each.name, index)} for index in range(len(each.shapes))]
        return owners

    def _element(
        self, computation: Computation, instruction: Instruction, given: list[set[tuple[str, int]]]
    ) -> list[set[tuple[str, int]]]:
        """One element of a tuple; an element that is a tuple itself spans several arrays."""
        source = computation.by_name[instruction.operands[0]]
        width = len(instruction.shapes)
        start = instruction.number("index")
        return (
            given[start : start + width] if len(given) == len(source.shapes) and width == 1 else [set().union(*given)]
        )

    def _updates(self, instruction: Instruction) -> bool:
        """Whether a fusion writes into its first operand."""
        if instruction.opcode != "fusion":
            return False
        root = self.module.computations[instruction.called["calls"][0]].root
        return root.opcode in ("dynamic-update-slice", "scatter")

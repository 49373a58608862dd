"""The text of a compiled program as data: computations, instructions, loops and source lines.

XLA's Python face gives figures for a whole program only; which collective, which loop and which line of the model they
come from stands in its scheduled HLO text. What is read here is what `Compiled.as_text()` prints for TPU, GPU and CPU;
nothing is judged.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16,
    "u16": 16, "f32": 32, "s32": 32, "u32": 32, "f64": 64, "s64": 64, "u64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_END = re.compile(r"\}(?:, execution_thread=.*)?")  # of a computation
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of a result: `bytes` as stored without padding, and whether it is in the device's main memory."""

    text: str
    bytes: int
    in_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        result: text of its shape, a tuple's included. attributes: everything after the operands.
    """

    name: str
    result: str
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result, in order; one unless it is a tuple."""
        return tuple(shapes_of(self.result))

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Attribute -> computations: `calls` of a fusion, `body` and `condition` of a loop."""
        return {
            match[0].partition("=")[0]: tuple(_NAME.findall(match[1])) for match in _CALLED.finditer(self.attributes)
        }

    @property
    def operation(self) -> str:
        """The path of scopes down to the primitive, as JAX names it: `jit(step)/.../mlp/dot_general`."""
        return _quoted("op_name", self.attributes)

    def number(self, name: str) -> int:
        """The attribute `name=5`; 0 where it has none."""
        match = re.search(rf"\b{name}=(\d+)", self.attributes)
        return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {each.name: each for each in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(each for each in reversed(self.instructions) if each.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program. `frames`: stack frame -> (file, line) of its innermost call."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, int]]

    def visits(self) -> Iterator[tuple[Computation, float, Instruction | None]]:
        """Every computation that runs, how often, and what calls it; a loop of unknown length counts once.

        What a fusion or a reduction calls is visited too: a collective may hide there.
        """
        pending: list[tuple[str, float, Instruction | None]] = [(self.entry, 1.0, None)]
        while pending:
            name, times, caller = pending.pop()
            computation = self.computations[name]
            yield computation, times, caller
            for each in computation.instructions:
                for role, names in each.called.items():
                    trips = (self.trips(each) or 1) if role == "body" else 1
                    if role != "condition":
                        pending += [(called, times * trips, each) for called in names]

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs: it counts from 0 in equal steps to a limit; None if its end is data."""
        if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(match[1])
        condition = self.computations[loop.called["condition"][0]]
        compare, operands = self._inlined(condition.root, condition)
        limit = next((each for each in operands if each.opcode == "constant"), None)
        counter = next((each for each in operands if each.opcode == "get-tuple-element"), None)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes or limit is None or counter is None:
            return None
        body = self.computations[loop.called["body"][0]]
        following = body.by_name[body.root.operands[counter.number("index")]]
        _, operands = self._inlined(following, body)
        step = next((int(each.arguments) for each in operands if each.opcode == "constant"), 1)
        return -(-int(limit.arguments) // step)

    def _inlined(self, instruction: Instruction, inside: Computation) -> tuple[Instruction, list[Instruction]]:
        """An operation and its operands, also where a fusion has nothing but that operation in it."""
        operands = [inside.by_name[name] for name in instruction.operands if name in inside.by_name]
        if instruction.opcode != "fusion":
            return instruction, operands
        inner = self.computations[instruction.called["calls"][0]]
        own = [inner.by_name[name] for name in inner.root.operands]
        return inner.root, [operands[int(each.arguments)] if each.opcode == "parameter" else each for each in own]

    def source(self, instruction: Instruction) -> str:
        """`decoder.py:88`, the line of the model that the instruction comes from, or ""."""
        file, line = self.frames.get(instruction.number("stack_frame_id"), ("", 0))
        return f"{file}:{line}" if file else ""


def parse(text: str) -> Module:
    """Reads `Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        if name and _END.fullmatch(line):
            found = (_instruction(each) for each in lines)
            computations[name] = Computation(name, tuple(each for each in found if each is not None))
            name = ""
        elif name and line.startswith("  "):
            lines.append(line)
        elif name and lines:  # what kernels say of themselves may hold ends of lines
            lines[-1] += line
        elif line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            name, lines = match[2], []
            entry = name if match[1] else entry
    return Module(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    arguments = rest[1:end]
    return Instruction(
        match[2], result, opcode, tuple(_NAME.findall(arguments)), arguments, rest[end + 1 :], bool(match[1])
    )


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def shapes_of(text: str) -> Iterator[Shape]:
    """The arrays of a shape's text."""
    for match in _ARRAY.finditer(text):
        sizes = [int(size.lstrip("<=")) for size in match[2].split(",") if size]
        bits = _BITS.get(match[1], 8 if match[1].startswith("f8") else 0)
        # S(1) and up are on-chip memories, host memory, semaphores.
        space = re.search(r"S\((\d+)\)", match[3] or "")
        yield Shape(f"{match[1]}[{match[2]}]", math.prod(sizes) * bits // 8, space is None or space[1] == "0")


def _quoted(name: str, text: str) -> str:
    match = re.search(rf'{name}="([^"]*)"', text)
    return match[1] if match else ""


def _frames(text: str) -> dict[int, tuple[str, int]]:
    """The tables after the computations: files, locations, frames."""
    files = {int(n): name for n, name in re.findall(r'^(\d+) "([^"]*)"$', _section(text, "FileNames"), re.M)}
    locations = {
        int(n): (files.get(int(file), ""), int(line))
        for n, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?line=(\d+)", _section(text, "FileLocations"), re.M
        )
    }
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", _section(text, "StackFrames"), re.M)
    return {int(n): locations[int(place)] for n, place in frames if int(place) in locations}


def _section(text: str, title: str) -> str:
    match = re.search(rf"^{title}\n((?:\d+ .*\n?)*)", text, re.M)
    return match[1] if match else ""

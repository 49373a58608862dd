"""What the TPU's compiler made of a kernel, instruction by instruction: exact figures with no TPU and no noise.

libtpu writes the final schedule of every program it compiles when it is told to before it starts. A TPU core issues one
bundle per cycle, so the bundles of a region are its cycles unless it waits: for copies from HBM, for semaphores, and
for a unit that is busy. Those waits are not in the figures.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re

from meshloom.core.errors import ConfigError

_LINE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*: ?(>*)")
_LOOP = re.compile(r"^\s*0x[0-9a-f]+\s+LB:")
_REGION = re.compile(r"(Start|End|Start/End empty) region (\d+)")
_REPORT = re.compile(r"const DATA =(\{.*?\});", re.DOTALL)  # in the page that libtpu writes on fast memory
_ARGUMENT = "LIBTPU_INIT_ARGS"


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of a kernel's schedule that runs as a whole: a loop body or a branch, without the regions inside it.

    Attributes:
        number: as the compiler counts.
        bundles: instruction words; cycles, if nothing waits.
        loops: whether it is the body of a loop itself; a branch in that body is not.
        matmuls: vmatmul instructions by the dtype of their operands.
        spills, fills: vector registers written to memory for want of registers, and read back.
        depth: loops around it, its own among them. copies: DMAs that it starts.
    """

    number: int
    bundles: int
    loops: bool
    matmuls: dict[str, int]
    spills: int
    fills: int
    depth: int = 0
    copies: int = 0


def dump_bundles(folder: str | pathlib.Path) -> None:
    """Has libtpu leave the schedules of all it compiles from now on in `folder`; call it before anything compiles.

    Only the last of some 70 passes: all are 300 MB for one attention kernel, and writing them doubles the time.
    """
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    os.environ[_ARGUMENT] = f"{os.environ.get(_ARGUMENT, '')} {flags}".strip()


def kernel_regions(folder: str | pathlib.Path, kernel: str) -> list[Region]:
    """The regions of the kernel called `kernel` (the `name` of its `pallas_call`), in the order of their first bundle.

    Raises:
        ConfigError: the folder holds no schedule of it; libtpu was asked too late, or read the program from a cache.
    """
    return regions(_schedule(folder, kernel))


def _schedule(folder: str | pathlib.Path, kernel: str) -> str:
    named = re.compile(rf"^\d+-{_named(kernel)}-\d+-final_bundles\.txt$")
    files = sorted(path for path in pathlib.Path(folder).iterdir() if named.match(path.name))
    if not files:
        raise ConfigError(f"no schedule of a kernel {kernel!r} in {folder}; ask for schedules before libtpu starts")
    return files[-1].read_text()


def _named(kernel: str) -> str:
    """How XLA spells a kernel's name: with what it was traced under around it, as in transpose(jvp(flash))."""
    return rf"(?:(?:jvp|transpose|jit|vmap)_)*{re.escape(kernel)}_*(?:\.\d+)?"


def kernel_memory(folder: str | pathlib.Path, kernel: str) -> int | None:
    """Bytes of fast memory that a kernel takes, as the compiler reports them: windows, scratch and spilled registers.

    An operand that XLA keeps in fast memory whole has no window there; two are counted for it, as if it came from HBM.
    None where there is no report.
    """
    named = _named(kernel)
    for path in sorted(pathlib.Path(folder).glob("*vmem_report.html"), reverse=True):
        found = _REPORT.search(path.read_text())
        for instruction, entry in (json.loads(found[1])["hlo_breakdowns"] if found else {}).items():
            if re.fullmatch(named, instruction):
                return entry["total_size"] + 2 * _held_whole(folder, kernel)
    return None


def _held_whole(folder: str | pathlib.Path, kernel: str) -> int:
    """Bytes of one window of every operand and result that lies in fast memory whole."""
    text = _schedule(folder, kernel)
    entry = text[: text.index(" /* entry bundle")] if " /* entry bundle" in text else ""
    total = 0
    for dtype, shape in re.findall(r"inlined_call_operand\.vmem [^%]*?window shape is ([a-z0-9]+)\[([0-9,]+)\]", entry):
        total += math.prod(map(int, shape.split(","))) * int(re.findall(r"\d+", dtype)[0]) // 8
    return total


def regions(text: str) -> list[Region]:
    """The regions of one schedule, from the text of its `final_bundles` file."""
    open_regions: list[int] = [0]
    counts: dict[int, collections.Counter[str]] = {0: collections.Counter()}
    for line in text.splitlines():
        events = _REGION.findall(line)
        for event, number in events:
            if event == "Start":
                open_regions.append(int(number))
                counts.setdefault(int(number), collections.Counter())
        if bundle := _LINE.match(line):
            count = counts[open_regions[-1]]
            if not count["bundles"]:
                count["depth"] = len(bundle[2])
            count["bundles"] += 1
            count["copies"] += len(re.findall(r"= dma\.", line))
            count["loops"] += bool(_LOOP.match(line))
            count["spills"] += len(re.findall(r"vst \[vmem:\[#allocation\d+_spill", line))
            count["fills"] += len(re.findall(r"vld \[vmem:\[#allocation\d+_spill", line))
            for dtype in re.findall(r"vmatmul\.(?:mubr\.|msk\.)*([a-z0-9]+)", line):
                count[f"matmul {dtype}"] += 1
        for event, number in events:
            if event == "End" and int(number) in open_regions[1:]:
                open_regions.remove(int(number))
    return [
        Region(
            number,
            count["bundles"],
            bool(count["loops"]),
            {key.split()[1]: value for key, value in count.items() if key.startswith("matmul ")},
            count["spills"],
            count["fills"],
            count["depth"],
            count["copies"],
        )
        for number, count in counts.items()
        if count["bundles"]
    ]

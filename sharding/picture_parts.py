"""The parts of a picture with their measures, before anything is placed: texts decide how wide a part is.

Sides are drawn as powers of sizes: a vocabulary is thirty times a head's width, and both must be seen. All lengths are
in pixels. It knows no places; `picture.py` finds them.
"""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from meshloom.sharding.explain import bytes_text
from meshloom.sharding.sketch import TIMES, Branch, Column, Cut, Moved, Side, Sketch, Weight

Pixels = float | int

WIDTH, DPI = 1600, 100
# Okabe and Ito's colours, told apart by all; texts are darker, for contrast.
PAIR, STORE, CONTEXT, SILENT = "#0072B2", "#E69F00", "#009E73", "#CC4C9B"
TEXT = {PAIR: "#005A8E", STORE: "#8A5A00", CONTEXT: "#00694D", SILENT: "#9C2470"}
_CAUSED = {"store": STORE, "context": CONTEXT, "silent": SILENT}  # all else comes of the pair rule
INK, GREY, LINE, WHOLE, PIECE, FRAME = "#1F2933", "#5F6B76", "#7B8794", "#E4E9EE", "#35495E", "#F8F6F0"
FRAME_EDGE, STREAM_FILL = "#CFC6B0", "#CBD2D9"
FONT = "DejaVu Sans"  # matplotlib brings it along
SMALL, NORMAL, LARGE = 11.5, 12.5, 19.0  # points: 16, 17 and 26 pixels
MARGIN, LEAD, LEGEND_GAP = 36, 21, 54  # around all; from one line of text to the next, one entry to the next
MOST_CUTS = 8  # more lie too close to be told apart
ABOVE, STREAM, BELOW = 36, 28, 30  # a row's heading, its stream, and from there to its weights
# Between branches; between weights; to the texts beside one, or under it; the shortest piece of wire.
BRANCH_GAP, CELL_GAP, BESIDE, UNDER, WIRE = 20, 20, 12, 8, 26
SHEET = 6  # each matrix of several lies so far behind the one before


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of text beside a weight."""

    text: str
    color: str
    bold: bool = False


@dataclasses.dataclass(frozen=True)
class Pill:
    """A collective, on the wire or beside the weight that it is of."""

    lines: tuple[str, ...]
    color: str
    width: Pixels

    @property
    def height(self) -> Pixels:
        return 10 + LEAD * len(self.lines)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A weight with its measures: the rectangle, and the texts and pills to its right."""

    weight: Weight
    across: Pixels
    down: Pixels
    lines: tuple[Line, ...]
    pills: tuple[Pill, ...]
    is_beside: bool  # the texts, to the right of the rectangle and not under it
    width: Pixels
    above: Pixels  # from its wires upwards, and below them
    below: Pixels

    @property
    def texts_height(self) -> Pixels:
        return LEAD * len(self.lines) + sum(each.height + 4 for each in self.pills)


@dataclasses.dataclass(frozen=True)
class Block:
    """A branch with its measures."""

    branch: Branch
    repeats: int
    columns: tuple[tuple[Cell, ...], ...]
    gaps: tuple[tuple[Pill, ...], ...]  # what is on the wire after each column
    gap_widths: tuple[Pixels, ...]
    width: Pixels
    above: Pixels
    below: Pixels


class Measures:
    """What a sketch's parts measure, at the scale of its largest weight."""

    def __init__(self, shown: Sketch):
        self.shown = shown
        self.renderer: Any = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=DPI)).get_renderer()
        self.cuts = [
            cut
            for frame in shown.frames
            for branch in frame.branches
            for column in branch.columns
            for weight in column.weights
            for side in sides_of(weight)
            for cut in side.cuts
        ]
        sizes = [
            side.size
            for frame in shown.frames
            for branch in frame.branches
            for column in branch.columns
            for weight in column.weights
            for side in (weight.down, weight.across)
        ]
        self.largest = max(sizes, default=1)

    def measured(self, text: str, size: float, *, bold: bool = False) -> Pixels:
        """The width of a text of `size` points."""
        font = FontProperties(family=FONT, weight="bold" if bold else "normal", size=size)
        return self.renderer.get_text_width_height_descent(text, font, False)[0]

    def pill(self, moved: Moved, *, wide: bool) -> Pill:
        """On one line beside a weight, on three on a wire."""
        axes, size = "+".join(moved.axes), bytes_text(moved.bytes)
        lines = (f"{moved.collective} {axes} {size}",) if wide else (str(moved.collective), f"over {axes}", size)
        if moved.cause == "silent":
            lines = (*lines, "by no rule")
        color = _CAUSED.get(moved.cause, PAIR)
        return Pill(lines, color, 18 + max(self.measured(line, SMALL) for line in lines))

    def extent(self, size: int) -> Pixels:
        """How long a side is drawn."""
        return max(22.0, 190 * (size / self.largest) ** 0.25)

    def cell(self, weight: Weight, *, is_beside: bool) -> Cell:
        """A weight, with its texts beside it or under it."""
        lines = [Line(weight.name + (" (the same)" if weight.again else ""), INK, bold=True)]
        if weight.sheets is not None:
            lines.append(self.side_line("▤", weight.sheets))
        lines += [self.side_line(sign, side) for sign, side in (("↔", weight.across), ("↕", weight.down)) if side.text]
        held = TIMES.join(str(side.piece) for side in sides_of(weight))
        lines.append(Line(f"■ {held}, {bytes_text(round(weight.bytes))}", PIECE))
        pills = tuple(self.pill(each, wide=True) for each in weight.moved)
        widths = [self.measured(line.text, SMALL, bold=line.bold) for line in lines]
        texts = max([*widths, *(each.width for each in pills)])
        across, down, behind = self.extent(weight.across.size), self.extent(weight.down.size), behind_of(weight)
        cell = Cell(weight, across, down, tuple(lines), pills, is_beside, 0, 0, 0)
        if is_beside:
            half = max(down / 2 + behind, cell.texts_height / 2)
            return dataclasses.replace(cell, width=across + behind + BESIDE + texts, above=half, below=half)
        above, below = down / 2 + behind, down / 2 + UNDER + cell.texts_height
        return dataclasses.replace(cell, width=max(across + behind, texts), above=above, below=below)

    def side_line(self, sign: str, side: Side) -> Line:
        """A side's dimensions and cuts, in the colour of the rule that cuts it."""
        cuts = "".join(f" ÷ {cut.axis} {cut.ways}" for cut in side.cuts)
        color = TEXT[PAIR if side.cuts[0].rule == "pair" else STORE] if side.cuts else GREY
        return Line(f"{sign} {side.text}{cuts}", color)

    def block(self, branch: Branch, repeats: int) -> Block:
        """A branch: columns of weights, and after each the wire with what is on it."""
        columns = tuple(
            tuple(self.cell(weight, is_beside=len(column.weights) > 1) for weight in column.weights)
            for column in branch.columns
        )
        gaps = tuple(self.on_wire(column) for column in branch.columns)
        widths = tuple(2 * WIRE + max((each.width for each in gap), default=0.0) for gap in gaps)
        on_wires = [sum(each.height + 6 for each in gap) / 2 for gap in gaps]
        above, below = (max([*on_wires, *(reach_of(cells)[side] for cells in columns)]) for side in (0, 1))
        width = WIRE + sum(widths) + sum(max(cell.width for cell in cells) for cells in columns)
        return Block(branch, repeats, columns, gaps, widths, width, above, below)

    def on_wire(self, column: Column) -> tuple[Pill, ...]:
        """How results are split (a pill without colour), and collectives."""
        pills = [self.pill(each, wide=False) for each in column.moved]
        if column.split:
            lines = ("split over", " and ".join(column.split))
            width = 18 + max(self.measured(line, SMALL) for line in lines)
            pills.insert(0, Pill(lines, "", width))
        return tuple(pills)

    def summary(self) -> str:
        """What one device holds, and all collectives."""
        held, total = bytes_text(self.shown.bytes_per_device), bytes_text(self.shown.bytes_total)
        moved = ", ".join(f"{kind} {bytes_text(round(count))}" for kind, count in self.shown.moved.items())
        return f"Each device holds {held} of {total} of weights; it gets {moved or 'nothing'} in a forward pass"

    def legend(self) -> list[tuple[str, str]]:
        """What colours mean: colour and text."""
        axes = {rule: dict.fromkeys(each.axis for each in self.cuts if each.rule == rule) for rule in ("pair", "store")}
        columns = [each for frame in self.shown.frames for branch in frame.branches for each in branch.columns]
        entries = [
            *([(PAIR, f"pair rule: {', '.join(axes['pair'])}")] if axes["pair"] else []),
            *([(STORE, f"store rule, gathered at use: {', '.join(axes['store'])}")] if axes["store"] else []),
            (PIECE, "on device 0"),
        ]
        if any(each.cause == "silent" for column in columns for each in column.moved):
            entries.append((SILENT, "no rule intends it"))
        if any(frame.repeats > 1 for frame in self.shown.frames):
            entries.append(("", "bytes: of one layer"))
        return entries

    def left_out(self) -> str:
        """What is not drawn."""
        vectors, others = self.shown.vectors, self.shown.others
        named = ", ".join(others[:2]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
        parts = [f"{vectors} vectors (scales, biases), whole on every device"] if vectors else []
        parts += [f"{named}, in no product"] if others else []
        return f"Not drawn: {'; '.join(parts)}" if parts else ""


def sides_of(weight: Weight) -> tuple[Side, ...]:
    """Outermost first; a side without dimensions (of a vector) is none."""
    return tuple(side for side in (weight.sheets, weight.across, weight.down) if side is not None and side.text)


def sheets_of(weight: Weight) -> int:
    """How many matrices are drawn one behind the other."""
    return 1 if weight.sheets is None else min(weight.sheets.size, 4)


def reach_of(cells: Sequence[Cell]) -> tuple[Pixels, Pixels]:
    """How far a column reaches above its middle and below it. That of a lone weight is the middle of its rectangle."""
    if len(cells) == 1:
        return cells[0].above, cells[0].below
    half = (sum(cell.above + cell.below for cell in cells) + CELL_GAP * (len(cells) - 1)) / 2
    return half, half


def height_of(row: Sequence[Block]) -> Pixels:
    """Of a row whose wires are at one height."""
    return max(block.above for block in row) + max(block.below for block in row)


def behind_of(weight: Weight) -> int:
    """How far the last matrix of a weight lies behind the first."""
    return SHEET * (sheets_of(weight) - 1)


def drawn_cuts(side: Side) -> list[tuple[Cut, int]]:
    """Each cut, and into how many pieces the side is drawn by it and those before it."""
    ways = itertools.accumulate((min(cut.ways, MOST_CUTS) for cut in side.cuts), operator.mul)
    return list(zip(side.cuts, ways, strict=True))


def rule_color(cut: Cut) -> str:
    """Blue or orange."""
    return PAIR if cut.rule == "pair" else STORE


def tint(color: str) -> str:
    """The colour thinned with seven parts of white."""
    parts = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{(part + 7 * 255) // 8:02X}" for part in parts)

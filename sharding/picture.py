"""`meshloom plan --picture`: a layout as one would sketch it on a whiteboard.

The residual stream runs along the top of each row; branches hang below it, their weights from left to right as the data
goes. A weight's residual side goes down and its other one across, so that the cuts of the pair rule stand upright and
those of the store rule lie flat. Lengths are in pixels, y downwards.
"""

import itertools
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from PIL import Image

from meshloom.core.errors import ConfigError
from meshloom.sharding.flow import Flow
from meshloom.sharding.picture_parts import (
    ABOVE,
    BELOW,
    BESIDE,
    BRANCH_GAP,
    CELL_GAP,
    DPI,
    FONT,
    FRAME,
    FRAME_EDGE,
    GREY,
    INK,
    LARGE,
    LEAD,
    LEGEND_GAP,
    LINE,
    MARGIN,
    NORMAL,
    PAIR,
    PIECE,
    SHEET,
    SMALL,
    STREAM,
    STREAM_FILL,
    TEXT,
    UNDER,
    WHOLE,
    WIDTH,
    WIRE,
    Block,
    Cell,
    Measures,
    Pill,
    Pixels,
    behind_of,
    drawn_cuts,
    height_of,
    reach_of,
    rule_color,
    sheets_of,
    tint,
)
from meshloom.sharding.sketch import Sketch
from meshloom.sharding.sketch_flow import sketch


def save_picture(known: Flow, path: str | pathlib.Path, title: str) -> None:
    """Draws the layout and the forward pass of `known`; the suffix of `path` says in which format.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = draw(sketch(known), title)
    try:
        if pathlib.Path(path).suffix.lower() != ".png":
            figure.savefig(path, dpi=DPI)
            return
        # A third of the bytes, for pages that show it.
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    except OSError as error:
        raise ConfigError(f"cannot write the picture to {path}: {error}") from error


def draw(shown: Sketch, title: str) -> Figure:
    """The picture of a sketch: at most 1600 pixels wide, unless one branch alone is wider, and as high as needed."""
    return _Drawing(shown).figure(title)


class _Drawing:
    """Places the parts of a sketch and draws them."""

    def __init__(self, shown: Sketch):
        self.shown, self.measures = shown, Measures(shown)

    def figure(self, title: str) -> Figure:
        rows = self.rows()
        measured = self.measures.measured
        texts = (
            measured(title, LARGE, bold=True),
            measured(self.measures.summary(), NORMAL),
            measured(self.measures.left_out(), SMALL),
        )
        legend = sum(measured(text, SMALL) + LEGEND_GAP for _, text in self.measures.legend()) - 30
        width = 2 * MARGIN + max([*texts, legend, *(sum(block.width + BRANCH_GAP for block in row) for row in rows)])
        tops, y = [], 112.0
        for row in rows:
            tops.append(y)
            y += ABOVE + STREAM + BELOW + height_of(row) + 44
        height = y + 66
        self.canvas = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.canvas)
        self.axes = self.canvas.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.text(MARGIN, 42, title, LARGE, INK, bold=True)
        self.text(MARGIN, 80, self.measures.summary(), NORMAL, GREY)
        for row, top in zip(rows, tops, strict=True):
            self.row(row, top, width, first=row is rows[0], last=row is rows[-1])
        self.legend_at(y + 10)
        return self.canvas

    def rows(self) -> list[list[Block]]:
        """Blocks in rows of at most the picture's width, in order."""
        rows: list[list[Block]] = [[]]
        for frame in self.shown.frames:
            for branch in frame.branches:
                block = self.measures.block(branch, frame.repeats)
                taken = sum(each.width + BRANCH_GAP for each in (*rows[-1], block))
                if rows[-1] and taken > WIDTH - 2 * MARGIN:
                    rows.append([])
                rows[-1].append(block)
        return [row for row in rows if row]

    def row(self, row: Sequence[Block], top: Pixels, width: Pixels, *, first: bool, last: bool) -> None:
        """One row: frames, the stream, branches. Room that is left goes between the branches."""
        slack = (width - 2 * MARGIN - sum(block.width for block in row)) / len(row)
        lefts = list(itertools.accumulate((block.width + slack for block in row), initial=float(MARGIN)))
        stream, middle = top + ABOVE, top + ABOVE + STREAM + BELOW + max(block.above for block in row)
        for repeats, places in itertools.groupby(range(len(row)), key=lambda place: row[place].repeats):
            members = list(places)
            start, end = lefts[members[0]] - 14, lefts[members[-1]] + row[members[-1]].width + 4
            if repeats > 1:
                height = ABOVE + STREAM + BELOW + height_of(row) + 22
                self.box(start, top, end - start, height, FRAME, FRAME_EDGE, 14, -3)
        if self.shown.stream:
            self.stream(row, lefts, stream, width, first=first, last=last)
        for block, left in zip(row, lefts, strict=False):
            self.branch(block, left, middle, stream)

    def stream(
        self, row: Sequence[Block], lefts: Sequence[Pixels], y: Pixels, width: Pixels, *, first: bool, last: bool
    ) -> None:
        """The residual stream of a row: from the first branch that joins or reads it to the last, and across rows."""
        ends = [
            *(left + WIRE / 2 for block, left in zip(row, lefts, strict=False) if block.branch.reads),
            *(left + block.width - WIRE / 2 for block, left in zip(row, lefts, strict=False) if block.branch.joins),
        ]
        if not ends:
            return
        start, end = min(ends) - 24 if first else 14, max(ends) + 24 if last else width - 14
        self.axes.add_patch(Rectangle((start, y), end - start, STREAM, facecolor=STREAM_FILL, lw=0, zorder=-1))
        for block, left in zip(row, lefts, strict=False):
            if block.branch.reads and block.branch.joins:
                for text in (self.shown.stream, "residual stream"):
                    if self.measures.measured(text, SMALL) < block.width - 2 * WIRE - 20:
                        self.text(left + block.width / 2, y + STREAM / 2, text, SMALL, INK, ha="center")
                        break

    def branch(self, block: Block, left: Pixels, middle: Pixels, stream: Pixels) -> None:
        """A branch from where it leaves the stream to where it joins it."""
        on_stream, x = stream + STREAM / 2, left + WIRE / 2
        repeated = f"in each of {block.repeats} layers" if block.repeats > 1 else ""
        name = ", ".join(part for part in (block.branch.title, repeated) if part)
        self.text(left, stream - 17, name, NORMAL, INK, bold=True)
        if self.shown.stream and block.branch.reads:
            self.axes.add_patch(Circle((x, on_stream), 5, color=LINE, zorder=3))
            self.wire([(x, on_stream), (x, middle)])
        else:
            self.wire([(x - WIRE / 2, middle), (x, middle)])
        color = LINE
        for number, cells in enumerate(block.columns):
            end = x + WIRE / 2 + max(cell.width for cell in cells)
            after = PAIR if block.branch.columns[number].split else LINE
            center = middle - reach_of(cells)[0] - CELL_GAP
            for cell in cells:
                center += CELL_GAP + cell.above
                self.wire([(x, middle), (x, center), (x + WIRE / 2, center)], color, arrow=True)
                right = cell.width if cell.is_beside else cell.across + behind_of(cell.weight)
                out = end + WIRE / 2
                self.wire([(x + WIRE / 2 + right + 6, center), (out, center), (out, middle)], after)
                self.cell_at(cell, x + WIRE / 2, center)
                center += cell.below
            x, color = end + block.gap_widths[number] - WIRE / 2, after
            is_end = number == len(block.columns) - 1 and not (block.branch.joins and self.shown.stream)
            self.wire([(end + WIRE / 2, middle), (x, middle)], after, arrow=is_end)
            self.on_wire_at(block.gaps[number], end + block.gap_widths[number] / 2, middle)
        if block.branch.joins and self.shown.stream:
            self.wire([(x, middle), (x, on_stream + 11)], color, arrow=True)
            self.axes.add_patch(Circle((x, on_stream), 11, facecolor="white", edgecolor=LINE, lw=1.8, zorder=3))
            for dx, dy in ((5, 0), (0, 5)):
                self.axes.plot([x - dx, x + dx], [on_stream - dy, on_stream + dy], color=LINE, lw=1.8, zorder=4)

    def on_wire_at(self, pills: Sequence[Pill], x: Pixels, middle: Pixels) -> None:
        """Collectives one above the other; how activations are split is written around the wire, or above those."""
        boxed = [each for each in pills if each.color]
        y = middle - (sum(each.height + 6 for each in boxed) - 6) / 2
        for each in pills:
            if not each.color:
                below = y - LEAD if boxed else middle + LEAD / 2 + 2
                for line, at in zip(each.lines, (below - LEAD - 4 * (not boxed), below), strict=True):
                    self.text(x, at, line, SMALL, TEXT[PAIR], ha="center")
        for each in boxed:
            self.pill_at(each, x - each.width / 2, y)
            y += each.height + 6

    def cell_at(self, cell: Cell, x: Pixels, center: Pixels) -> None:
        """A weight whose foremost rectangle has its middle at the height of its wires."""
        weight, top = cell.weight, center - cell.down / 2
        sheets, behind = sheets_of(weight), behind_of(weight)
        mine = 1 if weight.sheets is None else max(1, round(sheets * weight.sheets.piece / weight.sheets.size))
        for number in reversed(range(sheets)):
            back = SHEET * number
            self.rectangle(cell, x + back, top - back, held=number < mine, cut=number == 0)
        left = x + cell.across + behind + BESIDE if cell.is_beside else x
        text_y = center + (-cell.texts_height / 2 if cell.is_beside else cell.down / 2 + UNDER)
        for line in cell.lines:
            self.text(left, text_y + LEAD / 2, line.text, SMALL, line.color, bold=line.bold)
            text_y += LEAD
        for each in cell.pills:
            self.pill_at(each, left, text_y + 4)
            text_y += each.height + 4

    def rectangle(self, cell: Cell, x: Pixels, y: Pixels, *, held: bool, cut: bool) -> None:
        """One matrix; with its cuts if it is the foremost; and, if device 0 holds some of it, that piece."""
        weight, across, down = cell.weight, cell.across, cell.down
        edge = PAIR if weight.sheets is not None and weight.sheets.cuts else INK
        self.axes.add_patch(Rectangle((x, y), across, down, facecolor=WHOLE, edgecolor=edge, lw=1.3, zorder=2))
        if held:
            right, bottom = (
                length / max([1, *(ways for _, ways in drawn_cuts(side))])
                for side, length in ((weight.across, across), (weight.down, down))
            )
            self.axes.add_patch(Rectangle((x, y), right, bottom, facecolor=PIECE, lw=0, zorder=2.1))
        for side, length, upright in ((weight.across, across, True), (weight.down, down, False)) if cut else ():
            for each, ways in drawn_cuts(side):
                for number in range(1, ways):
                    at = length * number / ways
                    ends = ([x + at] * 2, [y, y + down]) if upright else ([x, x + across], [y + at] * 2)
                    self.axes.plot(*ends, color=rule_color(each), lw=1.8, zorder=2.2, solid_capstyle="butt")

    # -- drawing --

    def text(self, x: Pixels, y: Pixels, text: str, size: float, color: str, *, bold: bool = False, ha="left") -> None:
        weight = "bold" if bold else "normal"
        self.axes.text(x, y, text, family=FONT, fontsize=size, color=color, weight=weight, ha=ha, va="center", zorder=6)

    def pill_at(self, pill: Pill, x: Pixels, y: Pixels) -> None:
        self.box(x, y, pill.width, pill.height, tint(pill.color), pill.color, 7, 4)
        for number, line in enumerate(pill.lines):
            self.text(x + pill.width / 2, y + 5 + LEAD * (number + 0.5), line, SMALL, TEXT[pill.color], ha="center")

    def box(self, x: Pixels, y: Pixels, width: Pixels, height: Pixels, fill: str, edge: str, round_: Pixels, z: Pixels):
        style = f"round,pad=0,rounding_size={round_}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, lw=1.2, zorder=z)
        )

    def wire(self, points: Sequence[tuple[Pixels, Pixels]], color: str = LINE, *, arrow: bool = False) -> None:
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs, ys, color=color, lw=1.8, zorder=1, solid_joinstyle="round")
        if arrow:
            style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
            self.axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=style, zorder=1)

    def legend_at(self, y: Pixels) -> None:
        self.text(MARGIN, y + 28, self.measures.left_out(), SMALL, GREY)
        x = float(MARGIN)
        for color, text in self.measures.legend():
            if color:
                self.axes.add_patch(Rectangle((x, y - 8), 16, 16, facecolor=color, lw=0))
            self.text(x + (24 if color else 0), y, text, SMALL, INK if color else GREY)
            x += self.measures.measured(text, SMALL) + LEGEND_GAP

"""F12, the stage map: the architecture in the order in which data flows, under both libraries' names."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from blip2nb.display.figures.axes import add_title, legend_key
from blip2nb.display.figures.boxes import (
    DIVERGES,
    LOST,
    ROUNDS,
    UNJUDGED,
    Box,
    Part,
    fares_of,
    finding,
    in_parts,
    part_of,
)
from blip2nb.display.figures.style import (
    FAULT,
    HAIRLINE,
    INK,
    LAVIS,
    MUTED,
    ROUNDING,
    TRANSFORMERS,
    Arrays,
    Picture,
    Report,
    Row,
    styled,
)
from blip2nb.display.figures.words import as_count, text_inches, wrap_text


def available(report: Report, arrays: Arrays) -> bool:
    return bool(report.stages)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F12: every place that was compared, as boxes in the order in which data flows, and how each fared.

    Blocks that repeat are one box with a cell for each of them. What the parts are, and what repeats, is read off the
    stages' names: `part.block.07` is a block of a part, `{n}` in a library's name stands for its number.

    Args:
        report: `stages`, `threshold` and `first_divergence`.
        arrays: not used.
        width: inches. Two columns on a page, one in a column.
    """
    parts = in_parts(report)
    count = 2 if width >= 5 and sum(len(part.boxes) for part in parts) > 3 else 1  # three boxes are no column
    across = (width - _EDGE - (count - 1) * _GUTTER) / count
    columns = _columns([_Placed.of(part, across) for part in parts], count)
    room = _TURN if len(columns) > 1 else 0.03  # for the line from one column to the next
    tall = _KEY + room + max(sum(placed.height for placed in column) for column in columns)
    picture = Picture(width, tall, alt_text(report, arrays))
    add_title(picture, finding(report))
    lines = picture.get_suptitle().count("\n") + 1
    picture.set_figheight(tall + _EDGE + 1.25 * lines * matplotlib.rcParams["figure.titlesize"] / 72)
    axes = picture.add_subplot()
    axes.set_axis_off()
    axes.set(xlim=(0, width - _EDGE), ylim=(tall, 0))  # inches, downwards
    _library_key(axes)
    for number, column in enumerate(columns):
        _draw_column(axes, column, number * (across + _GUTTER), across)
    for number, (before, after) in enumerate(itertools.pairwise(columns)):
        _lead_over(axes, before, after, number * (across + _GUTTER), across)
    return picture


# Inches.
_EDGE, _GUTTER, _KEY, _PAD, _BETWEEN_BOXES, _BETWEEN_PARTS, _CELL = 0.09, 0.3, 0.2, 0.05, 0.09, 0.18, 0.07
_TURN, _MARK, _APART = 0.12, 0.13, 0.15  # a library's marker stands before each name; between two names in a line


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of text in a box: a `name` with how it fared at the `right` end, that alone (`fare`), the two `places` or
    one of them (`LAVIS`, `transformers`), or a `note`."""

    kind: str
    text: str
    right: str = ""


@dataclasses.dataclass(frozen=True)
class _Placed:
    """A part with its boxes' lines, which depend on how wide it is. Heights are in inches."""

    part: Part
    lines: tuple[tuple[_Line, ...], ...]

    @classmethod
    def of(cls, part: Part, across: float) -> _Placed:
        room = across - 4 * _PAD - (2 * _PAD if part.name else 0)
        return cls(part, tuple(_box_lines(box, room) for box in part.boxes))

    @property
    def heights(self) -> list[float]:
        cells = [(_CELL + _PAD) * (len(box.names) > 1) for box in self.part.boxes]
        return [
            2 * _PAD + cell + sum(_line_height(line.kind) for line in lines)
            for cell, lines in zip(cells, self.lines, strict=True)
        ]

    @property
    def inner(self) -> float:
        """From its upper edge to its lower."""
        frame = _line_height("part") + 2 * _PAD if self.part.name else 0.0
        return frame + sum(self.heights) + _BETWEEN_BOXES * (len(self.part.boxes) - 1)

    @property
    def height(self) -> float:
        """With the arrow that leads to it."""
        return _BETWEEN_PARTS + self.inner


def _line_height(kind: str) -> float:
    return 1.3 * _size(kind) / 72


def _size(kind: str) -> float:
    return matplotlib.rcParams["font.size" if kind in ("name", "part") else "xtick.labelsize"]


def _box_lines(box: Box, room: float) -> tuple[_Line, ...]:
    label = _shortened(box.label, room, "name")
    fits = text_inches(label, _size("name"), "bold") + text_inches(box.words, _size("fare"), "bold") + 0.12 < room
    lines = [_Line("name", label, box.words if fits else "")]
    if not fits:
        lines += [_Line("fare", line) for line in wrap_text(box.words, room, "xtick.labelsize", "bold").split("\n")]
    lines += _place_lines(box, room)
    notes = wrap_text(box.note, room, "xtick.labelsize").split("\n") if box.note else []
    return (*lines, *(_Line("note", line) for line in notes))


def _place_lines(box: Box, room: float) -> list[_Line]:
    """Both libraries' names, in one line if there is room."""
    needed = sum(_MARK + text_inches(name, _size("places")) for name in (box.reference, box.module))
    if needed + _APART <= room:
        return [_Line("places", box.reference, box.module)]
    names = room - _MARK
    return [_Line("LAVIS", _shortened(box.reference, names)), _Line("transformers", _shortened(box.module, names))]


def _shortened(path: str, room: float, kind: str = "places") -> str:
    """A path that is too long loses words in its middle: its ends say most."""
    size, weight = _size(kind), "bold" if kind == "name" else "normal"
    words = path.split(".")
    for gone in range(max(len(words) - 1, 1)):
        head = (len(words) - gone) // 2
        ends = [".".join(words[:head]), ".".join(words[head + gone :])]
        shorter = "…".join(ends) if gone else path
        if text_inches(shorter, size, weight) <= room:
            return shorter
    last = words[-1]
    while len(last) > 1 and text_inches(f"…{last}", size, weight) > room:
        last = last[1:]
    return last if last == path else f"…{last}"


def _columns(placed: Sequence[_Placed], count: int) -> list[list[_Placed]]:
    """The parts in one column or two, cut where the taller is as short as can be."""
    if count == 1 or len(placed) < 2:
        return [list(placed)]
    heights = np.cumsum([each.height for each in placed])
    cut = int(np.maximum(heights[:-1], heights[-1] - heights[:-1]).argmin()) + 1
    return [list(placed[:cut]), list(placed[cut:])]


def _library_key(axes: Axes) -> None:
    x = 0.1
    for marker, colour, name in (("o", LAVIS, "LAVIS"), ("s", TRANSFORMERS, "transformers")):
        _marker(axes, x, 0.12, marker, colour)
        axes.text(x + 0.1, 0.12, f"its place in {name}", va="center", size=_size("LAVIS"))
        x += 0.35 + text_inches(f"its place in {name}", _size("LAVIS"))


def _marker(axes: Axes, x: float, y: float, marker: str, colour: str) -> None:
    mark = legend_key(marker, colour)
    mark.set(xdata=[x], ydata=[y], markersize=_size("LAVIS") / 1.9, zorder=4)
    axes.add_line(mark)


def _draw_column(axes: Axes, column: Sequence[_Placed], left: float, across: float) -> None:
    y = _KEY
    for number, placed in enumerate(column):
        y += _BETWEEN_PARTS
        if number:
            before = column[number - 1].part.name
            _arrow(axes, left + across / 2, y - _BETWEEN_PARTS, y, _CROSSED.get((before, placed.part.name), ""))
        _draw_part(axes, placed, left, across, y)
        y += placed.inner


_CROSSED = {
    ("vision", "qformer"): "cross-attention",
    ("language.encoder", "language.decoder"): "cross-attention",
}
"""What is known of how one part reads another, for parts that have these names."""


def _draw_part(axes: Axes, placed: _Placed, left: float, across: float, y: float) -> None:
    if placed.part.name:
        frame = _rounded(
            left, y, across, placed.inner, facecolor="#F7F7F7", edgecolor=HAIRLINE, linewidth=0.6, zorder=1
        )
        axes.add_patch(frame)
        name = _shortened(placed.part.name, across - 4 * _PAD, "part")
        axes.text(left + 2 * _PAD, y + _PAD + _line_height("part") / 2, name, va="center", color=MUTED,
                  size=_size("part"))  # fmt: skip
        y += _PAD + _line_height("part")
        left, across = left + _PAD, across - 2 * _PAD
    for number, (box, lines, height) in enumerate(zip(placed.part.boxes, placed.lines, placed.heights, strict=True)):
        if number:
            _arrow(axes, left + across / 2, y - _BETWEEN_BOXES, y)
        _draw_box(axes, box, lines, (left, y, across, height))
        y += height + _BETWEEN_BOXES


_FACES = {DIVERGES: "#FBE5D8", ROUNDS: "#EDEDED"}


_LIBRARIES = {"LAVIS": [("o", LAVIS)], "transformers": [("s", TRANSFORMERS)]}
_LIBRARIES["places"] = _LIBRARIES["LAVIS"] + _LIBRARIES["transformers"]


def _draw_box(axes: Axes, box: Box, lines: Sequence[_Line], where: tuple[float, float, float, float]) -> None:
    left, y, across, _ = where
    lit = box.fare == DIVERGES
    edge, thick = (FAULT, 1.6) if lit else (MUTED, 0.6)
    axes.add_patch(_rounded(*where, facecolor=_FACES.get(box.fare, "white"), edgecolor=edge, linewidth=thick, zorder=2,
                            linestyle="--" if box.fare in (LOST, UNJUDGED) else "-"))  # fmt: skip
    axes.patches[-1].set_gid(box.fare)
    x, end = left + 2 * _PAD, left + across - 2 * _PAD
    y += _PAD
    loud: dict[str, Any] = {"weight": "bold", "color": FAULT} if lit else {}
    for line in lines:
        middle, size = y + _line_height(line.kind) / 2, _size(line.kind)
        write = functools.partial(axes.text, y=middle, va="center", size=size, zorder=3)
        if line.kind == "name":
            write(x, s=line.text, weight="bold")
            write(end, s=line.right, ha="right", **{**loud, "size": _size("fare")})
        elif line.kind in ("fare", "note"):
            write(x, s=line.text, **(loud if line.kind == "fare" else {}))
        else:
            other = x + _MARK + text_inches(line.text, size) + _APART
            pair = [(line.text, x), (line.right, other)] if line.kind == "places" else [(line.text, x)]
            for (name, at), (marker, fill) in zip(pair, _LIBRARIES[line.kind], strict=True):
                _marker(axes, at + 0.04, middle, marker, fill)
                write(at + _MARK, s=name)
        y += _line_height(line.kind)
    if len(box.names) > 1:
        _cells(axes, box, x, end, y + _PAD)


def _cells(axes: Axes, box: Box, left: float, right: float, y: float) -> None:
    """A cell for each of the blocks that the box stands for."""
    pitch = (right - left) / len(box.fares)
    for number, (name, fare) in enumerate(zip(box.names, box.fares, strict=True)):
        colour = {DIVERGES: FAULT, ROUNDS: ROUNDING}.get(fare, "white")
        hatch = "//////" if fare in (LOST, UNJUDGED) else None
        grow = 0.025 if fare == DIVERGES else 0.0  # seen in grey too
        edge, thick, above = (INK, 0.8, 3.5) if grow else (MUTED, 0.4, 3.0)
        corner, height = (left + number * pitch, y - grow), _CELL + 2 * grow
        axes.add_patch(Rectangle(corner, pitch, height, fc=colour, hatch=hatch, ec=edge, lw=thick, zorder=above))
        axes.patches[-1].set_gid(f"{name}: {fare}")


def _rounded(left: float, y: float, across: float, height: float, **looks: Any) -> FancyBboxPatch:
    return FancyBboxPatch((left, y), across, height, boxstyle="round,pad=0,rounding_size=0.05", **looks)


def _arrow(axes: Axes, x: float, start: float, end: float, words: str = "") -> None:
    axes.annotate("", (x, end), (x, start), arrowprops=_ARROW)
    if words:
        axes.text(x + 0.08, (start + end) / 2, words, va="center", size=_size("fare"), color=MUTED)


_ARROW = {"arrowstyle": "-|>", "color": MUTED, "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 6}


def _lead_over(axes: Axes, before: Sequence[_Placed], after: Sequence[_Placed], left: float, across: float) -> None:
    """From the foot of one column to the head of the next."""
    foot, head = _KEY + sum(placed.height for placed in before), _KEY + _BETWEEN_PARTS
    gutter, there = left + across + _GUTTER / 2, left + 1.5 * across + _GUTTER
    low, high = foot + _TURN - 0.03, head - 0.14
    x, y = [left + across / 2, left + across / 2, gutter, gutter, there], [foot, low, low, high, high]
    axes.plot(x, y, color=MUTED, lw=0.8, clip_on=False)
    _arrow(axes, there, high, head, _CROSSED.get((before[-1].part.name, after[0].part.name), ""))


def alt_text(report: Report, arrays: Arrays) -> str:
    parts = ", ".join(part.name or part.boxes[0].label for part in in_parts(report))
    return f"Map of {as_count(len(report.stages), 'place')} in the order of the network: {parts}. {finding(report)}."


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each stage."""
    return [
        {"name": stage.name, "part": part_of(stage.name), "lavis": stage.reference,
         "transformers": stage.module, "fare": fare, "excess": stage.excess}
        for stage, fare in zip(report.stages, fares_of(report), strict=True)
    ]  # fmt: skip

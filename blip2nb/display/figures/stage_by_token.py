"""F4, stage by token: at which positions of a stage's output its error sits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Patch, Rectangle

from blip2nb.display.figures.axes import ERROR_DECADES, add_legend, add_title, legend_key, stretches
from blip2nb.display.figures.depth import Depth, block_ticks
from blip2nb.display.figures.style import FAULT, HAIRLINE, MUTED, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_count, as_number, as_percent, as_token, tick_label


def available(report: Report, arrays: Arrays) -> bool:
    return bool(_panels(report, arrays))


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F4: each stage's local error at each of its positions: patches, queries, text tokens.

    A panel for each stretch of stages that have the same positions, over depth; and one vision stage's error as a grid
    over the image. The error is ‖transformers − LAVIS‖ ÷ ‖LAVIS‖ of the vector at that position.

    Args:
        report: `stages`, `first_divergence`, `examined` and the texts in `sequences`.
        arrays: `tokens/<stage>`, (positions,), of the first image; `pixels/image`, (height, width, 3).
        width: inches.
    """
    panels, wide = _panels(report, arrays), width >= 5
    seen = next((panel for panel in panels if panel.grid), None)
    rows = _rows(panels, seen, wide)
    heights = [max(_height(panel, wide) for panel in row) for row in rows]
    outer = [*(height + 0.45 for height in heights), 0.55]  # room for titles and ticks; the last is the colour bar's
    picture = Picture(width, sum(outer) + 0.7, alt_text(report, arrays))
    add_title(picture, _finding(report, panels))
    grid = picture.add_gridspec(len(outer), 1, height_ratios=outer)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        shares = [1.7 if panel is seen else 1.0 for panel in row]
        for panel, place in zip(row, _beside(grid[number], shares), strict=True):
            axes = picture.add_subplot(place)
            if panel:
                _map(axes, panel, report, width * (1.7 if panel is seen else 1.0) / sum(shares), height)
            elif seen:
                _over_image(axes, seen, _vision_stage(report, seen), arrays.get("pixels/image"))
    _colour_bar(picture, picture.add_subplot(_beside(grid[len(rows)], [0.3, 1, 0.1])[1]))
    _add_keys(picture, report, panels, width)
    return picture


def _beside(place: SubplotSpec, widths: list[float]) -> list[SubplotSpec]:
    grid = place.subgridspec(1, len(widths), width_ratios=widths)
    return [grid[number] for number in range(len(widths))]


_MOST_ROWS = 150
"""Of patches in a map: about two dots of the PNG for each where it is narrow and the map 1.45 inches high."""


@dataclasses.dataclass(frozen=True)
class _Panel:
    """Stages that have the same positions, such as the vision tower's."""

    part: str
    names: list[str]
    errors: np.ndarray  # (positions, stages)
    texts: list[str]  # of the positions; empty where they are not tokens

    @property
    def grid(self) -> int:
        """How many patches the image's side has; 0 where the positions are not a class token and patches."""
        side = math.isqrt(max(len(self.errors) - 1, 0))
        return side if self.part == "vision" and side * side == len(self.errors) - 1 else 0

    @property
    def together(self) -> int:
        """How many neighbouring patches share a row, so that a picture can hold the rows."""
        sizes = (n for n in range(1, self.grid) if self.grid % n == 0 and self.grid**2 // n <= _MOST_ROWS)
        return next(sizes, self.grid)

    @property
    def kind(self) -> str:
        """What its positions are."""
        return {"Q-Former": "query", "vision": "position"}.get(self.part, "token" if self.texts else "position")

    @property
    def counted(self) -> str:
        count = len(self.errors)
        return f"{count} queries" if self.kind == "query" and count != 1 else as_count(count, self.kind)

    def position(self, place: int) -> str:
        """What stands at a position, in words."""
        if self.texts:
            return f"token {place}, “{as_token(self.texts[place].strip(' '))}”"
        if not self.grid:
            return f"{self.kind} {place}"
        if not place:
            return "the class token"
        return f"the patch in row {(place - 1) // self.grid}, column {(place - 1) % self.grid}"


def _panels(report: Report, arrays: Arrays) -> list[_Panel]:
    stages = [stage for stage in report.stages if f"tokens/{stage.name}" in arrays]
    if not stages:
        return []
    depth = _depth(report, [stage.name for stage in stages])
    part_of = [part for part, start, stop in depth.parts() for _ in range(start, stop)]
    panels = []
    # The projection has the Q-Former's positions: one a query.
    keys = [("Q-Former" if part == "projection" else part, len(arrays[f"tokens/{name}"]))
            for part, name in zip(part_of, depth.names, strict=True)]  # fmt: skip
    for (part, length), group in itertools.groupby(zip(keys, depth.names, strict=True), key=lambda pair: pair[0]):
        names = [name for _, name in group]
        errors = np.stack([np.asarray(arrays[f"tokens/{name}"], dtype=float) for name in names], axis=1)
        texts = (report.sequences or {}).get(part.replace(" ", "."), ())
        panels.append(_Panel(part, names, errors, list(texts) if len(texts) == length else []))
    return panels


def _depth(report: Report, names: list[str]) -> Depth:
    return Depth.of(dataclasses.replace(report, stages=tuple(one for one in report.stages if one.name in names)))


def _rows(panels: list[_Panel], seen: _Panel | None, wide: bool) -> list[list[_Panel | None]]:
    """What stands beside what; None is the image."""
    rest: list[_Panel | None] = [panel for panel in panels if panel is not seen]
    if seen is None:
        return [rest] if wide else [[panel] for panel in rest]
    if wide:
        return [[seen, None], rest] if rest else [[seen, None]]
    return [[seen], [None, *rest[:1]], *([panel] for panel in rest[1:])]


def _height(panel: _Panel | None, wide: bool) -> float:
    """Inches: as many as a line for each text token takes, within bounds."""
    if panel is None or not panel.texts:
        return 2.0 if wide else 1.45
    return min(max(_line() * _rows_of(panel)[1][-1], 1.4), 3.2)


def _line() -> float:
    """Inches that a token's name takes."""
    return float(1.2 * matplotlib.rcParams["ytick.labelsize"] / 72)


# -- the maps


_NORM = LogNorm(10.0 ** ERROR_DECADES[0], 10.0 ** ERROR_DECADES[1])
_BIT_EQUAL = "#DDF3E8"  # dotted as well: in grey it is almost the yellow of an error of 1


def _colours() -> Colormap:
    return matplotlib.colormaps["cividis"].with_extremes(under=_BIT_EQUAL, bad=(0, 0, 0, 0))


def _shown(errors: np.ndarray) -> np.ndarray:
    """Errors as they are coloured: zeros below the bar, what lies beyond its ends, infinity as well, at those ends."""
    low, high = (10.0**decade for decade in ERROR_DECADES)
    return np.where(errors == 0, low / 10, np.clip(errors, low, high))


def _map(axes: Axes, panel: _Panel, report: Report, width: float, height: float) -> None:
    errors, rows = _rows_of(panel)
    columns = np.arange(len(panel.names) + 1) - 0.5
    axes.pcolormesh(columns, rows, _shown(errors), cmap=_colours(), norm=_NORM, rasterized=True)
    _hatch(axes, columns, rows, np.isnan(errors), "NaN")
    _hatch(axes, columns, rows, errors == 0, "bit-equal")
    axes.set(xlim=(columns[0], columns[-1]), ylim=(rows[-1], 0))
    for spine in axes.spines.values():
        spine.set(visible=True, color=HAIRLINE)
    _row_labels(axes, panel, height)
    block_ticks(axes, _depth(report, panel.names), width)
    shown = f", the worst of each {panel.together}" if panel.together > 1 else ""
    axes.set_title(f"{panel.part.split()[-1]}: {panel.counted}{shown}", loc="left")
    first = report.first_stage
    if first in panel.names:
        mark = legend_key("v", FAULT)
        mark.set(xdata=[panel.names.index(first)], ydata=[0], clip_on=False, zorder=3, label="first wrong")
        axes.add_line(mark)


def _rows_of(panel: _Panel) -> tuple[np.ndarray, np.ndarray]:
    """The errors as rows, and where each row begins and ends.

    Of patches that share a row the worst is shown: drawn as they are, a lone one would vanish in a picture. What is to
    be read by name has a higher row.
    """
    errors, side = panel.errors, panel.grid
    if side:
        patches = errors[1:].reshape(-1, panel.together, errors.shape[1]).max(axis=1)  # NaN if any is
        errors, heights = np.concatenate([errors[:1], patches]), np.array([side, *[panel.together] * len(patches)])
    else:
        heights = np.array([0.25 if text == _PLACEHOLDER else 1.0 for text in panel.texts or [""] * len(errors)])
    return errors, np.concatenate([[0.0], np.cumsum(heights)])


_PLACEHOLDER = "<image>"  # where the queries' output stands among the text


def _hatch(axes: Axes, columns: np.ndarray, rows: np.ndarray, where: np.ndarray, word: str) -> None:
    for place in range(where.shape[1]):
        for run in stretches(where[:, place]):
            corner, size = (columns[place], rows[run.start]), rows[run.stop] - rows[run.start]
            axes.add_patch(Rectangle(corner, columns[place + 1] - columns[place], size, gid=word, **_HATCHED[word]))


_HATCHED: dict[str, dict[str, Any]] = {
    "NaN": {"facecolor": "white", "edgecolor": MUTED, "hatch": "//////", "linewidth": 0},
    "bit-equal": {"facecolor": _BIT_EQUAL, "edgecolor": "#8FBFA8", "hatch": "..", "linewidth": 0},
}


def _row_labels(axes: Axes, panel: _Panel, height: float) -> None:
    edges = _rows_of(panel)[1]
    middles, count = (edges[1:] + edges[:-1]) / 2, len(panel.errors)
    if side := panel.grid:
        named = range(side // 4, side, max(1, side // 4))
        axes.set_yticks(
            [side / 2, *((row + 1.5) * side for row in named)], ["class token", *(f"row {row}" for row in named)]
        )
        return
    if not panel.texts:
        shown = range(0, count, math.ceil(count / 4))
        axes.set_yticks(middles[list(shown)], [str(place) for place in shown])
        axes.set_ylabel(panel.kind)
        return
    room = _line() * edges[-1] / height  # a line of text, in rows
    queries = [place for place in range(count) if panel.texts[place] == _PLACEHOLDER]
    labels = {float(np.mean(middles[queries])): f"{_PLACEHOLDER} × {len(queries)}"} if queries else {}
    words = [place for place in range(count) if place not in queries]
    for place in words[:: math.ceil(room)]:
        if all(abs(middles[place] - taken) > 0.9 * room for taken in labels):
            labels[middles[place]] = _short(panel.texts[place])
    axes.set_yticks(list(labels), list(labels.values()))


def _short(text: str) -> str:
    readable = as_token(text)
    return readable if len(readable) <= 12 else f"{readable[:11]}…"


# -- one stage over the image


def _over_image(axes: Axes, panel: _Panel, stage: str, image: np.ndarray | None) -> None:
    """A square for each patch, smaller than the patch, so that both the image and the colour can be told."""
    errors, side = panel.errors[:, panel.names.index(stage)], panel.grid
    if image is not None:
        axes.imshow(image, extent=(0, side, side, 0))
    patches = errors[1:].reshape(side, side)
    inner = np.zeros((5, 5), bool)
    inner[1:4, 1:4] = True
    fine = np.kron(_shown(patches), np.ones_like(inner, dtype=float))
    squares = np.ma.masked_where(~np.tile(inner, patches.shape), fine)
    axes.imshow(squares, cmap=_colours(), norm=_NORM, extent=(0, side, side, 0), interpolation="nearest")
    edges = np.arange(side + 1.0)
    _hatch(axes, edges, edges, np.isnan(patches), "NaN")
    axes.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[])
    axes.set_title(stage, loc="left")
    low, high = (as_number(end) for end in (patches.min(), patches.max()))
    span = high if low == high else f"{low} to {high}"
    axes.set_xlabel(f"patches {span}\nclass token {as_number(errors[0])}")


def _vision_stage(report: Report, panel: _Panel) -> str:
    """The examined stage if it is one of the vision tower's, else the one with the largest error."""
    examined = report.examined.stage if report.examined else ""
    return examined if examined in panel.names else _worst_stage([panel])[1]


def _worst_stage(panels: list[_Panel]) -> tuple[_Panel, str]:
    """The stage with the largest error; one with NaN before all others."""
    found = [(panel, name, _size(errors)) for panel in panels
             for name, errors in zip(panel.names, panel.errors.T, strict=True)]  # fmt: skip
    panel, name, _ = max(found, key=lambda each: each[2])
    return panel, name


def _size(errors: np.ndarray) -> float:
    return math.inf if np.isnan(errors).any() else float(np.square(errors).mean())


def _colour_bar(picture: Picture, axes: Axes) -> None:
    bar = picture.colorbar(ScalarMappable(_NORM, _colours()), cax=axes, orientation="horizontal", extend="max",
                           extendfrac=0.05, ticks=[1e-8, 1e-6, 1e-4, 1e-2, 1])  # fmt: skip
    bar.ax.set_xticks(bar.get_ticks(), [tick_label(tick) for tick in bar.get_ticks()])
    bar.ax.minorticks_off()
    bar.outline.set(edgecolor=MUTED, linewidth=0.6)  # type: ignore[operator]
    bar.set_label("relative error of a stage at a position")
    axes.add_patch(Rectangle((-0.1, 0), 0.08, 1, transform=axes.transAxes, clip_on=False, **_HATCHED["bit-equal"]))
    axes.text(-0.12, 0.5, "bit-equal", transform=axes.transAxes, ha="right", va="center", size="small")


def _add_keys(picture: Picture, report: Report, panels: list[_Panel], width: float) -> None:
    keys: list[tuple[Artist, str]] = []
    first = report.first_stage
    if any(first in panel.names for panel in panels):
        keys.append((legend_key("v", FAULT), f"first wrong: {first}"))
    if any(np.isnan(panel.errors).any() for panel in panels):
        keys.append((Patch(**_HATCHED["NaN"]), "NaN"))
    if keys:
        add_legend(picture, keys, width)


# -- what it says


def _focus(report: Report, panels: list[_Panel]) -> tuple[_Panel, str]:
    """The stage that the title speaks of: the first wrong one, or the first with NaN, or the examined one."""
    broken = [name for panel in panels
              for name, errors in zip(panel.names, panel.errors.T, strict=True) if np.isnan(errors).any()]  # fmt: skip
    for wanted in (report.first_stage, *broken[:1], report.examined.stage if report.examined else ""):
        for panel in panels:
            if wanted in panel.names:
                return panel, str(wanted)
    return _worst_stage(panels)


def _finding(report: Report, panels: list[_Panel]) -> str:
    """Where the error of the stage in question sits."""
    if not any(panel.errors.any() for panel in panels):
        return f"Bit-equal at every position of all {sum(len(panel.names) for panel in panels)} stages"
    panel, stage = _focus(report, panels)
    errors, first = panel.errors[:, panel.names.index(stage)], report.first_stage
    before = (
        ""
        if first == stage
        else f"First wrong at {first}, which is not drawn here. "
        if first
        else "No stage is wrong. "
    )
    lost = int((~np.isfinite(errors)).sum())
    if lost:
        what = "Not a number" if np.isnan(errors).any() else "An infinite error"
        where = "all" if lost == len(errors) else f"{lost} of"
        return f"{before if first else ''}{what} at {stage}: {where} {panel.counted}"
    return f"{before}At {stage} {_where(panel, errors)}"


_MOST_OF_IT = 0.9
"""Of the squared error: places that hold so much hold it for the title."""

_FEW = 1 / 8
"""By eye: so small a share of the places is a spot in the map, where more are a pattern."""

_ALIKE = 3.0
"""By eye: a factor of three from the median is half a decade, of eight that the colours span."""


def _where(panel: _Panel, errors: np.ndarray) -> str:
    """Where a stage's error sits, told by shares of the sum of its squares, beside the share if all were alike."""
    if not errors.any():
        return f"all {panel.counted} are bit-equal"
    if len(errors) == 1:
        return f"the error is {as_number(errors[0])}, at the only {panel.kind}"
    shares = np.square(errors) / np.square(errors).sum()
    order = np.argsort(-shares)
    worst, top = panel.position(int(order[0])), as_percent(shares[order[0]])
    few = int(np.searchsorted(np.cumsum(shares[order]), _MOST_OF_IT)) + 1
    if few == 1:
        return f"the error sits in one of {panel.counted}: {worst} holds {top} of it"
    if few <= len(errors) * _FEW:
        share = as_percent(_MOST_OF_IT)
        return f"the error sits in a few places: {few} of {panel.counted} hold {share} of it, {worst} the most"
    middle = np.median(errors)  # below it a tenth may be far off: some positions are bit-equal or nearly
    alike = errors.max() <= _ALIKE * middle and np.quantile(errors, 0.1) >= middle / _ALIKE
    how = "is alike everywhere" if alike else "is uneven"
    even = as_percent(1 / len(errors))
    return f"the error {how}: the worst of {panel.counted}, {worst}, holds {top} of it (an even share is {even})"


def alt_text(report: Report, arrays: Arrays) -> str:
    panels = _panels(report, arrays)
    parts = ", ".join(f"{panel.part} {len(panel.names)} × {len(panel.errors)}" for panel in panels)
    return f"Local error of each stage at each of its positions ({parts}). {_finding(report, panels)}."


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each stage and position."""
    return [
        {"name": name, "position": place, "text": panel.texts[place] if panel.texts else "", "local_error": error}
        for panel in _panels(report, arrays)
        for name, errors in zip(panel.names, panel.errors.T.tolist(), strict=True)
        for place, error in enumerate(errors)
    ]

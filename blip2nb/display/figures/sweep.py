"""F14, a sweep: each run's five proofs in words, and its errors over depth in miniature, on one axis for all.

It takes the index of a sweep, and so is not among the figures of one run in `plots`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from blip2nb.display import overview
from blip2nb.display.figures.axes import draw_markers, legend_key, on_axis
from blip2nb.display.figures.style import FAULT, HAIRLINE, HALO, INK, MUTED, Picture, style
from blip2nb.display.figures.words import as_count, first_few, text_inches, tick_label, to_floats, wrap_text
from blip2nb.report.store import INFINITE

_MOST_ROWS = {True: 15, False: 8}
"""Runs that are drawn where the figure is wide, and where it is narrow: as many as fit on a page."""

_SHARES = (0.19, 0.175, 0.25, 0.19, 0.195)
"""Of the room for the proofs, in their order: the layers have the most to say."""

_TALL = 0.42
"""Inches: the height of every miniature, so that they compare by eye."""

_COLOURS = {"passed": INK, "explained": INK, "failed": FAULT, "not done": MUTED}


def available(index: Mapping[str, Any]) -> bool:
    return bool(index["runs"])


def sweep(index: Mapping[str, Any], width: float = 7.0) -> Picture:
    """F14: a row for each run, with what each proof found in words, and error ÷ rounding over depth in miniature.

    Where there are more runs than fit on a page, those that went worst are drawn, and the figure says so.

    Args:
        index: as in index.json.
        width: inches.
    """
    with style(width):
        return _page(index, _drawn(index["runs"], _MOST_ROWS[width >= 5]), width)


def _drawn(runs: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """As many runs as have room, the worst of them if not all have, in the order in which they were asked for."""
    results = list(overview.RESULTS)
    places = sorted(range(len(runs)), key=lambda place: results.index(runs[place]["result"]))
    return [runs[place] for place in sorted(places[:most])]


def _page(index: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], width: float) -> Picture:
    """Laid out in inches from the top left. Where it is narrow a run's name stands over its cells, its errors under."""
    wide = width >= 5
    size, small = matplotlib.rcParams["font.size"] / 72, matplotlib.rcParams["legend.fontsize"]
    line = 1.3 * small / 72
    name, errors = (1.2, 1.8) if wide else (0.0, 0.0)
    cells = [(width - 0.1 - name - errors) * share for share in _SHARES]
    lefts = [0.08 + name + sum(cells[:number]) for number in range(len(cells))]
    title = wrap_text(index["sentence"], width - 0.15, "figure.titlesize", "bold")
    top = 0.16 + 1.65 * size * (title.count("\n") + 1)
    rows = [_Row.of(run, cells, name if wide else width - 0.1, wide) for run in runs]
    heights = [max(row.lines * line + 0.1, _TALL + 0.14) if wide else row.under(line) for row in rows]
    notes = wrap_text(_notes(index, runs), width - 0.2, "legend.fontsize")
    foot = 0.1 + line * (notes.count("\n") + 1) + (0.22 if wide else 0.38)
    height = top + line + 0.06 + sum(heights) + foot
    picture = Picture(width, height, alt_text(index), layout=None)
    page = picture.add_axes((0, 0, 1, 1))  # a page, not a plot
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    picture.suptitle(title, x=0.01, y=1 - 0.05 / height, ha="left", va="top")
    for left, proof in zip(lefts, overview.PROOFS, strict=True):
        page.text(left, top, proof, va="top", size=small, weight="bold")
    if wide:
        page.text(width - errors + 0.2, top, "error ÷ its own rounding", va="top", size=small, weight="bold")
    down, decades = top + line + 0.06, (-1.0, float(overview.top_decade(runs)))
    for row, tall in zip(rows, heights, strict=True):
        page.axhline(down - 0.02, color=HAIRLINE, lw=0.6)
        row.write(page, down, lefts, small, wide)
        left, under = (width - errors + 0.3, down + 0.06) if wide else (0.4, down + tall - _TALL - 0.08)
        if row.run["stages"]:
            box = (left / width, 1 - (under + _TALL) / height, (width - 0.06 - left) / width, _TALL / height)
            _draw_errors(picture.add_axes(box), row.run, decades, small, width - 0.06 - left)
        elif wide:
            page.text(left, under, "no place was compared", va="top", size=small, color=MUTED)
        down += tall
    page.axhline(down - 0.02, color=HAIRLINE, lw=0.6)
    page.text(0.08, down + 0.06, notes, va="top", size=small, color=MUTED, linespacing=1.3)
    _legend(page, runs, wide)
    return picture


@dataclasses.dataclass(frozen=True)
class _Row:
    """The words of one run, each in as many lines as its cell needs.

    Attributes:
        cells: state and words of each proof.
        named, lines: how many lines the name takes, and how many the row has room for beside or beneath it.
    """

    run: Mapping[str, Any]
    name: str
    cells: list[tuple[str, str]]
    named: int
    lines: int

    @classmethod
    def of(cls, run: Mapping[str, Any], cells: Sequence[float], room: float, beside: bool) -> _Row:
        parts = run["run_name"].replace("-", "- ")  # a name goes on in the next line behind a dash
        name = wrap_text(parts, room - 0.1, "legend.fontsize", "bold").replace("- ", "-")
        proofs = (run["proofs"][proof] for proof in overview.PROOFS)
        words = [
            (one["state"], wrap_text(_first_clause(one["words"]), cell - 0.07, "legend.fontsize"))
            for one, cell in zip(proofs, cells, strict=True)
        ]
        named, lines = name.count("\n") + 1, max(text.count("\n") + 2 for _, text in words)
        return cls(run, name, words, named, max(lines, named + 1) if beside else lines)

    def under(self, line: float) -> float:
        """Inches that it takes where its miniature is beneath."""
        return (self.named + 1 + self.lines) * line + (_TALL + 0.2 if self.run["stages"] else 0.08)

    def write(self, page: Axes, down: float, lefts: Sequence[float], small: float, beside: bool) -> None:
        page.text(0.08, down, self.name, va="top", size=small, weight="bold", linespacing=1.3)
        line = 1.3 * small / 72
        result = self.run["result"].replace("_", " ")
        page.text(0.08, down + line * self.named, result, va="top", size=small, color=MUTED)
        down += 0 if beside else line * (self.named + 1)
        for left, (state, words) in zip(lefts, self.cells, strict=True):
            colour = _COLOURS[state]
            head = f"{overview.SIGNS[state]} {state}"
            page.text(left, down, head, va="top", size=small, weight="bold", color=colour)
            page.text(left, down + line, words, va="top", size=small, color=colour, linespacing=1.3)


def _first_clause(words: str) -> str:
    """What a cell has room for: the miniature beside it shows the rest."""
    return re.split(r"[,;:] | \(", words)[0]


def _draw_errors(axes: Axes, run: Mapping[str, Any], decades: tuple[float, float], small: float, width: float) -> None:
    """F1 in miniature: a stem from 1 for each place, with a diamond where it is a fault or a known difference."""
    stages, first = run["stages"], run["first_divergence"]
    states, places = np.array(stages["state"]), np.arange(len(stages["name"]))
    excess = to_floats(stages["excess"])
    known, wrong = states == "known", np.isin(states, ("fault", "not a number"))
    values = np.where(states == "bit-equal", 0.0, np.where(np.isnan(excess) & (known | wrong), INFINITE, excess))
    low, high = decades
    span = high - low
    bottom = low - 0.3 * span
    axes.set_yscale("log")
    axes.set(xlim=(-0.9, len(places) - 0.1), ylim=(10**bottom, 10 ** (high + 0.04 * span)))
    axes.yaxis.set_major_locator(FixedLocator([1.0, 10.0**high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(bottom=False, labelbottom=False, labelsize=small)
    axes.axhline(1, color=MUTED, lw=0.6, label="1")
    axes.axhline(run["threshold"], color=INK, lw=0.6, ls=(0, (4, 2)), label="threshold")
    shown = on_axis(values, decades)
    stems = (values > 0) & ~np.isnan(values)
    axes.vlines(places[stems], 1, shown[stems], color=MUTED, lw=0.5)
    size = min(2.6, max(1.2, 26 * width / max(len(places), 1)))
    draw_markers(axes, places, values, ~known & ~wrong, "o", INK, size, decades, "excess")
    draw_markers(axes, places, values, known, "D", "white", 3.4, decades, "known")
    draw_markers(axes, places, values, wrong, "D", FAULT, 3.6, decades, "wrong")
    if first and first["stage"] in stages["name"]:
        _name(axes, stages["name"].index(first["stage"]), first, small, width)


def _name(axes: Axes, place: int, first: Mapping[str, Any], small: float, width: float) -> None:
    """The first divergence in words, at the top: right of its place, or left of it, or as near as the axes let it."""
    needed, at = text_inches(first["stage"], small) / width, (place + 0.9) / (axes.get_xlim()[1] + 1)
    left = at + 0.03 if at + 0.03 + needed <= 1 else at - 0.03 - needed
    axes.text(max(left, 1 - needed if left < 0 else 0.0), 0.98, first["stage"], transform=axes.transAxes, va="top",
              size=small, zorder=4, color=INK if first["known"] else FAULT, bbox=HALO)  # fmt: skip


def _notes(index: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """What the rows and the miniatures are."""
    limits = sorted({run["threshold"] for run in runs if run["threshold"]})
    words = "Each place from the image to the logits, fed what LAVIS's was fed, bit-equal ones at the bottom"
    words += f"; above {limits[0]:g} (dashed) is more than rounding." if limits else "."
    left = len(index["runs"]) - len(runs)
    return words + (f" Drawn are the {len(runs)} runs that went worst, of {len(index['runs'])}." if left else "")


def _legend(page: Axes, runs: Sequence[Mapping[str, Any]], wide: bool) -> None:
    states = {state for run in runs if run["stages"] for state in run["stages"]["state"]}
    keys: list[tuple[Line2D, str]] = []
    if states:
        keys.append((legend_key("o", INK), "rounding alone"))
    if "known" in states:
        keys.append((legend_key("D", "white"), "a known difference"))
    if states & {"fault", "not a number"}:
        keys.append((legend_key("D", FAULT), "a fault"))
    if keys:
        page.legend([key for key, _ in keys], [words for _, words in keys], loc="lower left", ncols=3 if wide else 2,
                    borderpad=0.2, handlelength=1.2, columnspacing=1.4, labelspacing=0.3, borderaxespad=0.3,
                    bbox_to_anchor=(0, 0))  # fmt: skip


def alt_text(index: Mapping[str, Any]) -> str:
    """One or two sentences with the numbers, for whoever cannot see the figure."""
    counts = ", ".join(f"{number} {overview.RESULTS[result]}" for result, number in index["counts"].items())
    places = [f"{run['run_name']} at {run['first_divergence']['stage']}" for run in index["runs"]
              if run["result"] == "diverges" and run["first_divergence"]]  # fmt: skip
    where = f" First wrong: {first_few(places, 5)}." if places else ""
    return f"{as_count(len(index['runs']), 'run')}, five proofs each: {index['sentence']}. {counts}.{where}"

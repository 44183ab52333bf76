"""F13, two runs: what moved between them, beside the parameters and versions in which they differ.

It takes two reports, and so is not among the figures of one run in `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blip2nb.display.difference import ReportDifference, excesses
from blip2nb.display.figures.axes import draw_dumbbells, legend_key, log_axis
from blip2nb.display.figures.moves import Move
from blip2nb.display.figures.style import FAULT, HALO, INK, MUTED, Picture, style
from blip2nb.display.figures.words import as_count, as_number, first_few, text_inches, wrap_text
from blip2nb.forms import INFINITE

_DRAWN_STAGES = 20

_DRAWN_CHANGES = 12

_UNDER_STAGES = 7.5
"""Letter heights under the stages: two lines of ticks, the axis's words, the key to the marks, and air."""

_CHANGE_LETTERS = 110
"""A longer one (texts, attributes) is cut: the whole of it is in the comparison's words and in its JSON."""


def available(found: ReportDifference) -> bool:
    return all(report.content.stages for report in found.reports)


def draw(found: ReportDifference, width: float = 7.0) -> Picture:
    """F13: error ÷ rounding in both runs, of the stages that moved by a tenth or more, and what else differs.

    Args:
        found: the comparison of two runs with stages.
        width: inches.
    """
    with style(width):
        return _page(found, found.reports[0].content.threshold, width)


def _page(found: ReportDifference, threshold: float, width: float) -> Picture:
    """Laid out in inches: the stages at the left, or on top where it is narrow; the words beside or beneath them."""
    size = matplotlib.rcParams["font.size"] / 72
    drawn = _largest(found.moved)
    title = wrap_text(found.finding, width - 0.15, "figure.titlesize", "bold")
    top = 0.2 + 1.7 * size * (title.count("\n") + 1)
    beside = width >= 5
    column = 0.56 * width if beside else width
    words = [(wrap_text(text, (width - column if beside else width) - 0.25, weight=weight), weight, colour)
             for text, weight, colour in _words(found)]  # fmt: skip
    steep = 1.85 * size * max(len(drawn), 2) + _UNDER_STAGES * size
    spoken = 1.45 * size * sum(text.count("\n") + 1.15 for text, _, _ in words)
    height = top + (max(steep, spoken) if beside else steep + spoken)
    picture = Picture(width, height, alt_text(found), layout=None)
    page = picture.add_axes((0, 0, 1, 1))  # in inches from the top left: a page, not a plot
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    picture.suptitle(title, x=0.01, y=1 - 0.06 / height, ha="left", va="top")
    _draw_stages(picture, page, drawn, threshold, top, column, steep)
    left, down = (column + 0.1, top) if beside else (0.1, top + steep)
    for text, weight, colour in words:
        page.text(left, down, text, va="top", weight=weight, color=colour, linespacing=1.25)
        down += 1.45 * size * (text.count("\n") + 1.15)
    return picture


def _largest(moved: Sequence[Move]) -> list[Move]:
    """As many of the largest moves as have room, in the order of the network."""
    kept = set(sorted(moved, key=lambda move: -move.size)[:_DRAWN_STAGES])
    return [move for move in moved if move in kept]


def _draw_stages(
    picture: Figure, page: Axes, drawn: Sequence[Move], threshold: float, top: float, column: float, steep: float
) -> None:
    """The dumbbells as a plot of their own, so many inches wide and high, with the key to their marks beneath."""
    size, small = matplotlib.rcParams["font.size"] / 72, matplotlib.rcParams["ytick.labelsize"]
    labels = [move.stage for move in drawn]
    names = 0.2 + max((text_inches(label, small) for label in labels), default=0.0)
    width, height = picture.get_size_inches()
    across, tall = column - names - 0.35, steep - _UNDER_STAGES * size
    axes = picture.add_axes((names / width, 1 - (top + tall) / height, across / width, tall / height))
    values = np.array([[move.before, move.after] for move in drawn], dtype=float).reshape(-1, 2)
    finite = values[(values > 0) & (values < INFINITE)]
    decades = (-1.0, max(2.0, float(math.ceil(math.log10(max([*finite, 10 * threshold])) + 0.3))))
    log_axis(axes, "x", decades, zero_row=bool((values == 0).any()), marks=[1, threshold])
    axes.axvspan(threshold, 10 ** (decades[1] + 0.5), color=FAULT, alpha=0.07, linewidth=0)
    axes.axvline(1, color=MUTED, lw=0.8)
    axes.axvline(threshold, color=INK, lw=0.8, ls=(0, (4, 2)))
    axes.set_yticks(range(len(drawn)), labels)
    axes.set_ylim(max(len(drawn), 1) - 0.4, -0.6)
    axes.set_xlabel("error ÷ its own rounding")
    if not drawn:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "(no stage moved)", transform=axes.transAxes, ha="center", va="center", color=MUTED,
                  bbox=HALO)  # fmt: skip
    draw_dumbbells(axes, values, decades, threshold, ("A", "B"), ("A: ", "B: "))
    keys = {"A": legend_key("D", INK), "B": legend_key("o", INK), "above the threshold": legend_key("s", FAULT)}
    page.legend(list(keys.values()), list(keys), loc="lower left", ncols=3, borderpad=0, handlelength=1.2,
                bbox_to_anchor=(0.1 / width, 1 - (top + steep - 1.1 * size) / height), borderaxespad=0)  # fmt: skip


def _words(found: ReportDifference) -> list[tuple[str, str, str]]:
    """What stands beside the stages: (text, weight, colour) of each paragraph."""
    lines = []
    for letter, name, verdict, wrong in zip("AB", found.names, found.verdicts, found.first_wrong, strict=True):
        run = letter if name == letter else f"{letter}, {name}"
        where = f", first wrong at {wrong}" if wrong else ""
        lines.append((f"{run}: {verdict}{where}", "normal", FAULT if verdict == "diverges" else INK))
    if found.logits:
        lines.append((f"Logits, relative error: {' → '.join(map(as_number, found.logits['relative']))}", "normal", INK))
    if found.captions_compared:
        lines.append((f"Captions: {len(found.captions)} of {found.captions_compared} changed", "normal", INK))
    lines.append(("They differ in" if found.changes else "The reports tell of nothing else that differs", "bold", INK))
    told = [f"{one.what}: {one}" for one in found.changes]
    lines += [(_cut(line), "normal", INK) for line in told[:_DRAWN_CHANGES]]
    rest = len(told) - _DRAWN_CHANGES
    lines += [(f"and {as_count(rest, 'other thing')}", "normal", INK)] if rest > 0 else []
    return [*lines, *((words, "normal", MUTED) for words in _not_drawn(found))]


def _cut(line: str) -> str:
    return line if len(line) <= _CHANGE_LETTERS else f"{line[: _CHANGE_LETTERS - 1]}…"


def _not_drawn(found: ReportDifference) -> list[str]:
    words = [f"not drawn: {as_count(found.still, 'stage')} moved by less than 10 %"]
    smaller = len(found.moved) - _DRAWN_STAGES
    words[0] += f", {as_count(smaller, 'smaller move')}" if smaller > 0 else ""
    words += [f"{as_count(len(names), 'stage')} in {letter} alone"
              for letter, names in zip("AB", found.only, strict=True) if names]  # fmt: skip
    return words


def alt_text(found: ReportDifference) -> str:
    others = [one.what for one in found.changes]
    told = f"They differ in {first_few(others, 6)}." if others else "The reports tell of nothing else that differs."
    return f"{found.finding}. {as_count(found.still, 'stage')} moved by less than 10 %. {told}"


def table(found: ReportDifference) -> list[dict[str, Any]]:
    """A row for each stage of either run: its error ÷ rounding in A and in B, None where the run has no such stage."""
    a, b = (excesses(report.content) for report in found.reports)
    moved = {move.stage for move in found.moved}
    return [{"stage": name, "a": a.get(name), "b": b.get(name), "moved": name in moved} for name in {**a, **b}]

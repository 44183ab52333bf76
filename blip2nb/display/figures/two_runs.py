"""F13, two runs: which stages moved between them, and how far.

It takes two reports, and so is not among the figures of one run in `plots`. What else is different between the runs is
in the words of the comparison: `display.difference`.
"""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.lines import Line2D

from blip2nb.display.difference import ReportDifference, excesses
from blip2nb.display.figures.axes import add_legend, add_title, legend_key
from blip2nb.display.figures.dumbbells import draw_moves, largest, rows_inches
from blip2nb.display.figures.style import FAULT, HALO, INK, MUTED, Picture, style
from blip2nb.display.figures.words import as_count, first_few, wrap_text


def available(found: ReportDifference) -> bool:
    return all(report.content.stages for report in found.reports)


def draw(found: ReportDifference, width: float = 7.0) -> Picture:
    """F13: error ÷ rounding in both runs, of the stages that moved by a tenth or more.

    Args:
        found: the comparison of two runs with stages.
        width: inches.
    """
    with style(width):
        drawn, keys = largest(found.moved), _keys(found, width)
        picture = Picture(width, rows_inches(drawn, width), alt_text(found))
        axes = picture.add_subplot()
        add_title(picture, found.finding)
        draw_moves(axes, drawn, found.reports[0].content.threshold, ("A", "B"), ("A: ", "B: "))
        if not drawn:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "(no stage moved)", transform=axes.transAxes, ha="center", va="center", color=MUTED,
                      bbox=HALO)  # fmt: skip
        add_legend(picture, keys, width)
        lines = picture.get_suptitle().count("\n") + len(keys) - 3
        picture.set_figheight(picture.get_figheight() + 1.3 * lines * matplotlib.rcParams["font.size"] / 72)
        return picture


def _keys(found: ReportDifference, width: float) -> list[tuple[Artist, str]]:
    """The marks, with the runs' names; then how many stages are not drawn."""
    runs = [letter if name == letter else f"{letter}: {name}" for letter, name in zip("AB", found.names, strict=True)]
    keys = [(legend_key("D", INK), runs[0]), (legend_key("o", INK), runs[1])]
    keys.append((legend_key("s", FAULT), "above the threshold"))
    still = f"not drawn: {as_count(found.still, 'stage')} moved by less than 10 %"
    smaller = len(found.moved) - len(largest(found.moved))
    keys.append((_NO_MARK, still + (f", {as_count(smaller, 'smaller move')}" if smaller else "")))
    keys += [(_NO_MARK, f"{as_count(len(names), 'stage')} in {letter} alone")
             for letter, names in zip("AB", found.only, strict=True) if names]  # fmt: skip
    return [(key, wrap_text(words, width - 0.5, "legend.fontsize")) for key, words in keys]


_NO_MARK = Line2D([], [], ls="")


_NAMED = 6  # parameters and versions in the alt text, which people listen to; all are in the comparison's words


def alt_text(found: ReportDifference) -> str:
    others = [one.what for one in found.changes]
    told = (
        f"They differ in {first_few(others, _NAMED)}." if others else "The reports tell of nothing else that differs."
    )
    return f"{found.finding}. {as_count(found.still, 'stage')} moved by less than 10 %. {told}"


def table(found: ReportDifference) -> list[dict[str, Any]]:
    """A row for each stage of either run: its error ÷ rounding in A and in B, None where the run has no such stage."""
    a, b = (excesses(report.content) for report in found.reports)
    moved = {move.stage for move in found.moved}
    return [{"stage": name, "a": a.get(name), "b": b.get(name), "moved": name in moved} for name in {**a, **b}]

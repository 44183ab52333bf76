"""What the figures share on their axes: log axes with a row for exact zeros, markers, legends, titles, hatching."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from blip2nb.display.figures.style import FAULT, HAIRLINE, HALO, INK, MUTED
from blip2nb.display.figures.words import text_inches, tick_label, wrap_text

# The same in every figure, so that two runs compare by eye. What lies beyond an end is an arrowhead there.
ERROR_DECADES = (-8, 0)  # relative: from below what float32 rounds (6e-8) to an error as large as the value
LOGIT_DECADES = (-8, 2)  # differences in the logits' own units: these are some units to some tens themselves
KL_DECADES = (-16, 1)  # goes with the square of the error


def log_axis(
    axes: Axes,
    which: str,
    decades: tuple[float, float],
    zero_row: bool = False,
    marks: Sequence[float] = (),
) -> None:
    """A log axis over fixed decades, with a row of its own for exact zeros below it where asked."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = decades
    span = high - low
    step = next(s for s in (1, 2, 3, 4, 6, 8) if span / s <= 4.6)
    ticks = [10.0**d for d in range(math.ceil(low), math.floor(high) + 1) if (d - math.ceil(low)) % step == 0]
    ticks = sorted({*ticks, *marks})
    labels = {tick: tick_label(tick) for tick in ticks}
    bottom = low - 0.03 * span
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    if zero_row:
        bottom = low - 0.17 * span
        zero = zero_place(decades)
        labels[zero] = "bit-equal" if which == "y" else "\nbit-equal"  # a line lower, clear of its neighbour
        line = axes.axhline if which == "y" else axes.axvline
        line(10 ** (low - 0.04 * span), color=HAIRLINE, lw=0.6, zorder=0.5)
    (axes.set_ylim if which == "y" else axes.set_xlim)(10**bottom, 10 ** (high + 0.03 * span))
    axis.set_major_locator(FixedLocator(sorted(labels)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(value, tick_label(value))))
    axis.set_minor_locator(NullLocator())
    axes.grid(True, axis=which, color="#EFEFEF", lw=0.6)  # type: ignore[arg-type]


def zero_place(decades: tuple[float, float]) -> float:
    """Where on a log axis exact zeros are drawn: below everything."""
    return math.pow(10, decades[0] - 0.105 * (decades[1] - decades[0]))


def on_axis(values: np.ndarray, decades: tuple[float, float]) -> np.ndarray:
    """Where values go on the axis: zeros on their row, what is beyond an end at that end, NaN nowhere."""
    values = np.asarray(values, dtype=float)
    clipped = np.clip(values, 10.0 ** decades[0], 10.0 ** decades[1])
    return np.where(values == 0, zero_place(decades), clipped)


def draw_markers(
    axes: Axes,
    at: np.ndarray,
    values: np.ndarray,
    where: np.ndarray,
    marker: str,
    colour: str,
    size: float,
    decades: tuple[float, float],
    what: str,
    flip: bool = False,
) -> None:
    """Markers of the values at `where`, along x if `flip`; what lies beyond the axis is an arrowhead at its end."""
    shown = on_axis(values, decades)
    over, under = values > 10.0 ** decades[1], (values < 10.0 ** decades[0]) & (values > 0)
    arrows = (">", "<") if flip else ("^", "v")
    for chosen, shape in ((where & ~over & ~under, marker), (where & over, arrows[0]), (where & under, arrows[1])):
        chosen = chosen & ~np.isnan(values)
        if chosen.any():
            x, y = (shown, at) if flip else (at, shown)
            mark = legend_key(shape, colour)
            mark.set(xdata=x[chosen], ydata=y[chosen], markersize=size, label=what, zorder=3, clip_on=False)
            axes.add_line(mark)


def mark_rounding(axes: Axes, threshold: float, top: float) -> None:
    """On an axis of error ÷ its own rounding up to 10**top: a line at 1, one at the threshold, a tint above that."""
    axes.set_ylabel("error ÷ its own\nrounding")
    axes.axhspan(threshold, 10 ** (top + 0.5), color=FAULT, alpha=0.07, linewidth=0)
    axes.axhline(1, color=MUTED, lw=0.8, label="1")
    axes.axhline(threshold, color=INK, lw=0.8, ls=(0, (4, 2)), label="threshold")


def name_zones(axes: Axes, wrong: np.ndarray, count: int, threshold: float, width: float) -> None:
    """Says what is above the threshold and what 1 is, at an end where nothing wrong is drawn, if there is one.

    Args:
        wrong: the places, of `count` along x, that must stay clear.
        width: of the figure, in inches.
    """
    small = matplotlib.rcParams["xtick.labelsize"]
    words = f"more than rounding (above {threshold:g})"
    taken = 1.1 * count * text_inches(words, small) / (width - 0.9)
    for x, ha, clear in ((0.01, "left", wrong > taken), (0.99, "right", wrong < count - taken)):
        if clear.all():
            how: Any = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": ha}
            axes.annotate(words, (x, threshold), (0, 2), va="bottom", size=small, color=FAULT, **how)
            axes.annotate("1 = rounding alone", (x, 1), (0, -5), va="top", size=small, color=MUTED, **how)
            return


def legend_key(marker: str, colour: str) -> Line2D:
    """A marker as the legend shows it; a white one is hollow. In grey a fault is paler than ink: hence its outline."""
    outlined = colour in ("white", FAULT)
    edge, width = (INK, 0.8) if outlined else (colour, 0.3)
    return Line2D([], [], ls="", marker=marker, mfc=colour, mec=edge, mew=width, ms=4.5)


def ring_key(marker: str, colour: str) -> Line2D:
    return Line2D([], [], ls="", marker=marker, mfc="none", mec=colour, mew=1.4, ms=6)


def add_legend(picture: Figure, keys: Sequence[tuple[Artist, str]], width: float) -> None:
    """Under the figure, in as many columns as the words leave room for."""
    size = matplotlib.rcParams["legend.fontsize"]
    needed = [max(text_inches(line, size) for line in words.split("\n")) + 3.65 * size / 72 for _, words in keys]
    columns = next(n for n in range(len(keys), 0, -1) if n == 1 or _across(needed, n) < width - 0.1)
    picture.legend([key for key, _ in keys], [words for _, words in keys], loc="outside lower left", ncols=columns,
                   handlelength=1.4, columnspacing=1.4, labelspacing=0.3, borderpad=0.1, borderaxespad=0.2)  # fmt: skip


def _across(needed: Sequence[float], columns: int) -> float:
    """Width of a legend that fills its columns one after the other, the longer ones first."""
    rows, longer = divmod(len(needed), columns)
    sizes = [rows + 1] * longer + [rows] * (columns - longer)
    ends = list(itertools.accumulate(sizes))
    return sum(max(needed[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def add_title(picture: Figure, finding: str) -> None:
    """Constrained layout keeps room for a figure's title, but only this one, and does not look at its width."""
    picture.suptitle(wrap_text(finding, picture.get_figwidth() - 0.15, "figure.titlesize", "bold"), x=0.01, ha="left")


def hatch_where(axes: Axes, where: np.ndarray, word: str) -> None:
    for run in stretches(where):
        axes.axvspan(run.start - 0.5, run.stop - 0.5, facecolor="none", edgecolor=MUTED, hatch="////", lw=0, zorder=0.8)
        axes.patches[-1].set_gid("NaN")
        if word:
            axes.text((run.start + run.stop - 1) / 2, 0.96, word, transform=axes.get_xaxis_transform(), ha="center",
                      va="top", size="small", weight="bold", color=FAULT, bbox=HALO)  # fmt: skip


def stretches(where: np.ndarray) -> Iterator[slice]:
    """The stretches of neighbours that are True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(start), int(stop))

"""Dumbbells: how far each stage's error ÷ its own rounding moved, a row for each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from blip2nb.display.figures.axes import draw_markers, log_axis, on_axis
from blip2nb.display.figures.moves import Move
from blip2nb.display.figures.style import FAULT, HAIRLINE, HALO, INK, MUTED
from blip2nb.display.figures.words import as_plain_times
from blip2nb.forms import INFINITE

MOST_ROWS = 20
"""Twenty rows are half a page of a paper. The others are counted in words, and all are in the figure's table."""


def largest(moves: Sequence[Move]) -> list[Move]:
    """As many of the largest moves as have room, in the order of the network."""
    kept = sorted(moves, key=lambda move: -move.size)[:MOST_ROWS]
    return [move for move in moves if move in kept]


def rows_inches(moves: Sequence[Move], width: float) -> float:
    """How high a figure of this width is whose rows are these moves, with a title and a legend of a line each."""
    return 1.5 + (0.24 if width >= 5 else 0.2) * max(len(moves), 2)


def draw_moves(
    axes: Axes, moves: Sequence[Move], threshold: float, sides: tuple[str, str], marks: tuple[str, str] = ("", "")
) -> None:
    """A row for each move: both numbers, joined by a line. Those above the threshold are faults.

    Args:
        sides: what the first number (a diamond) and the second (a disc) are.
        marks: what stands before "NaN" to say whose it is.
    """
    values = np.array([[move.before, move.after] for move in moves], dtype=float).reshape(-1, 2)
    finite = values[(values > 0) & (values < INFINITE)]
    decades = (-1.0, max(2.0, float(math.ceil(math.log10(max([*finite, 10 * threshold])) + 0.3))))
    log_axis(axes, "x", decades, zero_row=bool((values == 0).any()), marks=[1, threshold])
    axes.axvspan(threshold, 10 ** (decades[1] + 0.5), color=FAULT, alpha=0.07, linewidth=0)
    axes.axvline(1, color=MUTED, lw=0.8)
    axes.axvline(threshold, color=INK, lw=0.8, ls=(0, (4, 2)))
    _bells(axes, values, decades, threshold, sides)
    _numbers(axes, values, decades, marks)
    axes.set_yticks(range(len(moves)), [move.stage for move in moves])
    axes.set_ylim(max(len(moves), 1) - 0.4, -0.6)
    axes.set_xlabel("error ÷ its own rounding")


def _bells(
    axes: Axes, values: np.ndarray, decades: tuple[float, float], threshold: float, sides: tuple[str, str]
) -> None:
    rows, shown = np.arange(len(values), dtype=float), on_axis(values, decades)
    axes.hlines(rows, shown[:, 0], shown[:, 1], color=MUTED, lw=1.0)
    size = 5.0 if matplotlib.rcParams["font.size"] > 8 else 4.0
    for side, marker in enumerate("Do"):
        for wrong in (False, True):
            where = (values[:, side] > threshold) == wrong
            draw_markers(axes, rows, values[:, side], where, marker, FAULT if wrong else INK, size, decades,
                         sides[side], flip=True)  # fmt: skip


def _numbers(axes: Axes, values: np.ndarray, decades: tuple[float, float], marks: tuple[str, str]) -> None:
    """Each number beside its mark, away from the other; a row with one that is NaN is hatched."""
    small, shown = matplotlib.rcParams["xtick.labelsize"], on_axis(values, decades)
    for row, side in np.ndindex(values.shape):
        number, x = float(values[row, side]), float(shown[row, side])
        if math.isnan(number):
            axes.axhspan(row - 0.4, row + 0.4, facecolor="none", edgecolor=HAIRLINE, hatch="////", lw=0, zorder=0.8)
            axes.patches[-1].set_gid("NaN")
            axes.text(0.99, row, f"{marks[side]}NaN", transform=axes.get_yaxis_transform(), ha="right", va="center",
                      size=small, weight="bold", color=FAULT, bbox=HALO)  # fmt: skip
        elif number > 0:  # a zero stands on the row of those that are bit-equal
            other = float(shown[row, 1 - side])
            right = x > other or math.isnan(other) or (x == other and side == 1)
            axes.annotate(as_plain_times(number), (x, row), (5 if right else -5, 0), textcoords="offset points",
                          ha="left" if right else "right", va="center", size=small)  # fmt: skip

"""F2, before and after: what the fix does to each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.lines import Line2D

from blip2nb.display.figures.axes import add_legend, add_title, legend_key
from blip2nb.display.figures.dumbbells import draw_moves, largest, rows_inches
from blip2nb.display.figures.moves import SMALLEST_MOVE, Move
from blip2nb.display.figures.style import FAULT, INK, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_count, as_times, to_floats
from blip2nb.report.schema import Stage


def available(report: Report, arrays: Arrays) -> bool:
    return any(stage.fixed for stage in report.stages)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F2: error ÷ rounding as shipped and with the fix, for the stages that it moves by a tenth or more.

    Args:
        report: `stages` with `fixed`, and `threshold`.
        arrays: not used.
        width: inches.
    """
    moves, still = _moves(report.stages)
    drawn = largest(moves)
    picture = Picture(width, rows_inches(drawn, width), alt_text(report, arrays))
    add_title(picture, _moves_finding(moves))
    draw_moves(picture.add_subplot(), drawn, report.threshold, ("as shipped", "with the fix"))
    keys = [(legend_key("D", FAULT), "as shipped"), (legend_key("o", INK), "with the fix")]
    words = f"not drawn: {as_count(still, 'stage')} moved by less than 10 %"
    if len(moves) > len(drawn):
        words += f", {as_count(len(moves) - len(drawn), 'smaller move')}"
    add_legend(picture, [*keys, (Line2D([], [], ls=""), words)], width)
    return picture


def _moves(stages: Sequence[Stage]) -> tuple[list[Move], int]:
    """The stages that the fix moves, and how many it leaves where they were."""
    moves, still = [], 0
    for stage in stages:
        if stage.junction or stage.fixed is None:
            continue
        before, after = to_floats([stage.excess, stage.fixed.excess])
        if not all(side.refereed for side in (stage, stage.fixed)):
            continue  # there is no number to move from or to
        alike = (math.isnan(before) and math.isnan(after)) or abs(after - before) <= SMALLEST_MOVE * abs(before)
        if alike:
            still += 1
        else:
            moves.append(Move(stage.name, before, after))
    return moves, still


def _moves_finding(moves: list[Move]) -> str:
    if not moves:
        return "The fix moves no stage"
    most = max(moves, key=lambda move: move.size)
    words = f"With the fix, {most.stage} goes from {as_times(most.before)} to {as_times(most.after)} its own rounding"
    return words if len(moves) == 1 else f"{words}; {as_count(len(moves) - 1, 'other stage')} moved"


def alt_text(report: Report, arrays: Arrays) -> str:
    moves, still = _moves(report.stages)
    return f"{_moves_finding(moves)}. {as_count(still, 'stage')} moved by less than 10 %."


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each stage that the fix could move."""
    pairs = [(stage, stage.fixed) for stage in report.stages if stage.fixed]
    return [{"name": stage.name, "excess": stage.excess, "excess_fixed": fixed.excess} for stage, fixed in pairs]

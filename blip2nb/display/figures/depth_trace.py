"""F1, the depth trace: where in the network an error arises, and whether it is more than rounding."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Patch

from blip2nb.display.figures.axes import (
    ERROR_DECADES,
    add_legend,
    add_title,
    draw_markers,
    hatch_where,
    legend_key,
    log_axis,
    mark_rounding,
    name_zones,
    on_axis,
    stretches,
)
from blip2nb.display.figures.depth import Depth, block_ticks, marker_size, part_lines, part_strip
from blip2nb.display.figures.style import FAULT, INK, MUTED, ROUNDING, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_count, as_number, as_times, first_few, text_inches, to_floats, wrap_text
from blip2nb.forms import INFINITE
from blip2nb.report.schema import FirstDivergence


def available(report: Report, arrays: Arrays) -> bool:
    return bool(report.stages)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F1, the hero: where in the network an error arises, and whether it is more than rounding.

    Above, relative errors ‖transformers − LAVIS‖ ÷ ‖LAVIS‖ over depth; below, each stage's error over its own
    rounding. Stages that cannot be judged (NaN) are hatched in both.

    Args:
        report: `stages`, `threshold` and `first_divergence` are drawn.
        arrays: not used; every figure takes the same arguments.
        width: inches.
    """
    depth = Depth.of(report)
    picture = Picture(width, 5.2 if width >= 5 else 4.7, alt_text(report, arrays))
    rows = picture.add_gridspec(3, 1, height_ratios=[1.9, 1.5, 0.16])
    above = picture.add_subplot(rows[0])
    below = picture.add_subplot(rows[1], sharex=above)
    strip = picture.add_subplot(rows[2], sharex=above)
    add_title(picture, _finding(report, depth))
    _errors_over_depth(above, depth)
    _excess_over_depth(below, depth, report.threshold, width)
    picture.align_ylabels([above, below])
    for axes in (above, below):
        part_lines(axes, depth)
    hatch_where(above, depth.broken, "NaN")
    hatch_where(below, depth.broken, "")
    hatch_where(below, depth.unjudged & ~depth.broken, "not judged")
    above.set_xlim(-0.9, len(depth.names) - 0.1)
    above.tick_params(labelbottom=False, bottom=False)
    block_ticks(below, depth, width)
    part_strip(strip, depth, width)
    _callout(picture, above, below, report, depth, width)
    add_legend(picture, _depth_legend(depth), width)
    return picture


def _finding(report: Report, depth: Depth) -> str:
    """What the depth trace shows, as a title."""
    first = report.first_divergence
    if first:
        excess = to_floats([first.excess])[0]
        size = f"error {as_times(excess)} its own rounding" if not math.isnan(excess) else _without_excess(depth, first)
        return f"First wrong at {first.stage}: {size}"
    if depth.broken.any():
        return f"Not a number at {depth.names[int(depth.broken.argmax())]}: the stages hatched cannot be judged"
    own = np.where(depth.junction, depth.arrival_error, depth.local_error)
    if depth.unjudged.any() and np.isnan(depth.excess).all():
        return "No stage is judged, since the float64 runs failed"
    if len(own) and not own.any():
        return f"Bit-equal at all {len(own)} stages, each fed what LAVIS fed it"
    worst = int(np.nanargmax(depth.excess)) if not np.isnan(depth.excess).all() else 0
    top = f"{as_times(depth.excess[worst])} its own rounding, at {depth.names[worst]}"
    if depth.wrong.any():
        return f"{int(depth.wrong.sum())} stages stand out, the most {top}"
    if depth.unjudged.any():
        stages = as_count(int(depth.unjudged.sum()), "stage")
        return f"{stages} not judged, since the float64 run failed; the largest error of the others is {top}"
    return f"No stage is wrong: the largest error is {top}"


def _without_excess(depth: Depth, first: FirstDivergence) -> str:
    place = depth.names.index(first.stage) if first.stage in depth.names else None
    if place is not None and depth.junction[place] and not depth.broken[place]:
        return f"what arrives there is off by {as_number(depth.arrival_error[place])}"
    return "its output is not a number"


def _errors_over_depth(axes: Axes, depth: Depth) -> None:
    log_axis(axes, "y", ERROR_DECADES, zero_row=True)
    axes.set_ylabel("relative error")
    low, x = 10.0 ** ERROR_DECADES[0], depth.places
    size = marker_size(depth)
    band = np.clip(depth.rounding, low, None)
    # A junction computes nothing and has no rounding: the band stops there rather than guess.
    for run in stretches(~np.isnan(band)):
        steps, edges = np.repeat(band[run], 2), np.repeat(np.arange(run.start, run.stop + 1) - 0.5, 2)[1:-1]
        axes.fill_between(edges, low, steps, color=ROUNDING, linewidth=0, label="rounding")
    axes.plot(
        x, np.where(depth.drift > 0, on_axis(depth.drift, ERROR_DECADES), np.nan), color=MUTED, lw=0.9, zorder=2.5
    )
    axes.lines[-1].set_label("drift")
    for what, where, marker, colour, scale in (
        ("drift zero", depth.drift == 0, ".", MUTED, 0.45),
        ("local error", ~depth.junction & ~depth.wrong, "o", INK, 1.0),
        ("arrival error", depth.junction & ~depth.wrong, ">", "white", 1.15),
    ):
        values = {"drift zero": depth.drift, "local error": depth.local_error, "arrival error": depth.arrival_error}
        draw_markers(axes, x, values[what], where, marker, colour, size * scale, ERROR_DECADES, what)
    own = np.where(depth.junction, depth.arrival_error, depth.local_error)
    draw_markers(axes, x, own, depth.wrong, "D", FAULT, size * 1.25, ERROR_DECADES, "wrong")


def _excess_over_depth(axes: Axes, depth: Depth, threshold: float, width: float) -> None:
    finite = depth.excess[(depth.excess < INFINITE) & (depth.excess > 0)]
    top = max(2.0, math.ceil(math.log10(max([*finite, 10 * threshold])) + 0.15))
    zeros = (depth.excess == 0) | (~depth.junction & np.isnan(depth.excess) & (depth.local_error == 0))
    decades = (-1.0, float(top))
    log_axis(axes, "y", decades, zero_row=bool(zeros.any()), marks=[1, threshold])
    mark_rounding(axes, threshold, top)
    size, x = marker_size(depth), depth.places
    values = np.where(zeros, 0.0, depth.excess)
    shown = on_axis(values, decades)
    for where, colour in ((~depth.wrong & ~zeros, INK), (depth.wrong & ~zeros, FAULT)):
        axes.vlines(x[where], 1, shown[where], color=colour, lw=0.7)
    draw_markers(axes, x, values, ~depth.wrong, "o", INK, size, decades, "excess")
    draw_markers(axes, x, values, depth.wrong, "D", FAULT, size * 1.25, decades, "wrong excess")
    _fault_sizes(axes, depth, shown, width)
    wrong = depth.places[depth.wrong | depth.broken | depth.unjudged]
    name_zones(axes, wrong, len(depth.names), threshold, width)


_MOST_SIZES = 4  # of more faults than have room for a number each, the first alone has one
_MOST_OTHERS = 3  # so many further faults fit in a line over a page-wide picture; the rest are counted


def _fault_sizes(axes: Axes, depth: Depth, shown: np.ndarray, width: float) -> None:
    """How many times its rounding, beside each fault, on a side where no other fault's line is crossed."""
    wrong = depth.places[depth.wrong & ~np.isnan(depth.excess)]
    size, pitch = matplotlib.rcParams["legend.fontsize"], (width - 0.9) / len(depth.names)
    for place in wrong if len(wrong) <= _MOST_SIZES else wrong[:1]:
        words = as_times(depth.excess[place])
        reach = (text_inches(words, size, "bold") + 0.1) / pitch
        for side, ha, end in ((5, "left", place + reach), (-5, "right", place - reach)):
            crossed = (wrong > min(place, end)) & (wrong < max(place, end)) & (wrong != place)
            if not crossed.any() and 0 <= end < len(depth.names):
                axes.annotate(words, (place, shown[place]), (side, 0), color=FAULT, textcoords="offset points",
                              ha=ha, va="center", weight="bold", size=size)  # fmt: skip
                break


def _callout(picture: Figure, above: Axes, below: Axes, report: Report, depth: Depth, width: float) -> None:
    """The first divergence in words, over a line through both panels: over the data there is no room that is safe."""
    first = report.first_divergence
    if not first or first.stage not in depth.names:
        return
    place = depth.names.index(first.stage)
    lines = [_divergence_words(first, depth, place), first.cause or "the cause is not known"]
    others = [f"{depth.names[p]} ({as_times(depth.excess[p])})" for p in depth.places[depth.wrong] if p != place]
    if others:
        lines.append("also: " + first_few(others, _MOST_OTHERS))
    room = width - (1.0 if width >= 5 else 0.85)
    text = "\n".join(wrap_text(line, room, "legend.fontsize") for line in lines)
    size = matplotlib.rcParams["legend.fontsize"]
    across = max(text_inches(line, size) for line in text.split("\n")) / room
    at = (place + 0.9) / (len(depth.names) + 0.8)
    left = min(max(at - across / 2, 0.0), max(1 - across, 0.0))
    above.text(left, 1.05, text, transform=above.transAxes, va="bottom", color=FAULT, size=size, linespacing=1.3)
    line = ConnectionPatch((place, 1.03), (place, 0), above.get_xaxis_transform(), below.get_xaxis_transform(),
                           color=FAULT, lw=0.8, zorder=0.9)  # fmt: skip
    line.set_in_layout(False)
    picture.add_artist(line)


def _divergence_words(first: FirstDivergence, depth: Depth, place: int) -> str:
    what, own = ("error on arrival", depth.arrival_error) if depth.junction[place] else ("error", depth.local_error)
    return f"{first.stage}: {what} {as_number(own[place])}"


def _depth_legend(depth: Depth) -> list[tuple[Artist, str]]:
    keys: list[tuple[Artist, str]] = [
        (legend_key("o", INK), "alone, fed the reference recording"),
        (Line2D([], [], color=MUTED, lw=0.9), "drift: with all that came before"),
        (Patch(color=ROUNDING), "its own rounding"),
    ]
    if depth.junction.any():
        keys.append((legend_key(">", "white"), "what arrives there"))
    if depth.wrong.any():
        keys.append((legend_key("D", FAULT), "fault"))
    return keys


def alt_text(report: Report, arrays: Arrays) -> str:
    depth = Depth.of(report)
    words = f"Errors of {as_count(len(depth.names), 'stage')} over depth. {_finding(report, depth)}."
    drift = depth.drift[~np.isnan(depth.drift)]
    if len(drift):
        words += f" Drift reaches {as_number(drift.max())}; a fault is above {report.threshold:g} × rounding."
    if (count := int((depth.unjudged & ~depth.broken).sum())) > 0:
        words += f" {as_count(count, 'stage')} {'is' if count == 1 else 'are'} not judged: the float64 run failed."
    return words


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each stage."""
    keys = ("name", "junction", "arrival_error", "drift", "local_error", "rounding", "excess")
    return [{key: getattr(stage, key) for key in keys} for stage in report.stages]

"""F15, inside a stage: which of its modules goes wrong, and what is left of the error when that is put right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from blip2nb.display.faults import outcome, said
from blip2nb.display.figures.axes import (
    add_legend,
    add_title,
    draw_markers,
    hatch_where,
    legend_key,
    log_axis,
    mark_rounding,
    name_zones,
    on_axis,
)
from blip2nb.display.figures.style import FAULT, INK, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_count, as_times, first_few, text_inches, to_floats, wrap_text
from blip2nb.forms import INFINITE
from blip2nb.report.schema import Fault, Place


@dataclasses.dataclass(frozen=True)
class _Inside:
    """One stage from inside: its places in the order of execution, without those that hand on what they were given.

    Attributes:
        places: as in a fault's `inside`.
        names: of the places; a module by the end of its path that tells it from the others.
        arriving: what reaches a module, the work of the code before it; else what a module gives out.
        excess, after: error ÷ its own rounding as it is, and with the likeliest cause put right (NaN: not tried).
    """

    stage: str
    faults: Sequence[Fault]
    places: Sequence[Place]
    left_out: int
    names: list[str]
    arriving: np.ndarray
    faulty: np.ndarray
    excess: np.ndarray
    after: np.ndarray

    @classmethod
    def of(cls, report: Report) -> _Inside:
        first = next(fault for fault in report.faults if len(fault.inside) > 1)
        faults = [fault for fault in report.faults if fault.stage == first.stage]
        *before, last = first.inside
        places = [*(one for one in before if one.local_error != 0 or one.rounding != 0), last]
        after = [math.nan] * len(places)
        for fault in faults:
            at = _place_of(fault, places)
            test = fault.causes[0].counter_test
            if at is not None and test is not None:
                after[at] = to_floats(test.excess)[1]
        return cls(
            stage=first.stage,
            faults=faults,
            places=places,
            left_out=len(first.inside) - len(places),
            names=_names(places),
            arriving=np.array([place.at == "in" for place in places], dtype=bool),
            faulty=np.array([place.faulty for place in places], dtype=bool),
            excess=to_floats(place.excess for place in places),
            after=np.array(after),
        )

    @property
    def steps(self) -> np.ndarray:
        return np.arange(len(self.names))


def _place_of(fault: Fault, places: Sequence[Place]) -> int | None:
    """Where a fault was measured. One of the stage as a whole, such as another layer's weights, has no such place."""
    measured = fault.local_error, fault.excess
    return next((n for n, one in enumerate(places) if (one.local_error, one.excess) == measured), None)


def _names(places: Sequence[Place]) -> list[str]:
    """Code between two modules goes by what it is, a module by as much of its path's end as no other has."""
    modules = {place.module for place in places if place.at == "out"}
    names = []
    for place in places[:-1]:
        parts = place.module.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        own = [e for e in ends if not e.isdigit() and sum(f".{one}".endswith(f".{e}") for one in modules) < 2]
        end = next(iter(own), ends[-1])
        names.append(end if place.at == "out" else place.part)
    return [*names, places[-1].part]  # the stage's own output, the work of the code behind its last module


def available(report: Report, arrays: Arrays) -> bool:
    return any(len(fault.inside) > 1 for fault in report.faults)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F15: error ÷ rounding at every place inside the first stage that was opened, each fed the reference's values.

    Args:
        report: `faults` with `inside`, and `threshold`.
        arrays: not used.
        width: inches.
    """
    inside = _Inside.of(report)
    causes = _causes(inside, width - (1.0 if width >= 5 else 0.85))
    panel, around = (1.9, 1.2) if width >= 5 else (1.6, 1.5)
    small = matplotlib.rcParams["xtick.labelsize"]
    names = max(text_inches(name, small, "bold") for name in inside.names)
    words = 1.5 * small / 72 * (causes.count("\n") + 1)
    picture = Picture(width, panel + around + names + words, alt_text(report, arrays))
    axes = picture.add_subplot()
    add_title(picture, _finding(inside))
    _excess_in_order(axes, inside, report.threshold, panel)
    wrong = inside.steps[inside.faulty | np.isnan(inside.excess)]
    name_zones(axes, wrong, len(inside.names), report.threshold, width)
    _name_places(axes, inside, width)
    axes.text(0, 1.04, causes, transform=axes.transAxes, va="bottom", color=FAULT, linespacing=1.3,
              size=matplotlib.rcParams["legend.fontsize"])  # fmt: skip
    add_legend(picture, _keys(inside), width)
    return picture


def _finding(inside: _Inside) -> str:
    wrong = [inside.names[n] for n in inside.steps[inside.faulty]]
    if not wrong:
        return f"Inside {inside.stage}: no place alone is wrong"
    if len(wrong) > 1:
        return f"Inside {inside.stage} {len(wrong)} of {len(inside.names)} places are wrong: {first_few(wrong, 3)}"
    (excess,) = inside.excess[inside.faulty]
    size = "not a number" if math.isnan(excess) else f"{as_times(excess)} its own rounding"
    return f"Inside {inside.stage} it is the {wrong[0]}: {size}"


def _excess_in_order(axes: Axes, inside: _Inside, threshold: float, height: float) -> None:
    """The panel itself, `height` inches high: a dot for each place, an arrow to where the counter-test brings it."""
    both = np.concatenate([inside.excess, inside.after])
    finite = both[(both < INFINITE) & (both > 0)]
    top = max(2.0, math.ceil(math.log10(max([*finite, 10 * threshold])) + 0.15))
    decades = (-1.0, float(top))
    near = math.log10(threshold) * height / (top + 2) < 1.1 * matplotlib.rcParams["xtick.labelsize"] / 72
    log_axis(axes, "y", decades, zero_row=bool((both == 0).any()), marks=[1] if near else [1, threshold])
    mark_rounding(axes, threshold, top)
    size = 5.0 if matplotlib.rcParams["font.size"] > 8 else 4.0
    shown = on_axis(inside.excess, decades)
    right = ~inside.faulty
    tried = inside.faulty & ~np.isnan(inside.after)
    for where, colour in ((right, INK), (inside.faulty & ~tried, FAULT)):
        axes.vlines(inside.steps[where], 1, shown[where], color=colour, lw=0.7)
    for where, marker, colour, what in (
        (right & ~inside.arriving, "o", INK, "given out"),
        (right & inside.arriving, ">", "white", "arriving"),
        (inside.faulty, "D", FAULT, "wrong"),
    ):
        draw_markers(axes, inside.steps, inside.excess, where, marker, colour, size, decades, what)
    draw_markers(axes, inside.steps, inside.after, tried, "o", "white", size, decades, "counter-test")
    for step in inside.steps[tried & ~np.isnan(shown)]:
        start, end = shown[step], on_axis(inside.after[step : step + 1], decades)[0]
        arrow = {"arrowstyle": "->", "color": INK, "lw": 0.9, "shrinkA": size * 0.8, "shrinkB": size * 0.6}
        axes.annotate("", (step, end), (step, start), arrowprops=arrow, zorder=2.5)
    hatch_where(axes, np.isnan(inside.excess), "NaN")
    axes.set_xlim(-0.8, len(inside.names) - 0.2)


def _name_places(axes: Axes, inside: _Inside, width: float) -> None:
    """Every place's name where there is room; else every second's or third's, and always that of what is wrong."""
    size = matplotlib.rcParams["xtick.labelsize"]
    pitch = (width - 0.9) / max(len(inside.names), 1)
    every = math.ceil(1.25 * size / 72 / pitch)
    wrong = inside.steps[inside.faulty]
    far = [n for n in inside.steps if n % every == 0 and not (np.abs(wrong - n) < every).any()]
    named = sorted({*far, *wrong.tolist()})
    axes.set_xticks(named, [inside.names[n] for n in named], rotation=90)
    for step, label in zip(named, axes.get_xticklabels(), strict=True):
        if inside.faulty[step]:
            label.set(color=FAULT, weight="bold")
    axes.set_xlabel("places inside, in the order of execution")


_MOST_CAUSES = 2  # a cause takes up to three lines over a narrow picture; all are in the report's list of faults


def _causes(inside: _Inside, room: float) -> str:
    """The likeliest cause of the first faults, in lines of at most `room` inches."""
    lines = []
    for fault in inside.faults[:_MOST_CAUSES]:
        words, test = said(fault, fault.causes[0]), outcome(fault.causes[0])
        lines.append(f"{fault.part}: {words}{f' ({test})' if test else ''}")
    if len(inside.faults) > len(lines):
        lines.append(f"and {as_count(len(inside.faults) - len(lines), 'more fault')}")
    return "\n".join(wrap_text(line, room, "legend.fontsize") for line in lines)


def _keys(inside: _Inside) -> list[tuple[Artist, str]]:
    keys: list[tuple[Artist, str]] = [
        (legend_key("o", INK), "what a module gives out"),
        (legend_key(">", "white"), "what reaches one"),
        (legend_key("D", FAULT), "fault"),
    ]
    if not np.isnan(inside.after).all():
        keys.append((legend_key("o", "white"), "put right: the counter-test"))
    if inside.left_out:
        keys.append((Line2D([], [], ls=""), f"not drawn: {as_count(inside.left_out, 'place')} that hand on unchanged"))
    return keys


def alt_text(report: Report, arrays: Arrays) -> str:
    inside = _Inside.of(report)
    words = f"{_finding(inside)}. {as_count(len(inside.names), 'place')} inside it in the order of execution."
    fault = inside.faults[0]
    test = outcome(fault.causes[0])
    return f"{words} Likely cause: {said(fault, fault.causes[0])}{f'; {test}' if test else ''}."


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each place inside, also those that are not drawn."""
    inside = _Inside.of(report)
    after = {id(place): value for place, value in zip(inside.places, inside.after.tolist(), strict=True)}
    keys = ("module", "part", "at", "local_error", "rounding", "excess", "faulty")
    first = next(fault for fault in inside.faults if len(fault.inside) > 1)
    return [
        {**{key: getattr(place, key) for key in keys}, "excess_after": after.get(id(place))} for place in first.inside
    ]

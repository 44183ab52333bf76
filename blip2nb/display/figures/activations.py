"""F3, the activations themselves: how large both models' values are over depth, and where they part."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from blip2nb.display.figures.axes import (
    add_legend,
    add_title,
    draw_markers,
    hatch_where,
    legend_key,
    log_axis,
    on_axis,
    stretches,
    zero_place,
)
from blip2nb.display.figures.depth import Depth, block_ticks, marker_size, part_lines, part_strip
from blip2nb.display.figures.style import FAULT, INK, LAVIS, TRANSFORMERS, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_count, as_number, tick_label

_RMS, _LOW, _HIGH, _MAXIMUM = range(4)  # the columns of both arrays
_COMPARED = {_RMS: "RMS", _HIGH: "99th percentile", _MAXIMUM: "maximum"}  # the smallest values are noise in any pair
_DASHED, _PALE = (0, (3, 1.5)), 0.17
_PARTED = 1.1  # by eye: a smaller factor does not show on a log axis, and the title says how large it is all the same


def available(report: Report, arrays: Arrays) -> bool:
    sides = (arrays.get(f"activations/{side}") for side in ("lavis", "transformers"))
    return bool(report.stages) and all(side is not None and np.isfinite(side).any() for side in sides)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F3: the size of the values themselves over depth, of both models, each run by itself from the image and the text.

    RMS as a line, from the 1st to the 99th percentile of |value| as a band, the maximum as dots. A scale that explodes
    or vanishes shows here, single values that tower over the rest, and the stage from which on both models part.

    Args:
        report: `stages` and `first_divergence`.
        arrays: `activations/lavis` and `activations/transformers`, (stages, 4): RMS, 1st percentile, 99th percentile
            and maximum of |value|; NaN where there are no floating-point values.
        width: inches.
    """
    depth, ours, theirs = Depth.of(report), *_sides(arrays)
    picture = Picture(width, 3.9 if width >= 5 else 4.2, alt_text(report, arrays))
    rows = picture.add_gridspec(2, 1, height_ratios=[3.4, 0.16])
    axes = picture.add_subplot(rows[0])
    strip = picture.add_subplot(rows[1], sharex=axes)
    add_title(picture, _finding(depth, ours, theirs))
    decades = _size_axis(axes, np.stack([ours, theirs]))
    _bands(axes, ours, theirs, decades)
    size = marker_size(depth)
    # The larger squares lie under the discs: where both agree, which is the aim, both can still be seen.
    for values, marker, colour, scale, what in (
        (theirs, "s", TRANSFORMERS, 1.5, "transformers, maximum"),
        (ours, "o", LAVIS, 0.8, "LAVIS, maximum"),
    ):
        every = np.ones(len(values), bool)
        draw_markers(axes, depth.places, values[:, _MAXIMUM], every, marker, colour, size * scale, decades, what)
    _largest(axes, np.fmax(ours, theirs)[:, _MAXIMUM], decades)
    part_lines(axes, depth)
    broken = _broken(ours, theirs) | np.isnan(ours).any(axis=1) & depth.broken
    hatch_where(axes, broken, "NaN")
    axes.set_xlim(-0.9, len(depth.names) - 0.1)
    block_ticks(axes, depth, width)
    part_strip(strip, depth, width)
    empty = np.isnan(ours).all(axis=1) & ~broken
    add_legend(picture, _legend(axes, report, depth, _parting(ours, theirs), bool(empty.any())), width)
    return picture


def _sides(arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = (np.asarray(arrays[f"activations/{side}"], dtype=float) for side in ("lavis", "transformers"))
    return ours, theirs


def _broken(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Stages at which one side alone is NaN. Where both are, there is mostly nothing to measure: a mask, token ids."""
    return np.isnan(ours).any(axis=1) != np.isnan(theirs).any(axis=1)


def _parting(ours: np.ndarray, theirs: np.ndarray) -> int | None:
    """The first stage at which the models' scales are no longer the same."""
    apart = _broken(ours, theirs) | (_factors(ours, theirs) > _PARTED).any(axis=1)
    return int(apart.argmax()) if apart.any() else None


def _factors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many times the smaller the larger of both is: 1 where equal, infinite where one alone is 0."""
    small, large = np.minimum(ours, theirs), np.maximum(ours, theirs)
    factors = np.divide(large, small, out=np.full_like(small, np.inf), where=small > 0)
    return np.where(np.isnan(small), np.nan, np.where(small == large, 1.0, factors))


def _finding(depth: Depth, ours: np.ndarray, theirs: np.ndarray) -> str:
    """The first stage at which both part, and by how much; else that they do not, and the largest value."""
    place = _parting(ours, theirs)
    if place is not None:
        return f"The models part first at {depth.names[place]}: {_gap(ours[place], theirs[place])}"
    largest = int(np.nanargmax(ours[:, _MAXIMUM]))
    top = f"largest value {as_number(ours[largest, _MAXIMUM])}, at {depth.names[largest]}"
    if np.array_equal(ours, theirs, equal_nan=True):
        return f"Exactly the same magnitudes at every stage; {top}"
    apart = np.nanmax(_factors(ours, theirs)[:, list(_COMPARED)]) - 1
    return f"The same magnitudes at every stage, within {as_number(100 * apart)} %; {top}"


def _gap(ours: np.ndarray, theirs: np.ndarray) -> str:
    """In words, how two stages' values differ: the measure that differs most."""
    for name, values in (("transformers", theirs), ("LAVIS", ours)):
        if np.isnan(values).any():
            return f"{name} alone is not a number"
        if not np.isfinite(values).all():
            return f"{name} overflows, up to infinity"
    column = max(_COMPARED, key=lambda n: _factors(ours, theirs)[n])
    sizes = f"{as_number(theirs[column])} against {as_number(ours[column])}"
    if not ours[column]:
        return f"transformers' {_COMPARED[column]} is {sizes}"
    return f"transformers' {_COMPARED[column]} is {as_number(theirs[column] / ours[column])} × LAVIS's ({sizes})"


def _size_axis(axes: Axes, values: np.ndarray) -> tuple[float, float]:
    """A log axis over the whole decades that both models' values need, with a row for zeros where there are any."""
    shown = values[np.isfinite(values) & (values > 0)]
    low = math.floor(math.log10(shown.min(initial=1.0)))
    high = math.ceil(math.log10(shown.max(initial=1.0)) + 0.05)
    decades = (float(low), float(max(high, low + 2)))
    log_axis(axes, "y", decades, zero_row=bool((values == 0).any()))
    zero = zero_place(decades)  # of a value, "bit-equal" would be the wrong word
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: "zero" if value == zero else tick_label(value)))
    axes.set_ylabel("|value|")
    return decades


def _bands(axes: Axes, ours: np.ndarray, theirs: np.ndarray, decades: tuple[float, float]) -> None:
    for run in stretches(~np.isnan(ours).any(axis=1)):
        edges, (rms, low, high) = _steps(on_axis(ours, decades), run)
        axes.fill_between(edges, low, high, color=LAVIS, alpha=_PALE, linewidth=0, label="LAVIS, band")
        axes.plot(edges, rms, color=LAVIS, lw=2.4, label="LAVIS, RMS")
    for run in stretches(~np.isnan(theirs).any(axis=1)):
        edges, (rms, low, high) = _steps(on_axis(theirs, decades), run)
        axes.plot(edges, rms, color=TRANSFORMERS, lw=1.3, ls=_DASHED, label="transformers, RMS", zorder=2.5)
        for edge in (low, high):  # its edges alone: a filling over the other would hide how far both agree
            axes.plot(edges, edge, color=TRANSFORMERS, lw=0.9, ls=_DASHED, label="transformers, band")


def _steps(shown: np.ndarray, run: slice) -> tuple[np.ndarray, list[np.ndarray]]:
    """x, and y of RMS and both ends of the band, of steps a stage wide: a stage between two gaps is drawn as well."""
    edges = np.repeat(np.arange(run.start, run.stop + 1) - 0.5, 2)[1:-1]
    return edges, [np.repeat(shown[run, column], 2) for column in (_RMS, _LOW, _HIGH)]


def _largest(axes: Axes, values: np.ndarray, decades: tuple[float, float]) -> None:
    """The largest value, written over its dot."""
    place = int(np.nanargmax(values))
    words = as_number(values[place]) if math.isfinite(values[place]) else "∞"
    axes.annotate(words, (place, on_axis(values, decades)[place]), (0, 5), textcoords="offset points", ha="center",
                  va="bottom", size="small")  # fmt: skip


def _legend(axes: Axes, report: Report, depth: Depth, parting: int | None, empty: bool) -> list[tuple[Artist, str]]:
    """The keys, and on the axes the lines at the stages that are named in them."""
    keys: list[tuple[Artist, str]] = [
        (Line2D([], [], color=LAVIS, lw=2.4), "LAVIS: RMS"),
        (Line2D([], [], color=TRANSFORMERS, lw=1.3, ls=_DASHED), "transformers: RMS"),
        (Patch(color=LAVIS, alpha=_PALE), "LAVIS: 1–99 %"),
        (Line2D([], [], color=TRANSFORMERS, lw=0.9, ls=_DASHED), "transformers: 1–99 %"),
        (legend_key("o", LAVIS), "LAVIS: maximum"),
        (legend_key("s", TRANSFORMERS), "transformers: maximum"),
    ]
    first = report.first_stage
    wrong = depth.names.index(first) if first in depth.names else None
    for place, colour, line, words in ((parting, INK, ":", "they part"), (wrong, FAULT, "-", "first wrong")):
        if place is not None:
            axes.axvline(place, color=colour, lw=1.0, ls=line, zorder=0.9, label=words)
            keys.append((Line2D([], [], color=colour, lw=1.0, ls=line), f"{words}: {depth.names[place]}"))
    if empty:
        keys.append((Line2D([], [], ls=""), "gap: ids and masks, which have no size"))
    return keys


def alt_text(report: Report, arrays: Arrays) -> str:
    depth, ours, theirs = Depth.of(report), *_sides(arrays)
    rms = ours[np.isfinite(ours[:, _RMS]), _RMS]
    return (
        f"How large the values are at {as_count(len(depth.names), 'stage')}, LAVIS's beside transformers': "
        f"{_finding(depth, ours, theirs)}. LAVIS's RMS goes from {as_number(rms.min())} to {as_number(rms.max())}."
    )


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each stage."""
    rows = []
    for stage, ours, theirs in zip(report.stages, *_sides(arrays), strict=True):
        row: Row = {"name": stage.name}
        for side, values in (("lavis", ours), ("transformers", theirs)):
            names = (f"{side}_{what}" for what in ("rms", "low", "high", "maximum"))
            row |= dict(zip(names, values.tolist(), strict=True))
        rows.append(row)
    return rows

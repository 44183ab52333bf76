"""One function per figure: a report and its arrays in, a closed Figure out, drawn alike on every machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionPatch, Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

Report = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Draw = Callable[..., Figure]

LAVIS, TRANSFORMERS, FAULT = "#0072B2", "#E69F00", "#D55E00"
INK, MUTED, ROUNDING, HAIRLINE = "#222222", "#666666", "#D9D9D9", "#BBBBBB"
_THIRDS = ("#009E73", "#8C8C8C", "#CC79A7")  # query, key, value: neither model's colour, nor a fault's
_KINDS = {"Rename": "#5B6C8F", "FuseQueryValueBias": "#F0D95B"}  # cividis: dark and light, so they part in grey too
_FALLBACK = ("#9A9A9A", "#C8C8C8", "#707070")
_WORDS = {"Rename": "renamed", "FuseQueryValueBias": "fused"}

ERROR_DECADES = (-8, 0)  # a relative error's axis, the same in every figure, so that two runs compare by eye
LOGIT_DECADES = (-8, 2)  # differences in the logits' own units
KL_DECADES = (-16, 1)  # goes with the square of the error
INFINITE = 1e9  # how a report writes an excess over a rounding of zero
_DRAWN_STAGES = 20
_SMALLEST_MOVE = 0.1


class Picture(Figure):
    """A figure that pyplot does not know, drawn in the kit's style whatever the notebook's, shown by Jupyter as PNG.

    pyplot's own figures are shown by its inline backend, at the end of the cell as well as where they are returned; a
    plain Figure is not shown at all before that backend is set up. Ticks take their style when they are first drawn,
    which is why drawing happens in the style too.
    """

    def __init__(self, width: float, height: float, alt: str, layout: str | None = "constrained") -> None:
        super().__init__(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
        self.alt = alt

    def draw(self, renderer: Any) -> None:
        with _style(self.get_figwidth()):
            super().draw(renderer)

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        """Twice the pixels of its size on the screen, for screens that have them."""
        buffer = io.BytesIO()
        with _style(self.get_figwidth()):
            self.savefig(buffer, format="png", dpi=192)
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height, "alt": self.alt}


def _style(width: float) -> contextlib.AbstractContextManager[None]:
    """matplotlib's defaults and the kit's sizes, for as long as the context is open."""
    size = 9.0 if width >= 5 else 7.0
    own = {
        "font.size": size,
        "axes.titlesize": size,
        "axes.labelsize": size,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "figure.titlesize": size * 1.15,
        "figure.titleweight": "bold",
        "hatch.linewidth": 0.6,
        "legend.fontsize": size * 0.85,
        "legend.frameon": False,
        "pdf.fonttype": 42,
        "svg.hashsalt": "blip2nb",  # the same picture is the same file
        "text.color": INK,
        "text.parse_math": False,  # tokens and causes may hold a dollar sign
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": size * 0.85,
        "ytick.labelsize": size * 0.85,
        "xtick.major.size": 2.5,
        "ytick.major.size": 2.5,
    }
    return matplotlib.style.context(["default", own])


def _styled(draw: Draw) -> Draw:
    """Runs a figure's function in the style."""

    @functools.wraps(draw)
    def styled(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
        with _style(width):
            return draw(report, arrays, width)

    return styled


# ---------------------------------------------------------------------------------------------- F1: the depth trace


@_styled
def depth_trace(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F1, the hero: where in the network an error arises, and whether it is more than rounding.

    Above, relative errors ‖transformers − LAVIS‖ ÷ ‖LAVIS‖ over depth; below, each stage's error over its own
    rounding. Stages that cannot be judged (NaN) are hatched in both.

    Args:
        report: `stages`, `threshold` and `first_divergence` are drawn.
        arrays: not used; every figure takes the same arguments.
        width: inches.
    """
    depth = _Depth.of(report)
    picture = Picture(width, 5.2 if width >= 5 else 4.7, alt_text("depth_trace", report))
    rows = picture.add_gridspec(3, 1, height_ratios=[1.9, 1.5, 0.16])
    above = picture.add_subplot(rows[0])
    below = picture.add_subplot(rows[1], sharex=above)
    strip = picture.add_subplot(rows[2], sharex=above)
    _title(picture, _finding(report, depth))
    _errors_over_depth(above, depth)
    _excess_over_depth(below, depth, report["threshold"], width)
    picture.align_ylabels([above, below])
    for axes in (above, below):
        _depth_lines(axes, depth)
    _hatch(above, depth.broken, "NaN")
    _hatch(below, depth.broken | depth.unjudged, "")
    above.set_xlim(-0.9, len(depth.names) - 0.1)
    above.tick_params(labelbottom=False, bottom=False)
    _block_ticks(below, depth, width)
    _band_strip(strip, depth, width)
    _callout(picture, above, below, report, depth, width)
    _legend(picture, _depth_legend(depth), width)
    return picture


@dataclasses.dataclass(frozen=True)
class _Depth:
    """The report's stages as columns; what a stage has no number for is NaN."""

    names: list[str]
    junction: np.ndarray
    arrival_error: np.ndarray
    drift: np.ndarray
    local_error: np.ndarray
    rounding: np.ndarray
    excess: np.ndarray
    wrong: np.ndarray  # above the threshold, or named as the first divergence
    broken: np.ndarray  # an error that should be a number is not

    @classmethod
    def of(cls, report: Report) -> _Depth:
        stages = report["stages"]
        first = (report.get("first_divergence") or {}).get("stage")
        keys = ("arrival_error", "drift", "local_error", "rounding", "excess")
        columns = {key: _numbers(stage.get(key) for stage in stages) for key in keys}
        junction = np.array([bool(stage.get("junction")) for stage in stages], dtype=bool)
        own = np.where(junction, columns["arrival_error"], columns["local_error"])
        return cls(
            names=[stage["name"] for stage in stages],
            junction=junction,
            wrong=(columns["excess"] > report["threshold"]) | np.array([s["name"] == first for s in stages], bool),
            broken=np.isnan(own) | np.isnan(columns["drift"]),
            **columns,
        )

    @property
    def unjudged(self) -> np.ndarray:
        """Stages with an error but no number for what it is worth. Bit-equal ones need none."""
        return np.asarray(~self.junction & np.isnan(self.excess) & (self.local_error != 0))

    @property
    def places(self) -> np.ndarray:
        return np.arange(len(self.names))

    def parts(self) -> list[tuple[str, int, int]]:
        """(name, first place, one past the last) of each stretch of stages that belong together."""
        split = any(name.startswith("language.decoder") for name in self.names)
        labels, language = [], "language encoder" if split else "language"
        for name in self.names:
            head = name.split(".")[0]
            if name.startswith("language.decoder"):
                language = "language decoder"
            labels.append(_PARTS.get(head, head) if _PARTS.get(head) != "language" else language)
        found, start = [], 0
        for label, group in itertools.groupby(labels):
            end = start + len(list(group))
            found.append((label, start, end))
            start = end
        return found


_PARTS = {"pixels": "vision", "qformer": "Q-Former", "language": "language", "logits": "language"}


def _numbers(values: Any) -> np.ndarray:
    """None, NaN and infinities of a report as floats."""
    return np.array([math.nan if value is None else float(value) for value in values], dtype=float)


def _finding(report: Report, depth: _Depth) -> str:
    """What the depth trace shows, as a title."""
    first = report.get("first_divergence")
    if first:
        excess = _numbers([first.get("excess")])[0]
        size = f"error {_times(excess)} its own rounding" if not math.isnan(excess) else _without_excess(depth, first)
        return f"First wrong at {first['stage']}: {size}"
    if depth.broken.any():
        return f"Not a number at {depth.names[int(depth.broken.argmax())]}: the stages hatched cannot be judged"
    own = np.where(depth.junction, depth.arrival_error, depth.local_error)
    if len(own) and not own.any():
        return f"Bit-equal at all {len(own)} stages, each fed what LAVIS fed it"
    worst = int(np.nanargmax(depth.excess)) if not np.isnan(depth.excess).all() else 0
    top = f"{_times(depth.excess[worst])} its own rounding, at {depth.names[worst]}"
    if depth.wrong.any():
        return f"{int(depth.wrong.sum())} stages stand out, the most {top}"
    return f"No stage is wrong: the largest error is {top}"


def _without_excess(depth: _Depth, first: Mapping[str, Any]) -> str:
    place = depth.names.index(first["stage"]) if first["stage"] in depth.names else None
    if place is not None and depth.junction[place] and not depth.broken[place]:
        return f"what arrives there is off by {_number(depth.arrival_error[place])}"
    return "its output is not a number"


def _errors_over_depth(axes: Axes, depth: _Depth) -> None:
    _log_axis(axes, "y", ERROR_DECADES, zero_row=True)
    axes.set_ylabel("relative error")
    low, x = 10.0 ** ERROR_DECADES[0], depth.places
    size = _marker_size(depth)
    band = np.clip(depth.rounding, low, None)
    # A junction computes nothing and has no rounding: the band stops there rather than guess.
    for run in _runs(~np.isnan(band)):
        steps, edges = np.repeat(band[run], 2), np.repeat(np.arange(run.start, run.stop + 1) - 0.5, 2)[1:-1]
        axes.fill_between(edges, low, steps, color=ROUNDING, linewidth=0, label="rounding")
    axes.plot(x, np.where(depth.drift > 0, _shown(depth.drift, ERROR_DECADES), np.nan), color=MUTED, lw=0.9, zorder=2.5)
    axes.lines[-1].set_label("drift")
    for what, where, marker, colour, scale in (
        ("drift zero", depth.drift == 0, ".", MUTED, 0.45),
        ("local error", ~depth.junction & ~depth.wrong, "o", INK, 1.0),
        ("arrival error", depth.junction & ~depth.wrong, ">", "white", 1.15),
    ):
        values = {"drift zero": depth.drift, "local error": depth.local_error, "arrival error": depth.arrival_error}
        _markers(axes, x, values[what], where, marker, colour, size * scale, ERROR_DECADES, what)
    own = np.where(depth.junction, depth.arrival_error, depth.local_error)
    _markers(axes, x, own, depth.wrong, "D", FAULT, size * 1.25, ERROR_DECADES, "wrong")


def _excess_over_depth(axes: Axes, depth: _Depth, threshold: float, width: float) -> None:
    finite = depth.excess[(depth.excess < INFINITE) & (depth.excess > 0)]
    top = max(2.0, math.ceil(math.log10(max([*finite, 10 * threshold])) + 0.15))
    zeros = (depth.excess == 0) | (~depth.junction & np.isnan(depth.excess) & (depth.local_error == 0))
    decades = (-1.0, float(top))
    _log_axis(axes, "y", decades, zero_row=bool(zeros.any()), marks=[1, threshold])
    axes.set_ylabel("error ÷ its own\nrounding")
    axes.axhspan(threshold, 10 ** (top + 0.5), color=FAULT, alpha=0.07, linewidth=0)
    axes.axhline(1, color=MUTED, lw=0.8, label="1")
    axes.axhline(threshold, color=INK, lw=0.8, ls=(0, (4, 2)), label="threshold")
    size, x = _marker_size(depth), depth.places
    values = np.where(zeros, 0.0, depth.excess)
    shown = _shown(values, decades)
    for where, colour in ((~depth.wrong & ~zeros, INK), (depth.wrong & ~zeros, FAULT)):
        axes.vlines(x[where], 1, shown[where], color=colour, lw=0.7)
    _markers(axes, x, values, ~depth.wrong, "o", INK, size, decades, "excess")
    _markers(axes, x, values, depth.wrong, "D", FAULT, size * 1.25, decades, "wrong excess")
    _fault_sizes(axes, depth, shown, width)
    _zone_words(axes, depth, threshold, width)


def _fault_sizes(axes: Axes, depth: _Depth, shown: np.ndarray, width: float, most: int = 4) -> None:
    """How many times its rounding, beside each fault, on a side where no other fault's line is crossed."""
    wrong = depth.places[depth.wrong & ~np.isnan(depth.excess)]
    size, pitch = matplotlib.rcParams["legend.fontsize"], (width - 0.9) / len(depth.names)
    for place in wrong if len(wrong) <= most else wrong[:1]:
        words = _times(depth.excess[place])
        reach = (_inches(words, size, "bold") + 0.1) / pitch
        for side, ha, end in ((5, "left", place + reach), (-5, "right", place - reach)):
            crossed = (wrong > min(place, end)) & (wrong < max(place, end)) & (wrong != place)
            if not crossed.any() and 0 <= end < len(depth.names):
                axes.annotate(words, (place, shown[place]), (side, 0), color=FAULT, textcoords="offset points",
                              ha=ha, va="center", weight="bold", size=size)  # fmt: skip
                break


def _zone_words(axes: Axes, depth: _Depth, threshold: float, width: float) -> None:
    """Says what the two zones mean, at an end where nothing wrong is drawn, if there is one."""
    small = matplotlib.rcParams["xtick.labelsize"]
    words = f"more than rounding (above {threshold:g})"
    where, count = axes.get_yaxis_transform(), len(depth.names)
    taken = 1.1 * count * _inches(words, small) / (width - 0.9)
    wrong = depth.places[depth.wrong | depth.broken | depth.unjudged]
    for x, ha, clear in ((0.01, "left", wrong > taken), (0.99, "right", wrong < count - taken)):
        if clear.all():
            axes.text(x, threshold * 1.15, words, transform=where, ha=ha, va="bottom", size=small, color=FAULT)
            axes.text(x, 0.62, "1 = rounding alone", transform=where, ha=ha, va="top", size=small, color=MUTED)
            return


def _depth_lines(axes: Axes, depth: _Depth) -> None:
    for _, start, _ in depth.parts()[1:]:
        axes.axvline(start - 0.5, color=HAIRLINE, lw=0.6, zorder=0.5)


def _hatch(axes: Axes, where: np.ndarray, word: str) -> None:
    for run in _runs(where):
        axes.axvspan(run.start - 0.5, run.stop - 0.5, facecolor="none", edgecolor=MUTED, hatch="////", lw=0, zorder=0.8)
        axes.patches[-1].set_gid("NaN")
        if word:
            axes.text((run.start + run.stop - 1) / 2, 0.96, word, transform=axes.get_xaxis_transform(), ha="center",
                      va="top", size="small", weight="bold", color=FAULT, bbox=_HALO)  # fmt: skip


_HALO = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}


def _runs(where: np.ndarray) -> Iterator[slice]:
    """The stretches of neighbours that are True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], where, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(start), int(stop))


def _block_ticks(axes: Axes, depth: _Depth, width: float) -> None:
    """A tick every fourth block; as many of them numbered as have room."""
    blocks = {place: int(name.rsplit(".", 1)[1]) for place, name in enumerate(depth.names)
              if re.search(r"\.\d+$", name)}  # fmt: skip
    pitch = (width - 0.9) / max(len(depth.names), 1)
    room = 1.5 * _inches("00", "small")
    every = next(step for step in (4, 8, 16, 32, 64) if step * pitch > room or step == 64)
    ticks = [place for place, number in blocks.items() if number % 4 == 0]
    axes.set_xticks(ticks, [str(blocks[p]) if blocks[p] % every == 0 else "" for p in ticks])
    if ticks:
        axes.annotate("block", (0, 0), (-4, -6), xycoords="axes fraction", textcoords="offset points", ha="right",
                      va="top", size=matplotlib.rcParams["xtick.labelsize"], color=MUTED)  # fmt: skip


def _band_strip(axes: Axes, depth: _Depth, width: float) -> None:
    """The parts of the network as a strip: their names in it, or under it where they do not fit."""
    axes.set_ylim(0, 1)
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    pitch = (width - 0.9) / max(len(depth.names), 1)
    ends: list[float] = []  # how far each row of names under the strip reaches
    for number, (name, start, stop) in enumerate(depth.parts()):
        axes.axvspan(start - 0.5, stop - 0.5, facecolor=("#E4E4E4", "#CFCFCF")[number % 2], linewidth=0)
        if _inches(name, "small") > 0.94 * pitch * (stop - start):
            name = name.split(" ")[-1]
        middle, needed = (start + stop - 1) / 2, _inches(name, "small") / pitch
        if needed * 1.06 < stop - start:
            axes.text(middle, 0.46, name, ha="center", va="center", size="small")
            continue
        row = next((r for r, end in enumerate(ends) if end < middle - needed / 2), len(ends))
        ends[row : row + 1] = [middle + needed * 0.55]
        axes.text(middle, -0.25 - 0.95 * row, name, ha="center", va="top", size="small")


def _callout(picture: Figure, above: Axes, below: Axes, report: Report, depth: _Depth, width: float) -> None:
    """The first divergence in words, over a line through both panels: over the data there is no room that is safe."""
    first = report.get("first_divergence")
    if not first or first["stage"] not in depth.names:
        return
    place = depth.names.index(first["stage"])
    lines = [_divergence_words(first, depth, place), first.get("cause") or "the cause is not known"]
    others = [f"{depth.names[p]} ({_times(depth.excess[p])})" for p in depth.places[depth.wrong] if p != place]
    if others:
        lines.append("also: " + _some(others, 3))
    room = width - (1.0 if width >= 5 else 0.85)
    text = "\n".join(_wrap(line, room, "legend.fontsize") for line in lines)
    size = matplotlib.rcParams["legend.fontsize"]
    across = max(_inches(line, size) for line in text.split("\n")) / room
    at = (place + 0.9) / (len(depth.names) + 0.8)
    left = min(max(at - across / 2, 0.0), max(1 - across, 0.0))
    above.text(left, 1.05, text, transform=above.transAxes, va="bottom", color=FAULT, size=size, linespacing=1.3)
    line = ConnectionPatch((place, 1.03), (place, 0), above.get_xaxis_transform(), below.get_xaxis_transform(),
                           color=FAULT, lw=0.8, zorder=0.9)  # fmt: skip
    line.set_in_layout(False)
    picture.add_artist(line)


def _divergence_words(first: Mapping[str, Any], depth: _Depth, place: int) -> str:
    what, own = ("error on arrival", depth.arrival_error) if depth.junction[place] else ("error", depth.local_error)
    return f"{first['stage']}: {what} {_number(own[place])}"


def _depth_legend(depth: _Depth) -> list[tuple[Artist, str]]:
    keys: list[tuple[Artist, str]] = [
        (_key("o", INK), "alone, fed the reference recording"),
        (Line2D([], [], color=MUTED, lw=0.9), "drift: with all that came before"),
        (Patch(color=ROUNDING), "its own rounding"),
    ]
    if depth.junction.any():
        keys.append((_key(">", "white"), "what arrives there"))
    if depth.wrong.any():
        keys.append((_key("D", FAULT), "fault"))
    return keys


def _marker_size(depth: _Depth) -> float:
    scale = 1.0 if matplotlib.rcParams["font.size"] > 8 else 0.75
    return scale * min(5.0, max(2.6, 130 / max(len(depth.names), 1)))


# ------------------------------------------------------------------------------------- F2: before and after the fix


@_styled
def before_and_after(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F2: error ÷ rounding as shipped and with the fix, for the stages that it moves by a tenth or more.

    Args:
        report: `stages` with `fixed`, and `threshold`.
        arrays: not used.
        width: inches.
    """
    moves, still = _moves(report["stages"])
    drawn = sorted(sorted(moves, key=lambda move: -move.size)[:_DRAWN_STAGES], key=lambda move: move.place)
    row = 0.24 if width >= 5 else 0.2
    picture = Picture(width, 1.5 + row * max(len(drawn), 2), alt_text("before_and_after", report))
    axes = picture.add_subplot()
    _title(picture, _moves_finding(moves))
    values = np.array([[move.before, move.after] for move in drawn], dtype=float).reshape(-1, 2)
    finite = values[(values > 0) & (values < INFINITE)]
    decades = (-1.0, max(2.0, float(math.ceil(math.log10(max([*finite, 10 * report["threshold"]])) + 0.3))))
    _log_axis(axes, "x", decades, zero_row=bool((values == 0).any()), marks=[1, report["threshold"]])
    axes.axvspan(report["threshold"], 10 ** (decades[1] + 0.5), color=FAULT, alpha=0.07, linewidth=0)
    axes.axvline(1, color=MUTED, lw=0.8)
    axes.axvline(report["threshold"], color=INK, lw=0.8, ls=(0, (4, 2)))
    _dumbbells(axes, values, decades, report["threshold"])
    axes.set_yticks(range(len(drawn)), [move.name for move in drawn])
    axes.set_ylim(max(len(drawn), 1) - 0.4, -0.6)
    axes.set_xlabel("error ÷ its own rounding")
    keys = [(_key("D", FAULT), "as shipped"), (_key("o", INK), "with the fix")]
    words = f"not drawn: {_count(still, 'stage')} moved by less than 10 %"
    if len(moves) > len(drawn):
        words += f", {_count(len(moves) - len(drawn), 'smaller move')}"
    _legend(picture, [*keys, (Line2D([], [], ls=""), words)], width)
    return picture


@dataclasses.dataclass(frozen=True)
class _Move:
    """One stage's excess before and after the fix."""

    place: int
    name: str
    before: float
    after: float

    @property
    def size(self) -> float:
        """Decades. Anything to or from zero or NaN is more than any of them."""
        if not (self.before > 0 and self.after > 0):
            return math.inf
        return abs(math.log10(self.before / self.after))


def _moves(stages: Sequence[Mapping[str, Any]]) -> tuple[list[_Move], int]:
    """The stages that the fix moves, and how many it leaves where they were."""
    moves, still = [], 0
    for place, stage in enumerate(stages):
        before, after = _numbers([stage.get("excess"), (stage.get("fixed") or {}).get("excess")])
        if stage.get("junction") or not stage.get("fixed"):
            continue
        alike = (math.isnan(before) and math.isnan(after)) or abs(after - before) <= _SMALLEST_MOVE * abs(before)
        if alike:
            still += 1
        else:
            moves.append(_Move(place, stage["name"], before, after))
    return moves, still


def _moves_finding(moves: list[_Move]) -> str:
    if not moves:
        return "The fix moves no stage"
    most = max(moves, key=lambda move: move.size)
    words = f"With the fix, {most.name} goes from {_times(most.before)} to {_times(most.after)} its own rounding"
    return words if len(moves) == 1 else f"{words}; {_count(len(moves) - 1, 'other stage')} moved"


def _dumbbells(axes: Axes, values: np.ndarray, decades: tuple[float, float], threshold: float) -> None:
    y = np.arange(len(values), dtype=float)
    before, after = values[:, 0], values[:, 1]
    shown = _shown(values, decades)
    axes.hlines(y, shown[:, 0], shown[:, 1], color=MUTED, lw=1.0)
    size = 5.0 if matplotlib.rcParams["font.size"] > 8 else 4.0
    for column, marker, what in ((before, "D", "as shipped"), (after, "o", "with the fix")):
        for bad in (False, True):
            where = (column > threshold) == bad
            _markers(axes, y, column, where, marker, FAULT if bad else INK, size, decades, what, flip=True)
    small = matplotlib.rcParams["xtick.labelsize"]
    for place, (one, other) in enumerate(shown):
        right = one >= other or math.isnan(other)
        for x, number, outwards in ((one, before[place], right), (other, after[place], not right)):
            if math.isnan(number):
                axes.text(0.99, place, "NaN", transform=axes.get_yaxis_transform(), ha="right", va="center",
                          size=small, weight="bold", color=FAULT)  # fmt: skip
            else:
                axes.annotate(_plain_times(number), (x, place), (5 if outwards else -5, 0), va="center", size=small,
                              textcoords="offset points", ha="left" if outwards else "right")  # fmt: skip


# --------------------------------------------------------------------------------------------------- F7: the logits


@_styled
def logits(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F7: how far the logits are apart at each position, the last position's top tokens, and whether a token can flip.

    A difference can swap the first two tokens only where it is more than half the margin between them.

    Args:
        report: `logits`, and the texts `top_tokens` of the last position's ten likeliest tokens.
        arrays: `logits/kl`, `logits/max_abs` and `logits/margin`, each (positions,); `logits/top_lavis` and
            `logits/top_huggingface`, (positions, 50).
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.9 if wide else 7.4, alt_text("logits", report))
    panels: Any = [["kl", "tokens", "risk"], ["difference", "tokens", "risk"]]
    if not wide:
        panels, ratios = [["kl"], ["difference"], ["tokens"], ["risk"]], [1.0, 1.0, 1.7, 1.9]
    axes = picture.subplot_mosaic(panels, height_ratios=None if wide else ratios)
    flips = _flips(arrays)
    _title(picture, _logits_finding(report, flips))
    _per_position(axes["kl"], arrays["logits/kl"], KL_DECADES, "KL divergence\n(nats)")
    _per_position(axes["difference"], arrays["logits/max_abs"], LOGIT_DECADES, "largest difference\n(logits)")
    axes["difference"].set_xlabel("position in the sequence")
    axes["kl"].sharex(axes["difference"])
    axes["kl"].tick_params(labelbottom=False)
    _top_tokens(axes["tokens"], report, arrays)
    _flip_risk(axes["risk"], arrays, flips)
    keys: list[tuple[Artist, str]] = [(_key("o", LAVIS), "LAVIS"), (_ring("s", TRANSFORMERS), "transformers")]
    keys += [(_key("o", INK), "a position"), (Patch(color=FAULT, alpha=0.12), "difference > margin ÷ 2: can flip")]
    _legend(picture, keys, width)
    return picture


def _flips(arrays: Arrays) -> np.ndarray:
    """Positions at which the difference is large enough to swap the first two tokens."""
    return np.asarray(arrays["logits/max_abs"]) > np.asarray(arrays["logits/margin"]) / 2


def _logits_finding(report: Report, flips: np.ndarray) -> str:
    values = report["logits"]
    relative, agreement = _numbers([values.get("relative"), values.get("top1_agreement")])
    if relative == 0:
        return f"Logits bit-equal at all {len(flips)} positions"
    risk = "none can flip" if not flips.any() else f"{int(flips.sum())} of {len(flips)} can flip"
    return f"Logits differ by {_number(relative)} (relative), top tokens are {_percent(agreement)} equal, {risk}"


def _per_position(axes: Axes, values: np.ndarray, decades: tuple[float, float], label: str) -> None:
    _log_axis(axes, "y", decades, zero_row=True)
    axes.set_ylabel(label)
    # KL is computed as a difference, so that rounding can leave it a hair below zero: as good as none.
    clean = np.maximum(np.asarray(values, dtype=float), 0)
    places = np.arange(len(clean))
    size = max(1.8, min(4.0, 120 / max(len(clean), 1)))
    _markers(axes, places, clean, np.ones(len(clean), bool), "o", INK, size, decades, "positions")
    _hatch(axes, np.isnan(clean), "NaN")
    axes.set_xlim(-0.8, len(clean) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _top_tokens(axes: Axes, report: Report, arrays: Arrays) -> None:
    readable = [_readable(text) for text in (report.get("top_tokens") or [])[:10]]
    texts = [text if len(text) <= 14 else f"{text[:13]}…" for text in readable]  # a URL leaves no room for the plot
    ours = np.asarray(arrays["logits/top_lavis"], dtype=float)[-1][: len(texts)]
    theirs = np.asarray(arrays["logits/top_huggingface"], dtype=float)[-1][: len(texts)]
    y = np.arange(len(texts))
    axes.hlines(y, ours, theirs, color=MUTED, lw=1.0)
    axes.plot(ours, y, "o", color=LAVIS, ms=4, label="LAVIS")
    # A ring around the disc: where both agree, which is the aim, both can still be seen.
    axes.plot(theirs, y, "s", mfc="none", mec=TRANSFORMERS, mew=1.4, ms=7, label="transformers")
    axes.set_yticks(y, texts)
    axes.set_ylim(len(texts) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    gap = np.abs(ours - theirs).max(initial=0)
    apart = f"at most {_number(gap)} apart" if gap else "bit-equal"
    axes.set_xlabel(f"logit, last position\n({apart})")


def _flip_risk(axes: Axes, arrays: Arrays, flips: np.ndarray) -> None:
    margin = np.asarray(arrays["logits/margin"], dtype=float)
    difference = np.asarray(arrays["logits/max_abs"], dtype=float)
    across = (-6, 2)
    _log_axis(axes, "y", LOGIT_DECADES, zero_row=True)
    _log_axis(axes, "x", across)
    edge = np.array([10.0 ** (across[0] - 1), 10.0 ** (across[1] + 1)])
    axes.fill_between(edge, edge / 2, 10.0 ** (LOGIT_DECADES[1] + 1), color=FAULT, alpha=0.12, linewidth=0)
    axes.plot(edge, edge / 2, color=FAULT, lw=0.9, label="margin ÷ 2")
    x = np.clip(margin, 10.0 ** across[0], 10.0 ** across[1])
    size = 3.5
    _markers(axes, x, difference, ~flips, "o", INK, size, LOGIT_DECADES, "positions")
    _markers(axes, x, difference, flips, "D", FAULT, size * 1.2, LOGIT_DECADES, "could flip")
    axes.set_xlabel("margin of first to\nsecond token (logits)")
    axes.set_ylabel("largest difference (logits)")


# --------------------------------------------------------------------------------------------------- F8: the pixels


@_styled
def pixels(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F8: what the image looks like to each processor, as LAVIS's grey levels minus the processor's.

    Args:
        report: `pixel_values`, with `default` for the processor that transformers chooses by itself.
        arrays: `pixels/image`, (height, width, 3) uint8; `pixels/pil` and `pixels/default`, (3, height, width) grey
            levels from −255 to 255.
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.3 if wide else 2.6, alt_text("pixels", report))
    axes: dict[str, Axes] = picture.subplot_mosaic([["image", "pil", "default"]], width_ratios=[0.7, 1, 1])
    _title(picture, _pixels_finding(arrays))
    axes["image"].imshow(arrays["pixels/image"])
    shown = {name: np.asarray(arrays[f"pixels/{name}"], dtype=float) for name in ("pil", "default")}
    reach = max(1, int(max(np.abs(values).max(initial=0) for values in shown.values())))
    colours, norm, ticks = _grey_levels(reach)
    for name in shown:
        axes[name].imshow(_largest_by_cell(shown[name]), cmap=colours, norm=norm, interpolation="nearest")
        axes[name].set_xlabel(_pixel_words(shown[name]))
    for name, title in _PIXEL_TITLES.items():
        axes[name].set_title(title.replace("\n", " ") if wide else title, loc="left")
        axes[name].set(xticks=[], yticks=[])
        for spine in axes[name].spines.values():
            spine.set(visible=True, color=HAIRLINE)
    bar = picture.colorbar(ScalarMappable(norm, colours), ax=[axes["pil"], axes["default"]], location="bottom",
                           aspect=35, shrink=0.9, spacing="uniform", ticks=list(ticks))  # fmt: skip
    bar.ax.set_xticklabels(list(ticks.values()))
    bar.ax.tick_params(length=0)
    bar.set_label("grey levels, the largest near each dot" if wide else "grey levels (largest nearby)")
    return picture


_PIXEL_TITLES = {"image": "the image", "pil": "LAVIS −\nPIL processor", "default": "LAVIS −\ndefault processor"}


def _grey_levels(reach: int) -> tuple[ListedColormap, BoundaryNorm, dict[float, str]]:
    """PuOr in steps that double, 1, 2–3, 4–7, …, named by where they start: one grey level shows beside a hundred."""
    steps = math.floor(math.log2(reach)) + 1
    edges = [2.0**n - 0.5 for n in range(steps + 1)]
    # The palest quarter on either side of the middle is left out: one level must not look like none.
    shades = np.linspace(0.25, 0.5, steps) if steps > 1 else np.array([0.4])
    picks = [*(0.5 - shades[::-1]), 0.5, *(0.5 + shades)]
    colours = ListedColormap(matplotlib.colormaps["PuOr"](picks))
    bounds = [-edge for edge in reversed(edges)] + edges
    middles = [(low + high) / 2 for low, high in itertools.pairwise(bounds)]
    starts = [str(2**n) for n in range(steps)]
    labels = [*(f"−{start}" for start in reversed(starts)), "0", *(f"+{start}" for start in starts)]
    ticks = dict(zip(middles, labels, strict=True))
    return colours, BoundaryNorm(bounds, len(picks)), ticks


def _largest_by_cell(values: np.ndarray, cells: int = 112) -> np.ndarray:
    """(channels, height, width) to the largest difference, signed, of about `cells` × `cells`.

    A picture has fewer dots than the image has pixels: drawn as they are, lone differences would vanish.
    """
    step = max(1, math.ceil(max(values.shape[1:]) / cells))
    channels, height, width = values.shape
    padded = np.zeros((channels, math.ceil(height / step) * step, math.ceil(width / step) * step))
    padded[:, :height, :width] = values
    blocks = padded.reshape(channels, padded.shape[1] // step, step, -1, step).transpose(1, 3, 0, 2, 4)
    flat = blocks.reshape(*blocks.shape[:2], -1)
    largest = np.abs(flat).argmax(axis=-1)
    return np.take_along_axis(flat, largest[..., None], axis=-1)[..., 0]


def _pixels_finding(arrays: Arrays) -> str:
    pil, default = (_share(arrays[f"pixels/{name}"]) for name in ("pil", "default"))
    ours = f"differs in {_percent(pil)} of values" if pil else "sees LAVIS's pixels exactly"
    theirs = f"the default one differs in {_percent(default)}" if default else "the default one sees them exactly"
    return f"The PIL processor {ours}; {theirs}"


def _share(values: np.ndarray) -> float:
    return float(np.mean(np.asarray(values) != 0))


def _pixel_words(values: np.ndarray) -> str:
    if not values.any():
        return "bit-equal"
    levels = int(np.abs(values).max())
    return f"{_percent(_share(values))} differ,\nat most by {levels}"


# ------------------------------------------------------------------------------------------------- F9: the captions


@_styled
def captions(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F9: what both models say about each image, greedily, and the word at which they part.

    Args:
        report: `captions`, of `lavis` and `huggingface` by way of decoding; `random_weights`.
        arrays: not used.
        width: inches.
    """
    ours, theirs = (report["captions"][side]["greedy"] for side in ("lavis", "huggingface"))
    size = matplotlib.rcParams["font.size"] / 72
    room = width - 0.2 - 4.6 * size
    entries = [_caption_lines(number, a, b, room) for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)]
    notes = [_wrap(words, width - 0.2) for words in _caption_notes(report)]
    title = _wrap(_captions_finding(ours, theirs), width - 0.15, "figure.titlesize", "bold")
    top = 0.14 + 1.7 * size * (title.count("\n") + 1)
    listed = 1.5 * size * sum(len(lines) + 0.5 for lines in entries)
    height = top + listed + size * (2.4 + 1.5 * sum(note.count("\n") + 1 for note in notes))
    picture = Picture(width, height, alt_text("captions", report), layout=None)
    page = picture.add_axes((0, 0, 1, 1))  # in inches from the top left: a page, not a plot
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    picture.suptitle(title, x=0.01, y=1 - 0.06 / height, ha="left", va="top")
    down = top
    for lines in entries:
        for line in lines:
            _caption_line(page, line, down, size)
            down += 1.5 * size
        down += 0.75 * size
    down += 0.4 * size
    keys = {"LAVIS": _key("o", LAVIS), "transformers": _key("s", TRANSFORMERS)}
    if list(ours) != list(theirs):
        keys["from here they part"] = Line2D([], [], ls="", marker="|", mec=FAULT, mew=1.2)
    page.legend(list(keys.values()), list(keys), loc="upper left", ncols=3, borderpad=0,
                bbox_to_anchor=(0, 1 - down / height), handlelength=1.2, borderaxespad=0)  # fmt: skip
    for note in notes:
        down += 1.5 * size
        page.text(0.01 * width, down, note, va="top", color=MUTED)
        down += 1.5 * size * note.count("\n")
    return picture


@dataclasses.dataclass(frozen=True)
class _Line:
    """One line of a caption: its number and marks if it is the first, then pieces of text that are alike or are not."""

    number: str
    marks: tuple[str, ...]
    pieces: tuple[tuple[str, bool], ...]


def _caption_lines(number: int, ours: str, theirs: str, room: float) -> list[_Line]:
    a, b = _readable_words(ours), _readable_words(theirs)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    if ours == theirs:
        return _broken_up(f"{number}", ("o", "s"), a, len(a), room)
    if a == b:  # the same words; the spaces between them are not
        a, b, alike = [_readable(ours)], [_readable(theirs)], 0
    first = _broken_up(f"{number}", ("o",), a, alike, room)
    return [*first, *_broken_up("", ("s",), b, alike, room)]


def _readable_words(text: str) -> list[str]:
    return [_readable(word, spaces=False) for word in text.split()]


def _broken_up(number: str, marks: tuple[str, ...], words: list[str], alike: int, room: float) -> list[_Line]:
    """Words in lines of at most `room` inches. Bold is wider, so what parts is measured as bold."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0.0
    for place, word in enumerate(words or ["(nothing)"]):
        same = place < alike
        word = f"│{word}" if place == alike else word
        needed = _inches(word + " ", weight="normal" if same else "bold")
        if lines[-1] and used + needed > room:
            lines.append([])
            used = 0.0
        lines[-1].append((word, same))
        used += needed
    merged = [tuple((" ".join(w for w, _ in group), same) for same, group in itertools.groupby(line, lambda p: p[1]))
              for line in lines]  # fmt: skip
    return [_Line(number if n == 0 else "", marks if n == 0 else (), pieces) for n, pieces in enumerate(merged)]


def _caption_line(page: Axes, line: _Line, down: float, size: float) -> None:
    baseline = down + 0.95 * size
    page.text(0.1 + 1.6 * size, baseline, line.number, ha="right", color=MUTED)
    for mark in line.marks:
        key = _key("o", LAVIS) if mark == "o" else _key("s", TRANSFORMERS)
        key.set(xdata=[0.1 + (2.6 if mark == "o" else 3.6) * size], ydata=[down + 0.58 * size], markersize=5)
        page.add_line(key)
    x = 0.1 + 4.6 * size
    for text, same in line.pieces:
        weight = "normal" if same else "bold"
        page.text(x, baseline, text, weight=weight, color=INK if same else FAULT)
        x += _inches(text + " ", weight=weight)


def _captions_finding(ours: Sequence[str], theirs: Sequence[str]) -> str:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if equal == len(ours):
        return f"Both models say the same of {'all ' if equal > 1 else ''}{_count(equal, 'image')} (greedy)"
    return f"The captions part on {len(ours) - equal} of {_count(len(ours), 'image')} (greedy)"


def _caption_notes(report: Report) -> list[str]:
    notes = []
    for mode, values in (report["captions"].get("modes") or {}).items():
        equal = values.get("equal")
        if mode != "greedy" and equal:
            notes.append(f"{_MODES.get(mode, mode)}: {sum(map(bool, equal))} of {len(equal)} equal")
    if report.get("random_weights"):
        notes.append("random weights: this caption is noise on purpose")
    return notes


_MODES = {"beams": "five beams", "default": "five beams as LAVIS sets them by default"}


# --------------------------------------------------------------------------------------------------- F10: the files


@_styled
def files(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F10: the bytes of each component by what was done to them, and what was not written, in words.

    Args:
        report: `weights`, with `bytes_by_kind` by component and operation.
        arrays: not used.
        width: inches.
    """
    weights = report["weights"]
    table = weights["bytes_by_kind"]
    picture = Picture(width, 2.9 if width >= 5 else 2.8, alt_text("files", report))
    axes = picture.add_subplot()
    _title(picture, _files_finding(weights))
    total = max(sum(kinds.values()) for kinds in table.values()) or 1
    unit, word = _byte_unit(total)
    found = {kind for kinds in table.values() for kind in kinds}
    names = [*(kind for kind in _KINDS if kind in found), *sorted(found - set(_KINDS))]
    colours = dict(zip(names, [_KINDS.get(n, _FALLBACK[i % 3]) for i, n in enumerate(names)], strict=True))
    for y, kinds in enumerate(table.values()):
        left = 0.0
        for kind in (k for k in names if kinds.get(k)):
            axes.barh(y, kinds[kind] / unit, left=left, color=colours[kind], edgecolor=INK, lw=0.4, height=0.62)
            axes.patches[-1].set_gid(kind)
            left += kinds[kind] / unit
        axes.annotate(_bar_words(kinds), (left, y), (4, 0), textcoords="offset points", va="center", size="small")
    axes.set_yticks(range(len(table)), [_COMPONENTS.get(name, name) for name in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, total / unit * (1.38 if width >= 5 else 1.75))
    axes.set_xlabel(f"written, in {word}")
    picture.supxlabel(_wrap(_account(weights), width - 0.15), x=0.01, ha="left", size="medium",
                      color=FAULT if weights["missing"] or weights["unexpected"] else MUTED)  # fmt: skip
    keys = [Patch(fc=colours[name], ec=INK, lw=0.4, label=_WORDS.get(name, name)) for name in names]
    axes.legend(handles=keys, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, handlelength=1.4, borderpad=0.1)
    return picture


_COMPONENTS = {
    "vision_model": "vision",
    "qformer": "Q-Former",
    "query_tokens": "query tokens",
    "language_projection": "projection",
    "language_model": "language",
}


def _files_finding(weights: Mapping[str, Any]) -> str:
    wrong = [f"{len(weights[key])} {key}" for key in ("missing", "unexpected") if weights[key]]
    if wrong:
        return f"Not all tensors are accounted for: {' and '.join(wrong)}"
    total = sum(sum(kinds.values()) for kinds in weights["bytes_by_kind"].values())
    return f"Every tensor is accounted for: {weights['written']} written, {_bytes(total)}"


def _bar_words(kinds: Mapping[str, int]) -> str:
    total = sum(kinds.values())
    fused = kinds.get("FuseQueryValueBias", 0)
    return _bytes(total) + (f", {_bytes(fused)} of it fused" if fused else "")


def _account(weights: Mapping[str, Any]) -> str:
    wrong = [key for key in ("missing", "unexpected") if weights[key]]
    sentences = [f"{key.capitalize()}: {_some(list(weights[key]), 2)}." for key in wrong]
    parts = [f"{len(weights.get(key) or {})} {words}" for key, words in _NOT_WRITTEN.items()]
    sentences.append(f"Not written, by name: {', '.join(parts)}.")
    for key, (proven, refuted) in _PROOFS.items():
        if weights.get(key) is not None:
            sentences.append(proven if weights[key] else refuted)
    return " ".join(sentences)


_PROOFS = {
    "roundtrip": ("The way back is the same, bit for bit.", "THE WAY BACK DIFFERS."),
    "modules_equal": ("LAVIS's own modules hold the same weights.", "LAVIS'S OWN MODULES HOLD OTHER WEIGHTS."),
}
_NOT_WRITTEN = {"tied": "tied to another", "dropped": "dropped as a buffer", "unused": "unused by LAVIS"}


# -------------------------------------------------------------------------------------------------- F11: the fusion


@_styled
def fusion(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F11: LAVIS's two biases become one, and why its middle third may be anything but is zero.

    Args:
        report: `fusion`: the block, and how much a random bias of key or of query changes its output (relative).
        arrays: `fusion/query` and `fusion/value`, (width,); `fusion/fused`, (3 * width,).
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.1 if wide else 5.0, alt_text("fusion", report))
    panels: Any = [["two", "effect"], ["one", "effect"]] if wide else [["two"], ["one"], ["effect"]]
    axes = picture.subplot_mosaic(panels, width_ratios=[1.75, 1] if wide else None,
                                  height_ratios=None if wide else [1, 1, 1.1])  # fmt: skip
    _title(picture, _fusion_finding(report["fusion"]))
    query, value, fused = (np.asarray(arrays[f"fusion/{name}"], dtype=float) for name in ("query", "value", "fused"))
    third = len(query)
    parts = [(query, 0), (np.zeros(0), 1), (value, 2)]
    reach = 1.45 * max(np.abs(np.concatenate([query, value, fused])).max(initial=0), 1e-12)
    fused_parts = [(piece, place) for place, piece in enumerate(np.split(fused, 3))]
    for axis, pieces in ((axes["two"], parts), (axes["one"], fused_parts)):
        for values, place in pieces:
            _bias_third(axis, values, place, third)
        axis.set_xlim(0, 3 * third)
        axis.set_ylim(-reach, reach)
        axis.set_xticks([0, third, 2 * third, 3 * third])
        axis.yaxis.set_major_locator(MaxNLocator(3, symmetric=True))
    _fusion_words(axes["two"], axes["one"], query, value, fused)
    _bias_effects(axes["effect"], report["fusion"])
    return picture


def _bias_third(axes: Axes, values: np.ndarray, place: int, third: int) -> None:
    x = place * third + np.arange(len(values)) + 0.5
    if place:
        axes.axvline(place * third, color=HAIRLINE, lw=0.6, zorder=0.5)
    if not len(values):
        return
    axes.plot([place * third, (place + 1) * third], [0, 0], color=_THIRDS[place], lw=1.2)
    line = axes.vlines(x, 0, values, color=_THIRDS[place], lw=max(0.35, min(2.0, 130 / third)))
    line.set_gid(("query", "key", "value")[place])


def _fusion_words(two: Axes, one: Axes, query: np.ndarray, value: np.ndarray, fused: np.ndarray) -> None:
    key = np.split(fused, 3)[1]
    two.set_title("LAVIS: a query bias and a value bias", loc="left")
    one.set_title("transformers: one bias, qkv", loc="left")
    two.tick_params(labelbottom=False)
    small = matplotlib.rcParams["xtick.labelsize"]
    zeros = "zeros" if not key.any() else f"not zero: {_number(np.abs(key).max())}"
    for axes, place, word in ((two, 0, "query"), (two, 1, "no key bias"), (two, 2, "value"), (one, 1, zeros)):
        colour = FAULT if word.startswith("not") else INK
        y = 0.97 if axes is two and place != 1 else 0.72
        axes.text((place + 0.5) / 3, y, word, transform=axes.transAxes, ha="center", va="top", size=small, color=colour)
    same = np.array_equal(fused, np.concatenate([query, np.zeros_like(query), value]))
    exact = "bit-equal: query, zeros, value" if same else "NOT query, zeros, value"
    one.set_xlabel(f"channel ({exact})", color=INK if same else FAULT)


def _fusion_finding(values: Mapping[str, Any]) -> str:
    key, query = _numbers([values.get("key_bias_effect"), values.get("query_bias_effect")])
    if key <= _ROUNDING_EFFECT:
        change = "nothing" if key == 0 else f"{_number(key)}, rounding alone"
        return f"A random key bias changes the output by {change}; a random query bias by {_number(query)}"
    return f"A random key bias changes the output by {_number(key)}: that should be rounding alone"


# A block's own rounding in float32 is about 2e-7, and a large bias costs a digit more; one that counts changes tenths.
_ROUNDING_EFFECT = 1e-5


def _bias_effects(axes: Axes, values: Mapping[str, Any]) -> None:
    sizes = _numbers([values.get("query_bias_effect"), values.get("key_bias_effect")])
    _log_axis(axes, "x", ERROR_DECADES, zero_row=True)
    shown = _shown(sizes, ERROR_DECADES)
    axes.axvspan(10.0 ** ERROR_DECADES[0], _ROUNDING_EFFECT, color=ROUNDING, linewidth=0)
    axes.text(10.0**-6.5, 0.98, "rounding", transform=axes.get_xaxis_transform(), ha="center", va="top", size="small")
    for y, (size, x, colour) in enumerate(zip(sizes, shown, (_THIRDS[0], _THIRDS[1]), strict=True)):
        axes.hlines(y, 10.0 ** ERROR_DECADES[0], x, color=HAIRLINE, lw=0.8)
        _markers(axes, np.array([float(y)]), np.array([size]), np.ones(1, bool), "o", colour, 7, ERROR_DECADES,
                 ("query", "key")[y], flip=True)  # fmt: skip
        if not math.isnan(x):
            axes.annotate(_number(size), (x, y), (0, -8), textcoords="offset points", ha="center", va="top")
    axes.set_yticks([0, 1], ["query", "key"])
    axes.set_ylim(1.7, -0.7)
    axes.set_title("a random bias on …", loc="left")
    axes.set_xlabel(f"relative change of the\noutput of block {values.get('block', 0)}")


# ---------------------------------------------------------------------------------- all of them: alt text and files


FIGURES: dict[str, Draw] = {
    "depth_trace": depth_trace,
    "before_and_after": before_and_after,
    "logits": logits,
    "pixels": pixels,
    "captions": captions,
    "files": files,
    "fusion": fusion,
}

_NEEDS = {
    "logits": ("logits/kl", "logits/max_abs", "logits/margin", "logits/top_lavis", "logits/top_huggingface"),
    "pixels": ("pixels/image", "pixels/pil", "pixels/default"),
    "fusion": ("fusion/query", "fusion/value", "fusion/fused"),
}


def available(report: Report, arrays: Arrays) -> list[str]:
    """The figures for which the report and its arrays hold the data, in the order of FIGURES."""
    stages = report.get("stages") or []
    said = (report.get("captions") or {}).get("lavis") or {}
    present = {
        "depth_trace": bool(stages),
        "before_and_after": any(stage.get("fixed") for stage in stages),
        "logits": bool(report.get("logits")),
        "pixels": bool(report.get("pixel_values")),
        "captions": bool(said.get("greedy")),
        "files": bool((report.get("weights") or {}).get("bytes_by_kind")),
        "fusion": bool(report.get("fusion")),
    }
    return [name for name in FIGURES if present[name] and all(key in arrays for key in _NEEDS.get(name, ()))]


def alt_text(name: str, report: Report) -> str:
    """One or two sentences with the numbers, for whoever cannot see the figure.

    Raises:
        KeyError: there is no figure of that name.
    """
    return _ALT[name](report)


def _alt_depth(report: Report) -> str:
    depth = _Depth.of(report)
    words = f"Errors of {_count(len(depth.names), 'stage')} over depth. {_finding(report, depth)}."
    drift = depth.drift[~np.isnan(depth.drift)]
    if len(drift):
        words += f" Drift reaches {_number(drift.max())}; a fault is above {report['threshold']:g} × rounding."
    return words


def _alt_moves(report: Report) -> str:
    moves, still = _moves(report["stages"])
    return f"{_moves_finding(moves)}. {_count(still, 'stage')} moved by less than 10 %."


def _alt_logits(report: Report) -> str:
    values = report["logits"]
    largest, relative, kl, agreement = _numbers(values.get(k) for k in ("max_abs", "relative", "kl", "top1_agreement"))
    return (
        f"Logits of LAVIS and transformers differ by at most {_number(largest)} ({_number(relative)} relative, "
        f"KL divergence {_number(kl)}); the top token is the same at {_percent(agreement)} of positions."
    )


def _alt_pixels(report: Report) -> str:
    values = report["pixel_values"]
    ours = "are bit-equal" if values.get("equal") else "differ"
    default = values.get("default") or {}
    words = f"Pixel values of LAVIS and the PIL processor {ours} (at most {_number(values.get('max_abs'))} apart)."
    if not default:
        return words
    return (
        f"{words} The default processor differs in {_percent(default.get('share'))} of them, by up to "
        f"{_number(default.get('max_abs'))}."
    )


def _alt_captions(report: Report) -> str:
    ours, theirs = (report["captions"][side]["greedy"] for side in ("lavis", "huggingface"))
    noise = " The weights are random, so the captions are noise on purpose." if report.get("random_weights") else ""
    return f"{_captions_finding(ours, theirs)}. {_count(len(ours), 'image')} in all.{noise}"


def _alt_files(report: Report) -> str:
    table = report["weights"]["bytes_by_kind"]
    sizes = ", ".join(f"{_COMPONENTS.get(name, name)} {_bytes(sum(kinds.values()))}" for name, kinds in table.items())
    return f"{_files_finding(report['weights'])}. By component: {sizes}."


def _alt_fusion(report: Report) -> str:
    return f"LAVIS's query and value bias become one, with zeros for the key. {_fusion_finding(report['fusion'])}."


_ALT: dict[str, Callable[[Report], str]] = {
    "depth_trace": _alt_depth,
    "before_and_after": _alt_moves,
    "logits": _alt_logits,
    "pixels": _alt_pixels,
    "captions": _alt_captions,
    "files": _alt_files,
    "fusion": _alt_fusion,
}


def save(
    report: Report,
    arrays: Arrays,
    folder: Path,
    widths: Sequence[float] = (7.0,),
    formats: Sequence[str] = ("png", "svg"),
) -> list[Path]:
    """Writes every figure for which there is data, and returns the paths.

    Args:
        report: as in report.json.
        arrays: as in arrays.safetensors.
        folder: made if it is not there.
        widths: inches. The first gives `<name>.<format>`, each other one `<name>-<width>in.<format>`.
        formats: of png, svg and pdf (with fonts that can be edited).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in available(report, arrays):
        for number, width in enumerate(widths):
            picture = FIGURES[name](report, arrays, width)
            for kind in formats:
                path = folder / f"{name}{f'-{width:g}in' if number else ''}.{kind}"
                with _style(width):
                    picture.savefig(path, dpi=200, metadata=_metadata(kind, name, alt_text(name, report)))
                written.append(path)
    return written


def _metadata(kind: str, name: str, alt: str) -> dict[str, Any]:
    """The alt text travels with the file; the date does not, so that the same report gives the same bytes."""
    if kind == "pdf":
        return {"Title": name, "Subject": alt, "CreationDate": None}
    return {"Title": name, "Description": alt} | ({"Date": None} if kind == "svg" else {})


# ----------------------------------------------------------------------------- shared: axes, markers, words, widths


def _log_axis(
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
    labels = {tick: _tick(tick) for tick in ticks}
    bottom = low - 0.03 * span
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    if zero_row:
        bottom = low - 0.17 * span
        zero = _zero_place(decades)
        labels[zero] = "bit-equal" if which == "y" else "\nbit-equal"  # a line lower, clear of its neighbour
        line = axes.axhline if which == "y" else axes.axvline
        line(10 ** (low - 0.04 * span), color=HAIRLINE, lw=0.6, zorder=0.5)
    (axes.set_ylim if which == "y" else axes.set_xlim)(10**bottom, 10 ** (high + 0.03 * span))
    axis.set_major_locator(FixedLocator(sorted(labels)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(value, _tick(value))))
    axis.set_minor_locator(NullLocator())
    axes.grid(True, axis=which, color="#EFEFEF", lw=0.6)  # type: ignore[arg-type]


def _zero_place(decades: tuple[float, float]) -> float:
    """Where on a log axis exact zeros are drawn: below everything."""
    return math.pow(10, decades[0] - 0.105 * (decades[1] - decades[0]))


def _shown(values: np.ndarray, decades: tuple[float, float]) -> np.ndarray:
    """Where values go on the axis: zeros on their row, what is beyond an end at that end, NaN nowhere."""
    values = np.asarray(values, dtype=float)
    clipped = np.clip(values, 10.0 ** decades[0], 10.0 ** decades[1])
    return np.where(values == 0, _zero_place(decades), clipped)


def _markers(
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
    shown = _shown(values, decades)
    over, under = values > 10.0 ** decades[1], (values < 10.0 ** decades[0]) & (values > 0)
    arrows = (">", "<") if flip else ("^", "v")
    for chosen, shape in ((where & ~over & ~under, marker), (where & over, arrows[0]), (where & under, arrows[1])):
        chosen = chosen & ~np.isnan(values)
        if chosen.any():
            x, y = (shown, at) if flip else (at, shown)
            mark = _key(shape, colour)
            mark.set(xdata=x[chosen], ydata=y[chosen], markersize=size, label=what, zorder=3, clip_on=False)
            axes.add_line(mark)


def _key(marker: str, colour: str) -> Line2D:
    """A marker as the legend shows it; a white one is hollow. In grey a fault is paler than ink: hence its outline."""
    outlined = colour in ("white", FAULT)
    edge, width = (INK, 0.8) if outlined else (colour, 0.3)
    return Line2D([], [], ls="", marker=marker, mfc=colour, mec=edge, mew=width, ms=4.5)


def _ring(marker: str, colour: str) -> Line2D:
    return Line2D([], [], ls="", marker=marker, mfc="none", mec=colour, mew=1.4, ms=6)


def _legend(picture: Figure, keys: Sequence[tuple[Artist, str]], width: float) -> None:
    """Under the figure, in as many columns as the words leave room for."""
    size = matplotlib.rcParams["legend.fontsize"]
    needed = [_inches(words, size) + 3.65 * size / 72 for _, words in keys]
    columns = next(n for n in range(len(keys), 0, -1) if n == 1 or _across(needed, n) < width - 0.1)
    picture.legend([key for key, _ in keys], [words for _, words in keys], loc="outside lower left", ncols=columns,
                   handlelength=1.4, columnspacing=1.4, labelspacing=0.3, borderpad=0.1, borderaxespad=0.2)  # fmt: skip


def _across(needed: Sequence[float], columns: int) -> float:
    """Width of a legend that fills its columns one after the other, the longer ones first."""
    rows, longer = divmod(len(needed), columns)
    sizes = [rows + 1] * longer + [rows] * (columns - longer)
    ends = list(itertools.accumulate(sizes))
    return sum(max(needed[end - size : end]) for size, end in zip(sizes, ends, strict=True))


def _inches(text: str, size: str | float = "medium", weight: str = "normal") -> float:
    """How wide the text is drawn; a little more than its outlines, since hinting moves letters to whole dots."""
    font = font_manager.FontProperties(size=size, weight=weight)
    points: float = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
    return 1.02 * points / 72


def _title(picture: Figure, finding: str) -> None:
    """Constrained layout keeps room for a figure's title, but only this one, and does not look at its width."""
    picture.suptitle(_wrap(finding, picture.get_figwidth() - 0.15, "figure.titlesize", "bold"), x=0.01, ha="left")


def _wrap(text: str, room: float, setting: Any = "font.size", weight: str = "normal") -> str:
    """The text in lines of at most `room` inches, at a size of the style; too long a word is cut."""
    size = matplotlib.rcParams[setting]
    lines: list[str] = [""]
    for word in re.split(" (?![×%])", text):  # a number stays with its unit
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if _inches(longer, size, weight) <= room:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and _inches(lines[-1] + letter, size, weight) > room:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def _number(value: float | None) -> str:
    """Two digits, as people write them: 9.3e-7, 0.3, 12."""
    if value is None or math.isnan(value):
        return "NaN"
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _tick(value: float) -> str:
    return f"{value:g}" if 0.01 <= value < 1e4 else f"1e{round(math.log10(value))}"


def _plain_times(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if value >= INFINITE:
        return "∞"
    return f"{value:.1f}" if value < 100 else (f"{value:.0f}" if value < 1e5 else _number(value))


def _times(value: float) -> str:
    return f"{_plain_times(value)} ×"


def _percent(share: float | None) -> str:
    if share is None or math.isnan(share):
        return "NaN %"
    percent = 100 * share
    # 99.96 % must not read as all of them, nor 0.04 % as none.
    if 99 < percent < 100:
        return f"{math.floor(percent * 100) / 100:g} %"
    return f"{percent:.2g} %" if percent < 10 else f"{percent:.0f} %"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _some(names: list[str], most: int) -> str:
    """The first few, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _byte_unit(number: float) -> tuple[float, str]:
    return next(((u, w) for u, w in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= u), (1.0, "bytes"))


def _bytes(number: int) -> str:
    unit, word = _byte_unit(number)
    return f"{number / unit:.3g} {word}" if unit > 1 else _count(number, "byte")


def _readable(text: str, spaces: bool = True) -> str:
    """A token as it can be drawn: spaces and line ends made visible, letters that the font lacks by their code."""
    drawn = text.replace("\n", "⏎").replace("\t", "⇥")
    if spaces:
        drawn = drawn.replace(" ", "␣")
    letters = _letters()
    return "".join(c if ord(c) in letters else f"\\u{ord(c):04x}" for c in drawn) or "(empty)"


@functools.lru_cache(maxsize=1)
def _letters() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(FT2Font(path).get_charmap()) | {ord(" ")}

"""F6, the fault's signature: how the difference depends on the value tells what kind of fault it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from blip2nb.display.figures.axes import add_legend, add_title
from blip2nb.display.figures.examined import Examined, has_examined
from blip2nb.display.figures.style import FAULT, INK, MUTED, ROUNDING, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_number, as_percent

_ENOUGH = 0.5
"""A pattern is named if it explains at least half of the squared residual: more than all that it leaves over."""

_SIMPLER = 0.05
"""Of two patterns within five points the one with fewer numbers is named."""

_TYPICAL = 0.99
"""The fit looks at the 99 % of values, and of residuals, nearest to their median: no outlier tilts it."""

_NONE = 1e-3
"""A share of less than a tenth of a percent is drawn as none."""

_BINS = 32
"""Of the curve: enough for the bend of an activation function, few against the hundreds of values that are fitted."""

_FAR = 3.0
"""What is more than three times as far from zero as the typical values are would press the rest into a dot."""


def available(report: Report, arrays: Arrays) -> bool:
    return has_examined(report, arrays)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F6: transformers − LAVIS against LAVIS's value, and how much of it each simple pattern would explain.

    An offset is a bias, a slope a scale, a curve an activation function; without a pattern it is rounding, or mixed.

    Args:
        report: `examined`; `first_divergence` says whether this is a fault.
        arrays: `examined/lavis` and `examined/transformers`, (positions, channels).
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.5 if wide else 5.1, alt_text(report, arrays))
    signature = _Signature.of(Examined.of(report, arrays))
    mosaic: Any = [["cloud", "patterns"]] if wide else [["cloud"], ["patterns"]]
    axes = picture.subplot_mosaic(mosaic, width_ratios=[1.75, 1] if wide else None,
                                  height_ratios=None if wide else [1.5, 1])  # fmt: skip
    add_title(picture, signature.finding)
    _cloud(picture, axes["cloud"], signature, wide)
    _bars(axes["patterns"], signature)
    add_legend(picture, _keys(signature), width)
    return picture


# -- what the residual follows


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """One way in which a residual can depend on LAVIS's value, fitted.

    Attributes:
        fitted: the residual that it expects, at each value.
        explained: the share of the squared residual that it accounts for, R² without taking a mean off, and adjusted
            for how many numbers are fitted to how many values: a mean for each channel fits four positions of noise
            by a quarter. Values count as many as make up the square: a thousand small ones add little to ten large.
        words: what that is, with the number.
    """

    name: str
    fitted: np.ndarray
    explained: float
    words: str


@dataclasses.dataclass(frozen=True)
class _Signature:
    seen: Examined
    typical: np.ndarray  # the values that the fit looks at
    patterns: tuple[_Pattern, ...]  # the simpler first

    @classmethod
    def of(cls, seen: Examined) -> _Signature:
        typical = seen.numbers & _near_median(seen.values, seen.numbers) & _near_median(seen.residual, seen.numbers)
        return cls(seen, typical, tuple(_patterns(seen.values, seen.residual, typical)))

    @property
    def named(self) -> _Pattern | None:
        best = max(pattern.explained for pattern in self.patterns)
        if best < _ENOUGH:
            return None
        return next(pattern for pattern in self.patterns if pattern.explained >= max(_ENOUGH, best - _SIMPLER))

    @property
    def fits(self) -> bool:
        """Whether there is a residual to fit."""
        return bool(self.seen.residual[self.seen.numbers].any())

    @property
    def drawn(self) -> _Pattern:
        """The pattern over the cloud: a curve where it is one, otherwise the line."""
        curve = self.named is not None and self.named.name == "curve"
        return next(pattern for pattern in self.patterns if pattern.name == ("curve" if curve else "line"))

    @property
    def beside(self) -> float:
        """The share of the squared residual that is of the few values which the fit did not look at."""
        squares = np.where(self.seen.numbers, self.seen.residual, 0) ** 2
        return float(squares[~self.typical].sum() / (squares.sum() or 1.0))

    @property
    def finding(self) -> str:
        named, fault = self.named, self.seen.fault
        if named is None:
            best = max(self.patterns, key=lambda pattern: pattern.explained)
            if self.beside > 1 - _SIMPLER:
                outside = 1 - self.typical.sum() / max(self.seen.numbers.sum(), 1)
                return self.seen.finding(
                    f"the outermost {as_percent(outside)} of values hold {as_percent(self.beside)} of the squared "
                    "residual; the rest follows no pattern"
                )
            what = "no pattern in the residual, or a mixed one" if fault else "no pattern in the residual"
            some = f"; the best explains {_share(best)}" if best.explained >= _NONE else ""
            return self.seen.finding(what + some)
        words = f"{named.words} (explains {as_percent(named.explained)})"
        where = self.seen.numbers & ~self.typical
        left = ((self.seen.residual - named.fitted)[where] ** 2).sum()
        if left > _ENOUGH * (self.seen.residual[self.seen.numbers] ** 2).sum():
            words += "; but a few values are far off it"
        return self.seen.finding(words)


def _near_median(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    if not numbers.any():
        return numbers
    with np.errstate(invalid="ignore"):
        distance = np.abs(values - np.median(values[numbers]))
    return np.asarray(distance <= np.quantile(distance[numbers], _TYPICAL))


def _patterns(values: np.ndarray, residual: np.ndarray, typical: np.ndarray) -> Iterator[_Pattern]:
    """Every pattern, fitted by least squares to the typical values; the simpler first."""
    # What is not a number would make every sum one that is not; it is left out by `typical`.
    finite = np.isfinite(values) & np.isfinite(residual)
    v, r = np.where(finite, values, 0.0), np.where(finite, residual, 0.0)
    w = typical.astype(float)
    square = (w * r**2).sum()
    count = _ratio(square, np.sqrt((w * r**4).sum())) ** 2

    def pattern(name: str, fitted: np.ndarray, numbers: int, words: str) -> _Pattern:
        left = (w * (r - fitted) ** 2).sum()
        explained = 1 - left / square * count / (count - numbers) if count > numbers else 0.0
        return _Pattern(name, fitted, float(max(explained, 0.0)), words)

    offset = _ratio((w * r).sum(), w.sum())
    yield pattern("offset", np.full_like(v, offset), 1, f"residual = {_short(offset)}, an offset: a bias")
    scale = _ratio((w * r * v).sum(), (w * v * v).sum())
    yield pattern("scale", scale * v, 1, f"residual = {_short(scale)} × value: a scale")
    middle = _ratio((w * v).sum(), w.sum())
    slope = _ratio((w * r * (v - middle)).sum(), (w * (v - middle) ** 2).sum())
    start = offset - slope * middle
    line = f"residual = {_short(start)} {'−' if slope < 0 else '+'} {_short(abs(slope))} × value"
    yield pattern("line", start + slope * v, 2, f"{line}: a bias and a scale")
    curve, bins = _curve(v, r, typical)
    yield pattern("curve", curve, bins, "a curve over the value: an activation function")
    by_channel = _ratio((w * r).sum(axis=0, keepdims=True), w.sum(axis=0, keepdims=True))
    yield pattern("offset by channel", by_channel + 0 * v, v.shape[1],
                  f"the same in each channel, up to {_largest(by_channel)}: a bias")  # fmt: skip
    for name, axis, kind in (("channel", 0, "a weight by channel"), ("position", 1, "a norm or its eps")):
        scales = _ratio((w * r * v).sum(axis=axis, keepdims=True), (w * v * v).sum(axis=axis, keepdims=True))
        yield pattern(f"scale by {name}", scales * v, scales.size,
                      f"in each {name} a scale of its own, up to {_largest(scales)}: {kind}")  # fmt: skip


def _ratio(over: Any, under: Any) -> Any:
    """The quotient, and 0 for 0 ÷ 0: nothing to scale by."""
    return np.divide(over, under, out=np.zeros_like(np.asarray(over)), where=np.asarray(under) > 0)[()]


def _largest(values: np.ndarray) -> str:
    return _short(np.abs(values).max(initial=0))


def _short(value: float) -> str:
    """Rounded first, so that a hair less than 0.001 is 0.001 and not 1e-3."""
    return as_number(float(f"{value:.1e}"))


def _curve(v: np.ndarray, r: np.ndarray, typical: np.ndarray) -> tuple[np.ndarray, int]:
    """The residual's mean in bins of the value, straight between their middles.

    Half of the bins' edges part equally many values, half are equally far apart: a curve can be steep where there are
    many values, as around zero, and where there are few.
    """
    if not typical.any():
        return np.zeros_like(v), 1
    values = v[typical]
    steps = np.linspace(0, 1, _BINS // 2 + 1)
    edges = np.union1d(np.quantile(values, steps), values.min() + np.ptp(values) * steps)
    which = np.searchsorted(edges[1:-1], values, side="right")
    held = np.bincount(which)
    some = held > 0
    middles, means = (np.bincount(which, weights=of[typical])[some] / held[some] for of in (v, r))
    return np.interp(v, middles, means), int(some.sum())


# -- drawing


def _cloud(picture: Figure, axes: Axes, signature: _Signature, wide: bool) -> None:
    seen, numbers = signature.seen, signature.seen.numbers
    x, y = seen.values[numbers], seen.residual[numbers]
    right, top = (_reach(of, signature.typical) for of in (seen.values, seen.residual))
    beyond = (np.abs(x) > right) | (np.abs(y) > top)
    hexagons = _hexagons(axes, x[~beyond], y[~beyond], right, top, wide)
    axes.set(xlim=(-right, right), ylim=(-top, top))
    _arrowheads(axes, x[beyond], y[beyond], right, top)
    axes.axhline(0, color=MUTED, lw=0.6, zorder=1.5)
    if signature.fits:
        x, y = seen.values[signature.typical], signature.drawn.fitted[signature.typical]  # it says nothing of others
        order = np.argsort(x)
        order = order[np.linspace(0, len(order) - 1, min(len(order), 500)).astype(int)]
        colour = FAULT if seen.fault and signature.named else INK
        edge = [patheffects.withStroke(linewidth=3, foreground="white")]
        axes.plot(x[order], y[order], color=colour, lw=1.4, ls="-" if signature.named else (0, (4, 2)), label="fit",
                  path_effects=edge)  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, symmetric=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else as_number(value)))
    axes.set_xlabel(f"LAVIS's value\n({_census(signature, int(beyond.sum()))})")
    axes.set_ylabel("residual: transformers − LAVIS")
    bar = picture.colorbar(hexagons, ax=axes, pad=0.02, aspect=30)
    bar.set_label("values in a hexagon")
    decades = 10.0 ** np.arange(float(np.log10(hexagons.norm.vmax or 1.0)) + 1e-9)
    bar.ax.yaxis.set_major_locator(FixedLocator(decades.tolist()))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", " ")))
    bar.outline.set_visible(False)  # type: ignore[operator]


_GREYS = ListedColormap(matplotlib.colormaps["Greys"](np.linspace(0.22, 0.95, 128)))


def _hexagons(axes: Axes, x: np.ndarray, y: np.ndarray, right: float, top: float, wide: bool) -> PolyCollection:
    across = 48 if wide else 34
    hexagons = axes.hexbin(x, y, gridsize=(across, across // 2), extent=(-right, right, -top, top), mincnt=1,
                           cmap=_GREYS, linewidths=0.1)  # fmt: skip
    most = np.asarray(hexagons.get_array()).max(initial=1)
    hexagons.set_norm(LogNorm(1, max(float(most), 10.0)))
    return hexagons


def _reach(values: np.ndarray, typical: np.ndarray) -> float:
    """How far a symmetric axis goes: to the last value, unless few are so far off that the rest would be a dot."""
    most = np.abs(values[np.isfinite(values)]).max(initial=0)
    near = np.abs(values[typical]).max(initial=0)
    return 1.2 * (most if most <= _FAR * near or not near else 1.3 * near) or 1.0


def _arrowheads(axes: Axes, x: np.ndarray, y: np.ndarray, right: float, top: float) -> None:
    """What lies beyond an axis, at its end; of those that would cover each other, one."""
    where = np.column_stack([np.clip(x / right, -1, 1), np.clip(y / top, -1, 1)])
    where = (25 * where).round() / 25
    for shape, chosen in (
        ("^", y > top),
        ("v", y < -top),
        (">", (x > right) & (np.abs(y) <= top)),
        ("<", (x < -right) & (np.abs(y) <= top)),
    ):
        if chosen.any():
            at = np.unique(where[chosen], axis=0) * (right, top)
            axes.plot(at[:, 0], at[:, 1], ls="", marker=shape, mfc=INK, mec=INK, ms=3.5, label="beyond",
                      clip_on=False, zorder=4)  # fmt: skip


def _census(signature: _Signature, beyond: int) -> str:
    """How many values there are, and what became of those that are not in the cloud, or on its zero line."""
    numbers = signature.seen.numbers
    equal = int((signature.seen.residual[numbers] == 0).sum())
    words = [f"{numbers.sum():,} values".replace(",", " ")]
    words += [f"{as_percent(equal / numbers.sum())} bit-equal"] if equal else []
    words += [f"{beyond:,} beyond".replace(",", " ")] if beyond else []
    words += [f"{(~numbers).sum():,} NaN".replace(",", " ")] if not numbers.all() else []
    return ", ".join(words)


def _bars(axes: Axes, signature: _Signature) -> None:
    """How much each pattern would explain; the one that is named stands out, and so does the bar that it must pass."""
    for y, pattern in enumerate(signature.patterns):
        chosen = pattern is signature.named
        lit = FAULT if signature.seen.fault else INK
        axes.barh(y, pattern.explained, height=0.6, color=lit if chosen else ROUNDING, edgecolor=INK, lw=0.5)
        axes.annotate(_share(pattern), (pattern.explained, y), (3, 0), textcoords="offset points",
                      va="center", size="small", weight="bold" if chosen else "normal")  # fmt: skip
    axes.axvline(_ENOUGH, color=INK, lw=0.8, ls=":", label="enough")
    axes.set_yticks(range(len(signature.patterns)), [pattern.name for pattern in signature.patterns])
    axes.set(xlim=(0, 1.28), ylim=(len(signature.patterns) - 0.5, -0.5))
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_xlabel("of the squared residual\nexplained by")


def _share(pattern: _Pattern) -> str:
    return as_percent(pattern.explained if pattern.explained >= _NONE else 0.0)


def _keys(signature: _Signature) -> list[tuple[Artist, str]]:
    colour = FAULT if signature.seen.fault and signature.named else INK
    style: Any = "-" if signature.named else (0, (4, 2))
    kind = "curve" if signature.drawn.name == "curve" else "line"
    outside = 1 - signature.typical.sum() / max(signature.seen.numbers.sum(), 1)
    without = f", without the outermost {as_percent(outside)}" if outside else ""
    enough = (Line2D([], [], color=INK, lw=0.8, ls=":"), "enough to be named")
    fit = (Line2D([], [], color=colour, lw=1.4, ls=style), f"fitted {kind}{without}")
    return [fit, enough] if signature.fits else [enough]


def alt_text(report: Report, arrays: Arrays) -> str:
    signature = _Signature.of(Examined.of(report, arrays))
    shares = ", ".join(f"{p.name} {_share(p)}" for p in signature.patterns)
    return (
        "Residual transformers − LAVIS against LAVIS's value. "
        f"{signature.finding}. Share of the squared residual explained: {shares}."
    )


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each pattern, with the share that it explains, then one for each hexagon of the page-wide picture, with
    its middle and how many values are in it."""
    signature = _Signature.of(Examined.of(report, arrays))
    rows: list[Row] = [
        {"pattern": p.name, "explained": p.explained, "value": None, "residual": None, "count": None}
        for p in signature.patterns
    ]
    seen, numbers = signature.seen, signature.seen.numbers
    right, top = (_reach(of, signature.typical) for of in (seen.values, seen.residual))
    x, y = seen.values[numbers], seen.residual[numbers]
    inside = (np.abs(x) <= right) & (np.abs(y) <= top)
    hexagons = _hexagons(Figure().add_subplot(), x[inside], y[inside], right, top, wide=True)
    middles, counts = np.asarray(hexagons.get_offsets()).tolist(), np.asarray(hexagons.get_array()).tolist()
    return rows + [
        {"pattern": None, "explained": None, "value": value, "residual": residual, "count": int(count)}
        for (value, residual), count in zip(middles, counts, strict=True)
    ]

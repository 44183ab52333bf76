"""F5, position × channel: where in the examined stage's output the difference sits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from blip2nb.display.figures.axes import add_title, draw_markers, hatch_where, log_axis, on_axis, stretches, zero_place
from blip2nb.display.figures.cells import cell_steps, largest_by_cell
from blip2nb.display.figures.examined import Examined, has_examined
from blip2nb.display.figures.style import HAIRLINE, INK, MUTED, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_number, as_percent, as_token, text_inches

_CELLS = {True: (96, 240), False: (64, 120)}
"""At most so many (positions, channels) are told apart, wide or narrow: about four dots of the PNG each way for one."""


def available(report: Report, arrays: Arrays) -> bool:
    return has_examined(report, arrays)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F5: transformers − LAVIS at each position and channel, and how large it is along either.

    Args:
        report: `examined`; `first_divergence` says whether this is a fault; `sequences` names a position's text.
        arrays: `examined/lavis` and `examined/transformers`, (positions, channels / step).
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.9 if wide else 3.5, alt_text(report, arrays))
    seen = Examined.of(report, arrays)
    grid = picture.add_gridspec(3, 2, height_ratios=[0.75, 2.3, 0.09], width_ratios=[4.4 if wide else 3, 1])
    heat = picture.add_subplot(grid[1, 0])
    above = picture.add_subplot(grid[0, 0], sharex=heat)
    beside = picture.add_subplot(grid[1, 1], sharey=heat)
    add_title(picture, seen.finding(_where(report, seen)))
    _heat_map(picture, heat, picture.add_subplot(grid[2, 0]), seen, wide)
    _margin(above, _rms(seen, axis=0))
    _margin(beside, _rms(seen, axis=1), flip=True)
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    above.set_ylabel("RMS by\nchannel")
    beside.set_xlabel("RMS by\nposition")
    _channel_ticks(heat, above, seen, width)
    heat.set_ylabel("position")
    heat.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return picture


def _heat_map(picture: Figure, axes: Axes, bar: Axes, seen: Examined, wide: bool) -> None:
    positions, columns = seen.residual.shape
    steps = cell_steps(seen.residual.shape, _CELLS[wide])
    cells = largest_by_cell(seen.residual[None], steps)
    finite = np.abs(seen.residual[np.isfinite(seen.residual)])
    reach = finite.max(initial=0) or 1.0
    if np.isnan(cells).any():  # shows through where the image has no value
        axes.patch.set(hatch="////", facecolor="white", edgecolor=MUTED, gid="NaN")
    across, down = cells.shape[1] * steps[1] - 0.5, cells.shape[0] * steps[0] - 0.5
    image = axes.imshow(np.clip(cells, -reach, reach), cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto",
                        interpolation="nearest", extent=(-0.5, across, down, -0.5))  # fmt: skip
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(positions - 0.5, -0.5))
    for spine in axes.spines.values():
        spine.set(visible=True, color=HAIRLINE)
    scale = picture.colorbar(image, cax=bar, orientation="horizontal", ticks=[-reach, 0, reach])
    scale.outline.set_edgecolor(HAIRLINE)  # type: ignore[operator]
    nothing = ["", "bit-equal" if len(finite) else "NaN", ""]
    bar.set_xticklabels([f"−{as_number(reach)}", "0", f"+{as_number(reach)}"] if finite.any() else nothing)
    for label, side in zip(bar.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set(horizontalalignment=side)
    shared = f", in each cell\nthe largest of {steps[0]} positions × {steps[1]} channels" if max(steps) > 1 else ""
    bar.set_xlabel(f"transformers − LAVIS{shared}")


def _rms(seen: Examined, axis: int) -> np.ndarray:
    """Root of the mean square of the differences that are numbers; NaN where there is none."""
    numbers = np.isfinite(seen.residual)
    count = numbers.sum(axis=axis)
    total = np.where(numbers, seen.residual**2, 0).sum(axis=axis)
    return np.asarray(np.sqrt(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)))


def _margin(axes: Axes, sizes: np.ndarray, flip: bool = False) -> None:
    """The sizes along one side, on a log axis that spans them: a lone channel must stand out as far as it does."""
    at = np.arange(len(sizes), dtype=float)
    some = sizes[(sizes > 0) & np.isfinite(sizes)]
    top = math.ceil(math.log10(some.max(initial=1e-300)) + 0.05) if len(some) else 0
    low = min(top - 2, max(math.floor(math.log10(some.min())), top - 8)) if len(some) else -2
    decades, zeros = (float(low), float(top)), bool((sizes == 0).any())
    log_axis(axes, "x" if flip else "y", decades, zero_row=zeros)
    axis = axes.xaxis if flip else axes.yaxis
    ends = [zero_place(decades)] * zeros + [10.0 ** decades[0]] * (not zeros) + [10.0 ** decades[1]]
    axis.set_major_locator(FixedLocator(ends if len(some) else ends[:zeros]))  # there is no room for more
    for tick, side in zip(axis.get_major_ticks() if flip else [], ("left", "right"), strict=False):
        tick.label1.set(horizontalalignment=side)
    shown = on_axis(sizes, decades)
    if flip:
        axes.plot(shown, at, color=INK, lw=0.7, label="RMS")
        for run in stretches(np.isnan(sizes)):
            axes.axhspan(run.start - 0.5, run.stop - 0.5, facecolor="none", edgecolor=MUTED, hatch="////", lw=0)
            axes.patches[-1].set_gid("NaN")
    else:
        axes.plot(at, shown, color=INK, lw=0.7, label="RMS")
        hatch_where(axes, np.isnan(sizes), "")
    if len(some) and _Spread.of(np.where(np.isfinite(sizes), sizes, 0) ** 2).one:
        draw_markers(axes, at, sizes, sizes == some.max(), "o", INK, 3.5, decades, "the one", flip=flip)


def _channel_ticks(heat: Axes, above: Axes, seen: Examined, width: float) -> None:
    """Ticks at the heads' borders where there are heads, else where they fall; named by the model's own channels."""
    name = "channel" if seen.step == 1 else f"channel (every {_ordinal(seen.step)})"
    if not seen.heads:
        heat.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        heat.xaxis.set_major_formatter(FuncFormatter(lambda column, _: f"{column * seen.step:.0f}"))
        heat.set_xlabel(name)
        return
    borders = np.arange(seen.heads + 1) * (seen.channels // seen.heads)
    room = 0.62 * (width - 1.0) / seen.heads
    each = 1.5 * text_inches(str(seen.channels), "small") / room
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step > each or step == 128)
    labels = [str(border) if n % every == 0 else "" for n, border in enumerate(borders)]
    heat.set_xticks(borders / seen.step - 0.5, labels)
    for border in borders[1:-1] / seen.step - 0.5:
        above.axvline(border, color=HAIRLINE, lw=0.5, zorder=0.5)
    heat.set_xlabel(
        f"{name}; a tick between each two of {seen.heads} heads" if width >= 5 else f"{name} ({seen.heads} heads)"
    )


def _ordinal(number: int) -> str:
    return {2: "2nd", 3: "3rd"}.get(number, f"{number}th")


# -- where it sits


_HALF, _MOST, _TENTH, _TIMES = 0.5, 0.8, 0.1, 3.0
"""One channel holds an error that has half of its square: as much as all others together. Of few channels that is no
news, so that it must be three times an average other's share too. Few hold it when a tenth of them have most of it:
four fifths, eight times an even share."""


@dataclasses.dataclass(frozen=True)
class _Spread:
    """How the squared error is shared out: the largest share, whose it is, and how many it takes to hold most."""

    largest: float
    whose: int
    needed: int
    held: float  # the share that these hold
    among: int

    @classmethod
    def of(cls, energy: np.ndarray) -> _Spread:
        shares = energy / energy.sum()
        held = np.cumsum(np.sort(shares)[::-1])
        needed = min(int((held < _MOST).sum()) + 1, len(held))
        return cls(float(shares.max()), int(shares.argmax()), needed, float(held[needed - 1]), len(shares))

    @property
    def one(self) -> bool:
        """Whether one holds it: half of two heads would be no more than its share."""
        others = (1 - self.largest) / max(self.among - 1, 1)
        return self.among > 1 and self.largest >= max(_HALF, _TIMES * others)

    @property
    def few(self) -> bool:
        return self.needed <= self.among * _TENTH


def _where(report: Report, seen: Examined) -> str:
    """In which channel, head or position the error is, as far as the sums along either side tell."""
    energy = np.where(seen.numbers, seen.residual, 0) ** 2
    large = np.where(seen.numbers, seen.values, 0) ** 2
    if not energy.any():
        return "what differs is not a number"
    channel, position = _Spread.of(energy.sum(axis=0)), _Spread.of(energy.sum(axis=1))
    at, token = str(channel.whose * seen.step), f"{position.whose}{_text_at(report, seen.stage, position.whose)}"
    most = energy[position.whose, channel.whose] / energy.sum()
    if most >= _HALF and channel.one and position.one:
        return _holds(f"one value, position {token}, channel {at}", most, large[position.whose, channel.whose], large)
    if channel.one:
        return _holds(f"one channel, {at}", channel.largest, large[:, channel.whose], large)
    if seen.heads:
        head = _Spread.of(np.bincount(_heads(seen), weights=energy.sum(axis=0)))
        if head.one:
            return _holds(f"one head, {head.whose}", head.largest, large[:, _heads(seen) == head.whose], large)
    if position.one:
        return _holds(f"one position, {token}", position.largest, large[position.whose], large)
    sides = [(channel, "channel"), (position, "position")]
    for spread, name in sides:
        if spread.few:
            return f"{spread.needed} of {spread.among} {name}s hold {as_percent(spread.held)} of the squared error"
    most = [f"no {name} holds more than {as_percent(spread.largest)}" for spread, name in sides if spread.among > 1]
    return f"the error is everywhere: {' of its square, '.join(most)}"


def _holds(what: str, share: float, its_values: np.ndarray, values: np.ndarray) -> str:
    """With a note where LAVIS's own values are as lopsided: an error that is as large as its values is no news."""
    own = its_values.sum() / (values.sum() or 1.0)
    also = f", and {as_percent(own)} of the squared values" if own >= _HALF else ""
    return f"{what}, holds {as_percent(share)} of the squared error{also}"


def _heads(seen: Examined) -> np.ndarray:
    """Each kept channel's head."""
    return np.arange(seen.residual.shape[1]) * seen.step * (seen.heads or 1) // seen.channels


def _text_at(report: Report, stage: str, position: int) -> str:
    """The text that stands there, where the stage's positions are those of a text."""
    for part, texts in (report.sequences or {}).items():
        if stage.startswith(f"{part}.") and position < len(texts):
            return f" ({as_token(texts[position])})"
    return ""


def alt_text(report: Report, arrays: Arrays) -> str:
    seen = Examined.of(report, arrays)
    positions, channels = seen.residual.shape
    finite = np.abs(seen.residual[np.isfinite(seen.residual)])
    largest = as_number(finite.max(initial=0)) if len(finite) else "NaN"
    return (
        f"Difference transformers − LAVIS at {positions} positions × {channels} channels, at most {largest}. "
        f"{seen.finding(_where(report, seen))}."
    )


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each channel's and each position's RMS difference, then one for each cell of the page-wide picture:
    its first position and channel, and the largest signed difference in it."""
    seen = Examined.of(report, arrays)
    rows: list[Row] = [
        {"what": "RMS by channel", "position": None, "channel": place * seen.step, "value": value}
        for place, value in enumerate(_rms(seen, axis=0).tolist())
    ]
    rows += [
        {"what": "RMS by position", "position": place, "channel": None, "value": value}
        for place, value in enumerate(_rms(seen, axis=1).tolist())
    ]
    steps = cell_steps(seen.residual.shape, _CELLS[True])
    cells = largest_by_cell(seen.residual[None], steps)
    return rows + [
        {"what": "difference", "position": down * steps[0], "channel": across * steps[1] * seen.step, "value": value}
        for down, line in enumerate(cells.tolist())
        for across, value in enumerate(line)
    ]

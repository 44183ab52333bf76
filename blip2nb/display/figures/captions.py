"""F9, the captions: what both models say about each image, and how sure they were of each token of one of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from blip2nb.display.figures.axes import legend_key
from blip2nb.display.figures.style import (
    FAULT,
    HALO,
    INK,
    LAVIS,
    MUTED,
    ROUNDING,
    TRANSFORMERS,
    Arrays,
    Picture,
    Report,
    styled,
)
from blip2nb.display.figures.words import as_count, as_number, as_token, text_inches, to_floats, wrap_text
from blip2nb.forms import there
from blip2nb.report.schema import Ladder

_LEAST = -16.0  # nats; what is less likely than one in nine million is an arrowhead at the axis's end


def available(report: Report, arrays: Arrays) -> bool:
    return report.captions is not None and bool(report.captions.lavis.get("greedy"))


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F9: what both models say about each image, greedily, the word at which they part, and one caption as a ladder.

    The ladder shows each token's log-probability in both models and that of its runner-up, which tells how near to a
    tie it was. It is drawn of the first image on which the two part, or of the one with the nearest tie.

    Args:
        report: `captions`, of `lavis` and `huggingface` by way of decoding, and its `ladder`; `random_weights`.
        arrays: not used.
        width: inches.
    """
    said = there(report.captions)
    ours, theirs = said.lavis["greedy"], said.huggingface["greedy"]
    size = matplotlib.rcParams["font.size"] / 72
    ladder = _ladder_to_draw(report)
    beside = ladder is not None and width >= 5
    column = 0.5 * width if beside else width
    entries = [_caption_lines(number, a, b, column - 0.2 - 4.6 * size)
               for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)]  # fmt: skip
    notes = [wrap_text(words, column - 0.2) for words in _caption_notes(report)]
    keys = _keys(parted=list(ours) != list(theirs), ladder=ladder is not None)
    title = wrap_text(_captions_finding(ours, theirs), width - 0.15, "figure.titlesize", "bold")
    top = 0.14 + 1.7 * size * (title.count("\n") + 1)
    listed = 1.5 * size * sum(len(lines) + 0.5 for lines in entries)
    under = size * (0.9 + 1.5 * (-(-len(keys) // 2) + sum(note.count("\n") + 1 for note in notes)))
    steep = _ladder_inches(ladder, width - column if beside else width) if ladder else 0.0
    height = top + (max(listed + under, steep) if beside else listed + steep + under)
    picture = Picture(width, height, alt_text(report, arrays), layout=None)
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
    if ladder:
        left, above = (column, top) if beside else (0.0, down + 0.3 * size)
        _draw_ladder(picture, page, ladder, left, above, width - left)
        down += 0.0 if beside else steep
    down += 0.4 * size
    page.legend(list(keys.values()), list(keys), loc="upper left", ncols=2, borderpad=0,
                bbox_to_anchor=(0.1 / width, 1 - down / height), handlelength=1.2, borderaxespad=0)  # fmt: skip
    down += 1.5 * size * (-(-len(keys) // 2) - 1)
    for note in notes:
        down += 1.5 * size
        page.text(0.1, down, note, va="top", color=MUTED)
        down += 1.5 * size * note.count("\n")
    return picture


def _keys(parted: bool, ladder: bool) -> dict[str, Line2D]:
    keys = {"LAVIS": legend_key("o", LAVIS), "transformers": legend_key("s", TRANSFORMERS)}
    if ladder:
        hollow = legend_key("o", "white")
        hollow.set(markeredgecolor=MUTED, markersize=5)
        keys["hollow: the runner-up"] = hollow
    if parted:
        keys["from here they part"] = Line2D([], [], ls="", marker="|", mec=FAULT, mew=1.2)
    return keys


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
        a, b, alike = [as_token(ours)], [as_token(theirs)], 0
    first = _broken_up(f"{number}", ("o",), a, alike, room)
    return [*first, *_broken_up("", ("s",), b, alike, room)]


def _readable_words(text: str) -> list[str]:
    return [as_token(word, spaces=False) for word in text.split()]


def _broken_up(number: str, marks: tuple[str, ...], words: list[str], alike: int, room: float) -> list[_Line]:
    """Words in lines of at most `room` inches. Bold is wider, so what parts is measured as bold."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0.0
    for place, word in enumerate(words or ["(nothing)"]):
        same = place < alike
        word = f"│{word}" if place == alike else word
        needed = text_inches(word + " ", weight="normal" if same else "bold")
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
        key = legend_key("o", LAVIS) if mark == "o" else legend_key("s", TRANSFORMERS)
        key.set(xdata=[0.1 + (2.6 if mark == "o" else 3.6) * size], ydata=[down + 0.58 * size], markersize=5)
        page.add_line(key)
    x = 0.1 + 4.6 * size
    for text, same in line.pieces:
        weight = "normal" if same else "bold"
        page.text(x, baseline, text, weight=weight, color=INK if same else FAULT)
        x += text_inches(text + " ", weight=weight)


@dataclasses.dataclass(frozen=True)
class _Ladder:
    """One image's caption token by token; the shorter side is filled up with None.

    Attributes:
        tokens, others: (LAVIS's, transformers') texts of what was chosen and of the runner-up, at each step.
        chosen, second: (steps, 2) their log-probabilities in nats, NaN where there are none.
    """

    image: int
    tokens: list[tuple[str | None, str | None]]
    others: list[tuple[str | None, str | None]]
    chosen: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, image: int, both: Ladder) -> _Ladder:
        steps = list(itertools.zip_longest(both.lavis, both.transformers, fillvalue=(None, None, None, None)))
        chosen, second = (to_floats(one[n] for pair in steps for one in pair).reshape(-1, 2) for n in (1, 3))
        return cls(image, [(a[0], b[0]) for a, b in steps], [(a[2], b[2]) for a, b in steps], chosen, second)

    @property
    def parting(self) -> int | None:
        """The first step at which the models choose differently. From there on the rows are of two captions."""
        return next((step for step, (a, b) in enumerate(self.tokens) if a != b), None)

    @property
    def lost(self) -> np.ndarray:
        """The steps at which a model chose a token with a log-probability that is not a number."""
        chose = np.array([[text is not None for text in pair] for pair in self.tokens])
        return np.asarray((np.isnan(self.chosen) & chose).any(axis=1))

    @property
    def margins(self) -> np.ndarray:
        """Each step's distance to a tie, in the model that is nearer to one; NaN as infinity."""
        return np.nan_to_num(self.chosen - self.second, nan=math.inf).min(axis=1)

    @property
    def apart(self) -> float:
        """How far the models' log-probabilities of the same token are apart at most, as long as they agree."""
        same = self.chosen[: self.parting]
        return float(np.nan_to_num(np.abs(same[:, 0] - same[:, 1]), nan=0.0).max(initial=0.0))


def _ladder_to_draw(report: Report) -> _Ladder | None:
    """Of the first image on which the models part; else of the one with the nearest tie."""
    whole = [_Ladder.of(n, both) for n, both in enumerate(there(report.captions).ladder, 1)]
    ladders = [ladder for ladder in whole if ladder.tokens]
    parted = [ladder for ladder in ladders if ladder.parting is not None]
    return parted[0] if parted else min(ladders, key=lambda ladder: ladder.margins.min(), default=None)


def _ladder_finding(ladder: _Ladder) -> str:
    if ladder.parting is not None:
        a, b = (_word(text) for text in ladder.tokens[ladder.parting])
        margin = as_number(float(ladder.margins[ladder.parting]))
        return f"Image {ladder.image} parts at token {ladder.parting + 1}: {a} or {b}, {margin} nats from a tie"
    step = int(ladder.margins.argmin())
    token, other = _word(ladder.tokens[step][0]), _word(ladder.others[step][0])
    return (
        f"Image {ladder.image} comes nearest to a tie: token {step + 1}, {token} before {other} "
        f"by {as_number(float(ladder.margins[step]))} nats"
    )


def _row_inches() -> float:
    return 1.28 * matplotlib.rcParams["font.size"] / 72


def _ladder_heading(ladder: _Ladder, room: float) -> str:
    return wrap_text(_ladder_finding(ladder), room - 0.2)


def _ladder_inches(ladder: _Ladder, room: float) -> float:
    """Height of heading, rows, axis and its two lines of words."""
    size = matplotlib.rcParams["font.size"] / 72
    lines = _ladder_heading(ladder, room).count("\n") + 1
    return 1.35 * size * lines + 0.4 * size + _row_inches() * (len(ladder.tokens) + 0.4) + 5.5 * size


def _draw_ladder(picture: Figure, page: Axes, ladder: _Ladder, left: float, top: float, room: float) -> None:
    """The ladder as a plot of its own, at so many inches from the page's left and top."""
    size, small = matplotlib.rcParams["font.size"] / 72, matplotlib.rcParams["ytick.labelsize"]
    heading = _ladder_heading(ladder, room)
    page.text(left + 0.1, top, heading, va="top", linespacing=1.15)
    top += 1.35 * size * (heading.count("\n") + 1) + 0.4 * size
    labels = [
        f"{_either(pair)}{'  NaN' if lost else ''}" for pair, lost in zip(ladder.tokens, ladder.lost, strict=True)
    ]
    names = 0.2 + max(text_inches(label, small, "bold") for label in labels)
    across, tall = room - names - 0.15, _row_inches() * (len(labels) + 0.4)
    width, height = picture.get_size_inches()
    axes = picture.add_axes(((left + names) / width, 1 - (top + tall) / height, across / width, tall / height))
    axes.set_ylim(len(labels) - 0.3, -0.7)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(True, axis="x", color="#EFEFEF", lw=0.6)
    chosen, second = (np.maximum(values, _LEAST) for values in (ladder.chosen, ladder.second))
    ends = np.fmin(np.fmin.reduce(chosen, axis=1), np.fmin.reduce(second, axis=1))
    beneath = [_either((a or b, b or a)) for a, b in ladder.others]
    needed = np.array([text_inches(words, small) + 9 / 72 for words in beneath])
    # The words left of the marks must end inside the axis, whose scale depends on where it starts.
    starts = (ends * across - needed * 0.05) / (across - needed)
    low = min(-1.0, float(np.nan_to_num(starts, nan=-1.0).min()))
    axes.set_xlim(low, 0.05)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    words = wrap_text(_apart_words(ladder), room - 0.25)
    axes.set_xlabel(f"log-probability of the token (nats)\n{words}", loc="right")
    _mark_rows(axes, ladder)
    rows = np.arange(len(labels))
    axes.hlines(rows, ends, np.fmax.reduce(chosen, axis=1), color=MUTED, lw=0.9, zorder=1.5)
    for values, told, filled in ((second, ladder.second, False), (chosen, ladder.chosen, True)):
        for side, marker, colour, points in ((1, "s", TRANSFORMERS, 6.0), (0, "o", LAVIS, 3.2)):
            _rungs(axes, values[:, side], told[:, side], marker, colour, points, filled)
    for row, words in enumerate(beneath):
        if not math.isnan(ends[row]):
            axes.annotate(words, (ends[row], row), (-5, 0), textcoords="offset points", ha="right", va="center",
                          size=small, color=MUTED, bbox=HALO if ladder.lost[row] else None)  # fmt: skip


def _either(pair: tuple[str | None, str | None]) -> str:
    """The token, or both where the models differ; what is long is cut, since a URL leaves no room for the plot."""
    a, b = (_word(text) for text in pair)
    most = 14 if a == b else 9
    a, b = (text if len(text) <= most else f"{text[: most - 1]}…" for text in (a, b))
    return a if pair[0] == pair[1] else f"{a} | {b}"


def _word(text: str | None) -> str:
    return "(end)" if text is None else as_token(text)


def _apart_words(ladder: _Ladder) -> str:
    until = "" if ladder.parting is None else " until they part"
    return f"the models at most {as_number(ladder.apart)} apart{until}" if ladder.apart else f"bit-equal{until}"


def _mark_rows(axes: Axes, ladder: _Ladder) -> None:
    """The row where the models part in the fault's colour, else the nearest tie in grey; what is no number hatched."""
    parting = ladder.parting
    marked = parting if parting is not None else int(ladder.margins.argmin())
    colour, alpha = (FAULT, 0.16) if parting is not None else (ROUNDING, 0.6)
    axes.axhspan(marked - 0.5, marked + 0.5, color=colour, alpha=alpha, lw=0, zorder=0.6)
    axes.patches[-1].set_gid("parting" if parting is not None else "tie")
    labels = axes.get_yticklabels()
    labels[marked].set(weight="bold", color=FAULT if parting is not None else INK)
    for row in np.flatnonzero(ladder.lost):
        axes.axhspan(row - 0.5, row + 0.5, facecolor="none", edgecolor=MUTED, hatch="////", lw=0, zorder=0.8)
        axes.patches[-1].set_gid("NaN")
        labels[row].set(weight="bold", color=FAULT)


def _rungs(
    axes: Axes, shown: np.ndarray, told: np.ndarray, marker: str, colour: str, points: float, filled: bool
) -> None:
    """One model's marks; the square is the larger, so that the circle in it leaves both in sight where they agree."""
    rows = np.arange(len(shown))
    label = f"{'LAVIS' if colour == LAVIS else 'transformers'}{'' if filled else ', runner-up'}"
    for chosen, shape in ((told >= _LEAST, marker), (told < _LEAST, "<")):
        if chosen.any():
            line = Line2D(shown[chosen], rows[chosen], ls="", marker=shape, ms=points, mew=0.9, zorder=3, label=label,
                          mfc=colour if filled else "white", mec=colour, clip_on=False)  # fmt: skip
            axes.add_line(line)


def _captions_finding(ours: Sequence[str], theirs: Sequence[str]) -> str:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if equal == len(ours):
        return f"Both models say the same of {'all ' if equal > 1 else ''}{as_count(equal, 'image')} (greedy)"
    return f"The captions part on {len(ours) - equal} of {as_count(len(ours), 'image')} (greedy)"


def _caption_notes(report: Report) -> list[str]:
    notes = []
    for mode, values in there(report.captions).modes.items():
        equal = values.equal
        if mode != "greedy" and equal:
            notes.append(f"{_MODES.get(mode, mode)}: {sum(map(bool, equal))} of {len(equal)} equal")
    if report.random_weights:
        notes.append("random weights: this caption is noise on purpose")
    return notes


_MODES = {"beams": "five beams", "default": "five beams as LAVIS sets them by default"}


def alt_text(report: Report, arrays: Arrays) -> str:
    said = there(report.captions)
    ours, theirs = said.lavis["greedy"], said.huggingface["greedy"]
    ladder = _ladder_to_draw(report)
    sure = f" {_ladder_finding(ladder)}." if ladder else ""
    noise = " The weights are random, so the captions are noise on purpose." if report.random_weights else ""
    return f"{_captions_finding(ours, theirs)}. {as_count(len(ours), 'image')} in all.{sure}{noise}"


def table(report: Report, arrays: Arrays) -> list[dict[str, Any]]:
    """A row for each image and way of decoding, and one for each token of the ladders, whose place is `token`."""
    said = there(report.captions)
    captions = [
        _table_row(mode, number, None, (ours, None, None, None), (theirs, None, None, None))
        for mode in said.lavis
        for number, (ours, theirs) in enumerate(zip(said.lavis[mode], said.huggingface[mode], strict=True), 1)
    ]
    nothing = (None, None, None, None)
    tokens = [
        _table_row("greedy", number, place, ours, theirs)
        for number, both in enumerate(said.ladder, 1)
        for place, (ours, theirs) in enumerate(
            itertools.zip_longest(both.lavis, both.transformers, fillvalue=nothing), 1
        )
    ]
    return captions + tokens


def _table_row(mode: str, image: int, token: int | None, ours: Sequence, theirs: Sequence) -> dict[str, Any]:
    row = {"mode": mode, "image": image, "token": token, "lavis": ours[0], "transformers": theirs[0]}
    row["equal"] = ours[0] == theirs[0]
    for side, step in (("lavis", ours), ("transformers", theirs)):
        names = ("log_probability", "runner_up", "runner_up_log_probability")
        row |= {f"{side}_{name}": value for name, value in zip(names, step[1:], strict=True)}
    return row

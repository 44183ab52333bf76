"""F9, the captions: how sure both models were of each token of one of them, and how near each choice was to a tie."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from blip2nb.display.figures.axes import add_legend, add_title, legend_key
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

_LEAST = -16.0
"""Nats, one in nine million. The likeliest of 50 000 tokens is never below −11; of a runner-up that is less likely than
this, an arrowhead at the axis's end says enough."""


def available(report: Report, arrays: Arrays) -> bool:
    return _ladder_to_draw(report) is not None


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F9: one caption as a ladder, decoded greedily: each token's log-probability in both models, and its runner-up's.

    The distance to the runner-up tells how near to a tie the choice was. The caption is that of the first image on
    which the two models part, or of the one with the nearest tie. What both say of all images is in `display.captions`.

    Args:
        report: `captions`, of `lavis` and `huggingface` by way of decoding, and its `ladder`; `random_weights`.
        arrays: not used.
        width: inches.
    """
    ladder = there(_ladder_to_draw(report))
    labels = [
        f"{_either(pair)}{'  NaN' if lost else ''}" for pair, lost in zip(ladder.tokens, ladder.lost, strict=True)
    ]
    small = matplotlib.rcParams["ytick.labelsize"]
    across = width - 0.35 - max(text_inches(label, small, "bold") for label in labels)
    heading, apart = wrap_text(_ladder_finding(ladder), across), wrap_text(_apart_words(ladder), across)
    picture = Picture(width, 1.0, alt_text(report, arrays))
    add_title(picture, _captions_finding(report))
    lines = sum(words.count("\n") + 1 for words in (picture.get_suptitle(), heading, apart))
    size = matplotlib.rcParams["font.size"] / 72
    picture.set_figheight(size * (1.28 * (len(labels) + 0.4) + 1.3 * lines + _AROUND[width >= 5]))
    axes = picture.add_subplot()
    axes.set_title(heading, loc="left")
    axes.set_xlabel(f"log-probability of the token (nats)\n{apart}", loc="right")
    _draw_ladder(axes, ladder, labels, across)
    add_legend(picture, _keys(report), width)
    return picture


_AROUND = {True: 7.0, False: 9.5}  # letter heights that ticks, legend and air take, wide or narrow


def _keys(report: Report) -> list[tuple[Artist, str]]:
    hollow = legend_key("o", "white")
    hollow.set(markeredgecolor=MUTED, markersize=5)
    keys: list[tuple[Artist, str]] = [
        (legend_key("o", LAVIS), "LAVIS"),
        (legend_key("s", TRANSFORMERS), "transformers"),
        (hollow, "hollow: the runner-up"),
    ]
    if report.random_weights:
        keys.append((Line2D([], [], ls=""), "random weights: this caption is noise on purpose"))
    return keys


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
    whole = [_Ladder.of(n, both) for n, both in enumerate(report.captions.ladder if report.captions else (), 1)]
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


def _draw_ladder(axes: Axes, ladder: _Ladder, labels: Sequence[str], across: float) -> None:
    """The rungs, from the top, on axes that are `across` inches wide."""
    axes.set_ylim(len(labels) - 0.3, -0.7)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(True, axis="x", color="#EFEFEF", lw=0.6)
    chosen, second = (np.maximum(values, _LEAST) for values in (ladder.chosen, ladder.second))
    ends = np.fmin(np.fmin.reduce(chosen, axis=1), np.fmin.reduce(second, axis=1))
    beneath = [_either((a or b, b or a)) for a, b in ladder.others]
    small = matplotlib.rcParams["ytick.labelsize"]
    needed = np.array([text_inches(words, small) + 9 / 72 for words in beneath])
    # The words left of the marks must end inside the axis, whose scale depends on where it starts.
    starts = (ends * across - needed * 0.05) / (across - needed)
    low = min(-1.0, float(np.nan_to_num(starts, nan=-1.0).min()))
    axes.set_xlim(low, 0.05)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
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
    most = 14 if a == b else 9  # letters
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


def _captions_finding(report: Report) -> str:
    said = there(report.captions)
    ours, theirs = said.lavis["greedy"], said.huggingface["greedy"]
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if equal == len(ours):
        return f"Both models say the same of {'all ' if equal > 1 else ''}{as_count(equal, 'image')} (greedy)"
    return f"The captions part on {len(ours) - equal} of {as_count(len(ours), 'image')} (greedy)"


def alt_text(report: Report, arrays: Arrays) -> str:
    said, ladder = there(report.captions), there(_ladder_to_draw(report))
    ours, theirs = (" ".join(side["greedy"][ladder.image - 1].split()) for side in (said.lavis, said.huggingface))
    words = f"Both say “{ours}”" if ours == theirs else f"LAVIS says “{ours}”, transformers “{theirs}”"
    noise = " The weights are random, so the captions are noise on purpose." if report.random_weights else ""
    return f"{_captions_finding(report)}. {_ladder_finding(ladder)}. {words}.{noise}"


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

"""The worst of many images: what both models saw and said, how far their predictions part, and where the others are."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from blip2nb.display.captions import words_alike
from blip2nb.display.figures.axes import (
    KL_DECADES,
    add_legend,
    add_title,
    draw_markers,
    hatch_where,
    legend_key,
    log_axis,
)
from blip2nb.display.figures.style import (
    FAULT,
    HAIRLINE,
    HALO,
    INK,
    LAVIS,
    MUTED,
    TRANSFORMERS,
    Arrays,
    Picture,
    Report,
    Row,
    styled,
)
from blip2nb.display.figures.words import as_count, as_number, as_token, to_floats, wrap_text
from blip2nb.forms import there
from blip2nb.report.schema import Take, Worst

_IMAGE = "<image>"
_CLOSE = 0.25  # how far apart the image's tokens are drawn: there are many, and they have no names


def available(report: Report, arrays: Arrays) -> bool:
    return bool(report.images) and all(f"images/{name}" in arrays for name in ("worst", "kl", "same"))


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """The worst of the images: the picture, its KL divergence token by token, that of all the others, and its captions.

    Args:
        report: `images`, with `each` take's numbers and the `worst`.
        arrays: `images/worst`, (side, side, 3) uint8; `images/kl` and `images/same`, (takes, positions).
        width: inches.
    """
    wide = width >= 5
    lines = _caption_lines(report, width - 0.2)
    size = matplotlib.rcParams["font.size"] / 72
    below = 1.5 * size * len(lines)
    heights = [1.25, 1.25, below] if wide else [1.6, 1.1, 1.1, below]
    panels: Any = [["image", "tokens"], ["image", "others"], ["words", "words"]]
    if not wide:
        panels = [["image"], ["tokens"], ["others"], ["words"]]
    picture = Picture(width, sum(heights) + (1.3 if wide else 2.1), alt_text(report, arrays))
    axes = picture.subplot_mosaic(panels, height_ratios=heights, width_ratios=[1.0, 1.9] if wide else None)
    add_title(picture, _finding(report))
    axes["image"].imshow(arrays["images/worst"])
    axes["image"].set(xticks=[], yticks=[])
    axes["image"].set_xlabel(wrap_text(_name(report), 0.28 * width if wide else width - 0.3))
    for spine in axes["image"].spines.values():
        spine.set(visible=True, color=HAIRLINE)
    _per_token(axes["tokens"], report, arrays)
    _others(axes["others"], report)
    _write_captions(picture, axes["words"], lines)
    keys: list[tuple[Artist, str]] = [(legend_key("o", INK), "a token, an image"), (legend_key("D", FAULT), _marked())]
    add_legend(picture, keys, width)
    return picture


def _marked() -> str:
    return "the likeliest token differs; the worst image"


def _finding(report: Report) -> str:
    images = there(report.images)
    worst = images.worst
    if len(images.each) == 1:
        return f"{_name(report)}: KL divergence {as_number(_number(report, 'kl'))} nats"
    which = f"Worst of {as_count(images.count, 'image')}: {_name(report)}"
    beside = f" with “{_short(worst.text)}”" if len(images.texts) > 1 else ""
    return f"{which}{beside}, {worst.why} (KL divergence {as_number(_number(report, 'kl'))} nats)"


def _number(report: Report, what: str) -> float:
    images = there(report.images)
    return float(to_floats([getattr(images.each[images.worst.take], what)])[0])


def _name(report: Report) -> str:
    return _short(there(report.images).worst.image)


def _short(text: str) -> str:
    readable = as_token(text, spaces=False)
    return readable if len(readable) <= 30 else f"{readable[:29]}…"


def _worst_rows(report: Report, arrays: Arrays) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The worst take's KL divergence, whether the likeliest token is the same, and the token, position by position."""
    worst = there(report.images).worst
    tokens = worst.tokens
    kl, same = (np.asarray(arrays[f"images/{name}"][worst.take][: len(tokens)], float) for name in ("kl", "same"))
    return np.maximum(kl, 0), same, tokens  # it is a difference, which rounding can leave a hair below zero


_LABELS = 16  # so many tokens' names stand side by side under a narrow panel


def _per_token(axes: Axes, report: Report, arrays: Arrays) -> None:
    kl, same, tokens = _worst_rows(report, arrays)
    image = sum(token == _IMAGE for token in tokens)
    places = np.cumsum([_CLOSE if token == _IMAGE else 1.0 for token in tokens])
    log_axis(axes, "y", KL_DECADES, zero_row=True)
    for where, marker, colour in ((same != 0, "o", INK), (same == 0, "D", FAULT)):
        draw_markers(axes, places, kl, where, marker, colour, 3.2, KL_DECADES, "tokens")
    for number in np.flatnonzero(np.isnan(kl)):
        half = (_CLOSE if tokens[number] == _IMAGE else 1.0) / 2
        axes.axvspan(places[number] - half, places[number] + half, fc="none", ec=MUTED, hatch="////", lw=0)
        axes.patches[-1].set_gid("NaN")
    axes.set_xlim(places[0] - 0.8, places[-1] + 0.8)
    axes.set_ylabel("KL divergence\n(nats)")
    labelled = range(image, len(tokens), -(-(len(tokens) - image) // _LABELS) or 1)
    axes.set_xticks(places[list(labelled)], [_label(tokens[place]) for place in labelled], rotation=90)
    if image:
        axes.axvspan(places[0] - 0.8, places[image - 1] + 0.4, color="#F4F4F4", lw=0, zorder=0)
        axes.text(places[image - 1] / 2, 0.97, "image", transform=axes.get_xaxis_transform(), ha="center", va="top",
                  size="small", color=MUTED, bbox=HALO)  # fmt: skip


def _label(token: str) -> str:
    readable = as_token(token, spaces=False).strip() or as_token(token)
    return readable if len(readable) <= 10 else f"{readable[:9]}…"


def _others(axes: Axes, report: Report) -> None:
    """Every image's mean KL divergence from the smallest on, the worst one marked."""
    images = there(report.images)
    values = np.maximum(to_floats(one.kl for one in images.each), 0)
    order = np.argsort(values, kind="stable")
    worst = np.asarray(order == images.worst.take)
    places = np.arange(len(values))
    log_axis(axes, "y", KL_DECADES, zero_row=True)
    for where, marker, colour in ((~worst, "o", INK), (worst, "D", FAULT)):
        draw_markers(axes, places, values[order], where, marker, colour, 3.2, KL_DECADES, "images")
    hatch_where(axes, np.isnan(values[order]), "NaN")
    axes.set_xlim(-0.8, len(values) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylabel("mean KL\n(nats)")
    axes.set_xlabel("images and texts, by KL divergence" if len(images.texts) > 1 else "images, by KL divergence")


def _caption_lines(report: Report, room: float) -> list[tuple[str, str]]:
    """(text, colour) of each line of the captions."""
    worst = there(report.images).worst
    lines = []
    for side, colour in (("lavis", LAVIS), ("transformers", TRANSFORMERS)):
        name = {"lavis": "LAVIS", "transformers": "transformers"}[side]
        wrapped = wrap_text(f"{name}: {as_token(getattr(worst, side), spaces=False)}", room)
        lines += [(line, colour) for line in wrapped.split("\n")]
    said = "the captions are the same" if worst.lavis == worst.transformers else _parting(worst)
    noise = "; random weights: this caption is noise on purpose" if report.random_weights else ""
    notes = wrap_text(f"greedily, {said}{noise}", room).split("\n")
    return lines + [(line, MUTED) for line in notes]


def _parting(worst: Worst) -> str:
    return f"they part at word {words_alike(worst.lavis.split(), worst.transformers.split()) + 1}"


def _write_captions(picture: Figure, axes: Axes, lines: list[tuple[str, str]]) -> None:
    """From the figure's left edge on, wherever the plots above begin."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(lines), 0))
    page = blended_transform_factory(picture.transFigure, axes.transData)
    left = 0.14 / picture.get_figwidth()
    for row, (line, colour) in enumerate(lines):
        text = axes.text(left, row + 0.5, line, va="center", color=MUTED if colour == MUTED else INK, transform=page)
        text.set_in_layout(False)
        if colour != MUTED:
            mark = Line2D([left / 2], [row + 0.5], ls="", marker="|", mec=colour, mew=2.2, ms=8, transform=page)
            mark.set(clip_on=False, in_layout=False)
            axes.add_artist(mark)


def alt_text(report: Report, arrays: Arrays) -> str:
    images = there(report.images)
    worst = images.worst
    same = "Both caption it alike" if worst.lavis == worst.transformers else "Their greedy captions of it differ"
    kl, largest = (_number(report, what) for what in ("kl", "max_abs"))
    return (
        f"Of {as_count(images.count, 'image')} {worst.image} is the worst: {worst.why}. LAVIS's and "
        f"transformers' predictions are {as_number(kl)} nats apart (mean KL divergence), logits at most "
        f"{as_number(largest)}. {same}."
    )


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each image and text, then one for each token of the worst, whose place is `position`."""
    images = there(report.images)
    rows = [_row(one, None, None, one.kl, one.top1_agreement, one.captions_equal.get("greedy")) for one in images.each]
    worst = images.each[images.worst.take]
    kl, same, tokens = _worst_rows(report, arrays)
    tokens_rows = enumerate(zip(tokens, kl.tolist(), same.tolist(), strict=True))
    return rows + [_row(worst, place, *values, None) for place, values in tokens_rows]


def _row(take: Take, position: int | None, token: str | None, kl: Any, same: Any, caption: Any) -> dict[str, Any]:
    names = ("image", "text", "position", "token", "kl", "top1_agreement", "caption_equal")
    values = (take.image, take.text, position, token, kl, same, caption)
    return dict(zip(names, values, strict=True))

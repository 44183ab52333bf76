"""F7, the logits: how far apart they are, and whether a token can flip."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from blip2nb.display.figures.axes import (
    KL_DECADES,
    LOGIT_DECADES,
    add_legend,
    add_title,
    draw_markers,
    hatch_where,
    legend_key,
    log_axis,
    ring_key,
)
from blip2nb.display.figures.style import FAULT, INK, LAVIS, MUTED, TRANSFORMERS, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_number, as_percent, as_token, to_floats
from blip2nb.forms import there

_ARRAYS = ("kl", "max_abs", "margin", "top_lavis", "top_huggingface")


def available(report: Report, arrays: Arrays) -> bool:
    return bool(report.logits) and all(f"logits/{name}" in arrays for name in _ARRAYS)


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F7: how far the logits are apart at each position, the last position's top tokens, and whether a token can flip.

    A difference can swap the first two tokens only where it is more than half the margin between them.

    Args:
        report: `logits`, and the texts `top_tokens` of the last position's ten likeliest tokens.
        arrays: `logits/kl`, `logits/max_abs` and `logits/margin`, each (positions,); `logits/top_lavis` and
            `logits/top_huggingface`, (positions, 50).
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.9 if wide else 7.4, alt_text(report, arrays))
    panels: Any = [["kl", "tokens", "risk"], ["difference", "tokens", "risk"]]
    if not wide:
        panels, ratios = [["kl"], ["difference"], ["tokens"], ["risk"]], [1.0, 1.0, 1.7, 1.9]
    axes = picture.subplot_mosaic(panels, height_ratios=None if wide else ratios)
    flips = _flips(arrays)
    add_title(picture, _logits_finding(report, flips))
    _per_position(axes["kl"], arrays["logits/kl"], KL_DECADES, "KL divergence\n(nats)")
    _per_position(axes["difference"], arrays["logits/max_abs"], LOGIT_DECADES, "largest difference\n(logits)")
    axes["difference"].set_xlabel("position in the sequence")
    axes["kl"].sharex(axes["difference"])
    axes["kl"].tick_params(labelbottom=False)
    _top_tokens(axes["tokens"], report, arrays)
    _flip_risk(axes["risk"], arrays, flips)
    keys: list[tuple[Artist, str]] = [(legend_key("o", LAVIS), "LAVIS"), (ring_key("s", TRANSFORMERS), "transformers")]
    keys += [
        (legend_key("o", INK), "a position"),
        (Patch(color=FAULT, alpha=0.12), "difference > margin ÷ 2: can flip"),
    ]
    add_legend(picture, keys, width)
    return picture


def _flips(arrays: Arrays) -> np.ndarray:
    """Positions at which the difference is large enough to swap the first two tokens.

    At worst the first token falls by the difference and the second rises by it: they meet at half their margin.
    """
    return np.asarray(arrays["logits/max_abs"]) > np.asarray(arrays["logits/margin"]) / 2


def _logits_finding(report: Report, flips: np.ndarray) -> str:
    values = there(report.logits)
    relative, agreement = to_floats([values.relative, values.top1_agreement])
    if relative == 0:
        return f"Logits bit-equal at all {len(flips)} positions"
    risk = "none can flip" if not flips.any() else f"{int(flips.sum())} of {len(flips)} can flip"
    return f"Logits differ by {as_number(relative)} (relative), top tokens are {as_percent(agreement)} equal, {risk}"


def _per_position(axes: Axes, values: np.ndarray, decades: tuple[float, float], label: str) -> None:
    log_axis(axes, "y", decades, zero_row=True)
    axes.set_ylabel(label)
    # KL is computed as a difference, so that rounding can leave it a hair below zero: as good as none.
    clean = np.maximum(np.asarray(values, dtype=float), 0)
    places = np.arange(len(clean))
    size = max(1.8, min(4.0, 120 / max(len(clean), 1)))
    draw_markers(axes, places, clean, np.ones(len(clean), bool), "o", INK, size, decades, "positions")
    hatch_where(axes, np.isnan(clean), "NaN")
    axes.set_xlim(-0.8, len(clean) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


_TOP = 10  # of the 50 that the arrays have: a row of the panel for each
_LETTERS = 14  # of a token, before it is cut: a URL leaves no room for the plot


def _top_tokens(axes: Axes, report: Report, arrays: Arrays) -> None:
    readable = [as_token(text) for text in report.top_tokens[:_TOP]]
    texts = [text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…" for text in readable]
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
    apart = f"at most {as_number(gap)} apart" if gap else "bit-equal"
    axes.set_xlabel(f"logit, last position\n({apart})")


def _flip_risk(axes: Axes, arrays: Arrays, flips: np.ndarray) -> None:
    margin = np.asarray(arrays["logits/margin"], dtype=float)
    difference = np.asarray(arrays["logits/max_abs"], dtype=float)
    across = (-6, 2)  # a margin is some units; at a logit of 10 two neighbouring float32 are 1e-6 apart
    log_axis(axes, "y", LOGIT_DECADES, zero_row=True)
    log_axis(axes, "x", across)
    edge = np.array([10.0 ** (across[0] - 1), 10.0 ** (across[1] + 1)])
    axes.fill_between(edge, edge / 2, 10.0 ** (LOGIT_DECADES[1] + 1), color=FAULT, alpha=0.12, linewidth=0)
    axes.plot(edge, edge / 2, color=FAULT, lw=0.9, label="margin ÷ 2")
    x = np.clip(margin, 10.0 ** across[0], 10.0 ** across[1])
    size = 3.5
    draw_markers(axes, x, difference, ~flips, "o", INK, size, LOGIT_DECADES, "positions")
    draw_markers(axes, x, difference, flips, "D", FAULT, size * 1.2, LOGIT_DECADES, "could flip")
    axes.set_xlabel("margin of first to\nsecond token (logits)")
    axes.set_ylabel("largest difference (logits)")


def alt_text(report: Report, arrays: Arrays) -> str:
    values = there(report.logits)
    largest, relative, kl, agreement = to_floats(
        getattr(values, k) for k in ("max_abs", "relative", "kl", "top1_agreement")
    )
    return (
        f"Logits of LAVIS and transformers differ by at most {as_number(largest)} ({as_number(relative)} relative, "
        f"KL divergence {as_number(kl)}); the top token is the same at {as_percent(agreement)} of positions."
    )


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each position."""
    columns = {name: np.asarray(arrays[f"logits/{name}"]).tolist() for name in ("kl", "max_abs", "margin")}
    return [
        {"position": place, "kl": kl, "max_abs": largest, "margin": margin}
        for place, (kl, largest, margin) in enumerate(zip(*columns.values(), strict=True))
    ]

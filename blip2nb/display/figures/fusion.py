"""F11, the fusion: one bias out of two, and why its middle third shows nowhere."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from blip2nb.display.figures.axes import ERROR_DECADES, add_title, draw_markers, log_axis, on_axis
from blip2nb.display.figures.style import FAULT, HAIRLINE, INK, ROUNDING, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_number, to_floats
from blip2nb.forms import there
from blip2nb.report.schema import Fusion

_THIRDS = ("#009E73", "#8C8C8C", "#CC79A7")  # query, key, value: neither model's colour, nor a fault's


def available(report: Report, arrays: Arrays) -> bool:
    return bool(report.fusion) and all(f"fusion/{name}" in arrays for name in ("query", "value", "fused"))


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F11: LAVIS's two biases become one, and why its middle third may be anything but is zero.

    Args:
        report: `fusion`: the block, and how much a random bias of key or of query changes its output (relative).
        arrays: `fusion/query` and `fusion/value`, (width,); `fusion/fused`, (3 * width,).
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.1 if wide else 5.0, alt_text(report, arrays))
    panels: Any = [["two", "effect"], ["one", "effect"]] if wide else [["two"], ["one"], ["effect"]]
    axes = picture.subplot_mosaic(panels, width_ratios=[1.75, 1] if wide else None,
                                  height_ratios=None if wide else [1, 1, 1.1])  # fmt: skip
    add_title(picture, _fusion_finding(there(report.fusion)))
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
    _bias_effects(axes["effect"], there(report.fusion))
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
    zeros = "zeros" if not key.any() else f"not zero: {as_number(np.abs(key).max())}"
    for axes, place, word in ((two, 0, "query"), (two, 1, "no key bias"), (two, 2, "value"), (one, 1, zeros)):
        colour = FAULT if word.startswith("not") else INK
        y = 0.97 if axes is two and place != 1 else 0.72
        axes.text((place + 0.5) / 3, y, word, transform=axes.transAxes, ha="center", va="top", size=small, color=colour)
    same = np.array_equal(fused, np.concatenate([query, np.zeros_like(query), value]))
    exact = "bit-equal: query, zeros, value" if same else "NOT query, zeros, value"
    one.set_xlabel(f"channel ({exact})", color=INK if same else FAULT)


def _fusion_finding(values: Fusion) -> str:
    key, query = to_floats([values.key_bias_effect, values.query_bias_effect])
    if key <= _ROUNDING_EFFECT:
        change = "nothing" if key == 0 else f"{as_number(key)}, rounding alone"
        return f"A random key bias changes the output by {change}; a random query bias by {as_number(query)}"
    return f"A random key bias changes the output by {as_number(key)}: that should be rounding alone"


_ROUNDING_EFFECT = 1e-5
"""A block's own rounding in float32 is about 2e-7, and a large bias costs a digit more; one that counts changes
tenths."""


def _bias_effects(axes: Axes, values: Fusion) -> None:
    sizes = to_floats([values.query_bias_effect, values.key_bias_effect])
    log_axis(axes, "x", ERROR_DECADES, zero_row=True)
    shown = on_axis(sizes, ERROR_DECADES)
    axes.axvspan(10.0 ** ERROR_DECADES[0], _ROUNDING_EFFECT, color=ROUNDING, linewidth=0)
    axes.text(10.0**-6.5, 0.98, "rounding", transform=axes.get_xaxis_transform(), ha="center", va="top", size="small")
    for y, (size, x, colour) in enumerate(zip(sizes, shown, (_THIRDS[0], _THIRDS[1]), strict=True)):
        axes.hlines(y, 10.0 ** ERROR_DECADES[0], x, color=HAIRLINE, lw=0.8)
        draw_markers(axes, np.array([float(y)]), np.array([size]), np.ones(1, bool), "o", colour, 7, ERROR_DECADES,
                 ("query", "key")[y], flip=True)  # fmt: skip
        if not math.isnan(x):
            axes.annotate(as_number(size), (x, y), (0, -8), textcoords="offset points", ha="center", va="top")
    axes.set_yticks([0, 1], ["query", "key"])
    axes.set_ylim(1.7, -0.7)
    axes.set_title("a random bias on …", loc="left")
    axes.set_xlabel(f"relative change of the\noutput of block {values.block}")


def alt_text(report: Report, arrays: Arrays) -> str:
    return f"LAVIS's query and value bias become one, with zeros for the key. {_fusion_finding(there(report.fusion))}."


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each channel of the fused bias."""
    query, value, fused = (np.asarray(arrays[f"fusion/{name}"], dtype=float) for name in ("query", "value", "fused"))
    parts = np.concatenate([query, np.zeros_like(query), value])
    return [
        {"channel": place, "lavis": ours, "transformers": theirs}
        for place, (ours, theirs) in enumerate(zip(parts.tolist(), fused.tolist(), strict=True))
    ]

"""One position of the examined stage, channel by channel: both models' values, and what is between them."""

from __future__ import annotations

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from blip2nb.display.figures.axes import add_legend, add_title, hatch_where
from blip2nb.display.figures.style import INK, LAVIS, MUTED, TRANSFORMERS, Arrays, Picture, Report, styled
from blip2nb.display.figures.words import as_number
from blip2nb.forms import there


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0, position: int = 0) -> Picture:
    """Values and differences at one position of the examined stage's output.

    Args:
        report: `examined`.
        arrays: `examined/lavis` and `examined/transformers`, (positions, channels).
        width: inches.
        position: which row.
    """
    ours, theirs = (np.asarray(arrays[f"examined/{side}"][position], float) for side in ("lavis", "transformers"))
    difference = theirs - ours
    stage, finding = there(report.examined).stage, _finding(difference)
    picture = Picture(width, 3.8, f"{stage}, position {position}: {finding}.")
    values, below = picture.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    add_title(picture, f"{stage}, position {position}: {finding}")
    channels = np.arange(len(ours))
    size = 3.0 if len(ours) <= 200 else 0.0
    # As with rings around discs: LAVIS's line is wide and below, so that both show where they agree.
    values.plot(channels, ours, color=LAVIS, lw=2.2, alpha=0.7, marker="o", ms=size, label="LAVIS")
    values.plot(channels, theirs, color=TRANSFORMERS, lw=1.0, ls="--", marker="s", ms=size, mfc="none",
                label="transformers")  # fmt: skip
    values.set_ylabel("value")
    below.axhline(0, color=MUTED, lw=0.6)
    below.vlines(channels, 0, difference, color=INK, lw=max(0.4, min(2.0, 130 / len(ours))))
    reach = 1.1 * np.nanmax(np.abs(difference), initial=0.0)
    below.set_ylim(-(reach or 1.0), reach or 1.0)
    if not reach:
        below.set_yticks([0], ["bit-equal"])
    below.set_ylabel("transformers\n− LAVIS")
    below.set_xlabel("channel")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    for axes in (values, below):
        hatch_where(axes, np.isnan(difference), "")
    keys = [
        Line2D([], [], color=LAVIS, lw=2.2, alpha=0.7, marker="o", ms=3.5),
        Line2D([], [], color=TRANSFORMERS, lw=1.0, ls="--", marker="s", ms=3.5, mfc="none"),
    ]
    add_legend(picture, list(zip(keys, ("LAVIS", "transformers"), strict=True)), width)
    return picture


def _finding(difference: np.ndarray) -> str:
    lost = int(np.isnan(difference).sum())
    if lost:
        return f"{lost} of {len(difference)} channels are not a number"
    if not difference.any():
        return "bit-equal in every channel"
    most = int(np.abs(difference).argmax())
    return f"the channels differ by at most {as_number(abs(difference[most]))}, at channel {most}"

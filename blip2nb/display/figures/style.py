"""How every figure looks: colours, sizes, and a figure that shows itself in Jupyter as it would be saved."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from blip2nb.report.schema import Content

Report = Content
Arrays = Mapping[str, np.ndarray]
Row = dict[str, object]
"""Of a figure's data: column -> a number or a text."""

DPI = 200
"""Of the figures' PNG, in a file and in a notebook: two pixels for each of a screen's, and a little more."""

LAVIS, TRANSFORMERS, FAULT = "#0072B2", "#E69F00", "#D55E00"
INK, MUTED, ROUNDING, HAIRLINE = "#222222", "#666666", "#D9D9D9", "#BBBBBB"


class Picture(Figure):
    """A figure that pyplot does not know, drawn in the kit's style whatever the notebook's, shown by Jupyter as PNG.

    pyplot's own figures are shown by its inline backend, at the end of the cell as well as where they are returned; a
    plain Figure is not shown at all before that backend is set up. Ticks take their style when they are first drawn,
    which is why drawing happens in the style too.
    """

    def __init__(self, width: float, height: float, alt: str, layout: str | None = "constrained") -> None:
        super().__init__(figsize=(width, height), layout=layout)  # type: ignore[arg-type]
        self.alt = alt
        self._kept = b""

    def draw(self, renderer: Any) -> None:
        self._kept = b""
        with style(self.get_figwidth()):
            super().draw(renderer)

    def keep(self, png: bytes) -> None:
        """Show this PNG of the figure instead of drawing it, until somebody changes or draws the figure."""
        self._kept, self.stale = png, False  # matplotlib sets `stale` on every change

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        png = b"" if self.stale else self._kept
        if not png:
            buffer = io.BytesIO()
            rasterise(self, DPI).save(buffer, "PNG")
            png = buffer.getvalue()
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        return png, {"width": width, "height": height, "alt": self.alt}


Draw = Callable[..., Picture]


def rasterise(picture: Figure, dpi: int) -> Image.Image:
    """The picture as RGB. matplotlib's own way to a PNG draws it twice, the first time for the layout alone."""
    before = picture.dpi
    picture.set_dpi(dpi)
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    image = Image.frombytes("RGB", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBX")
    picture.set_dpi(before)
    return image


def style(width: float) -> contextlib.AbstractContextManager[None]:
    """matplotlib's defaults and the kit's sizes, for as long as the context is open."""
    size = 9.0 if width >= 5 else 7.0  # figures are made for 7.0 and 3.4 inches: what is near 7 is wide, in all of them
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


def styled(draw: Draw) -> Draw:
    """Runs a figure's function in the style."""

    @functools.wraps(draw)
    def styled(report: Report, arrays: Arrays, width: float = 7.0, **options: Any) -> Picture:
        with style(width):
            return draw(report, arrays, width, **options)

    return styled


HALO = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}

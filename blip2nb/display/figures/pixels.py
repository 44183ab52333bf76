"""F8, the pixels: what each image processor makes of the image."""

from __future__ import annotations

import itertools
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap

from blip2nb.display.figures.axes import add_title
from blip2nb.display.figures.cells import cell_steps, largest_by_cell
from blip2nb.display.figures.style import HAIRLINE, Arrays, Picture, Report, Row, styled
from blip2nb.display.figures.words import as_number, as_percent
from blip2nb.forms import there


def available(report: Report, arrays: Arrays) -> bool:
    return bool(report.pixel_values) and all(f"pixels/{name}" in arrays for name in ("image", "pil", "default"))


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Picture:
    """F8: what the image looks like to each processor, as LAVIS's grey levels minus the processor's.

    Args:
        report: `pixel_values`, with `default` for the processor that transformers chooses by itself.
        arrays: `pixels/image`, (height, width, 3) uint8; `pixels/pil` and `pixels/default`, (3, height, width) grey
            levels from −255 to 255.
        width: inches.
    """
    wide = width >= 5
    picture = Picture(width, 3.3 if wide else 2.6, alt_text(report, arrays))
    axes: dict[str, Axes] = picture.subplot_mosaic([["image", "pil", "default"]], width_ratios=[0.7, 1, 1])
    add_title(picture, _pixels_finding(arrays))
    axes["image"].imshow(arrays["pixels/image"])
    shown = {name: np.asarray(arrays[f"pixels/{name}"], dtype=float) for name in ("pil", "default")}
    reach = max(1, int(max(np.abs(values).max(initial=0) for values in shown.values())))
    colours, norm, ticks = _grey_levels(reach)
    for name in shown:
        cells = largest_by_cell(shown[name], cell_steps(shown[name].shape, _CELLS))
        axes[name].imshow(cells, cmap=colours, norm=norm, interpolation="nearest")
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


_CELLS = (112, 112)  # one is two pixels of 224 each way, and about two dots of a narrow picture's PNG


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


def _pixels_finding(arrays: Arrays) -> str:
    pil, default = (_share(arrays[f"pixels/{name}"]) for name in ("pil", "default"))
    ours = f"differs in {as_percent(pil)} of values" if pil else "sees LAVIS's pixels exactly"
    theirs = f"the default one differs in {as_percent(default)}" if default else "the default one sees them exactly"
    return f"The PIL processor {ours}; {theirs}"


def _share(values: np.ndarray) -> float:
    return float(np.mean(np.asarray(values) != 0))


def _pixel_words(values: np.ndarray) -> str:
    if not values.any():
        return "bit-equal"
    levels = int(np.abs(values).max())
    return f"{as_percent(_share(values))} differ,\nat most by {levels}"


def alt_text(report: Report, arrays: Arrays) -> str:
    values = there(report.pixel_values)
    ours = "are bit-equal" if values.equal else "differ"
    default = values.default
    words = f"Pixel values of LAVIS and the PIL processor {ours} (at most {as_number(values.max_abs)} apart)."
    return (
        f"{words} The default processor differs in {as_percent(default.share)} of them, by up to "
        f"{as_number(default.max_abs)}."
    )


def table(report: Report, arrays: Arrays) -> list[Row]:
    """A row for each processor and size of difference: how many values are that many grey levels apart."""
    rows = []
    for name in ("pil", "default"):
        levels, counts = np.unique(np.asarray(arrays[f"pixels/{name}"], dtype=int), return_counts=True)
        rows += [
            {"processor": name, "grey_levels": level, "values": count}
            for level, count in zip(levels.tolist(), counts.tolist(), strict=True)
        ]
    return rows

"""The report's stages as columns over depth, and the marks that every figure over depth has in common."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from blip2nb.display.figures.style import HAIRLINE, MUTED, Report
from blip2nb.display.figures.words import text_inches, to_floats


@dataclasses.dataclass(frozen=True)
class Depth:
    """The report's stages as columns; what a stage has no number for is NaN."""

    names: list[str]
    junction: np.ndarray
    arrival_error: np.ndarray
    drift: np.ndarray
    local_error: np.ndarray
    rounding: np.ndarray
    excess: np.ndarray
    wrong: np.ndarray  # above the threshold, or named as the first divergence
    broken: np.ndarray  # an error that should be a number is not

    @classmethod
    def of(cls, report: Report) -> Depth:
        stages = report.stages
        first = report.first_stage
        keys = ("arrival_error", "drift", "local_error", "rounding", "excess")
        columns = {key: to_floats(getattr(stage, key) for stage in stages) for key in keys}
        junction = np.array([bool(stage.junction) for stage in stages], dtype=bool)
        own = np.where(junction, columns["arrival_error"], columns["local_error"])
        return cls(
            names=[stage.name for stage in stages],
            junction=junction,
            wrong=(columns["excess"] > report.threshold) | np.array([s.name == first for s in stages], bool),
            broken=np.isnan(own) | np.isnan(columns["drift"]),
            **columns,
        )

    @property
    def unjudged(self) -> np.ndarray:
        """Stages with an error but no number for what it is worth. Bit-equal ones need none."""
        return np.asarray(~self.junction & np.isnan(self.excess) & (self.local_error != 0))

    @property
    def places(self) -> np.ndarray:
        return np.arange(len(self.names))

    def parts(self) -> list[tuple[str, int, int]]:
        """(name, first place, one past the last) of each stretch of stages that belong together."""
        return parts_of(self.names)


def parts_of(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """(name, first place, one past the last) of each stretch of stages that belong together, by their names."""
    split = any(name.startswith("language.decoder") for name in names)
    labels, language = [], "language encoder" if split else "language"
    for name in names:
        head = name.split(".")[0]
        if name.startswith("language.decoder"):
            language = "language decoder"
        labels.append(_PARTS.get(head, head) if _PARTS.get(head) != "language" else language)
    found, start = [], 0
    for label, group in itertools.groupby(labels):
        end = start + len(list(group))
        found.append((label, start, end))
        start = end
    return found


_PARTS = {"pixels": "vision", "qformer": "Q-Former", "language": "language", "logits": "language"}


def part_lines(axes: Axes, depth: Depth) -> None:
    for _, start, _ in depth.parts()[1:]:
        axes.axvline(start - 0.5, color=HAIRLINE, lw=0.6, zorder=0.5)


def block_ticks(axes: Axes, depth: Depth, width: float) -> None:
    """A tick every fourth block, which is near enough to count from; as many of them numbered as have room."""
    blocks = {place: int(name.rsplit(".", 1)[1]) for place, name in enumerate(depth.names)
              if re.search(r"\.\d+$", name)}  # fmt: skip
    pitch = (width - 0.9) / max(len(depth.names), 1)
    room = 1.5 * text_inches("00", "small")
    every = next(step for step in (4, 8, 16, 32, 64) if step * pitch > room or step == 64)
    ticks = [place for place, number in blocks.items() if number % 4 == 0]
    axes.set_xticks(ticks, [str(blocks[p]) if blocks[p] % every == 0 else "" for p in ticks])
    if ticks:
        axes.annotate("block", (0, 0), (-4, -6), xycoords="axes fraction", textcoords="offset points", ha="right",
                      va="top", size=matplotlib.rcParams["xtick.labelsize"], color=MUTED)  # fmt: skip


def part_strip(axes: Axes, depth: Depth, width: float) -> None:
    """The parts of the network as a strip: their names in it, or under it where they do not fit."""
    axes.set_ylim(0, 1)
    axes.tick_params(left=False, labelleft=False, bottom=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    pitch = (width - 0.9) / max(len(depth.names), 1)
    ends: list[float] = []  # how far each row of names under the strip reaches
    for number, (name, start, stop) in enumerate(depth.parts()):
        axes.axvspan(start - 0.5, stop - 0.5, facecolor=("#E4E4E4", "#CFCFCF")[number % 2], linewidth=0)
        if text_inches(name, "small") > 0.94 * pitch * (stop - start):
            name = name.split(" ")[-1]
        middle, needed = (start + stop - 1) / 2, text_inches(name, "small") / pitch
        if needed * 1.06 < stop - start:
            axes.text(middle, 0.46, name, ha="center", va="center", size="small")
            continue
        row = next((r for r, end in enumerate(ends) if end < middle - needed / 2), len(ends))
        ends[row : row + 1] = [middle + needed * 0.55]
        axes.text(middle, -0.25 - 0.95 * row, name, ha="center", va="top", size="small")


def marker_size(depth: Depth) -> float:
    scale = 1.0 if matplotlib.rcParams["font.size"] > 8 else 0.75
    return scale * min(5.0, max(2.6, 130 / max(len(depth.names), 1)))

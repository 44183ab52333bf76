"""The one stage that a report looks at closely: both models' values there, and what is said of them in a title."""

from __future__ import annotations

import dataclasses

import numpy as np

from blip2nb.display.figures.style import Arrays, Report
from blip2nb.display.figures.words import as_percent
from blip2nb.forms import there


@dataclasses.dataclass(frozen=True)
class Examined:
    """Values of the examined stage, (positions, channels) float64; of the channels every `step`-th is there."""

    stage: str
    fault: bool  # else nothing in the report diverges, and this is the stage nearest to it
    values: np.ndarray  # LAVIS's
    residual: np.ndarray  # transformers − LAVIS
    step: int
    channels: int
    heads: int | None

    @classmethod
    def of(cls, report: Report, arrays: Arrays) -> Examined:
        about = there(report.examined)
        ours, theirs = (np.asarray(arrays[f"examined/{side}"], dtype=float) for side in ("lavis", "transformers"))
        with np.errstate(invalid="ignore"):  # infinity − infinity is NaN, and drawn as such
            residual = theirs - ours
        heads = about.heads
        return cls(
            stage=about.stage,
            fault=bool(report.first_divergence),
            values=ours,
            residual=residual,
            step=about.channel_step,
            channels=about.channels,
            heads=heads if heads and heads > 1 and about.channels % heads == 0 else None,
        )

    @property
    def numbers(self) -> np.ndarray:
        """Where both models have a number: True, (positions, channels)."""
        return np.isfinite(self.values) & np.isfinite(self.residual)

    def finding(self, words: str) -> str:
        """The words as a title: where, whether it is a fault, and how much of it is not a number."""
        if not self.residual.size or not self.numbers.any():
            return f"Not a number at {self.stage}: no difference can be shown"
        if not self.residual.any():
            return f"Bit-equal at {self.stage}: there is no difference"
        lost = 1 - self.numbers.mean()
        words = f"{'Fault' if self.fault else 'Only rounding'} at {self.stage}: {words}"
        return f"{words}; {as_percent(lost)} of the values are not a number" if lost else words


def has_examined(report: Report, arrays: Arrays) -> bool:
    return bool(report.examined) and all(f"examined/{side}" in arrays for side in ("lavis", "transformers"))

"""How far a stage's error ÷ its own rounding moved: from as shipped to fixed, or from one run to another."""

from __future__ import annotations

import dataclasses
import math

from blip2nb.display.figures.words import as_times

SMALLEST_MOVE = 0.1
"""A stage has moved when its error ÷ its own rounding changed by more than this share of what it was.

Between two machines rounding moves it by a few percent. A tenth is clear of that, and far below what a cause does:
float16 in place of float32 is hundreds of times.
"""


@dataclasses.dataclass(frozen=True)
class Move:
    """A stage's error ÷ its own rounding in both runs: NaN for no number, 0 for bit-equal and without a rounding."""

    stage: str
    before: float
    after: float

    @property
    def size(self) -> float:
        """In decades. To or from zero or NaN is more than any of them."""
        if not (self.before > 0 and self.after > 0):
            return math.inf
        return abs(math.log10(self.before) - math.log10(self.after))

    def __str__(self) -> str:
        return " → ".join(as_times(value) if value else "bit-equal" for value in (self.before, self.after))

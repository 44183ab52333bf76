"""Whether a place is computed in lower precision than the rest: told from the exact computation."""

from __future__ import annotations

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.metrics import CEILING, FEW, THRESHOLD

COARSEST = 2.0**-4
"""No precision that models run in rounds more than this: sixteen roundings to bfloat16."""

LIKE = {"bfloat16": 2.0**-10, "float16": 2.0**-14}
"""Below what a single rounding to each costs on average, 2⁻⁹ and 2⁻¹²: the coarsest first."""


def causes_of_precision(look: Look, scene: Scene) -> list[Cause]:
    """Where the exact computation agrees with the reference and the module's own does not."""
    if not look.expected.is_floating_point() or look.exact.shape != look.expected.shape:
        return []
    theirs = computing.off(look.exact, look.expected)
    worse = max(THRESHOLD * theirs, FEW) < look.rounding
    # in the referee's run too, as autocast does
    cast = look.rounding > CEILING and theirs < THRESHOLD * look.rounding
    if not scene.suspect.strict or not (worse or cast) or look.rounding > COARSEST:
        return []
    like = next((name for name, least in LIKE.items() if look.rounding > least), "less than float32")
    words = f"it is computed in lower precision than float32: its rounding is {look.rounding:.1e}, as of {like}"
    if not worse:
        return [Cause("precision", words, look.module, "float32 rounds no module that much")]
    test = CounterTest("computed in float64", (look.local_error, theirs), (look.excess, 1.0), True)
    return [Cause("precision", words, look.module, "in float64 it agrees with the reference", test)]

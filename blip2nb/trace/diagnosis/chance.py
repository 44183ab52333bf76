"""Whether a stage gives another output each time: dropout that was left on."""

from __future__ import annotations

import math

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.repairs import still
from blip2nb.trace.inside import Suspect
from blip2nb.trace.paths import join
from blip2nb.trace.repeats import REPEATS, repeated


def by_chance(suspect: Suspect) -> Finding | None:
    """A fault where a stage does not compute the same thing twice."""
    first = suspect.output()
    if not first.isfinite().all():
        return None
    second = next((one for one in (suspect.output() for _ in range(REPEATS)) if not repeated(first, one)), first)
    if second is first:
        return None
    looks, again = suspect.looks(), {one.key: one.found for one in suspect.looks()}
    differ = [one for one in looks if one.key not in again or not repeated(one.found, again[one.key])]
    at = differ[0] if differ else looks[-1]
    live = [(name, one) for name, one in suspect.module.named_modules() if one.training]
    drops = [name for name, one in live if isinstance(one, torch.nn.Dropout) and one.p > 0]
    module = join(suspect.path, drops[0]) if len(drops) == 1 and len(live) == 1 else at.module
    with still(suspect.module):
        calm = repeated(suspect.output(), suspect.output())
        after = next((one for one in suspect.looks() if one.key == at.key), at)
    rounding = (at.local_error, after.local_error), (math.inf, after.excess)
    test = CounterTest("with every module in eval mode", *rounding, calm and after.sound)
    named = f"{len(live)} of its modules are in training mode" if live else "no module is in training mode"
    size = computing.off(second, first)
    words = f"it gives another output each time; {named}"
    cause = Cause("dropout", words, module, f"two runs differ by {size:.1e}", test)
    return Finding(suspect.name, module, at.part, None, at.local_error, at.rounding, math.inf, tuple(looks), (cause,))

"""One call of a stage, judged: run again in float64, in the least exact order of adding up, and simply once more."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from blip2nb.trace.inside import parameters_of
from blip2nb.trace.metrics import CEILING, FEW, THRESHOLD, distance, exceeds, judged, unit
from blip2nb.trace.precision import HALF, Weights, in_float64, one_by_one, only_sums
from blip2nb.trace.repeats import REPEATS, repeated
from blip2nb.trace.tape import first_tensor

NOT_COMPARABLE: dict[str, Any] = {
    "local_error": math.inf, "rounding": math.nan, "excess": math.inf, "bit_equal": False,
}  # fmt: skip
"""What is said of a stage that was never called, or whose output has another shape than the reference's."""

COARSE = {torch.float64: 1e-10, torch.float32: CEILING, torch.float16: 0.1, torch.bfloat16: 0.3}
"""A rounding error above this is looked at twice: is it rounding at all? In float32 `CEILING`; in bfloat16 and float16
about twice the most that unbroken stages have, 0.11 and 0.06 (`python -m benchmarks.false_alarms`, arrival errors); in
float64 a million roundings. Chosen, since a second look takes `REPEATS` runs and changes nothing where they agree."""


@dataclasses.dataclass(frozen=True, eq=False)
class StageCall:
    """One call of a stage's module on the reference's inputs, which can be made again beside the pass it belongs to.

    Attributes:
        path, module: of the stage, in the candidate.
        args, kwargs: what the module is called with.
        fed: argument -> the recorded value, as it was before it was cast to what the model runs in.
        weights: of a candidate in half precision, its parameters from before the cast, by name.
        aside: opens a run beside the pass: stages inside this one are fed the reference's inputs, nothing is measured.
    """

    path: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    fed: Mapping[str, torch.Tensor]
    weights: Weights | None
    aside: Callable[[], contextlib.AbstractContextManager[None]]

    @property
    def unit(self) -> float:
        """What the excess is measured in."""
        half = [one.dtype for one in self.module.parameters() if one.dtype in HALF]
        return unit(half[0] if half else torch.float32, self.weights is not None)

    def exactly(self) -> torch.Tensor:
        """The module's output on the same inputs, computed in float64; with the weights and inputs from before the cast
        where it runs in half precision and they are known."""
        weights = self.weights
        if weights is None:
            with self.aside():
                return in_float64(self.module, self.args, self.kwargs)
        names, given, named = list(parameters_of(self.module)), list(self.args), dict(self.kwargs)
        for name, value in self.fed.items():
            if name in names[: len(given)]:
                given[names.index(name)] = value
            else:
                named[name] = value
        with self.aside():
            return in_float64(self.module, tuple(given), named, lambda name: weights(f"{self.path}.{name}"))

    def least(self, exact: torch.Tensor) -> float:
        """How near any correct computation must come to the exact one, where the candidate's own rounding does not say
        it: a stage without weights is a function, of which libraries are allowed a few roundings; where a stage only
        adds up products, the order of adding decides, and the least exact one is tried."""
        if not list(self.module.parameters()):
            return FEW / THRESHOLD
        if not only_sums(self.module):
            return 0.0
        with self.aside(), one_by_one():
            return distance(first_tensor(self.module(*self.args, **self.kwargs)), exact)

    def repeats(self, found: torch.Tensor) -> bool:
        """Whether it gives the same each time."""
        with self.aside():
            again = (first_tensor(self.module(*self.args, **self.kwargs)) for _ in range(REPEATS))
            return all(repeated(found, one) for one in again)


def judge_call(called: StageCall, found: torch.Tensor, expected: torch.Tensor, strict: bool) -> dict[str, Any]:
    """What is said of a call's output: see `metrics.judge`. The excess of what is another each time is infinite.

    Args:
        strict: whether the candidate runs in the reference's precision.
    """
    if found.shape == expected.shape:
        result = judged(found, expected, called.exactly, called.unit, strict, called.least)
    else:
        result = NOT_COMPARABLE
    return {**result, "excess": math.inf} if _by_chance(called, found, result) else result


def _by_chance(called: StageCall, found: torch.Tensor, result: Mapping[str, Any]) -> bool:
    """Whether a stage whose rounding is far too large gives something else the second time. Dropout would else pass
    for rounding: its float64 is as far from it as the reference is."""
    coarse = exceeds(result["rounding"], COARSE[found.dtype]) or exceeds(result["excess"], THRESHOLD)
    if result["bit_equal"] or not (coarse or result["excess"] is None):
        return False
    return bool(found.isfinite().all()) and not called.repeats(found)

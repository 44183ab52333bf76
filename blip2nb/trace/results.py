"""What was measured of two models, stage by stage, and how it is shown."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping

import torch

from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE, THRESHOLD, exceeds


def faulty(arrival_error: float | None, excess: float | None, threshold: float = THRESHOLD) -> bool:
    """Whether more than rounding happens at a stage or on the way to it."""
    return exceeds(arrival_error, ARRIVAL_TOLERANCE) or exceeds(excess, threshold)


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What was measured at one stage. All errors are relative to the norm of the reference's value.

    Attributes:
        arrival_error: the largest distance of its inputs, as they arrived, to the reference's; of whole numbers and
            masks, the share that differs. None for a stage without recorded inputs. In half precision, what a cast
            alone can do counts as 0.
        drift: distance of its output in an undisturbed run.
        local_error: distance of its output when fed the reference's inputs. None at a junction.
        rounding: distance of the candidate's output to the same stage in float64, on those inputs.
        excess: the reference's distance to float64 over the candidate's. 1 where both are bit-equal, infinite where
            the candidate is exact and the reference differs. None where the float64 run failed and the outputs are
            neither equal nor so far apart that no rounding explains it: then the stage is not judged.
        refereed: whether the float64 run came to its end.
        referee_error: what ended it, on one line; "" where nothing did.
    """

    name: str
    module: str
    junction: bool
    arrival_error: float | None
    drift: float | None
    local_error: float | None = None
    rounding: float | None = None
    excess: float | None = None
    bit_equal: bool | None = None
    refereed: bool = True
    referee_error: str = ""

    @property
    def judged(self) -> bool:
        """Whether it is known that only rounding happens here, or that more does."""
        return self.refereed or self.excess is not None

    def faulty(self, threshold: float = THRESHOLD) -> bool:
        """Whether more than rounding happens here or on the way here. NaN is a fault."""
        return faulty(self.arrival_error, self.excess, threshold) or self.local_error == math.inf


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All stages of one pair of models on one input.

    Attributes:
        outputs: the candidate's undisturbed output per stage.
        local_outputs: its output per stage when fed the reference's inputs.
        token_errors: stage -> local error per position, for outputs of shape (batch, positions, channels).
        findings: for each fault the module it is in and its likely causes, in the order of the network.
        stopped: what the candidate raised, "" where it ran to its end.
    """

    stages: tuple[StageResult, ...]
    outputs: Mapping[str, torch.Tensor]
    local_outputs: Mapping[str, torch.Tensor]
    token_errors: Mapping[str, torch.Tensor]
    threshold: float = THRESHOLD
    findings: tuple[Finding, ...] = ()
    stopped: str = ""

    @property
    def faults(self) -> list[StageResult]:
        """The stages where an error arises, in the order of the network."""
        return [stage for stage in self.stages if stage.faulty(self.threshold)]

    @property
    def unjudged(self) -> list[StageResult]:
        """The stages that could not be judged, since their float64 run failed."""
        return [stage for stage in self.stages if not stage.judged]

    @property
    def first_divergence(self) -> StageResult | None:
        return next(iter(self.faults), None)

    def __getitem__(self, name: str) -> StageResult:
        return next(stage for stage in self.stages if stage.name == name)

    def _repr_html_(self) -> str:
        words = ("stage", "arrival error", "error alone", "÷ its own rounding", "drift", "")
        head = "".join(f"<th>{word}</th>" for word in words)
        rows = "".join(
            f"<tr><td align='left'>{html.escape(stage.name)}</td>"
            + "".join(
                f"<td>{'–' if value is None else format(value, '.2g')}</td>"
                for value in (stage.arrival_error, stage.local_error, stage.excess, stage.drift)
            )
            + f"<td align='left'>{self._word(stage)}</td></tr>"
            for stage in self.stages
        )
        found = "".join(f"<li>{html.escape(str(finding))}</li>" for finding in self.findings)
        return f"<p>{html.escape(repr(self))}</p><ul>{found}</ul><table><tr>{head}</tr>{rows}</table>"

    def _word(self, stage: StageResult) -> str:
        if stage.faulty(self.threshold):
            return "<b>wrong</b>"
        return "" if stage.judged else f"not judged: its float64 run failed ({html.escape(stage.referee_error)})"

    def __repr__(self) -> str:
        first, count = self.first_divergence, len(self.unjudged)
        rest = f", {count} not judged" if count else ""
        if first is None:
            return f"Comparison({len(self.stages)} stages, no error above rounding{rest})"
        return f"Comparison({len(self.stages)} stages, first wrong at {first.name}, {len(self.faults)} in all{rest})"

    def __str__(self) -> str:
        unjudged = (f"{one.name}: not judged, its float64 run failed ({one.referee_error})" for one in self.unjudged)
        return "\n".join([repr(self), *(f"  {line}" for line in (*self.findings, *unjudged))])

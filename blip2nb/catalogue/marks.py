"""Which answers to a planted fault are right, and where it has to be found at the latest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from blip2nb.catalogue.cases import Placed
from blip2nb.catalogue.planting import Target
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE, distance, exceeds
from blip2nb.trace.results import Comparison

VISIBLE = 3.0
"""A stage shows a fault where its output moves by more than this times its own rounding.

A fault of f roundings gives an excess of √(1 + f²) where both sides round alike, 3.16 for 3. They need not: the
roundings themselves give at least 0.64 of that (see `blip2nb.trace.metrics.THRESHOLD`), so that only from 4.6 roundings
on it is above the threshold of 3 for certain. What lies between and is missed counts as missed.
"""


def shows(stage: str, before: Comparison, after: Comparison) -> bool:
    """Whether a stage shows what was done to a model: by what it gives, or by what arrives there.

    Args:
        before, after: every stage fed LAVIS's values, without the fault and with it.
    """
    if after.stopped or exceeds(after[stage].arrival_error, ARRIVAL_TOLERANCE):
        return True
    rounding = before[stage].rounding
    if rounding is None:  # a place between stages computes nothing, and one that was not refereed has no measure
        return False
    found = after.local_outputs.get(stage)
    moved = math.inf if found is None else distance(found, before.local_outputs[stage])
    return exceeds(moved, VISIBLE * rounding)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a right answer says of one fault.

    Attributes:
        stages: where it arises; to find it at any of these is no mistake.
        must: those of them where it shows, so that it has to be found at the first at the latest; none where it cannot
            be seen. A wrong weight is there to be found whether or not it shows.
        target: its place.
        causes: what it may be called.
    """

    stages: tuple[str, ...]
    must: tuple[str, ...]
    target: Target
    causes: frozenset[str]


def expected_of(placed: Placed, shown: Sequence[str]) -> Expected:
    """What a right answer says of a fault at its place.

    Args:
        shown: the stages that show it.
    """
    fault, stages = placed.fault, placed.stages
    must = tuple(stage for stage in stages if stage in shown)
    if fault.kind == "files" and len(placed.target.names) > 1:
        must = stages
    elif fault.kind == "files":  # a table that serves two stages: a row of it may be used at one of them
        must = must or stages
    return Expected(stages, must, placed.target, fault.also | {fault.cause})


@dataclasses.dataclass(frozen=True)
class Marks:
    """Which questions were answered right, of one fault or of all that were planted together.

    Attributes:
        detected: something is found at one of its stages.
        stage: at the first where it must be, or before, and nothing that is right is blamed earlier.
        module: what is named there is a module at fault, the one that holds it, or, where all of it is, one in it.
        first, three: the cause named first there, or one of the first three, is right; three are a glance, by choice.
        extra: stages that are blamed and have no fault.
    """

    detected: bool
    stage: bool
    module: bool
    first: bool
    three: bool
    extra: int = 0

    @property
    def right(self) -> bool:
        """Whether all of it is."""
        return self.detected and self.stage and self.module and self.first and not self.extra


def judge(expected: Sequence[Expected], findings: Sequence[Finding], order: Sequence[str]) -> Marks:
    """Mark what was said of one fault, or of several at once: then all must be right.

    Args:
        order: the names of all stages.
    """
    each = [_mark(one, findings) for one in expected]
    at_fault = {stage for one in expected for stage in one.stages}
    blamed = [stage for stage in order if any(finding.stage == stage for finding in findings)]
    return Marks(
        detected=all(one.detected for one in each),
        stage=all(one.stage for one in each) and at_fault.issuperset(blamed[:1]),
        module=all(one.module for one in each),
        first=all(one.first for one in each),
        three=all(one.three for one in each),
        extra=len(set(blamed) - at_fault),
    )


def _mark(one: Expected, findings: Sequence[Finding]) -> Marks:
    finding = said_of(one, findings)
    if finding is None:
        return Marks(False, False, False, False, False)
    ids = [cause.id for cause in finding.causes]
    in_time = one.stages.index(finding.stage) <= one.stages.index(one.must[0])
    first, three = (not one.causes.isdisjoint(ids[:count]) for count in (1, 3))
    return Marks(True, in_time, one.target.names_module(finding.module), first, three)


def said_of(one: Expected, findings: Sequence[Finding]) -> Finding | None:
    """What is found at the first of a fault's stages where something is."""
    return next((each for stage in one.stages for each in findings if each.stage == stage), None)

"""What was measured, as the rows of the report."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blip2nb.families.captioners.stages import KnownDifference
from blip2nb.report import schema
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.known import AttributeDifference
from blip2nb.trace.metrics import compare_logits
from blip2nb.trace.results import Comparison, StageResult
from blip2nb.trace.stage import Stage


def fault(finding: Finding) -> schema.Fault:
    """A finding without its tensors."""
    return schema.Fault(
        stage=finding.stage,
        module=finding.module,
        part=finding.part,
        arrival_error=finding.arrival_error,
        local_error=finding.local_error,
        rounding=finding.rounding,
        excess=finding.excess,
        causes=tuple(map(_cause, finding.causes)),
        inside=tuple(
            schema.Place(look.module, look.part, look.at, look.local_error, look.rounding, look.excess, look.faulty)
            for look in finding.looks
        ),
    )


def _cause(cause: Cause) -> schema.Cause:
    test = cause.counter_test
    tried = None if test is None else schema.CounterTest(test.change, test.local_error, test.excess, test.passed)
    return schema.Cause(cause.id, cause.words, cause.module, cause.evidence, tried)


def stage(result: StageResult, reference: str = "", fixed: StageResult | None = None) -> schema.Stage:
    """One stage.

    Args:
        reference: its place in LAVIS.
        fixed: the same stage with the known differences put right.
    """
    return schema.Stage(
        name=result.name,
        module=result.module,
        junction=result.junction,
        arrival_error=result.arrival_error,
        drift=result.drift,
        local_error=result.local_error,
        rounding=result.rounding,
        excess=result.excess,
        bit_equal=result.bit_equal,
        refereed=result.refereed,
        referee_error=result.referee_error,
        reference=reference,
        fixed=None if fixed is None else _again(fixed),
    )


def _again(result: StageResult) -> schema.Again:
    return schema.Again(
        result.arrival_error,
        result.drift,
        result.local_error,
        result.rounding,
        result.excess,
        result.refereed,
        result.referee_error,
    )


def stages(table: list[Stage], shipped: Comparison, fixed: Comparison | None) -> tuple[schema.Stage, ...]:
    """All stages, as the model is and with the known differences put right; none of a model that was not run."""
    after = fixed.stages if fixed is not None else [None] * len(table)
    rows = zip(table, shipped.stages, after, strict=True) if shipped.stages else ()
    return tuple(stage(result, place.reference, again) for place, result, again in rows)


def known_difference(
    known: KnownDifference, found: AttributeDifference, shipped: Comparison, fixed: Comparison
) -> schema.KnownDifference:
    """A known difference, with what became of its stage when it was put right."""
    before, after = shipped[known.stage], fixed[known.stage]
    accounted = after.judged and not after.faulty(fixed.threshold)
    return schema.KnownDifference(
        id=known.id,
        stage=known.stage,
        module=found.module,
        attribute=found.attribute,
        lavis=found.reference,
        transformers=found.candidate,
        words=known.words,
        why=known.why,
        fix=known.fix,
        explains=tuple(one.name for one in shipped.faults if one.name == known.stage and accounted),
        counter_test=schema.Effect((before.local_error, after.local_error), (before.excess, after.excess)),
    )


def agreement(found: torch.Tensor, expected: torch.Tensor) -> schema.Agreement:
    """How far the logits are apart."""
    return schema.Agreement(**compare_logits(found, expected))


def of_comparison(found: Comparison, summary: str = "") -> schema.Content:
    """A comparison of any two models, for the figures over depth: `plots.FIGURES["depth_trace"](of_comparison(found),
    {})`."""
    first = found.first_divergence
    return schema.Content(
        threshold=found.threshold,
        stages=tuple(map(stage, found.stages)),
        faults=tuple(map(fault, found.findings)),
        first_divergence=None if first is None else _first(first, found.findings),
        summary=summary,
    )


def _first(result: StageResult, findings: Sequence[Finding]) -> schema.FirstDivergence:
    at = next((one for one in findings if one.stage == result.name), None)
    cause = str(at.causes[0]) if at is not None and at.causes else ""
    module, part = (at.module, at.part) if at is not None else (result.module, "")
    errors = (result.arrival_error, result.local_error, result.excess)
    return schema.FirstDivergence(result.name, module, part, *errors, cause)

"""The second proof: the model on what LAVIS was shown, as it ships and with the known differences put right."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.recording import recording
from blip2nb.families.captioners.stages import KNOWN_DIFFERENCES, KnownDifference, module_pairs, stages
from blip2nb.proof import symptoms
from blip2nb.proof.knowledge import before_the_cast, knowledge, knowledge_of_cast
from blip2nb.proof.subject import Subject
from blip2nb.trace.calling import TableError
from blip2nb.trace.causes import Cause
from blip2nb.trace.comparison import compare, compare_in_passing
from blip2nb.trace.diagnosis.findings import Finding, ranked
from blip2nb.trace.diagnosis.known import AttributeDifference, attribute_differences
from blip2nb.trace.diagnosis.repairs import repaired, still
from blip2nb.trace.results import Comparison
from blip2nb.trace.stage import Stage
from blip2nb.trace.tape import Tape
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Behaviour:
    """What running the model showed.

    Attributes:
        shipped: the model as it is.
        fixed: with the known differences of today's transformers put right; None where there are none.
        known, unknown: attributes in which the modules differ, those that are known of transformers and those not.
        findings: the faults that are left then.
    """

    table: list[Stage]
    shipped: Comparison
    fixed: Comparison | None
    known: list[tuple[KnownDifference, AttributeDifference]]
    unknown: list[AttributeDifference]
    findings: list[Finding]


def run(subject: Subject, loaded: huggingface.Loaded, inputs: Mapping[str, Any], say: Progress) -> Behaviour:
    """Compare a loaded model with the recording.

    Args:
        inputs: what to call it with.
        say: called with each stage's name.
    """
    tape, model = subject.recording, subject.variant
    table = [_that_exist(stage, loaded.model) for stage in stages(model)]
    known, unknown = _differences(tape, loaded.model, model)
    whole = loaded.model.dtype == torch.float32
    before = None if whole else before_the_cast(subject)
    of_lavis = knowledge(subject, unknown) if whole else knowledge_of_cast(before, unknown)
    training = loaded.model.training  # as a whole: a part of it that is, is for the comparison to find
    with still(loaded.model) if training else contextlib.nullcontext():
        try:
            with repaired(loaded.model, [difference for _, difference in known]):
                found = compare(tape, loaded.model, table, inputs, known=of_lavis, weights=before, progress=say)
        except TableError as error:
            return Behaviour(table, _STOPPED, None, known, unknown, [_of_another_build(error)])
        shipped = _as_shipped(found, loaded, table, tape, inputs, known) if known and not found.stopped else found
    findings = _of_inputs(list(found.findings), loaded, model, tape, inputs)
    if training:
        words = "the whole model is in training mode: call .eval() on it"
        cause = Cause("dropout", words, "", "read off the model", None)
        findings.insert(0, Finding(table[0].name, "", "model", None, None, None, None, (), (cause,)))
    return Behaviour(table, shipped, found if known else None, known, unknown, findings)


_STOPPED = Comparison((), {}, {}, {}, stopped="the model is not built as the table of stages says")


def _of_another_build(error: TableError) -> Finding:
    """A model that lacks a module, or calls it otherwise, goes wrong there."""
    cause = Cause("unknown", str(error).rstrip("."), error.module, "the model is built otherwise")
    return Finding(error.stage, error.module, "stage", None, math.inf, None, math.inf, (), (cause,))


def _that_exist(stage: Stage, model: torch.nn.Module) -> Stage:
    """A stage without the modules that a model does not have, such as one that was wrapped."""
    names = {name for name, _ in model.named_modules()}
    there = {a: b for a, b in stage.modules.items() if not b or f"{stage.module}.{b}" in names}
    return stage if len(there) == len(stage.modules) else dataclasses.replace(stage, modules=there)


def _differences(
    tape: Tape, candidate: torch.nn.Module, model: Variant
) -> tuple[list[tuple[KnownDifference, AttributeDifference]], list[AttributeDifference]]:
    """What differs in the modules' own attributes: what is known of today's transformers, and what is not."""
    pairs = [(pair.stage, pair.reference, pair.candidate) for pair in module_pairs(model)]
    known, unknown = [], []
    for difference in attribute_differences(recording(tape)["attributes"], candidate, pairs):
        match = [one for one in KNOWN_DIFFERENCES if one.explains(difference)]
        if match:
            known.append((match[0], difference))
        else:
            unknown.append(difference)
    return known, unknown


def _as_shipped(
    fixed: Comparison,
    loaded: huggingface.Loaded,
    table: Sequence[Stage],
    tape: Tape,
    inputs: Mapping[str, Any],
    known: Sequence[tuple[KnownDifference, AttributeDifference]],
) -> Comparison:
    """The model without the fixes, in one pass. Where a stage is fed LAVIS's inputs only the stages that hold a fix are
    others; what passes through the whole model is measured again."""
    touched = {one.stage for one, _ in known}
    again = compare_in_passing(tape, loaded.model, table, inputs, touched)
    results = []
    for before, after in zip(again.stages, fixed.stages, strict=True):
        measured = before if before.name in touched else after
        # what arrives there was not fed LAVIS's values on the way this time
        results.append(dataclasses.replace(measured, drift=before.drift, arrival_error=after.arrival_error))
    return Comparison(
        tuple(results),
        again.outputs,
        {**fixed.local_outputs, **again.local_outputs},
        {**fixed.token_errors, **again.token_errors},
    )


def _of_inputs(
    found: list[Finding], loaded: huggingface.Loaded, model: Variant, tape: Tape, inputs: Mapping[str, Any]
) -> list[Finding]:
    """What arrives wrong because the pixels or the tokens are, with that as its cause, once."""
    out: list[Finding] = []
    tokens = symptoms.token_causes(loaded, model, inputs, tape)
    for finding in found:
        if finding.stage == "pixels":
            pixels = symptoms.pixel_causes(loaded, model, tape_images(tape)[0], inputs["pixel_values"], tape)
            finding = dataclasses.replace(finding, causes=tuple(ranked([*pixels, *finding.causes])))
        if tokens and finding.stage in ("language.inputs_embeds", "language.attention_mask"):
            told = tuple(ranked([*tokens, *finding.causes]))
            finding = dataclasses.replace(finding, causes=told, module=symptoms.TOKENS, part="input")
            if any(one.stage == "language.inputs_embeds" for one in out):
                continue  # the mask is as long as the text
        out.append(finding)
    return out


def tape_images(tape: Tape) -> list[Image]:
    """The images LAVIS was shown, from the tape."""
    from PIL import Image as PIL

    names = sorted(
        (name for name in tape.names() if name.startswith("image.")), key=lambda name: int(name.split(".")[1])
    )
    return [PIL.open(io.BytesIO(tape[name].numpy().tobytes())).convert("RGB") for name in names]

"""Both proofs of a converted directory, and the report of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.recording import recording
from blip2nb.forms import settled
from blip2nb.proof import behaviour, captions, evidence, rows, takes
from blip2nb.proof.behaviour import Behaviour, Progress, tape_images
from blip2nb.proof.findings import in_order, not_whole, of_weights
from blip2nb.proof.provenance import reference, state, versions
from blip2nb.proof.subject import Subject
from blip2nb.proof.verdict import cause_words, judge, not_judged, not_proven
from blip2nb.proof.weights import prove_weights
from blip2nb.report import schema
from blip2nb.report.schema import Content, Missing
from blip2nb.report.store import ReportData
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.repairs import repaired
from blip2nb.trace.metrics import THRESHOLD

NO_RECORDING = Missing(
    "no_lavis", "behaviour", "Behaviour was not compared with LAVIS's: there is no recording of it for this model."
)
_DOES_NOT_LOAD = Missing("does_not_load", "behaviour", "The model does not load, so it was not run.")


def verify(
    subject: Subject,
    completion: str = "",
    progress: Progress | None = None,
    dtype: str = "",
    missing: Missing = NO_RECORDING,
) -> ReportData:
    """Prove a converted directory.

    Args:
        subject: the directory, with LAVIS's recording of the same weights; without one only the weights are proven.
        completion: the command that completes the proof, for a report in which something is missing.
        progress: called with a word at each step.
        dtype: what to run it in, "float32", "bfloat16" or "float16"; float32 unless the weights were cast.
        missing: why there is no recording, if there is none.

    Raises:
        RequestError: the directory is not one of ours, or does not load.
    """
    started = time.time()
    say = progress or (lambda word: None)
    tape, manifest = subject.tape, subject.manifest
    say("weights")
    weights = prove_weights(subject)
    content = Content(
        model_name=subject.variant.name,
        random_weights=subject.variant.twin,
        computed_in=dtype or (manifest.dtype if subject.lossy else "float32"),
        proof="weights" if tape is None else "both",
        weights=weights,
        versions={"converted with": manifest.versions, "checked with": versions()},
        provenance=manifest.provenance(state(subject.folder), None if tape is None else reference(tape)),
        threshold=THRESHOLD,
    )
    arrays: dict[str, np.ndarray] = {}
    lacks = [missing] if tape is None else []
    if tape is None:
        pass
    elif broken := not_whole(subject, weights):
        content = dataclasses.replace(content, proof="weights", faults=tuple(map(rows.fault, broken)))
        lacks = [_DOES_NOT_LOAD]
    else:
        content, arrays = _prove_behaviour(subject, content, weights, say)
    incomplete = (*not_proven(content), *lacks, *not_judged(content))
    content = dataclasses.replace(content, incomplete=incomplete, complete_with=completion if incomplete else "")
    content = judge(content)
    return ReportData(settled(dataclasses.replace(content, seconds=round(time.time() - started, 2))), arrays)


def _prove_behaviour(
    subject: Subject, content: Content, weights: schema.Weights, say: Progress
) -> tuple[Content, dict[str, np.ndarray]]:
    """The report with the second proof in it, and its arrays."""
    tape, model = subject.recording, subject.variant
    say("loading")
    loaded = huggingface.load(subject.folder, content.computed_in)
    images = tape_images(tape)
    inputs = huggingface.forward_inputs(loaded, model, images[0], recording(tape)["texts"])
    pixels, arrays = evidence.pixels(subject.folder, tape, inputs["pixel_values"], images[0])
    say("stages")
    seen = behaviour.run(subject, loaded, inputs, say)
    faults = in_order([*seen.findings, *of_weights(subject, weights, seen.findings)], seen.table)
    stages = rows.stages(seen.table, seen.shipped, seen.fixed)
    known = [rows.known_difference(*one, seen.shipped, seen.fixed) for one in seen.known if seen.fixed]
    content = dataclasses.replace(
        content,
        pixel_values=pixels,
        stages=stages,
        known_differences=tuple(known),
        attribute_differences=tuple(map(str, seen.unknown)),
        faults=tuple(map(rows.fault, faults)),
        versions={**content.versions, "reference": recording(tape)["versions"]},
    )
    if seen.shipped.stopped:  # it has no logits and says nothing
        return dataclasses.replace(content, first_divergence=_first_divergence(faults, content)), arrays
    differences = [difference for _, difference in seen.known]
    measured = takes.measure(loaded, model, tape, seen.table, differences, (seen.shipped, seen.fixed), say)
    say("captions")
    said = captions.compare(loaded, tape, images, takes.errors(measured, tape))
    if seen.known:
        with repaired(loaded.model, differences):
            errors = takes.errors(measured, tape, fixed=True)
            equal = said.equal or captions.compare(loaded, tape, images, errors).equal
        said = dataclasses.replace(said, equal_when_fixed=equal)
    known += captions.beam_search(tape, said)
    content = dataclasses.replace(content, captions=said, known_differences=tuple(known))
    content = dataclasses.replace(content, first_divergence=_first_divergence(faults, content))
    if "takes" in recording(tape):
        of_takes, of_images = takes.summary(loaded, model, tape, measured, said)
        content, arrays = dataclasses.replace(content, images=of_takes), arrays | of_images
    content, gathered = _with_evidence(subject, loaded, inputs, seen, content)
    return content, arrays | gathered


def _with_evidence(
    subject: Subject, loaded: huggingface.Loaded, inputs: Mapping[str, Any], seen: Behaviour, content: Content
) -> tuple[Content, dict[str, np.ndarray]]:
    """The report with the logits, and what the figures need."""
    tape, model = subject.recording, subject.variant
    outputs = {name: one.float() if one.is_floating_point() else one for name, one in seen.shipped.outputs.items()}
    expected = tape[seen.table[-1].reference]
    fixed = None if seen.fixed is None else rows.agreement(seen.fixed.outputs["logits"], expected)
    as_shipped = rows.agreement(outputs["logits"], expected)
    examined, arrays = evidence.examined(seen.shipped, seen.table, tape, model, content.first_divergence)
    said = evidence.logits(outputs["logits"], expected)
    likeliest = said["logits/top_ids"][-1, :10].tolist() if said else []  # ten: what the figure has room for, by eye
    arrays |= said | evidence.token_errors(seen.shipped) | evidence.activations(seen.table, outputs, tape)
    fusion = None
    if content.computed_in == "float32":
        fusion, biases = evidence.fusion(loaded.model, tape)
        arrays |= biases
    content = dataclasses.replace(
        content,
        logits=schema.Logits(**dataclasses.asdict(as_shipped), fixed=fixed),
        sequences=evidence.sequences(loaded, model, tape, inputs),
        examined=examined,
        top_tokens=tuple(loaded.processor.tokenizer.decode([token]) for token in likeliest),
        fusion=fusion,
    )
    return content, arrays


def _first_divergence(faults: Sequence[Finding], content: Content) -> schema.FirstDivergence | None:
    """The first fault that nothing known explains; else the first known difference that shows."""
    if faults:
        first = faults[0]
        cause = str(first.causes[0]) if first.causes else ""
        errors = (first.arrival_error, first.local_error, first.excess)
        return schema.FirstDivergence(first.stage, first.module, first.part, *errors, cause)
    known = next((one for one in content.known_differences if one.explains and one.stage != "captions"), None)
    if known is None:
        return None
    stage = next(one for one in content.stages if one.name == known.stage)
    errors = (stage.arrival_error, stage.local_error, stage.excess)
    return schema.FirstDivergence(known.stage, stage.module, "norm", *errors, cause_words(known))

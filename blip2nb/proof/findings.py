"""The faults of a directory that both proofs find, with their modules and causes, in the order of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.recording import recording
from blip2nb.families.captioners.stages import module_pairs, stages
from blip2nb.proof import behaviour
from blip2nb.proof.knowledge import knowledge
from blip2nb.proof.subject import Subject
from blip2nb.proof.weights import parameter_names, prove_weights
from blip2nb.report import schema
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.stands_there import weight_cause
from blip2nb.trace.stage import Stage
from blip2nb.trace.weights import kind_of
from blip2nb.variants import Variant
from blip2nb.weights.convert import file_hash


def findings(
    subject: Subject,
    *,
    loaded: huggingface.Loaded | None = None,
    inputs: Mapping[str, Any] | None = None,
    progress: behaviour.Progress | None = None,
) -> list[Finding]:
    """Every fault of a converted directory that both proofs find, with its module and likely causes, and nothing else:
    no captions, no figures. The known differences of today's transformers are put right beforehand.

    Args:
        subject: with a recording.
        loaded: a model that was changed after loading, to be looked at instead of the directory's.
        inputs: what to call it with instead of what LAVIS was shown.
    """
    weights = prove_weights(subject)
    if loaded is None and (broken := not_whole(subject, weights)):
        return broken
    loaded = huggingface.load(subject.folder) if loaded is None else loaded
    if inputs is None:
        tape = subject.recording
        image = behaviour.tape_images(tape)[0]
        inputs = huggingface.forward_inputs(loaded, subject.variant, image, recording(tape)["texts"])
    seen = behaviour.run(subject, loaded, inputs, progress or (lambda word: None))
    return in_order([*seen.findings, *of_weights(subject, weights, seen.findings)], seen.table)


def of_weights(subject: Subject, weights: schema.Weights, found: Sequence[Finding]) -> list[Finding]:
    """The faults that no activation shows, such as a key bias.

    Args:
        found: those that were seen in activations.
    """
    told = {finding.module for finding in found}
    told |= {cause.module.rpartition(".")[0] for finding in found for cause in finding.causes}
    layers = [finding.module for finding in found if finding.part == "layer"]
    of_lavis, saved = knowledge(subject), subject.saved
    at = _stages_by_module(subject.variant)
    out: dict[str, Finding] = {}
    different = [*weights.modules_different, *weights.roundtrip_differences]
    for name in parameter_names(different, saved, subject.variant):
        tensor, module = saved[name].tensor(), name.rpartition(".")[0]
        if module in told or any(name.startswith(f"{layer}.") for layer in layers) or of_lavis.same(name, tensor):
            continue
        cause = weight_cause(name, tensor, of_lavis)
        told_at = (_stage_of(module, at), module or name, kind_of(name))
        first = out.setdefault(module, Finding(*told_at, None, None, None, None))
        out[module] = dataclasses.replace(first, causes=(*first.causes, cause))
    return list(out.values())


def not_whole(subject: Subject, weights: schema.Weights) -> list[Finding]:
    """What keeps a directory from loading: one finding for each module that lacks a tensor or has another's shape."""
    written = subject.manifest.configuration.get("config.json")
    changed = written is not None and file_hash(subject.folder / "config.json") != written
    hint = "config.json is not as it was written" if changed else "compared by name and shape"
    at = _stages_by_module(subject.variant)
    words = {"missing": "is not there", "unexpected": "has no place in the model", "misshapen": "has another shape"}
    out: dict[str, Finding] = {}
    for what, said in words.items():
        for name in getattr(weights, what):
            module = name.rpartition(".")[0]
            id = (
                "weight_changed"
                if what == "misshapen"
                else "bias_missing"
                if name.endswith("bias")
                else "weight_missing"
            )
            causes = [Cause(id, f"{name} {said}", name, "compared by name and shape")]
            if changed:
                causes.insert(0, Cause("attribute", f"{name} {said}: {hint}", name, hint))
            told_at = (_stage_of(module, at), module or name, kind_of(name))
            first = Finding(*told_at, None, None, None, None, (), tuple(causes))
            out.setdefault(module, first)
    return in_order(out.values(), stages(subject.variant))


def _stages_by_module(model: Variant) -> dict[str, str]:
    """Which stage each of transformers' modules belongs to; the query tokens have none of their own."""
    at = {pair.candidate: pair.stage for pair in module_pairs(model)}
    return at | {"vision_model.embeddings": "vision.embeddings", "": "qformer.embeddings"}


def _stage_of(module: str, at: Mapping[str, str]) -> str:
    """The stage whose modules hold one, or are nearest to it."""
    near = [path for path in at if path and module.startswith(f"{path}.")]
    if module in at or not near:
        return next((stage for path, stage in at.items() if path == module or path.startswith(f"{module}.")), "")
    return at[max(near, key=len)]


def in_order(found: Iterable[Finding], table: Sequence[Stage]) -> list[Finding]:
    """Findings in the order of the network; what belongs to no stage comes last."""
    places = {stage.name: number for number, stage in enumerate(table)}
    return sorted(found, key=lambda finding: places.get(finding.stage, len(places)))

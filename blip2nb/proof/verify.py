"""The two proofs of a converted directory: its weights, by hash and round trip, and its behaviour, against a tape."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blip2nb.conversion.hub import CARD
from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.mapping import entries
from blip2nb.families.captioners.stages import KNOWN_DIFFERENCES, KnownDifference, module_pairs, parameter_pairs, stages
from blip2nb.proof import evidence, symptoms, takes
from blip2nb.proof.knowledge import at_hand, before_the_cast, knowledge, knowledge_of_cast, made_again
from blip2nb.report.manifest import Manifest
from blip2nb.report.store import FORMAT, Missing, ReportData
from blip2nb.trace.calling import TableError
from blip2nb.trace.causes import Cause
from blip2nb.trace.comparison import compare, compare_in_passing
from blip2nb.trace.diagnosis.findings import Finding, ranked
from blip2nb.trace.diagnosis.known import AttributeDifference, Known, attribute_differences
from blip2nb.trace.diagnosis.repairs import repaired, still
from blip2nb.trace.diagnosis.stands_there import weight_cause
from blip2nb.trace.metrics import compare_logits
from blip2nb.trace.results import Comparison, faulty
from blip2nb.trace.weights import kind_of
from blip2nb.variants import Variant
from blip2nb.weights import hashing, stored
from blip2nb.weights.convert import LOSSY, file_hash, inverse_of
from blip2nb.weights.rules import MappingError
from blip2nb.weights.sources import open_folder, shapes

if TYPE_CHECKING:
    from PIL.Image import Image

    from blip2nb.conversion.files import Opened
    from blip2nb.trace.stage import Stage
    from blip2nb.trace.tape import Tape

Progress = Callable[[str], None]

CAPTION_MODES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 5, "length_penalty": 0.0},
    "default": {"num_beams": 5, "length_penalty": 1.0},
}
"""What is captioned, in transformers' words; the same modes as in the recording. Old and new transformers divide a
beam's score by different lengths, so only the first two must agree."""


NO_RECORDING = Missing(
    "no_lavis", "behaviour", "Behaviour was not compared with LAVIS's: there is no recording of it for this model."
)


def verify(
    folder: Path,
    tape: Tape | None,
    completion: str = "",
    progress: Progress | None = None,
    source: Callable[[], Opened | None] = lambda: None,
    dtype: str = "",
    missing: Missing = NO_RECORDING,
) -> ReportData:
    """Prove a converted directory.

    Args:
        folder: the converted directory.
        tape: LAVIS's recording of the same weights; without one only the weights are proven.
        completion: the command that completes the proof, for a report in which something is missing.
        progress: called with a word at each step.
        source: opens what it was converted from, or gives None; asked when a weight is wrong, for the right one.
        dtype: what to run it in, "float32", "bfloat16" or "float16"; float32 unless the weights were cast.
        missing: why there is no recording, if there is none.

    Raises:
        RequestError: the directory is not one of ours, or does not load.
    """
    started = time.time()
    source = functools.cache(source)
    say = progress or (lambda word: None)
    manifest = Manifest.read(folder)
    model = manifest.model_variant
    say("weights")
    content: dict[str, Any] = {
        "format": FORMAT,
        "model_name": model.name,
        "random_weights": model.twin,
        "computed_in": dtype or (manifest.dtype if manifest.dtype in LOSSY else "float32"),
        "proof": "weights" if tape is None else "both",
        "weights": prove_weights(folder, manifest, model, tape, source),
        "pixel_values": None,
        "logits": None,
        "stages": [],
        "known_differences": [],
        "faults": [],
        "first_divergence": None,
        "captions": None,
        "images": None,
        "versions": {"converted with": dict(manifest.versions), "checked with": versions()},
        "provenance": _provenance(folder, manifest, tape),
    }
    arrays: dict[str, np.ndarray] = {}
    lacks = [missing] if tape is None else []
    if tape is None:
        pass
    elif broken := _not_whole(folder, manifest, model, content["weights"]):
        content["proof"] = "weights"
        content["faults"] = [finding.report() for finding in broken]
        lacks = [Missing("does_not_load", "behaviour", "The model does not load, so it was not run.")]
    else:
        content["versions"]["reference"] = tape.metadata["versions"]
        _prove_behaviour(folder, model, tape, source, content, arrays, say)
    content["incomplete"] = [dataclasses.asdict(one) for one in [*_not_proven(content), *lacks, *_not_judged(content)]]
    if content["incomplete"]:
        content["complete_with"] = completion
    content |= _verdict(content)
    content["seconds"] = round(time.time() - started, 2)
    return ReportData(content, arrays)


# -- the first proof


def prove_weights(
    folder: Path,
    manifest: Manifest,
    model: Variant,
    tape: Tape | None,
    source: Callable[[], Opened | None] = lambda: None,
) -> dict[str, Any]:
    """Without running anything: every tensor accounted for, the way back bit for bit, the modules equal by hash; of
    tensors that were cast, equal to the source's cast, where that is at hand."""
    saved = open_folder(folder)
    held = shapes(saved)
    expected = _parameters_of(folder)
    tied = {entry.target for entry in entries(model) if entry.kind == "Tied"}
    expected = {name: shape for name, shape in expected.items() if name not in tied}
    roundtrip, differences = _round_trip(folder, manifest, model)
    lossy = manifest.dtype in LOSSY  # LAVIS's hashes are of the tensors before the cast
    equal, different, checked = _casts(folder, saved, source) if lossy else _modules(saved, model, tape)
    return {
        "written": len(held),
        "missing": sorted(name for name in expected if name not in held),
        "unexpected": sorted(name for name in held if name not in expected),
        "misshapen": sorted(name for name in held if name in expected and held[name] != expected[name]),
        "dropped": dict(manifest.dropped),
        "tied": dict(manifest.tied),
        "unused": dict(manifest.unused),
        "no_way_back": dict(manifest.no_way_back),
        "origins": dict(manifest.origins),
        "unproven": _compared_with_nothing(saved, manifest, model, tape, equal, source),
        "roundtrip": roundtrip,
        "roundtrip_differences": differences,
        "modules_equal": equal,
        "modules_different": different,
        "modules_checked": checked,
        "weights_hash": manifest.weights_hash,
        "dtype": manifest.dtype,
        "bytes_by_kind": {name: dict(kinds) for name, kinds in manifest.bytes_by_kind.items()},
        "names": evidence.names(manifest),
    }


def _parameters_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in transformers' own state dict for this configuration."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    try:
        config = Blip2Config.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers checks fields with errors of its own
        if memory_ran_out(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(f"{folder / 'config.json'} is damaged ({first}). Convert again with overwrite.") from error
    try:
        with torch.device("meta"):
            state = Blip2ForConditionalGeneration(config).state_dict()
    except Exception as error:  # whatever its parts think of what they are given
        if memory_ran_out(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(
            f"{folder / 'config.json'} describes no model that transformers builds ({type(error).__name__}: {first}). "
            "Convert again with overwrite."
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _round_trip(folder: Path, manifest: Manifest, model: Variant) -> tuple[bool | None, list[str]]:
    """Whether the inverse rules give back every tensor that was read, bit for bit. None after a lossy cast."""
    if manifest.dtype in LOSSY:
        return None, []
    saved = open_folder(folder)  # what is missing is reported as that
    whole = [entry for entry in entries(model) if not entry.optional and entry.target in saved]
    seen, differences = set(), []
    for entry in whole:
        if entry.sources[0] in manifest.no_way_back:
            continue
        try:
            for name, tensor in inverse_of(entry, saved):
                seen.add(name)
                if stored.digest_as(tensor, manifest.parameters[name]) != manifest.parameters[name]:
                    differences.append(name)
        except MappingError as error:
            differences.append(str(error))
    gone = [name for name in manifest.parameters if name not in seen and name not in manifest.no_way_back]
    differences += [] if differences else [f"{name} cannot be computed back" for name in gone]
    return not differences, differences


def _casts(folder: Path, saved: Any, source: Callable[[], Opened | None]) -> tuple[bool | None, list[str], int]:
    """Compare each tensor of a directory that was cast with the source's, cast in the same way."""
    right = before_the_cast(folder, source)
    if right is None:
        return None, [], 0
    known = knowledge_of_cast(right)
    judged = {name: known.same(name, saved[name].tensor()) for name in sorted(saved)}
    different = [f"{name} is not the source's" for name, same in judged.items() if same is False]
    return not different, different, sum(same is not None for same in judged.values())


def _compared_with_nothing(
    saved: Any,
    manifest: Manifest,
    model: Variant,
    tape: Tape | None,
    equal: bool | None,
    source: Callable[[], Opened | None],
) -> list[str]:
    """The tensors that neither the round trip, a hash of LAVIS's nor the source could prove: all of a cast model whose
    source is gone, and, without a recording, those that have no way back and are not made again from the source."""
    if manifest.dtype in LOSSY:
        return [] if equal is not None else sorted(saved)
    changed = [str(one.target) for one in entries(model) if one.sources and one.sources[0] in manifest.no_way_back]
    if tape is not None or not changed:
        return []
    opened = at_hand(source)
    if opened is None:
        return changed
    made = {name: made_again(name, opened) for name in changed}
    return [name for name, one in made.items() if one is None or not _is_that(saved[name].tensor(), one)]


def _is_that(tensor: torch.Tensor, made: torch.Tensor) -> bool:
    return tensor.shape == made.shape and torch.equal(tensor, made.to(tensor.dtype))


def parameter_names(different: Sequence[str], saved: Any, model: Variant) -> list[str]:
    """The names in transformers of the parameters that the proof of the weights found to be others."""
    words = {word.strip(".,:;'\"()") for sentence in different for word in sentence.split()}
    pairs = parameter_pairs(model)
    words |= {pairs[word][0] for word in words if word in pairs}
    return sorted(name for name in saved if name in words)


def _modules(saved: Any, model: Variant, tape: Tape | None) -> tuple[bool | None, list[str], int]:
    """Compare each parameter that was in LAVIS's modules with the one in the module the stages pair it with."""
    if tape is None:
        return None, [], 0
    pairs = parameter_pairs(model)
    names = set(saved)
    different, covered = [], set()
    for reference, expected in tape.metadata["parameters"].items():
        target, rows = pairs.get(reference, (None, None))
        if target is None or target not in names:
            different.append(f"{reference} has no counterpart")
            continue
        covered.add(target)
        tensor = saved[target].tensor()
        if hashing.digest_as(tensor if rows is None else tensor[rows], expected) != expected:
            different.append(f"{reference} is not {target}")
    different += [f"{name} has no counterpart in LAVIS" for name in sorted(names - covered)]
    return not different, different, len(tape.metadata["parameters"])


# -- the second proof


def _prove_behaviour(
    folder: Path,
    model: Variant,
    tape: Tape,
    source: Callable[[], Opened | None],
    content: dict[str, Any],
    arrays: dict[str, np.ndarray],
    say: Progress,
) -> None:
    say("loading")
    loaded = huggingface.load(folder, content["computed_in"])
    images = tape_images(tape)
    inputs = huggingface.forward_inputs(loaded, model, images[0], tape.metadata["texts"])
    content["pixel_values"], shown = evidence.pixels(folder, tape, inputs["pixel_values"], images[0])
    arrays |= shown
    say("stages")
    seen = _behaviour(folder, loaded, model, tape, inputs, source, say)
    _tell_stages(seen, content)
    faults = [*seen.findings, *_of_weights(folder, model, tape, source, content["weights"], seen.findings)]
    faults.sort(key=lambda finding: _place_of(finding, seen.table))
    content["faults"] = [finding.report() for finding in faults]
    if seen.shipped.stopped:
        content["first_divergence"] = _first_divergence(faults, content)
        return  # it has no logits and says nothing
    differences = [difference for _, difference in seen.known]
    measured = takes.measure(loaded, model, tape, seen.table, differences, (seen.shipped, seen.fixed), say)
    say("captions")
    captions = _captions(loaded, tape, images, takes.errors(measured, tape))
    content["captions"] = captions | {"equal_when_fixed": None}
    if seen.known:
        with repaired(loaded.model, differences):
            errors = takes.errors(measured, tape, fixed=True)
            fixed = captions if captions["equal"] else _captions(loaded, tape, images, errors)
            content["captions"]["equal_when_fixed"] = fixed["equal"]
    content["known_differences"] += _beam_search(tape, captions)
    content["first_divergence"] = _first_divergence(faults, content)
    if "takes" in tape.metadata:
        content["images"], of_images = takes.summary(loaded, model, tape, measured, captions)
        arrays |= of_images
    _gather_evidence(loaded, model, tape, inputs, seen, content, arrays)


def _tell_stages(seen: _Behaviour, content: dict[str, Any]) -> None:
    """What was measured at each stage, and in which settings the modules differ."""
    shipped, fixed = seen.shipped, seen.fixed
    content["threshold"] = shipped.threshold
    measured = seen.table if shipped.stages else []
    content["stages"] = [_stage(stage, number, shipped, fixed) for number, stage in enumerate(measured)]
    content["known_differences"] = [_known(one, found, shipped, fixed) for one, found in seen.known if fixed]
    content["attribute_differences"] = [str(one) for one in seen.unknown]


def _gather_evidence(
    loaded: huggingface.Loaded,
    model: Variant,
    tape: Tape,
    inputs: Mapping[str, Any],
    seen: _Behaviour,
    content: dict[str, Any],
    arrays: dict[str, np.ndarray],
) -> None:
    """The logits, and what the figures need."""
    outputs = {name: one.float() if one.is_floating_point() else one for name, one in seen.shipped.outputs.items()}
    expected = tape[seen.table[-1].reference]
    content["logits"] = compare_logits(outputs["logits"], expected)
    if seen.fixed is not None:
        content["logits"]["fixed"] = compare_logits(seen.fixed.outputs["logits"], expected)
    content["sequences"] = evidence.sequences(loaded, model, tape, inputs)
    content["examined"], looked_at = evidence.examined(
        seen.shipped, seen.table, tape, model, content["first_divergence"]
    )
    said = evidence.logits(outputs["logits"], expected)
    likeliest = said["logits/top_ids"][-1, :10].tolist() if said else []
    content["top_tokens"] = [loaded.processor.tokenizer.decode([token]) for token in likeliest]
    arrays |= looked_at | said | evidence.token_errors(seen.shipped)
    arrays |= evidence.activations(seen.table, outputs, tape)
    if content["computed_in"] == "float32":
        content["fusion"], biases = evidence.fusion(loaded.model, tape)
        arrays |= biases


@dataclasses.dataclass(frozen=True, eq=False)
class _Behaviour:
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


def _behaviour(
    folder: Path,
    loaded: huggingface.Loaded,
    model: Variant,
    tape: Tape,
    inputs: Mapping[str, Any],
    source: Callable[[], Opened | None],
    say: Progress,
) -> _Behaviour:
    table = [_that_exist(stage, loaded.model) for stage in stages(model)]
    known, unknown = _differences(tape, loaded.model, model)
    whole = loaded.model.dtype == torch.float32
    before = None if whole else before_the_cast(folder, source)
    of_lavis = _known_weights(folder, model, tape, source, unknown) if whole else knowledge_of_cast(before, unknown)
    training = loaded.model.training  # as a whole: a part of it that is, is for the comparison to find
    with still(loaded.model) if training else contextlib.nullcontext():
        try:
            with repaired(loaded.model, [difference for _, difference in known]):
                found = compare(tape, loaded.model, table, inputs, known=of_lavis, weights=before, progress=say)
        except TableError as error:
            return _Behaviour(table, _STOPPED, None, known, unknown, [_of_another_build(error)])
        shipped = _as_shipped(found, loaded, table, tape, inputs, known) if known and not found.stopped else found
    findings = _of_inputs(list(found.findings), loaded, model, tape, inputs)
    if training:
        words = "the whole model is in training mode: call .eval() on it"
        cause = Cause("dropout", words, "", "read off the model", None)
        findings.insert(0, Finding(table[0].name, "", "model", None, None, None, None, (), (cause,)))
    return _Behaviour(table, shipped, found if known else None, known, unknown, findings)


def _known_weights(
    folder: Path,
    model: Variant,
    tape: Tape,
    source: Callable[[], Opened | None],
    differences: Sequence[AttributeDifference] = (),
) -> Known:
    """What is known of the tensors in the directory: LAVIS's hashes, or, where they were cast, the source's cast."""
    if Manifest.read(folder).dtype in LOSSY:
        return knowledge_of_cast(before_the_cast(folder, source), differences)
    return knowledge(model, tape, folder, source, differences)


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


def findings(
    folder: Path,
    tape: Tape,
    *,
    loaded: huggingface.Loaded | None = None,
    inputs: Mapping[str, Any] | None = None,
    source: Callable[[], Opened | None] = lambda: None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Every fault of a converted directory that both proofs find, with its module and likely causes, and nothing else:
    no captions, no figures. The known differences of today's transformers are put right beforehand.

    Args:
        loaded: a model that was changed after loading, to be looked at instead of the directory's.
        inputs: what to call it with instead of what LAVIS was shown.
        source: as for `verify`.
    """
    manifest = Manifest.read(folder)
    model = manifest.model_variant
    source = functools.cache(source)
    weights = prove_weights(folder, manifest, model, tape, source)
    if loaded is None and (broken := _not_whole(folder, manifest, model, weights)):
        return broken
    loaded = huggingface.load(folder) if loaded is None else loaded
    if inputs is None:
        inputs = huggingface.forward_inputs(loaded, model, tape_images(tape)[0], tape.metadata["texts"])
    seen = _behaviour(folder, loaded, model, tape, inputs, source, progress or (lambda word: None))
    found = [*seen.findings, *_of_weights(folder, model, tape, source, weights, seen.findings)]
    return sorted(found, key=lambda finding: _place_of(finding, seen.table))


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


def _of_weights(
    folder: Path,
    model: Variant,
    tape: Tape,
    source: Callable[[], Opened | None],
    weights: Mapping[str, Any],
    found: Sequence[Finding],
) -> list[Finding]:
    """The faults that no activation shows, such as a key bias."""
    told = {finding.module for finding in found}
    told |= {cause.module.rpartition(".")[0] for finding in found for cause in finding.causes}
    layers = [finding.module for finding in found if finding.part == "layer"]
    of_lavis, saved = _known_weights(folder, model, tape, source), open_folder(folder)
    at = _stages_by_module(model)
    out: dict[str, Finding] = {}
    for name in parameter_names([*weights["modules_different"], *weights["roundtrip_differences"]], saved, model):
        tensor, module = saved[name].tensor(), name.rpartition(".")[0]
        if module in told or any(name.startswith(f"{layer}.") for layer in layers) or of_lavis.same(name, tensor):
            continue
        cause = weight_cause(name, tensor, of_lavis)
        told_at = (_stage_of(module, at), module or name, kind_of(name))
        first = out.setdefault(module, Finding(*told_at, None, None, None, None))
        out[module] = dataclasses.replace(first, causes=(*first.causes, cause))
    return list(out.values())


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


def _not_whole(folder: Path, manifest: Manifest, model: Variant, weights: Mapping[str, Any]) -> list[Finding]:
    """What keeps a directory from loading: one finding for each module that lacks a tensor or has another's shape."""
    written = manifest.configuration.get("config.json")
    changed = written is not None and file_hash(folder / "config.json") != written
    hint = "config.json is not as it was written" if changed else "compared by name and shape"
    at = _stages_by_module(model)
    words = {"missing": "is not there", "unexpected": "has no place in the model", "misshapen": "has another shape"}
    out: dict[str, Finding] = {}
    for what, said in words.items():
        for name in weights[what]:
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
    table = stages(model)
    return sorted(out.values(), key=lambda finding: _place_of(finding, table))


def _place_of(finding: Finding, table: Sequence[Stage]) -> int:
    return next((number for number, stage in enumerate(table) if stage.name == finding.stage), len(table))


def tape_images(tape: Tape) -> list[Image]:
    """The images LAVIS was shown, from the tape."""
    from PIL import Image as PIL

    names = sorted(
        (name for name in tape.names() if name.startswith("image.")), key=lambda name: int(name.split(".")[1])
    )
    return [PIL.open(io.BytesIO(tape[name].numpy().tobytes())).convert("RGB") for name in names]


def _differences(
    tape: Tape, candidate: torch.nn.Module, model: Variant
) -> tuple[list[tuple[KnownDifference, AttributeDifference]], list[AttributeDifference]]:
    """What differs in the modules' own attributes: what is known of today's transformers, and what is not."""
    pairs = [(pair.stage, pair.reference, pair.candidate) for pair in module_pairs(model)]
    known, unknown = [], []
    for difference in attribute_differences(tape.metadata["attributes"], candidate, pairs):
        match = [one for one in KNOWN_DIFFERENCES if one.explains(difference)]
        if match:
            known.append((match[0], difference))
        else:
            unknown.append(difference)
    return known, unknown


def _captions(
    loaded: huggingface.Loaded, tape: Tape, images: Sequence[Image], errors: Sequence[float | None] = ()
) -> dict[str, Any]:
    """Caption every image in every mode and compare token ids with LAVIS's.

    Args:
        errors: how far rounding moves the logits of each caption's image: `takes.errors`. With it, captions that part
            at a tie are told from those that differ.
    """
    shown, prompts = takes.shown(tape, images)
    out: dict[str, Any] = {"prompt": tape.metadata["prompt"], "lavis": {}, "huggingface": {}, "modes": {}}
    steps: list[list] = []
    for mode, options in CAPTION_MODES.items():
        theirs = tape.metadata["captions"][mode]
        ours = takes.caption(loaded, shown, prompts, max_new_tokens=30, **options)
        judged = errors if errors and mode != "default" else [None] * len(shown)
        steps = ours.get("steps", steps)
        out["lavis"][mode], out["huggingface"][mode] = theirs["text"], ours["text"]
        out["modes"][mode] = {
            "equal": [a == b for a, b in zip(ours["ids"], theirs["ids"], strict=True)],
            "ties": takes.ties(loaded, shown, prompts, theirs, ours, judged),
            "lavis_ids": theirs["ids"],
            "huggingface_ids": ours["ids"],
        }
    out["ladder"] = evidence.ladder(loaded, tape.metadata["captions"]["greedy"]["steps"], steps)
    compared = [out["modes"][mode] for mode in ("greedy", "beams")]
    out["equal"] = all(same or tied for one in compared for same, tied in zip(one["equal"], one["ties"], strict=True))
    return out


def _stage(place: Stage, number: int, shipped: Comparison, fixed: Comparison | None) -> dict[str, Any]:
    stage = {**dataclasses.asdict(shipped.stages[number]), "reference": place.reference}
    after = fixed.stages[number] if fixed is not None else None
    names = ("arrival_error", "drift", "local_error", "rounding", "excess", "refereed", "referee_error")
    stage["fixed"] = {name: getattr(after, name) for name in names} if after is not None else None
    return stage


def _known(
    known: KnownDifference, found: AttributeDifference, shipped: Comparison, fixed: Comparison
) -> dict[str, Any]:
    before, after = shipped[known.stage], fixed[known.stage]
    return {
        "id": known.id,
        "stage": known.stage,
        "module": found.module,
        "attribute": found.attribute,
        "lavis": found.reference,
        "transformers": found.candidate,
        "words": known.words,
        "why": known.why,
        "fix": known.fix,
        "explains": [
            one.name
            for one in shipped.faults
            if one.name == known.stage and after.judged and not after.faulty(fixed.threshold)
        ],
        "counter_test": {
            "local_error": [before.local_error, after.local_error],
            "excess": [before.excess, after.excess],
        },
    }


def _beam_search(tape: Tape, captions: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other known difference, in `generate` and not in any module: listed whatever its effect."""
    import transformers

    old, new = tape.metadata["versions"]["transformers"], transformers.__version__
    if int(old.split(".")[0]) >= int(new.split(".")[0]):
        return []
    different = captions["modes"]["default"]["equal"].count(False)
    return [
        {
            "id": "beam_length_normalisation",
            "stage": "captions",
            "module": "generate",
            "attribute": "length_penalty",
            "lavis": f"transformers {old}: a beam is scored by the length of prompt and caption, without its end",
            "transformers": f"transformers {new}: by the length of the caption alone",
            "words": "beam search's length normalisation",
            "why": "LAVIS runs on an old transformers, whose beam search counts the prompt as part of the caption.",
            "fix": "model.generate(**inputs, num_beams=5, length_penalty=0.0) is the same search in both",
            "explains": ["captions.default"] if different else [],
            "captions_that_differ": different,
        }
    ]


def _first_divergence(faults: Sequence[Finding], content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first fault that nothing known explains; else the first known difference that shows."""
    if faults:
        first = faults[0]
        cause = str(first.causes[0]) if first.causes else ""
        return {
            "stage": first.stage,
            "module": first.module,
            "part": first.part,
            "arrival_error": first.arrival_error,
            "local_error": first.local_error,
            "excess": first.excess,
            "cause": cause,
        }
    known = next((one for one in content["known_differences"] if one["explains"] and one["stage"] != "captions"), None)
    if known is None:
        return None
    stage = next(one for one in content["stages"] if one["name"] == known["stage"])
    return {
        **{name: stage[name] for name in ("module", "arrival_error", "local_error", "excess")},
        "stage": known["stage"],
        "part": "norm",
        "cause": _cause(known),
    }


def _cause(known: Mapping[str, Any]) -> str:
    return f"{known['words']}: LAVIS {known['lavis']}, transformers {known['transformers']}"


# -- what is missing


def _not_proven(content: Mapping[str, Any]) -> list[Missing]:
    """Weights that there was nothing to compare with."""
    weights = content["weights"]
    names = weights["unproven"]
    if not names:
        return []
    if weights["dtype"] in LOSSY:
        words = f"The weights were cast to {weights['dtype']}, and their source is not here to be compared with them."
    else:
        said = f"{names[0]} was computed anew and has no way back"
        more = f" ({len(names)} such tensors)" if len(names) > 1 else ""
        words = f"{said}{more}; neither the source nor a recording of LAVIS gave the same tensor."
    return [Missing("weights", "weights", words)]


def _not_judged(content: Mapping[str, Any]) -> list[Missing]:
    """Stages, images and captions of which rounding could not be told from a fault."""
    out = []
    stages = {one["name"]: why for one in content["stages"] if (why := _why_not_judged(one)) is not None}
    if stages:
        some = ", ".join(f"{name} ({why})" for name, why in [*stages.items()][:3])
        more = f" and {len(stages) - 3} more" if len(stages) > 3 else ""
        words = f"{len(stages)} of {len(content['stages'])} stages are not judged, since their float64 run failed: "
        out.append(Missing("stages", "behaviour", f"{words}{some}{more}."))
    images = content["images"]
    others = [one for one in images["each"][1:] if one["unjudged"]] if images else []
    if others:
        words = f"On {len(others)} of {len(images['each'])} images and texts a stage is not judged, since its float64"
        first = f"{others[0]['unjudged'][0]} on {others[0]['image']}"
        out.append(Missing("images", "behaviour", f"{words} run failed: {first}."))
    captions = content["captions"]
    if out and captions and not captions["equal"] and captions["equal_when_fixed"] is not True:
        words = "Captions differ, and while stages are not judged, nothing tells whether rounding alone chose them."
        out.append(Missing("captions", "text", words))
    return out


def _why_not_judged(stage: Mapping[str, Any]) -> str | None:
    """What ended the float64 run of a stage that is not judged, as it ships or with the known differences fixed."""
    for one in (stage, stage["fixed"]):
        if one and not one["refereed"] and one["excess"] is None:
            return one["referee_error"]
    return None


# -- the verdict


def _verdict(content: Mapping[str, Any]) -> dict[str, Any]:
    """match, explained, diverges or incomplete, the causes, and the sentence a person reads. A fault that was found
    stays one, whatever is missing; without one, what is missing counts."""
    answer = _of_what_was_compared(content)
    if answer["verdict"] == "diverges" or not content["incomplete"]:
        return answer
    first = answer["summary"] if content["proof"] == "weights" else "No fault was found, but not everything was judged."
    words = " ".join([first, *(one["words"] for one in content["incomplete"])])
    return _answer("incomplete", answer["causes"], words)


def _of_what_was_compared(content: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict that what was run and judged would give by itself."""
    weights = content["weights"]
    problems = (
        [f"{name} is missing" for name in weights["missing"]]
        + [f"{name} does not belong to the model" for name in weights["unexpected"]]
        + [f"{name} has another shape" for name in weights["misshapen"]]
        + weights["roundtrip_differences"]
        + weights["modules_different"]
    )
    weights_fine = not problems and weights["roundtrip"] is not False and weights["modules_equal"] is not False
    if not weights_fine:
        sentence = f"The weights are not the source's: {problems[0]} ({len(problems)} in all)."
        if "attribute" in _causes_of(content):  # nothing was compared: it does not load
            sentence = f"config.json was changed and does not fit the weights: {problems[0]} ({len(problems)} in all)."
        return _answer("diverges", _causes_of(content), f"{sentence} {_first_words(content)}".strip())
    if content["proof"] == "weights":
        cast = f", cast to {weights['dtype']} on request and so with no way back"
        back = " and go back bit for bit" if weights["roundtrip"] else cast
        return _answer("match", [], f"All {weights['written']} tensors are accounted for{back}.")
    faults = [stage for stage in content["stages"] if _faulty(stage, content["threshold"])]
    causes = [one["id"] for one in content["known_differences"] if one["explains"] and one["stage"] != "captions"]
    captions = content["captions"]
    known = next((one for one in content["known_differences"] if one["stage"] != "captions"), None)
    if content["faults"]:
        return _answer("diverges", _causes_of(content), _first_words(content))
    if not content["pixel_values"]["equal"]:
        return _answer("diverges", [], "The pixel values differ from LAVIS's: look at the image processor first.")
    images = content.get("images")
    if images and images["problem"]:
        return _answer("diverges", causes, images["problem"])
    half = content["computed_in"] != "float32"
    if half:
        sentence = f"Every layer agrees with LAVIS's float32 to the rounding of {content['computed_in']}"
        same = "the captions are the same" if captions["equal"] else "some captions differ, as rounding alone can do"
        return _answer("explained" if faults else "match", causes, f"{sentence}; {same}.")
    cannot_tell = any(one["id"] == "captions" for one in content["incomplete"])
    if not captions["equal"] and captions["equal_when_fixed"] is not True and not cannot_tell:
        return _answer(
            "diverges", causes, "Every layer agrees, but the captions do not: look at generation's settings."
        )
    if not faults and captions["equal"] and not (images and images["explained"]):
        return _answer(
            "match", [], "The same model: every layer agrees with LAVIS to rounding, and so do the captions."
        )
    agreements = [content["logits"], *(images["each"] if images else [])]
    safe = captions["equal"] and all(one["top1_agreement"] == 1.0 for one in agreements)
    effect = (
        f"It changes the logits by {content['logits']['relative']:.1e} of their size "
        f"({content['logits']['fixed']['relative']:.1e} without it)"
    )
    advice = "no caption: safe to ship as it is" if safe else "and some captions: apply the fix"
    assert known is not None  # only its counter-test leads here
    sentence = f"The same model but for one known cause: {_cause(known)}. {effect} and {advice}."
    return _answer("explained", causes or [known["id"]], sentence)


def _causes_of(content: Mapping[str, Any]) -> list[str]:
    """The likeliest cause of each fault, each named once."""
    return list(dict.fromkeys(fault["causes"][0]["id"] for fault in content["faults"] if fault["causes"]))


def _first_words(content: Mapping[str, Any]) -> str:
    """Where it first goes wrong and why, and how many faults there are; "" where none was looked for."""
    first, count = content["first_divergence"], len(content["faults"])
    if first is None or not count:
        return ""
    more = f" ({count} faults in all)" if count > 1 else ""
    return f"First wrong at {first['stage']}, in {first['module']}: {first['cause']}{more}."


def _answer(verdict: str, causes: list[str], summary: str) -> dict[str, Any]:
    return {"verdict": verdict, "causes": causes, "summary": summary}


def _faulty(stage: Mapping[str, Any], threshold: float) -> bool:
    return faulty(stage["arrival_error"], stage["excess"], threshold)


# -- what it was made of


def _provenance(folder: Path, manifest: Manifest, tape: Tape | None) -> dict[str, Any]:
    """What was compared with what. Names and hashes only: a report travels, and paths of this machine do not."""
    model = manifest.model_variant
    return {
        "state": state(folder),
        "files": [{"name": one["name"], "bytes": one["size"]} for one in manifest.files],
        "checkpoints": list(manifest.checkpoints),
        "weights_hash": manifest.weights_hash,
        "dtype": manifest.dtype,
        "prompt": model.prompt,
        "image_size": model.image_size,
        "language_model": model.language_model,
        "reference": None if tape is None else {
            name: tape.metadata[name] for name in ("source_hash", "inputs_hash", "device", "texts", "versions")
        },
    }  # fmt: skip


def state(folder: Path) -> str:
    """What tells at a glance that a converted directory is as it was: its files' names, sizes and times of change. The
    card is no part of it: it says what was found, and is written after."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file() and path.name not in CARD]
    text = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """What compares."""
    import platform

    import transformers

    from blip2nb._version import __version__

    return {
        "blip2nb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

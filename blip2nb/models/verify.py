"""The two proofs of a converted directory: its weights, by hash and round trip, and its behaviour, against a tape."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blip2nb.errors import RequestError
from blip2nb.models import evidence, huggingface
from blip2nb.models.stages import KNOWN_DIFFERENCES, KnownDifference, module_pairs, parameter_pairs, stages
from blip2nb.report import Report
from blip2nb.trace.comparison import ARRIVAL_TOLERANCE, Comparison, StageResult, compare, exceeds, faulty
from blip2nb.trace.diagnose import AttributeDifference, attribute_differences, repaired
from blip2nb.trace.metrics import compare_logits
from blip2nb.variants import Variant
from blip2nb.weights import hashing, stored
from blip2nb.weights.convert import LOSSY, Manifest, inverse_tensors
from blip2nb.weights.mapping import MappingError, Plan, entries
from blip2nb.weights.sources import open_folder, shapes

if TYPE_CHECKING:
    from PIL.Image import Image

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


def verify(folder: Path, tape: Tape | None, completion: str = "", progress: Progress | None = None) -> Report:
    """Prove a converted directory.

    Args:
        folder: the converted directory.
        tape: LAVIS's recording of the same weights; without one only the weights are proven.
        completion: the commands that add the second proof, for a report that has only the first.
        progress: called with a word at each step.

    Raises:
        RequestError: the directory is not one of ours, or does not load.
    """
    started = time.time()
    say = progress or (lambda word: None)
    manifest = Manifest.read(folder)
    model = manifest.model_variant
    say("weights")
    content: dict[str, Any] = {
        "format": 1,
        "model_name": model.name,
        "random_weights": model.twin,
        "proof": "weights" if tape is None else "both",
        "weights": prove_weights(folder, manifest, model, tape),
        "pixel_values": None,
        "logits": None,
        "stages": [],
        "known_differences": [],
        "first_divergence": None,
        "captions": None,
        "versions": {"converted with": dict(manifest.versions), "checked with": versions()},
        "provenance": _provenance(folder, manifest, tape),
    }
    arrays: dict[str, np.ndarray] = {}
    if tape is None:
        content["complete_with"] = completion
    elif any(content["weights"][what] for what in ("missing", "unexpected", "misshapen")):
        content["proof"] = "weights"  # it does not load whole, so there is nothing to run
    else:
        content["versions"]["reference"] = tape.metadata["versions"]
        _prove_behaviour(folder, model, tape, content, arrays, say)
    content |= _verdict(content)
    content["seconds"] = round(time.time() - started, 2)
    return Report(content, arrays)


# -- the first proof


def prove_weights(folder: Path, manifest: Manifest, model: Variant, tape: Tape | None) -> dict[str, Any]:
    """Without running anything: every tensor accounted for, the way back bit for bit, the modules equal by hash."""
    saved = open_folder(folder)
    held = shapes(saved)
    expected = _parameters_of(folder)
    tied = {entry.target for entry in entries(model) if entry.kind == "Tied"}
    expected = {name: shape for name, shape in expected.items() if name not in tied}
    roundtrip, differences = _round_trip(folder, manifest, model)
    lossy = manifest.dtype in LOSSY  # LAVIS's hashes are of the tensors before the cast
    equal, different, checked = _modules(saved, model, None if lossy else tape)
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
    except (OSError, ValueError, TypeError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise RequestError(f"{folder / 'config.json'} is damaged ({first}). Convert again with --overwrite.") from error
    with torch.device("meta"):
        state = Blip2ForConditionalGeneration(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _round_trip(folder: Path, manifest: Manifest, model: Variant) -> tuple[bool | None, list[str]]:
    """Whether the inverse rules give back every tensor that was read, bit for bit. None after a lossy cast."""
    if manifest.dtype in LOSSY:
        return None, []
    held = set(open_folder(folder))  # what is missing is reported as that
    whole = [entry for entry in entries(model) if not entry.optional and entry.target in held]
    whole = [entry for entry in whole if entry.sources[0] not in manifest.no_way_back]
    seen, differences = set(), []
    try:
        for name, tensor in inverse_tensors(folder, Plan(model, tuple(whole), (), (), {})):
            seen.add(name)
            if stored.digest_as(tensor, manifest.parameters[name]) != manifest.parameters[name]:
                differences.append(name)
    except MappingError as error:
        differences.append(str(error))
    except KeyError as error:
        differences.append(f"{error.args[0]} is not in the directory")
    gone = [name for name in manifest.parameters if name not in seen and name not in manifest.no_way_back]
    differences += [] if differences else [f"{name} cannot be computed back" for name in gone]
    return not differences, differences


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
    folder: Path, model: Variant, tape: Tape, content: dict[str, Any], arrays: dict[str, np.ndarray], say: Progress
) -> None:
    say("loading")
    loaded = huggingface.load(folder)
    images = tape_images(tape)
    inputs = huggingface.forward_inputs(loaded, model, images[0], tape.metadata["texts"])
    content["pixel_values"], shown = evidence.pixels(folder, tape, inputs["pixel_values"], images[0])
    table = stages(model)
    say("stages")
    shipped = compare(tape, loaded.model, table, inputs, progress=say)
    say("counter-test")
    known, unknown = _differences(tape, loaded.model, model)
    with repaired(loaded.model, [difference for _, difference in known]):
        fixed = compare(tape, loaded.model, table, inputs, progress=say) if known else None
        say("captions")
        captions_fixed = _captions(loaded, tape, images) if known else None
    captions = _captions(loaded, tape, images)
    expected = tape[table[-1].reference]
    content["threshold"] = shipped.threshold
    content["stages"] = [_stage(stage, number, shipped, fixed) for number, stage in enumerate(table)]
    content["logits"] = compare_logits(shipped.outputs["logits"], expected)
    if fixed is not None:
        content["logits"]["fixed"] = compare_logits(fixed.outputs["logits"], expected)
    content["captions"] = captions | {"equal_when_fixed": captions_fixed["equal"] if captions_fixed else None}
    content["known_differences"] = [_known(one, found, shipped, fixed) for one, found in known]
    content["known_differences"] += _beam_search(tape, captions)
    content["attribute_differences"] = [str(one) for one in unknown]
    content["first_divergence"] = _first_divergence(shipped, unknown, content)
    content["fusion"], biases = evidence.fusion(loaded.model, tape)
    content["sequences"] = evidence.sequences(loaded, model, tape, inputs)
    content["examined"], looked_at = evidence.examined(shipped, table, tape, model, content["first_divergence"])
    said = evidence.logits(shipped.outputs["logits"], expected)
    likeliest = said["logits/top_ids"][-1, :10].tolist() if said else []
    content["top_tokens"] = [loaded.processor.tokenizer.decode([token]) for token in likeliest]
    arrays |= shown | biases | looked_at | said | evidence.token_errors(shipped)
    arrays |= evidence.activations(table, shipped.outputs, tape)


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


def _captions(loaded: huggingface.Loaded, tape: Tape, images: Sequence[Image]) -> dict[str, Any]:
    """Caption every image in every mode and compare token ids with LAVIS's."""
    out: dict[str, Any] = {"prompt": tape.metadata["prompt"], "lavis": {}, "huggingface": {}, "modes": {}}
    steps: list[list] = []
    for mode, options in CAPTION_MODES.items():
        theirs = tape.metadata["captions"][mode]
        ours = huggingface.caption(loaded, list(images), tape.metadata["prompt"], max_new_tokens=30, **options)
        steps = ours.get("steps", steps)
        out["lavis"][mode], out["huggingface"][mode] = theirs["text"], ours["text"]
        out["modes"][mode] = {
            "equal": [a == b for a, b in zip(ours["ids"], theirs["ids"], strict=True)],
            "lavis_ids": theirs["ids"],
            "huggingface_ids": ours["ids"],
        }
    out["ladder"] = evidence.ladder(loaded, tape.metadata["captions"]["greedy"]["steps"], steps)
    out["equal"] = all(all(out["modes"][mode]["equal"]) for mode in ("greedy", "beams"))
    return out


def _stage(place: Stage, number: int, shipped: Comparison, fixed: Comparison | None) -> dict[str, Any]:
    stage = {**dataclasses.asdict(shipped.stages[number]), "reference": place.reference}
    after = fixed.stages[number] if fixed is not None else None
    names = ("arrival_error", "drift", "local_error", "rounding", "excess")
    stage["fixed"] = {name: getattr(after, name) for name in names} if after is not None else None
    return stage


def _known(
    known: KnownDifference, found: AttributeDifference, shipped: Comparison, fixed: Comparison | None
) -> dict[str, Any]:
    assert fixed is not None
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
            one.name for one in shipped.faults if one.name == known.stage and not after.faulty(fixed.threshold)
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


def _first_divergence(
    shipped: Comparison, unknown: Sequence[AttributeDifference], content: Mapping[str, Any]
) -> dict[str, Any] | None:
    if not shipped.faults:
        return None
    accounted = {name for one in content["known_differences"] for name in one["explains"]}
    first = next((fault for fault in shipped.faults if fault.name not in accounted), shipped.faults[0])
    explained = [one for one in content["known_differences"] if first.name in one["explains"]]
    if explained:
        cause = _cause(explained[0])
    else:
        named = [str(one) for one in unknown if one.stage == first.name]
        weights = [one for one in content["weights"]["modules_different"] if first.module in one]
        if content["weights"]["dtype"] in LOSSY:
            weights = [f"the weights were cast to {content['weights']['dtype']}"]
        cause = "; ".join(named + weights) or _where_to_look(first)
    return {
        "stage": first.name,
        "module": first.module,
        "arrival_error": first.arrival_error,
        "local_error": first.local_error,
        "excess": first.excess,
        "cause": cause,
    }


def _cause(known: Mapping[str, Any]) -> str:
    return f"{known['words']}: LAVIS {known['lavis']}, transformers {known['transformers']}"


def _where_to_look(stage: StageResult) -> str:
    """What is left when neither a weight nor an attribute of the stage differs."""
    if exceeds(stage.arrival_error, ARRIVAL_TOLERANCE):
        return "what arrives there differs, so look between the stages (tokens, positions, order, mask)"
    return "its weights and plain attributes are LAVIS's, so look at what it computes (activation, scale, mask)"


# -- the verdict


def _verdict(content: Mapping[str, Any]) -> dict[str, Any]:
    """match, explained, diverges or weights_only, the causes, and the sentence a person reads."""
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
        return _answer("diverges", [], f"The weights are not the source's: {problems[0]} ({len(problems)} in all).")
    if content["proof"] == "weights":
        cast = f", cast to {weights['dtype']} on request and so with no way back"
        back = " and go back bit for bit" if weights["roundtrip"] else cast
        sentence = f"All {weights['written']} tensors are accounted for{back}. Behaviour was not compared with LAVIS's."
        return _answer("weights_only", [], sentence)
    faults = [stage for stage in content["stages"] if _faulty(stage, content["threshold"])]
    left = [stage for stage in content["stages"] if stage["fixed"] and _faulty(stage["fixed"], content["threshold"])]
    causes = [one["id"] for one in content["known_differences"] if one["explains"] and one["stage"] != "captions"]
    captions = content["captions"]
    first = content["first_divergence"]
    known = next((one for one in content["known_differences"] if one["stage"] != "captions"), None)
    if not content["pixel_values"]["equal"]:
        return _answer("diverges", [], "The pixel values differ from LAVIS's: look at the image processor first.")
    if faults and (left or not causes):
        return _answer("diverges", causes, f"First wrong at {first['stage']}: {first['cause']}.")
    if not captions["equal"] and captions["equal_when_fixed"] is not True:
        return _answer(
            "diverges", causes, "Every layer agrees, but the captions do not: look at generation's settings."
        )
    if not faults and captions["equal"]:
        return _answer(
            "match", [], "The same model: every layer agrees with LAVIS to rounding, and so do the captions."
        )
    safe = captions["equal"] and content["logits"]["top1_agreement"] == 1.0
    effect = (
        f"It changes the logits by {content['logits']['relative']:.1e} of their size "
        f"({content['logits']['fixed']['relative']:.1e} without it)"
    )
    advice = "no caption: safe to ship as it is" if safe else "and some captions: apply the fix"
    assert known is not None  # only its counter-test leads here
    sentence = f"The same model but for one known cause: {_cause(known)}. {effect} and {advice}."
    return _answer("explained", causes or [known["id"]], sentence)


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
    """What tells at a glance that a converted directory is as it was: its files' names, sizes and times of change."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    text = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """What compares."""
    import platform

    import transformers

    from blip2nb import __version__

    return {
        "blip2nb": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

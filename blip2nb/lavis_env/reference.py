"""The recording to compare with: the one that fits, or whether one can be made here, or how to make it elsewhere."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from blip2nb import resources
from blip2nb.conversion.preview import memory_proving
from blip2nb.errors import RequestError
from blip2nb.families.captioners.inputs import Chosen, demo_hash
from blip2nb.families.captioners.recording import recording
from blip2nb.families.captioners.stages import stages
from blip2nb.lavis_env.environment import Lavis, find_lavis
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import Origin, RunPaths
from blip2nb.report.schema import Missing
from blip2nb.sizes import as_bytes
from blip2nb.trace.stage import places
from blip2nb.trace.tape import Tape
from blip2nb.variants import Variant
from blip2nb.weights.convert import LOSSY

log = logging.getLogger("blip2nb")

SHIPPED_TAPES = Path(__file__).resolve().parent.parent / "tapes"


def shipped_tape(model: Variant) -> Path:
    """Where the kit's own recording of a model is, if it has one."""
    return SHIPPED_TAPES / f"{model.name}.safetensors"


def images_tape(run: RunPaths) -> Path:
    """Where a run keeps its recording of images and texts of one's own: the last that were asked for."""
    return run.tape_path.with_name("tape-images.safetensors")


def find_tape(run: RunPaths, manifest: Manifest, chosen: Chosen | None = None) -> Tape | None:
    """The run's own recording or the kit's, whichever was made of these weights and inputs and holds every place.

    Args:
        chosen: the images and texts, where they are not the demo's.
    """
    model = manifest.variant
    wanted = {"source_hash": manifest.weights_hash, "inputs_hash": _hash_of(model, chosen)}
    for path in (run.tape_path, shipped_tape(model)) if chosen is None else (images_tape(run),):
        if path.is_file():
            tape = open_tape(path)
            made_of = {name: recording(tape).get(name) for name in wanted}
            if made_of == wanted and not _unrecorded(tape, manifest):
                log.info("comparing with the recording %s", path.name)
                return tape
    return None


def _hash_of(model: Variant, chosen: Chosen | None) -> str:
    return demo_hash(model) if chosen is None else chosen.inputs_hash(model)


def given_tape(path: Path, manifest: Manifest, chosen: Chosen | None = None) -> Tape:
    """The recording that was named, whatever it shows; where images or texts were named too, it must be of them.

    Raises:
        RequestError: it is none, was made of other weights or inputs, or lacks a place.
    """
    tape = open_tape(path)
    told = recording(tape)
    again = f"Record again with `blip2nb capture {manifest.model}`."
    if "source_hash" not in told:
        raise RequestError(f"{path} is of an older version: it does not say of which files it was made. {again}")
    if told["source_hash"] != manifest.weights_hash:
        raise RequestError(
            f"{path} was recorded on other weights (of {told['model']}) than this model was converted from. {again}"
        )
    if chosen is not None and told["inputs_hash"] != chosen.inputs_hash(manifest.variant):
        raise RequestError(f"{path} was recorded on other images or texts. Leave out images and texts, or the tape.")
    unrecorded = _unrecorded(tape, manifest)
    if unrecorded:
        raise RequestError(f"{path} is of an older version: nothing is recorded for {unrecorded[0]}. {again}")
    return tape


def open_tape(path: Path) -> Tape:
    """Raises RequestError when there is no tape, or a damaged one."""
    try:
        return Tape(path)
    except (ValueError, FileNotFoundError) as error:
        raise RequestError(str(error)) from error


def _unrecorded(tape: Tape, manifest: Manifest) -> list[str]:
    return [place for place in places(stages(manifest.variant)) if place not in tape]


def can_compare(proof: str, manifest: Manifest) -> bool:
    """Whether behaviour is to be compared at all: asked for, and possible on this machine.

    Raises:
        RequestError: both proofs were asked for, and there is not the memory.
    """
    if proof == "weights":
        return False
    short = memory_short(manifest.variant)
    if short and proof == "both":
        raise RequestError(f"{short} Use a larger machine, or proof weights.")
    if short:
        log.info("%s Proving the weights alone.", short)
    return not short


def why_not_compared(proof: str, manifest: Manifest) -> Missing:
    """Why a verification has no recording to compare with."""
    short = memory_short(manifest.variant)
    id, why = "no_lavis", "no recording of LAVIS fits it, and there is no environment with LAVIS to make one."
    if proof == "weights":
        id, why = "not_asked", "the weights alone were asked for."
    elif short:
        id, why = "no_memory", short
    return Missing(id, "behaviour", f"Behaviour was not compared with LAVIS's: {why}")


def memory_short(model: Variant) -> str:
    """A sentence when this machine cannot hold the model in float32, as both sides are compared; else ""."""
    needed, total = memory_proving(model), resources.memory()
    if not total or needed <= resources.SHARE * total:  # where it cannot be told: try and see
        return ""
    return f"Running {model.name} in float32 takes {as_bytes(needed)} of memory; this machine has {as_bytes(total)}."


def require_lavis(lavis_python: str | Path, model: Variant) -> Lavis:
    """The LAVIS environment. Raises RequestError where there is none."""
    lavis = find_lavis(lavis_python)
    if lavis is None:
        raise RequestError(
            f"Recording {model.name} needs an environment with LAVIS, and none was found: no kernel `lavis`, no "
            ".venv-lavis. Make one with `make lavis`, or name yours as lavis_python."
        )
    return lavis


def report_holds(run: RunPaths, lavis_python: str | Path = "", chosen: Chosen | None = None) -> bool:
    """Whether the run's report is of its model as it stands, by these versions, on the demo's inputs or those that were
    chosen, and as complete as it can be here."""
    from blip2nb.proof.provenance import state, versions

    if not (run.folder / "report.json").is_file():
        return False
    manifest = Manifest.read(run.model)
    try:
        report = run.report.content
    except RequestError as error:
        log.info("%s", error)
        return False
    made = report.provenance
    same = made is not None and made.state == state(run.model)
    recorded = made.reference if made is not None else None
    if recorded is not None and recorded.inputs_hash != _hash_of(manifest.variant, chosen):
        log.info("the report of %s is of other images or texts", run.folder.name)
        return False
    if not same or report.versions.get("checked with") != versions():
        return False
    if any(one.id in ("weights", "stages", "images", "captions") for one in report.incomplete):
        return False  # the source or the memory may be there by now
    return (
        report.proof == "both"
        or not can_compare("auto", manifest)
        or (find_tape(run, manifest, chosen) is None and find_lavis(lavis_python) is None)
    )


def again(run: RunPaths, manifest: Manifest, origin: Origin) -> str:
    """The command that verifies a run once more, where something could not be judged."""
    words = ["blip2nb", "verify", str(run.model), "--proof", "both", "--output", str(run.folder)]
    if manifest.dtype in LOSSY:
        words += ["--source", origin.source or "SOURCE"]
    return shlex.join(words)


def completion(run: RunPaths, manifest: Manifest, origin: Origin) -> str:
    """The commands that add the second proof to a run that has only the first."""
    words = ["blip2nb", "capture", manifest.model, *(["--source", origin.source] if origin.source else [])]
    words += ["--base", origin.base] if origin.base else []
    words += ["--output", str(run.tape_path)]
    again = ["blip2nb", "verify", str(run.model), "--tape", str(run.tape_path), "--output", str(run.folder)]
    return f"{shlex.join(words)} && {shlex.join(again)}"

"""One run of a sweep: what became of it, its five proofs in words, and what is drawn of it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from urllib.parse import quote

import numpy as np

from blip2nb.display import faults
from blip2nb.display.figures.depth import Depth
from blip2nb.display.figures.words import as_number, as_percent, as_times, first_few
from blip2nb.forms import mapped, settled, there
from blip2nb.report.schema import Captions, Content, Fault, Logits, Pixels, Weights
from blip2nb.report.store import lacking
from blip2nb.report.sweep import Entry, Outcome, Proofs, ProofWords, StageColumns, WrongAt
from blip2nb.weights.convert import LOSSY

PROOFS = tuple(one.name for one in dataclasses.fields(Proofs))

MOST_TRACEBACK = 6000
"""So many letters of a traceback are kept, most of them of its end. Chosen: about sixty lines, and 1.2 MB in a sweep of
two hundred that all fail. The executed notebook has it whole."""


def summarise(outcome: Outcome, report: Content | None = None) -> Entry:
    """One run's entry in index.json: what the sweep says of it, the five proofs in words, and what is drawn of it.

    Args:
        report: the run's; None where it left none.
    """
    folder = outcome.folder
    page = _link(folder, "report.html") if folder and report else None
    first = _first_divergence(report) if report else None
    stages = _stages(report) if report and report.stages else None
    proofs = _proofs(report, first, stages) if report else dict.fromkeys(PROOFS, ("not done", _nothing(outcome)))
    anchors = _anchors(report, proofs) if report else {}
    told = {one.name: getattr(outcome, one.name) for one in dataclasses.fields(outcome)}
    told["traceback"] = _shortened(_plain(outcome.traceback).strip("\n"))
    told["error"] = " ".join(_plain(outcome.error).split())
    entry = Entry(
        **told,
        result=_result(outcome),
        page=page,
        notebook_page=_link(folder, outcome.executed) if folder and outcome.executed else None,
        summary=report.summary if report else "",
        missing=tuple(one.words for one in lacking(report, str(outcome.parameters.get("proof", "")))) if report else (),
        causes=tuple(_causes(report)) if report else (),
        first_divergence=first,
        threshold=report.threshold if report else None,
        stages=stages,
        versions=report.versions if report else {},
        proofs=Proofs(
            **{
                name: ProofWords(state, words, f"{page}#{anchors[name]}" if page else None)
                for name, (state, words) in proofs.items()
            }
        ),
    )
    return mapped(settled(entry), lambda one: _plain(one) if isinstance(one, str) else one)


def _link(*parts: str) -> str:
    """A relative address; "./" keeps a browser from taking a name with a colon for a scheme."""
    return "./" + "/".join(quote(part.encode("utf-8", "replace"), safe="/") for part in parts)


def _result(outcome: Outcome) -> str:
    if outcome.state != "finished":
        return outcome.state
    return outcome.verdict or "no report"


def _nothing(outcome: Outcome) -> str:
    return {"failed": "did not finish", "not run": "not run"}.get(outcome.state, "left no report")


_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
_FORBIDDEN = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _plain(text: str) -> str:
    """Text as every format may hold it: without a terminal's colours and without what XML forbids."""
    return _FORBIDDEN.sub("", _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def _shortened(text: str) -> str:
    left_out = len(text) - MOST_TRACEBACK
    if left_out <= 0:
        return text
    head = MOST_TRACEBACK // 6  # chosen: the end says what failed, the beginning in which cell
    words = f"\n… {left_out} letters are left out here; the executed notebook has them …\n"
    return text[:head] + words + text[head + left_out :]


def _causes(report: Content) -> list[str]:
    """Why it is not LAVIS's to the bit: the likely causes of its faults, or else the known differences that show."""
    if report.faults:
        return [group.words_with_more for group in faults.grouped(report.faults)[: faults.MOST_GROUPS]]
    return [
        f"{one.words}: LAVIS {one.lavis}, transformers {one.transformers}"
        for one in report.known_differences
        if one.id in report.causes
    ]


def _first_divergence(report: Content) -> WrongAt | None:
    """Where it first goes wrong, or differs for a known reason; of a model that does not load, what it lacks first."""
    known = not report.faults
    if known and not report.first_divergence:
        return None
    first = report.first_divergence or report.faults[0]
    cause = _likeliest(first) if isinstance(first, Fault) else first.cause
    size = "seen in the weights alone"
    if first.excess is not None:
        size = f"{as_times(first.excess)} rounding"
    elif first.arrival_error:
        size = f"off by {as_number(first.arrival_error)} on arrival"
    elif report.faults:
        size = faults.size(report.faults[0])
    return WrongAt(first.stage or "the weights", first.module, cause, size, known)


def _likeliest(fault: Fault) -> str:
    return fault.causes[0].words if fault.causes else ""


def _stages(report: Content) -> StageColumns:
    """What the miniature draws."""
    depth = Depth.of(report)
    known = {name for one in report.known_differences for name in one.explains}
    own = np.where(depth.junction, depth.arrival_error, depth.local_error)
    return StageColumns(
        name=tuple(depth.names),
        local_error=tuple(map(_short, own.tolist())),
        rounding=tuple(map(_short, depth.rounding.tolist())),
        excess=tuple(map(_short, depth.excess.tolist())),
        state=tuple(_state(depth, place, float(own[place]), known) for place in depth.places),
    )


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.3g}")


def _state(depth: Depth, place: int, own: float, known: set[str]) -> str:
    if math.isnan(own):  # what is not a number only because of what came before is not at fault
        return "not a number"
    if depth.unjudged[place]:
        return "not judged"
    if depth.names[place] in known:
        return "known"
    if depth.wrong[place] or (depth.junction[place] and own > 0):
        return "fault"
    return "bit-equal" if own == 0 else "rounding"


# -- its proofs: each a state, and in words what was found


def _proofs(report: Content, first: WrongAt | None, stages: StageColumns | None) -> dict[str, tuple[str, str]]:
    absent = ("not done", "it does not load" if report.faults else "not compared")
    layers = _of_layers(report, first, stages) if report.proof == "both" else absent
    unproven = any(one.proof == "weights" for one in report.incomplete)
    weights = _of_weights(there(report.weights))
    proofs = {
        "weights": ("not done", "not compared with the source") if unproven and weights[0] == "passed" else weights,
        "pixels": _of_pixels(report.pixel_values) if report.pixel_values else absent,
        "layers": layers,
        "logits": _of_logits(report.logits, layers[0]) if report.logits else absent,
        "captions": _of_captions(report, report.captions) if report.captions else absent,
    }
    if report.verdict == "diverges" and "failed" not in {state for state, _ in proofs.values()}:
        proofs["layers"] = ("failed", report.summary)  # only the sentence says what it is
    return proofs


def _of_weights(weights: Weights) -> tuple[str, str]:
    changed = max(len(weights.roundtrip_differences), len(weights.modules_different))
    missing = len(weights.missing)
    counted = {
        "missing": missing,
        "that do not belong": len(weights.unexpected),
        "of another shape": len(weights.misshapen),
    }
    if not any(counted.values()):
        counted = {"not the source's": changed}
    said = ", ".join(f"{number} {words}" for words, number in counted.items() if number)
    if said or weights.roundtrip is False or weights.modules_equal is False:
        return "failed", f"{said or 'not the source’s'} (of {weights.written + missing})"
    if weights.dtype not in LOSSY:
        return "passed", f"{weights.written} equal, bit for bit"
    same = "equal to the source's, cast" if weights.modules_equal else "there, cast"
    return "passed", f"{weights.written} {same} to {weights.dtype}"


def _of_pixels(pixels: Pixels) -> tuple[str, str]:
    return ("passed", "equal") if pixels.equal else ("failed", f"off by up to {as_number(pixels.max_abs)}")


def _of_layers(report: Content, first: WrongAt | None, stages: StageColumns | None) -> tuple[str, str]:
    if not stages:
        return "failed", f"first wrong at {first.stage}" if first else "they could not be compared"
    states = dict(zip(stages.name, stages.state, strict=True))
    wrong = [name for name, state in states.items() if state in ("fault", "not a number")]
    if wrong:
        if first and first.stage in wrong:
            return "failed", f"first wrong at {first.stage}: {first.size}"
        return "failed", f"first wrong at {wrong[0]}"
    alone = [one.excess for one in report.stages if one.excess and states[one.name] == "rounding"]
    rest = f"{min(alone):.2f}–{max(alone):.2f} × rounding" if alone else "bit-equal"
    unjudged = [name for name, state in states.items() if state == "not judged"]
    if unjudged:
        return "not done", f"not judged: {first_few(unjudged, 2)}; else {rest}"
    known = [name for name, state in states.items() if state == "known"]
    if known:
        return "explained", f"known: {first_few(known, 2)}; else {rest}"
    return "passed", rest


def _of_logits(logits: Logits, layers: str) -> tuple[str, str]:
    """As right as the layers are; how far they are off by themselves has no measure."""
    if logits.relative is None or math.isnan(logits.relative):
        return "failed", "not a number"
    if logits.relative == 0:
        return "passed", "bit-equal"
    off = f"off by {as_number(logits.relative)}"
    if layers == "failed":
        return "failed", f"{off}; same first token at {as_percent(logits.top1_agreement)}"
    if layers == "not done":
        return "not done", off
    if layers == "explained" and logits.fixed:
        return "explained", f"{off}; {as_number(logits.fixed.relative)} with the remedy"
    return "passed", off


def _of_captions(report: Content, captions: Captions) -> tuple[str, str]:
    equal = [same for mode in captions.modes.values() for same in mode.equal]
    said = f"{sum(equal)} of {len(equal)} equal"
    if all(equal):
        return "passed", said
    if captions.equal:
        must = [captions.modes[mode] for mode in ("greedy", "beams")]
        reasons = ["ties"] if not all(same for mode in must for same in mode.equal) else []
        reasons += ["known"] if not all(captions.modes["default"].equal) else []
        return "explained", f"{said}, the others {' or '.join(reasons)}"
    if captions.equal_when_fixed:
        return "explained", f"{said}, all with the remedy"
    if report.computed_in != "float32" and report.verdict != "diverges":
        return "explained", f"{said}, the others by rounding"
    return ("not done" if report.verdict == "incomplete" else "failed"), said


def _anchors(report: Content, proofs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Proof -> the part of report.html that shows it."""
    shown = {
        "weights": "meaning" if proofs["weights"][0] == "failed" else "names",
        "pixels": "pixels" if report.pixel_values else "meaning",
        "layers": "stages" if report.stages else "meaning",
        "logits": "logits" if report.logits else "meaning",
        "captions": "captions" if report.captions else "meaning",
    }
    if report.faults and proofs["layers"][0] == "failed":
        shown["layers"] = "faults"
    return shown

"""What a sweep found over all its runs: index.html and, of the same content, index.json, summary.md and junit.xml.

`summarise` makes one run's entry, `index` puts the entries together, and the texts are functions of the index alone.
What the page says and in which order is the template's (overview.html.j2).
"""

from __future__ import annotations

import dataclasses
import html as escaping
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup

from blip2nb.display import faults, templates
from blip2nb.display.figures.depth import Depth
from blip2nb.display.figures.words import as_count, as_number, as_percent, as_times, first_few
from blip2nb.report.store import INFINITE, finite, lacking
from blip2nb.weights.convert import LOSSY
from blip2nb.whole import write_whole

Entry = Mapping[str, Any]
Index = Mapping[str, Any]

PROOFS = ("weights", "pixels", "layers", "logits", "captions")

RESULTS = {
    "failed": "failed",
    "diverges": "not the same model",
    "no report": "without a report",
    "not run": "not run",
    "incomplete": "not proven in full",
    "explained": "the same but for a known difference",
    "match": "the same model",
}
"""What a run came to, in words, the worst first."""

MOST_TRACEBACK = 6000
"""So many letters of a traceback are kept, most of them of its end. The executed notebook has it whole."""

MOST_SUMMARY = 60_000
"""Letters of summary.md. GitHub refuses a comment of more than 65,536."""


# -- one run


def summarise(outcome: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One run's entry in index.json: what the sweep says of it, the five proofs in words, and what is drawn of it.

    Args:
        outcome: run_name, model_name, notebook, parameters, state ("finished", "failed" or "not run"), verdict,
            error, traceback, seconds, finished, earlier, folder (from the index's; "" for none), executed.
        report: the content of the run's report.json; None where it left none.

    Returns:
        JSON values without control characters: the outcome's own, and
        result: one of RESULTS; page, notebook_page: links from the index's folder, or None; summary: the report's
        sentence; missing: what the proof that was asked for lacks, in sentences; proofs: name -> state ("passed",
        "explained", "failed" or "not done"), words, link; causes: in words;
        first_divergence: stage, module, size, cause, known; threshold; stages: columns; versions.
    """
    folder = str(outcome.get("folder") or "")
    page = _link(folder, "report.html") if folder and report else None
    entry = {
        **outcome,
        "traceback": _shortened(_plain(str(outcome.get("traceback") or "")).strip("\n")),
        "error": " ".join(_plain(str(outcome.get("error") or "")).split()),
        "result": _result(outcome),
        "page": page,
        "notebook_page": _link(folder, outcome["executed"]) if folder and outcome.get("executed") else None,
        "summary": report["summary"] if report else "",
        "missing": [one["words"] for one in lacking(report, outcome["parameters"].get("proof", ""))] if report else [],
        "causes": _causes(report) if report else [],
        "first_divergence": _first_divergence(report) if report else None,
        "threshold": report.get("threshold") if report else None,
        "stages": _stages(report) if report and report["stages"] else None,
        "versions": report["versions"] if report else {},
    }
    proofs = _proofs(report, entry) if report else dict.fromkeys(PROOFS, ("not done", _nothing(outcome)))
    anchors = _anchors(report, proofs) if report else {}
    entry["proofs"] = {
        name: {"state": state, "words": words, "link": f"{page}#{anchors[name]}" if page else None}
        for name, (state, words) in proofs.items()
    }
    return _cleaned(finite(entry))


def _link(*parts: str) -> str:
    """A relative address; "./" keeps a browser from taking a name with a colon for a scheme."""
    return "./" + "/".join(quote(part.encode("utf-8", "replace"), safe="/") for part in parts)


def _result(outcome: Mapping[str, Any]) -> str:
    if outcome["state"] != "finished":
        return outcome["state"]
    return outcome.get("verdict") or "no report"


def _nothing(outcome: Mapping[str, Any]) -> str:
    return {"failed": "did not finish", "not run": "not run"}.get(outcome["state"], "left no report")


_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
_FORBIDDEN = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _plain(text: str) -> str:
    """Text as every format may hold it: without a terminal's colours and without what XML forbids."""
    return _FORBIDDEN.sub("", _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, Mapping):
        return {_plain(str(name)): _cleaned(one) for name, one in value.items()}
    return [_cleaned(one) for one in value] if isinstance(value, list | tuple) else value


def _shortened(text: str) -> str:
    left_out = len(text) - MOST_TRACEBACK
    if left_out <= 0:
        return text
    head = MOST_TRACEBACK // 6
    words = f"\n… {left_out} letters are left out here; the executed notebook has them …\n"
    return text[:head] + words + text[head + left_out :]


def _causes(report: Mapping[str, Any]) -> list[str]:
    """Why it is not LAVIS's to the bit: the likely causes of its faults, or else the known differences that show."""
    if report["faults"]:
        return [group.words_with_more for group in faults.grouped(report["faults"])[: faults.MOST_GROUPS]]
    return [
        f"{one['words']}: LAVIS {one['lavis']}, transformers {one['transformers']}"
        for one in report["known_differences"]
        if one["id"] in report["causes"]
    ]


def _first_divergence(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where it first goes wrong, or differs for a known reason; of a model that does not load, what it lacks first."""
    known = not report["faults"]
    first = report["first_divergence"] if known or report["first_divergence"] else _lacking(report["faults"][0])
    if not first:
        return None
    size = "seen in the weights alone"
    if first["excess"] is not None:
        size = f"{as_times(first['excess'])} rounding"
    elif first["arrival_error"]:
        size = f"off by {as_number(first['arrival_error'])} on arrival"
    elif report["faults"]:
        size = faults.size(report["faults"][0])
    named = {key: first[key] for key in ("stage", "module", "cause")}
    return {**named, "stage": named["stage"] or "the weights", "size": size, "known": known}


def _lacking(fault: Mapping[str, Any]) -> dict[str, Any]:
    return {**fault, "cause": fault["causes"][0]["words"] if fault["causes"] else ""}


def _stages(report: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Column -> a value a stage: what the miniature draws, to three digits."""
    depth = Depth.of(report)
    known = {name for one in report["known_differences"] for name in one["explains"]}
    own = np.where(depth.junction, depth.arrival_error, depth.local_error)
    columns = {"local_error": own, "rounding": depth.rounding, "excess": depth.excess}
    return {
        "name": depth.names,
        **{key: [_short(value) for value in column] for key, column in columns.items()},
        "state": [_state(depth, place, float(own[place]), known) for place in depth.places],
    }


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


def _proofs(report: Mapping[str, Any], entry: Entry) -> dict[str, tuple[str, str]]:
    absent = ("not done", "it does not load" if report["faults"] else "not compared")
    layers = _of_layers(report, entry) if report["proof"] == "both" else absent
    unproven = any(one["proof"] == "weights" for one in report["incomplete"])
    weights = _of_weights(report["weights"])
    proofs = {
        "weights": ("not done", "not compared with the source") if unproven and weights[0] == "passed" else weights,
        "pixels": _of_pixels(report["pixel_values"]) if report["pixel_values"] else absent,
        "layers": layers,
        "logits": _of_logits(report["logits"], layers[0]) if report["logits"] else absent,
        "captions": _of_captions(report) if report["captions"] else absent,
    }
    if report["verdict"] == "diverges" and "failed" not in {state for state, _ in proofs.values()}:
        proofs["layers"] = ("failed", report["summary"])  # only the sentence says what it is
    return proofs


def _of_weights(weights: Mapping[str, Any]) -> tuple[str, str]:
    changed = max(len(weights["roundtrip_differences"]), len(weights["modules_different"]))
    missing, unexpected, misshapen = (len(weights[key]) for key in ("missing", "unexpected", "misshapen"))
    counted = {"missing": missing, "that do not belong": unexpected, "of another shape": misshapen}
    if not any(counted.values()):
        counted = {"not the source's": changed}
    said = ", ".join(f"{number} {words}" for words, number in counted.items() if number)
    if said or weights["roundtrip"] is False or weights["modules_equal"] is False:
        return "failed", f"{said or 'not the source’s'} (of {weights['written'] + missing})"
    if weights["dtype"] not in LOSSY:
        return "passed", f"{weights['written']} equal, bit for bit"
    same = "equal to the source's, cast" if weights["modules_equal"] else "there, cast"
    return "passed", f"{weights['written']} {same} to {weights['dtype']}"


def _of_pixels(pixels: Mapping[str, Any]) -> tuple[str, str]:
    return ("passed", "equal") if pixels["equal"] else ("failed", f"off by up to {as_number(pixels['max_abs'])}")


def _of_layers(report: Mapping[str, Any], entry: Entry) -> tuple[str, str]:
    first, stages = entry["first_divergence"], entry["stages"]
    if not stages:
        return "failed", f"first wrong at {first['stage']}" if first else "they could not be compared"
    states = dict(zip(stages["name"], stages["state"], strict=True))
    wrong = [name for name, state in states.items() if state in ("fault", "not a number")]
    if wrong:
        if first and first["stage"] in wrong:
            return "failed", f"first wrong at {first['stage']}: {first['size']}"
        return "failed", f"first wrong at {wrong[0]}"
    alone = [one["excess"] for one in report["stages"] if one["excess"] and states[one["name"]] == "rounding"]
    rest = f"{min(alone):.2f}–{max(alone):.2f} × rounding" if alone else "bit-equal"
    unjudged = [name for name, state in states.items() if state == "not judged"]
    if unjudged:
        return "not done", f"not judged: {first_few(unjudged, 2)}; else {rest}"
    known = [name for name, state in states.items() if state == "known"]
    if known:
        return "explained", f"known: {first_few(known, 2)}; else {rest}"
    return "passed", rest


def _of_logits(logits: Mapping[str, Any], layers: str) -> tuple[str, str]:
    """As right as the layers are; how far they are off by themselves has no measure."""
    if logits["relative"] is None or math.isnan(logits["relative"]):
        return "failed", "not a number"
    if logits["relative"] == 0:
        return "passed", "bit-equal"
    off = f"off by {as_number(logits['relative'])}"
    if layers == "failed":
        return "failed", f"{off}; same first token at {as_percent(logits['top1_agreement'])}"
    fixed = logits.get("fixed")
    if layers == "not done":
        return "not done", off
    if layers == "explained" and fixed:
        return "explained", f"{off}; {as_number(fixed['relative'])} with the remedy"
    return "passed", off


def _of_captions(report: Mapping[str, Any]) -> tuple[str, str]:
    captions = report["captions"]
    equal = [same for mode in captions["modes"].values() for same in mode["equal"]]
    said = f"{sum(equal)} of {len(equal)} equal"
    if all(equal):
        return "passed", said
    if captions["equal"]:
        must = [captions["modes"][mode] for mode in ("greedy", "beams")]
        reasons = ["ties"] if not all(same for mode in must for same in mode["equal"]) else []
        reasons += ["known"] if not all(captions["modes"]["default"]["equal"]) else []
        return "explained", f"{said}, the others {' or '.join(reasons)}"
    if captions["equal_when_fixed"]:
        return "explained", f"{said}, all with the remedy"
    if report["computed_in"] != "float32" and report["verdict"] != "diverges":
        return "explained", f"{said}, the others by rounding"
    return ("not done" if report["verdict"] == "incomplete" else "failed"), said


def _anchors(report: Mapping[str, Any], proofs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Proof -> the part of report.html that shows it."""
    there = {
        "weights": "meaning" if proofs["weights"][0] == "failed" else "names",
        "pixels": "pixels" if report["pixel_values"] else "meaning",
        "layers": "stages" if report["stages"] else "meaning",
        "logits": "logits" if report["logits"] else "meaning",
        "captions": "captions" if report["captions"] else "meaning",
    }
    if report["faults"] and proofs["layers"][0] == "failed":
        there["layers"] = "faults"
    return there


# -- all of them


def index(entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of index.json.

    Args:
        entries: what `summarise` gave for each run, in the order in which they were asked for.

    Returns:
        state ("failed" if a run failed; else "diverges" if one does; else "not run" if one was not run; else
        "incomplete" if a proof that was asked for is; else "good"), sentence, known (the differences that are known,
        with the number of runs), counts (by result), seconds,
        versions (what -> package -> those that were met), runs.
    """
    counts = Counter(entry["result"] for entry in entries)
    bad = [result for result in ("failed", "diverges", "not run") if counts[result]]
    bad += ["incomplete"] if any(entry["missing"] for entry in entries) else []
    known = Counter(cause for entry in entries if entry["result"] == "explained" for cause in entry["causes"])
    return {
        "format": 1,
        "state": next(iter(bad), "good"),
        "sentence": _sentence(entries, counts, len(known)),
        "known": dict(known.most_common()),
        "counts": {result: counts[result] for result in RESULTS if counts[result]},
        "seconds": round(sum(entry.get("seconds") or 0 for entry in entries if not entry.get("earlier")), 2),
        "versions": _versions(entries),
        "runs": [{key: value for key, value in entry.items() if key != "versions"} for entry in entries],
    }


def _sentence(entries: Sequence[Entry], counts: Mapping[str, int], known: int) -> str:
    """The finding: what is wrong, in which runs; else what all of them are."""
    total = len(entries)
    if not total:
        return "Nothing was run"
    failed, diverging = ([one for one in entries if one["result"] == what] for what in ("failed", "diverges"))
    verb = "diverges" if len(diverging) == 1 else "diverge"
    waiting = f"; {counts['not run']} of {total} not run" if counts["not run"] else ""
    if failed and diverging:
        words = f"{len(failed)} of {total} failed and {len(diverging)} {verb}"
        return f"{words}: {first_few(_named(failed + diverging), 3)}{waiting}"
    if failed:
        return f"{len(failed)} of {total} failed: {first_few(_named(failed), 3)}{waiting}"
    if diverging:
        words = f"{len(diverging)} of {total} {verb}: {first_few(_named(diverging), 3)}"
        first = diverging[0]["first_divergence"]
        return words + (f", first wrong at {first['stage']}" if first and len(diverging) == 1 else "") + waiting
    done = total - counts["not run"]
    return f"{_good(entries, counts, done, known)}{waiting}" if done else f"None of {total} was run"


def _named(entries: Iterable[Entry]) -> list[str]:
    return [entry["run_name"] for entry in entries]


def _good(entries: Sequence[Entry], counts: Mapping[str, int], done: int, known: int) -> str:
    """What the runs are, where nothing is wrong with any."""
    proven, silent = counts["match"] + counts["explained"], counts["no report"]
    lacks = sum(bool(entry["missing"]) for entry in entries)
    alone = counts["incomplete"] - lacks
    but = f", {'with one known difference' if known == 1 else 'with known differences'}"
    if proven == done:
        who = f"All {done} are" if done > 1 else f"{next(e['run_name'] for e in entries if e['result'] in RESULTS)} is"
        some = f", {counts['explained']} of them{but[1:]}" if counts["explained"] < done else but
        return f"{who} the same model as LAVIS's" + (some if counts["explained"] else "")
    said = []
    if proven:
        said.append(f"{proven} of {done} {'is' if proven == 1 else 'are'} the same model as LAVIS's{but * bool(known)}")
    if lacks:
        said.append(f"{lacks} {'is' if lacks == 1 else 'are'} not proven in full")
    if alone:
        said.append(f"of {alone} the weights alone were compared, and are the same")
    if silent:
        said.append(f"{silent} finished and left no report")
    words = "; ".join(said)
    return words[0].upper() + words[1:]


def _versions(entries: Iterable[Entry]) -> dict[str, dict[str, list[str]]]:
    found: dict[str, dict[str, set[str]]] = {}
    for entry in entries:
        for what, packages in entry["versions"].items():
            for package, version in packages.items():
                found.setdefault(what, {}).setdefault(package, set()).add(version)
    return {what: {one: sorted(packages[one]) for one in sorted(packages)} for what, packages in found.items()}


# -- as files


def texts(index: Index) -> dict[str, str]:
    """File name -> its whole content."""
    return {
        "index.html": html(index),
        "index.json": json.dumps(index, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n",
        "summary.md": markdown(index),
        "junit.xml": junit(index),
    }


def save(index: Index, folder: Path) -> list[Path]:
    """Write the four files into `folder`, each whole or not at all. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in texts(index).items():
        write_whole(folder / name, text)
        written.append(folder / name)
    return written


# -- the page

SIGNS = {"passed": "✓", "explained": "≈", "failed": "✗", "not done": "–"}

_RESULT_SIGNS = {
    "match": "✓",
    "explained": "≈",
    "diverges": "✗",
    "failed": "✗",
    "incomplete": "½",
    "no report": "–",
    "not run": "–",
}

_MOST_TROUBLES, _MOST_LINKS = 10, 12


def html(index: Index) -> str:
    """index.html: needs no network, and links to the runs' folders beside it."""
    runs = list(enumerate(index["runs"]))
    drawn = [(number, entry) for number, entry in runs if entry["stages"]]
    top = top_decade(index["runs"])
    return templates.template("overview.html.j2", count=as_count, seconds=_seconds, unbroken=_unbroken).render(
        index=index,
        runs=runs,
        proofs=PROOFS,
        signs=SIGNS,
        result_signs=_RESULT_SIGNS,
        results=RESULTS,
        order=list(RESULTS),
        troubles=_troubles(index["runs"]),
        most_troubles=_MOST_TROUBLES,
        most_links=_MOST_LINKS,
        failed=[(number, entry) for number, entry in runs if entry["state"] == "failed"],
        not_run=[entry for _, entry in runs if entry["state"] == "not run"],
        axis=_axis(top, next((entry["threshold"] for _, entry in drawn if entry["threshold"]), 0.0)),
        miniatures=[(number, entry, _miniature(entry, top)) for number, entry in drawn],
        given={number: _given(entry) for number, entry in runs},
        packages=sorted({package for found in index["versions"].values() for package in found}),
    )


def _seconds(value: float) -> str:
    return f"{value:.3g} seconds" if value < 100 else f"{value / 60:.3g} minutes"


def _unbroken(words: str) -> Markup:
    """Words in which a browser does not end a line within a number such as 3.7e-7."""
    parts = re.split(r"(\S*\de-\d+)", words)
    return Markup("").join(
        Markup("<span class='digits'>{}</span>").format(p) if n % 2 else p for n, p in enumerate(parts)
    )


def _given(entry: Entry) -> str:
    """The parameters of a run but for the model that its name tells."""
    return ", ".join(
        f"{name} {value}"
        for name, value in entry["parameters"].items()
        if value not in (entry["run_name"], "")
        and not (name == "model_name" and entry["run_name"].startswith(str(value)))
    )


@dataclasses.dataclass(frozen=True)
class _Trouble:
    """What goes wrong, in pieces of one sentence, and the runs in which it does, each with the link to more of it."""

    where: str
    size: str
    module: str
    why: str
    runs: list[tuple[str, str]]


def _troubles(entries: Sequence[Entry]) -> list[_Trouble]:
    """Runs that broke off with one error together, and those that first go wrong at one place for one reason."""
    found: dict[tuple[str, str], _Trouble] = {}
    for number, entry in enumerate(entries):
        if entry["state"] == "failed":
            new, link = _Trouble("Did not finish", "", "", f": {entry['error']}", []), f"#failure-{number}"
        elif entry["result"] == "diverges":
            first = entry["first_divergence"] or {"stage": "a place that is not told", "size": "", "module": ""}
            why = f"; most likely because: {(entry['causes'] or [entry['summary']])[0]}"
            new = _Trouble(f"First wrong at {first['stage']}", first["size"], first["module"], why, [])
            link = entry["proofs"]["layers"]["link"] or entry["page"]
        else:
            continue
        found.setdefault((new.where, new.why), new).runs.append((entry["run_name"], link))
    return list(found.values())


# -- a miniature of the errors over depth: a few paths, in the units of its view box

WIDTH, HEIGHT = 320, 118
_LEFT, _RIGHT, _TOP, _LOW, _ZERO = 30, 314, 20, 88, 97


@dataclasses.dataclass(frozen=True)
class _Miniature:
    """What the template draws: paths as SVG knows them, and words with their places.

    Attributes:
        stems, dots: of the places that are rounding alone, or bit-equal.
        known, wrong, borders: diamonds, and the lines between the parts of the network.
        parts: (name, x of its middle).
        mark: (x, anchor, words) of the first divergence, or None.
        alt: what is to be seen, in words.
    """

    stems: str
    dots: str
    known: str
    wrong: str
    borders: str
    parts: list[tuple[str, float]]
    mark: tuple[float, str, str] | None
    alt: str


def top_decade(entries: Iterable[Entry]) -> int:
    """Where the axis that all miniatures share ends, as a power of ten of error ÷ its own rounding."""
    found = [one for entry in entries if entry["stages"] for one in entry["stages"]["excess"] if one]
    return max(2, math.ceil(math.log10(max((one for one in found if one < INFINITE), default=1.0)) + 0.15))


def _height(excess: float, top: int) -> float:
    share = (math.log10(excess) + 1) / (top + 1)
    return round(_LOW - min(max(share, 0.0), 1.0) * (_LOW - _TOP), 1)


def _axis(top: int, threshold: float) -> dict[str, Any]:
    """The axis that all miniatures share: (height, label) of its lines, and the height of the threshold."""
    step = next(step for step in (1, 2, 3, 4, 5) if top / step <= 3)
    lines = [(_height(10.0**power, top), "1" if power == 0 else f"1e{power}") for power in range(0, top + 1, step)]
    return {
        "lines": lines,
        "threshold": _height(threshold, top) if threshold else None,
        "words": f"{threshold:g}",
        "box": (WIDTH, HEIGHT),
        "ends": (_LEFT, _RIGHT),
        "zero": _ZERO,
        "foot": HEIGHT - 5,
    }


def _miniature(entry: Entry, top: int) -> _Miniature:
    stages, first = entry["stages"], entry["first_divergence"]
    names, states = stages["name"], stages["state"]
    pitch = (_RIGHT - _LEFT) / max(len(names), 1)
    xs = [round(_LEFT + (place + 0.5) * pitch, 1) for place in range(len(names))]
    ys = [_place(*one, top) for one in zip(stages["excess"], states, strict=True)]
    base = _height(1.0, top)
    paths = {"stems": "", "dots": "", "known": "", "wrong": ""}
    for x, y, state in zip(xs, ys, states, strict=True):
        kind = {"known": "known", "fault": "wrong", "not a number": "wrong"}.get(state, "dots")
        paths[kind] += f"M{x:g} {y:g}h0" if kind == "dots" else f"M{x:g} {y - 4:g}l4 4-4 4-4-4z"
        if y != _ZERO:
            paths["stems"] += f"M{x:g} {base:g}V{y:g}"
    parts = Depth.of({"stages": [{"name": name} for name in names], "threshold": math.inf}).parts()
    edges = [round(_LEFT + start * pitch, 1) for _, start, _ in parts[1:]]
    mark = None
    if first and first["stage"] in names:
        x = xs[names.index(first["stage"])]
        anchor = "start" if x < (_LEFT + _RIGHT) / 2 else "end"
        mark = (x - 4 if anchor == "start" else x + 4, anchor, f"{'known: ' * first['known']}{first['stage']}")
    return _Miniature(
        **paths,
        borders="".join(f"M{x:g} {_TOP - 4}V{_ZERO + 5}" for x in edges),
        parts=[
            (name.split(" ")[-1], round(_LEFT + (start + stop) / 2 * pitch, 1))
            for name, start, stop in parts
            if pitch * (stop - start) > 5.5 * len(name.split(" ")[-1])
        ],
        mark=mark,
        alt=describe(entry),
    )


def _place(excess: float | None, state: str, top: int) -> float:
    """A place's height: what is bit-equal on a row of its own, what has no measure but is wrong at the top."""
    if state in ("fault", "not a number", "known", "not judged") and excess is None:
        return _TOP
    return _height(excess, top) if excess else _ZERO


def describe(entry: Entry) -> str:
    """What the miniature shows, for whoever cannot see it."""
    stages = entry["stages"]
    counts = Counter(stages["state"])
    words = {"rounding": "by rounding alone", "not judged": "not judged", "bit-equal": "bit-equal",
             "known": "for a known reason", "fault": "wrong", "not a number": "not a number"}  # fmt: skip
    said = ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state])
    first = entry["first_divergence"]
    where = f" {_first_words(first)}." if first else ""
    return f"{as_count(len(stages['name']), 'place')} from the image to the logits: {said}.{where}"


def _first_words(first: Mapping[str, Any]) -> str:
    how = "Known difference" if first["known"] else "First wrong"
    return f"{how} at {first['stage']}: {first['size']}"


# -- for a pull request


def markdown(index: Index) -> str:
    """The summary in GitHub's Markdown: the sentence, a table with the worst first, the failures."""
    counts = ", ".join(f"{number} {RESULTS[result]}" for result, number in index["counts"].items())
    text = f"## {_escaped(index['sentence'])}\n\n{counts}\n\n" if index["runs"] else f"## {index['sentence']}\n"
    ordered = sorted(index["runs"], key=lambda entry: list(RESULTS).index(entry["result"]))
    rows = [_row(entry) for entry in ordered]
    text += f"| run | result | {' | '.join(PROOFS)} | where and why |\n|{'---|' * (len(PROOFS) + 3)}\n" if rows else ""
    shown = _that_fit(rows, MOST_SUMMARY * 2 // 3)
    text += "".join(shown)
    if len(shown) < len(rows):
        text += f"\n{len(rows) - len(shown)} more are in index.html.\n"
    failures = [_failure(entry) for entry in ordered if entry["state"] == "failed"]
    told = _that_fit(failures, MOST_SUMMARY - len(text) - 100)
    text += "".join(told)
    if len(told) < len(failures):
        text += f"\n{len(failures) - len(told)} more failures are in index.html.\n"
    return text


def _that_fit(texts: Sequence[str], room: int) -> list[str]:
    ends = itertools.accumulate(map(len, texts))
    return [text for text, end in zip(texts, ends, strict=True) if end <= room]


def _row(entry: Entry) -> str:
    first = entry["first_divergence"]
    why = f"{first['stage']}, {first['size']}: {first['cause']}" if first else entry["error"]
    why = why or " ".join(entry["missing"])
    proofs = [f"{SIGNS[one['state']]} {_escaped(one['words'])}" for one in entry["proofs"].values()]
    result = f"{_RESULT_SIGNS[entry['result']]} {RESULTS[entry['result']]}"
    return f"| {' | '.join([_code(entry['run_name']), result, *proofs, _escaped(_cut(why, 300))])} |\n"


def _failure(entry: Entry) -> str:
    lines = entry["traceback"][-2500:] or entry["error"]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    head = f"<b>{escaping.escape(_one_line(entry['run_name']))}</b>: {escaping.escape(_cut(entry['error'], 300))}"
    return f"\n<details><summary>{head}</summary>\n\n{fence}text\n{lines}\n{fence}\n\n</details>\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2]} …"


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!@])", r"\\\1", _one_line(text))


def _code(text: str) -> str:
    """Text as code, in which nothing is a link or a mention; a table's bar is escaped there too."""
    words = _one_line(text).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    return f"{fence} {words} {fence}" if len(fence) > 1 else f"`{words}`"


# -- for a build server


def junit(index: Index) -> str:
    """The runs as test cases: a divergence is a failure, a run that broke off an error, and one that was not run or
    lacks something of the proof that was asked for is skipped."""
    counts = index["counts"]
    totals = {
        "tests": str(len(index["runs"])),
        "failures": str(counts.get("diverges", 0)),
        "errors": str(counts.get("failed", 0)),
        "skipped": str(counts.get("not run", 0) + sum(bool(entry["missing"]) for entry in index["runs"])),
        "time": f"{index['seconds']:.2f}",
    }
    suites = ElementTree.Element("testsuites", {"name": "blip2nb sweep", **totals})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "blip2nb sweep", **totals})
    for entry in index["runs"]:
        named = {"classname": entry["notebook"], "name": entry["run_name"], "time": f"{entry['seconds'] or 0:.2f}"}
        case = ElementTree.SubElement(suite, "testcase", named)
        if entry["parameters"]:
            properties = ElementTree.SubElement(case, "properties")
            for name, value in entry["parameters"].items():
                ElementTree.SubElement(properties, "property", {"name": name, "value": str(value)})
        _outcome(case, entry)
    ElementTree.indent(suites, " ")
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suites, encoding="unicode") + "\n"


def _outcome(case: ElementTree.Element, entry: Entry) -> None:
    """What of a test case is not a success."""
    if entry["result"] == "diverges":
        first = entry["first_divergence"]
        message = f"{_first_words(first)}: {first['cause']}" if first else entry["summary"]
        attributes = {"type": "diverges", "message": message}
        ElementTree.SubElement(case, "failure", attributes).text = entry["summary"]
    elif entry["result"] == "failed":
        attributes = {"type": "failed", "message": entry["error"]}
        ElementTree.SubElement(case, "error", attributes).text = entry["traceback"] or entry["error"]
    elif entry["result"] == "not run":
        ElementTree.SubElement(case, "skipped", {"message": entry["error"] or "not run"})
    elif entry["missing"]:
        ElementTree.SubElement(case, "skipped", {"message": f"incomplete: {' '.join(entry['missing'])}"})

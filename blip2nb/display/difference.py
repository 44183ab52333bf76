"""Two runs compared: the verdicts, the stages that moved, the output, and the parameters in which the runs differ."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blip2nb.display.figures.moves import SMALLEST_MOVE, Move
from blip2nb.display.figures.words import as_count, as_number, as_percent, first_few, to_floats
from blip2nb.display.text import VERDICTS, Note
from blip2nb.errors import RequestError
from blip2nb.report.store import ReportData

LOGITS = {
    "relative": ("relative error", as_number),
    "max_abs": ("largest difference", as_number),
    "kl": ("KL divergence, nats", as_number),
    "top1_agreement": ("same first token", as_percent),
}
"""What is compared of the logits: its name on screen, and how its value is written."""

_PICTURES = (".png", ".svg", ".pdf")

_WORDS_AROUND, _CAPTIONS_SHOWN = 4, 6

_MODES = {"greedy": "greedy", "beams": "5 beams", "default": "LAVIS's own beams"}


@dataclasses.dataclass(frozen=True)
class Change:
    """A parameter or version that is not the same in both runs; "none" where a run has no such thing."""

    what: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


@dataclasses.dataclass(frozen=True)
class Caption:
    """What transformers said of one image, counted from 1, in both runs, where it is not the same."""

    mode: str
    image: int
    before: str
    after: str

    def __str__(self) -> str:
        """Both, a few words around the place where they part."""
        a, b = self.before.split(), self.after.split()
        alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        start, stop = max(alike - _WORDS_AROUND, 0), alike + _WORDS_AROUND
        parts = [["…"] * (start > 0) + words[start:stop] + ["…"] * (stop < len(words)) for words in (a, b)]
        return " → ".join(" ".join(words) or "(nothing)" for words in parts)


@dataclasses.dataclass(frozen=True, repr=False)
class Difference:
    """What is different between two runs, A and B. A pair is always (A's, B's).

    Attributes:
        names: the runs' names.
        reports: what each run found.
        verdicts: match, explained, diverges or incomplete.
        first_wrong: the stage at which each first goes wrong; "" for none.
        moved: the stages that moved, in the order of the network; empty where a run's behaviour was not compared.
        still: how many stages are in both and did not move.
        only: the names of the stages that are in one run alone.
        logits: a name of LOGITS -> its two values; empty where a run has none.
        captions: those of transformers that changed.
        captions_compared: how many were said by both, over all ways of decoding.
        same_weights: whether both were converted from the same tensors, by hash.
        changes: the parameters and versions in which the runs differ.
    """

    names: tuple[str, str]
    reports: tuple[ReportData, ReportData] = dataclasses.field(compare=False)
    verdicts: tuple[str, str]
    first_wrong: tuple[str, str]
    moved: tuple[Move, ...]
    still: int
    only: tuple[tuple[str, ...], tuple[str, ...]]
    logits: Mapping[str, tuple[float, float]]
    captions: tuple[Caption, ...]
    captions_compared: int
    same_weights: bool
    changes: tuple[Change, ...]

    @property
    def finding(self) -> str:
        """One sentence without a full stop: the first stage that moved."""
        unseen = [name for name, report in zip(self.names, self.reports, strict=True) if not report["stages"]]
        if unseen:
            return f"No stages to compare: the behaviour of {' and '.join(dict.fromkeys(unseen))} was not compared"
        if not self.moved and not self.still:
            return "No stages to compare: the two models have none in common"
        if not self.moved:
            return f"No stage moved by a tenth or more; {as_count(self.still, 'stage')} compared"
        first, others = self.moved[0], len(self.moved) - 1
        words = f"First moved: {first.stage}, error ÷ its own rounding {first}"
        return f"{words}; {as_count(others, 'other stage')} moved" if others else words

    def __repr__(self) -> str:
        lines = []
        for letter, name, report in zip("AB", self.names, self.reports, strict=True):
            lines += [f"{letter}  {name}: {report.verdict} ({VERDICTS[report.verdict]})", f"   {report['summary']}"]
        for heading, rows in self._sections():
            lines += ["", heading]
            width = max((len(label) for label, value in rows if value), default=0)
            lines += [f"  {label:<{width}}  {value}".rstrip() for label, value in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        runs = "".join(
            f"<p><strong>{letter}: {html.escape(name)}: {report.verdict}</strong> ({VERDICTS[report.verdict]})<br>"
            f"{html.escape(report['summary'])}</p>"
            for letter, name, report in zip("AB", self.names, self.reports, strict=True)
        )
        sections = "".join(
            f"<tr><th colspan='2' align='left'>{html.escape(heading)}</th></tr>"
            + "".join(
                f"<tr><td align='left'>{html.escape(label)}</td><td align='left'>{html.escape(value)}</td></tr>"
                for label, value in rows
            )
            for heading, rows in self._sections()
        )
        return f"<div style='border-left:4px solid #666666;padding-left:12px'>{runs}<table>{sections}</table></div>"

    def _sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """The comparison as headings with (label, value) under each, for the terminal and for notebooks."""
        changes = [(one.what, str(one)) for one in self.changes] or [("nothing that the reports tell", "")]
        weights = "the same tensors, by hash" if self.same_weights else "other tensors"
        sections = [("They differ in", changes), ("Weights", [("converted from", weights)])]
        moved = [(move.stage, str(move)) for move in self.moved]
        sections.append(("Stages, error ÷ its own rounding", [*moved, *((words, "") for words in self._not_moved())]))
        if self.logits:
            pairs = [(name, " → ".join(map(write, self.logits[key]))) for key, (name, write) in LOGITS.items()]
            sections.append(("Logits, transformers against LAVIS", pairs))
        if self.captions_compared:
            said = [(f"{_MODES.get(one.mode, one.mode)}, image {one.image}", str(one)) for one in self.captions]
            rest = len(said) - _CAPTIONS_SHOWN
            more = [(f"and {rest} more", "")] if rest > 0 else []
            count = f"{len(said)} of {self.captions_compared} changed"
            sections.append(("Captions of transformers", [(count, ""), *said[:_CAPTIONS_SHOWN], *more]))
        return sections

    def _not_moved(self) -> list[str]:
        """What there is to say of the stages that are not in the list."""
        if not self.moved and not self.still:
            return [self.finding]
        words = [f"{as_count(self.still, 'stage')} moved by less than a tenth"]
        for letter, names in zip("AB", self.only, strict=True):
            words += (
                [f"{as_count(len(names), 'stage')} in {letter} alone: {first_few(list(names), 3)}"] if names else []
            )
        return words

    def figure(self, width: float = 7.0) -> Any:
        """The comparison as a picture, or a note where a run's behaviour was not compared.

        Args:
            width: inches.
        """
        from blip2nb.display.figures import two_runs

        one, other = self.reports
        if not two_runs.available(one.content, one.arrays, other.content, other.arrays):
            return Note(f"No picture of this: {self.finding}.")
        return two_runs.draw(one.content, one.arrays, other.content, other.arrays, width, self.names)

    def draw(self, path: str | Path, width: float = 7.0) -> Path:
        """Write the picture to a .png, .svg or .pdf file, with its alt text in it, and return the path.

        Raises:
            RequestError: the name ends otherwise, its folder is not there, or there is nothing to draw.
        """
        from blip2nb.display.plots import save_picture

        path = Path(path).expanduser()
        if path.suffix not in _PICTURES:
            raise RequestError(f"A picture's file should end with {', '.join(_PICTURES)}, found {path.name!r}.")
        if not path.parent.is_dir():
            raise RequestError(f"{path.parent} is no folder: make it first, or give another place for the picture.")
        picture = self.figure(width)
        if isinstance(picture, Note):
            raise RequestError(f"{picture} {path} was not written.")
        return save_picture(picture, path, "two_runs", picture.alt)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: every field but the reports, and the finding."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "reports"]
        shallow = {name: getattr(self, name) for name in fields}
        for name in ("moved", "captions", "changes"):
            shallow[name] = [dataclasses.asdict(one) for one in shallow[name]]
        return {**shallow, "finding": self.finding}


def compare_reports(one: ReportData, other: ReportData, names: tuple[str, str] = ("A", "B")) -> Difference:
    """Compare what two runs found, as far as both went.

    Args:
        one, other: the reports of A and B, of the same model or of two.
        names: what to call the runs.
    """
    a, b = one.content, other.content
    moved, still = stage_moves(a, b)
    places = [{stage["name"]: None for stage in report["stages"]} for report in (a, b)]
    alone = [tuple(name for name in mine if name not in theirs) for mine, theirs in itertools.permutations(places)]
    changed, compared = _captions(a, b)
    logits = [report["logits"] for report in (a, b) if report.get("logits")]
    return Difference(
        names=names,
        reports=(one, other),
        verdicts=(one.verdict, other.verdict),
        first_wrong=(_first_wrong(a), _first_wrong(b)),
        moved=moved,
        still=still,
        only=(alone[0], alone[1]) if all(places) else ((), ()),
        logits={name: _pair(side.get(name) for side in logits) for name in LOGITS} if len(logits) == 2 else {},
        captions=changed,
        captions_compared=compared,
        same_weights=_weights_hash(a) == _weights_hash(b) != "",
        changes=_changes(a, b),
    )


def stage_moves(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[Move, ...], int]:
    """The stages in both reports that moved, in the order of the network, and how many did not.

    Matched by name. Places where something only arrives have no error of their own and are not counted.
    """
    after = excesses(other)
    both = [Move(name, value, after[name]) for name, value in excesses(one).items() if name in after]
    moved = tuple(move for move in both if not _alike(move.before, move.after))
    return moved, len(both) - len(moved)


def excesses(report: Mapping[str, Any]) -> dict[str, float]:
    """Stage -> error ÷ its own rounding, of the stages that have one: see `Move` for zero and NaN."""
    return {stage["name"]: _excess(stage) for stage in report["stages"] if not stage.get("junction")}


def _excess(stage: Mapping[str, Any]) -> float:
    bit_equal = stage.get("excess") is None and stage.get("local_error") == 0
    return 0.0 if bit_equal else float(to_floats([stage.get("excess")])[0])


def _alike(before: float, after: float) -> bool:
    lost = math.isnan(before) and math.isnan(after)
    return lost or before == after or abs(after - before) <= SMALLEST_MOVE * abs(before)


def _pair(values: Iterable[Any]) -> tuple[float, float]:
    before, after = to_floats(values)
    return float(before), float(after)


def _first_wrong(report: Mapping[str, Any]) -> str:
    return (report.get("first_divergence") or {}).get("stage", "")


def _captions(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[Caption, ...], int]:
    """What transformers said otherwise, and of how many captions: those of the images and ways that both have."""
    said = [(report.get("captions") or {}).get("huggingface") or {} for report in (one, other)]
    pairs = [
        Caption(mode, image, before, after)
        for mode in said[0]
        if mode in said[1]
        for image, (before, after) in enumerate(zip(said[0][mode], said[1][mode], strict=False), 1)
    ]
    return tuple(one for one in pairs if one.before != one.after), len(pairs)


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Change, ...]:
    a, b = _made_of(one), _made_of(other)
    if one["stages"] and other["stages"]:  # else that one was not compared with LAVIS is said once: another proof
        a, b = a | _compared_with(one), b | _compared_with(other)
    whole = {what: (a.get(what, "none"), b.get(what, "none")) for what in [*a, *b]}
    return tuple(Change(what, *values) for what, values in whole.items() if values[0] != values[1])


def _made_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What a run was made of and by, in words; what the report does not say is left out."""
    made: Mapping[str, Any] = report.get("provenance") or {}
    files = made.get("files")
    told = {
        "model": report["model_name"],
        "proof": report.get("proof"),
        "dtype": made.get("dtype"),
        "language model": made.get("language_model"),
        "image size": made.get("image_size"),
        "prompt": json.dumps(made["prompt"]) if "prompt" in made else None,
        "checkpoints": ", ".join(made.get("checkpoints") or []),
        "files read": files and f"{as_count(len(files), 'file')}, {sum(file['bytes'] for file in files)} bytes",
        "hash of the weights": _weights_hash(report)[:12],
    }
    return _said(told) | _versions(report, {"converted with": "converting", "checked with": "checking"})


def _compared_with(report: Mapping[str, Any]) -> dict[str, str]:
    """The reference recording, and what is known to be different from it whatever the weights."""
    recorded: Mapping[str, Any] = (report.get("provenance") or {}).get("reference") or {}
    told = {
        "hash of the recording's inputs": (recorded.get("inputs_hash") or "")[:12],
        "recording's texts": json.dumps(recorded["texts"], ensure_ascii=False) if "texts" in recorded else None,
        "recording made on": recorded.get("device"),
        "threshold": report.get("threshold"),
        "known differences": ", ".join(known["id"] for known in report.get("known_differences") or []),
        "attributes that differ": ", ".join(report.get("attribute_differences") or []),
    }
    return _said(told) | _versions(report, {"reference": "recording"})


def _versions(report: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, str]:
    versions: Mapping[str, Any] = report.get("versions") or {}
    return {
        f"{library} ({word})": version
        for role, word in roles.items()
        for library, version in versions.get(role, {}).items()
    }


def _said(told: Mapping[str, Any]) -> dict[str, str]:
    return {what: str(value) for what, value in told.items() if value not in (None, "")}


def _weights_hash(report: Mapping[str, Any]) -> str:
    made: Mapping[str, Any] = report.get("provenance") or report.get("weights") or {}
    return made.get("weights_hash") or ""

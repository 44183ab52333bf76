"""Two runs compared: the verdicts, the stages that moved, the output, and the parameters in which the runs differ."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

from blip2nb.display.captions import words_alike
from blip2nb.display.figures.moves import SMALLEST_MOVE, Move
from blip2nb.display.figures.words import as_count, as_number, as_percent, first_few, to_floats
from blip2nb.display.text import VERDICTS
from blip2nb.forms import plain
from blip2nb.report.outputs import CaptionChange, Change, RunsCompared, StageMove
from blip2nb.report.schema import Content, Stage
from blip2nb.report.store import ReportData

LOGITS = {
    "relative": ("relative error", as_number),
    "max_abs": ("largest difference", as_number),
    "kl": ("KL divergence, nats", as_number),
    "top1_agreement": ("same first token", as_percent),
}
"""What is compared of the logits: its name on screen, and how its value is written."""

_WORDS_AROUND, _CAPTIONS_SHOWN = 4, 6  # chosen: a few words around a change tell where it is; a twin has six images

_MODES = {"greedy": "greedy", "beams": "5 beams", "default": "LAVIS's own beams"}


@dataclasses.dataclass(frozen=True)
class Caption(CaptionChange):
    """A caption that changed, in words."""

    def __str__(self) -> str:
        """Both, a few words around the place where they part."""
        a, b = self.before.split(), self.after.split()
        alike = words_alike(a, b)
        start, stop = max(alike - _WORDS_AROUND, 0), alike + _WORDS_AROUND
        parts = [["…"] * (start > 0) + words[start:stop] + ["…"] * (stop < len(words)) for words in (a, b)]
        return " → ".join(" ".join(words) or "(nothing)" for words in parts)


@dataclasses.dataclass(frozen=True, repr=False)
class ReportDifference:
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

    @classmethod
    def of(cls, one: ReportData, other: ReportData, names: tuple[str, str] = ("A", "B")) -> Self:
        """Compare what two runs found, as far as both went.

        Args:
            one, other: the reports of A and B, of the same model or of two.
            names: what to call the runs.
        """
        a, b = one.content, other.content
        moved, still = stage_moves(a, b)
        places = [{stage.name: None for stage in report.stages} for report in (a, b)]
        alone = [tuple(name for name in mine if name not in theirs) for mine, theirs in itertools.permutations(places)]
        changed, compared = _captions(a, b)
        logits = [report.logits for report in (a, b) if report.logits]
        return cls(
            names=names,
            reports=(one, other),
            verdicts=(one.verdict, other.verdict),
            first_wrong=(a.first_stage, b.first_stage),
            moved=moved,
            still=still,
            only=(alone[0], alone[1]) if all(places) else ((), ()),
            logits={name: _pair(getattr(side, name) for side in logits) for name in LOGITS} if len(logits) == 2 else {},
            captions=changed,
            captions_compared=compared,
            same_weights=_weights_hash(a) == _weights_hash(b) != "",
            changes=_changes(a, b),
        )

    @property
    def finding(self) -> str:
        """One sentence without a full stop: the first stage that moved."""
        unseen = [name for name, report in zip(self.names, self.reports, strict=True) if not report.content.stages]
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
            lines += [
                f"{letter}  {name}: {report.verdict} ({VERDICTS[report.verdict]})",
                f"   {report.content.summary}",
            ]
        for heading, rows in self._sections():
            lines += ["", heading]
            width = max((len(label) for label, value in rows if value), default=0)
            lines += [f"  {label:<{width}}  {value}".rstrip() for label, value in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        runs = "".join(
            f"<p><strong>{letter}: {html.escape(name)}: {report.verdict}</strong> ({VERDICTS[report.verdict]})<br>"
            f"{html.escape(report.content.summary)}</p>"
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
        wrong = [(letter, stage) for letter, stage in zip("AB", self.first_wrong, strict=True) if stage]
        sections += [("First wrong at", wrong)] if wrong else []
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

    @property
    def row(self) -> RunsCompared:
        """The same as --json prints it: without the reports."""
        return RunsCompared(
            names=self.names,
            verdicts=self.verdicts,
            first_wrong=self.first_wrong,
            moved=tuple(StageMove(one.stage, one.before, one.after) for one in self.moved),
            still=self.still,
            only=self.only,
            logits=self.logits,
            captions=self.captions,
            captions_compared=self.captions_compared,
            same_weights=self.same_weights,
            changes=self.changes,
            finding=self.finding,
        )


def stage_moves(one: Content, other: Content) -> tuple[tuple[Move, ...], int]:
    """The stages in both reports that moved, in the order of the network, and how many did not.

    Matched by name. Places where something only arrives have no error of their own and are not counted.
    """
    after = excesses(other)
    both = [Move(name, value, after[name]) for name, value in excesses(one).items() if name in after]
    moved = tuple(move for move in both if not _alike(move.before, move.after))
    return moved, len(both) - len(moved)


def excesses(report: Content) -> dict[str, float]:
    """Stage -> error ÷ its own rounding, of the stages that have one: see `Move` for zero and NaN."""
    return {stage.name: _excess(stage) for stage in report.stages if not stage.junction}


def _excess(stage: Stage) -> float:
    bit_equal = stage.excess is None and stage.local_error == 0
    return 0.0 if bit_equal else float(to_floats([stage.excess])[0])


def _alike(before: float, after: float) -> bool:
    lost = math.isnan(before) and math.isnan(after)
    return lost or before == after or abs(after - before) <= SMALLEST_MOVE * abs(before)


def _pair(values: Iterable[Any]) -> tuple[float, float]:
    before, after = to_floats(values)
    return float(before), float(after)


def _captions(one: Content, other: Content) -> tuple[tuple[Caption, ...], int]:
    """What transformers said otherwise, and of how many captions: those of the images and ways that both have."""
    said = [report.captions.huggingface if report.captions else {} for report in (one, other)]
    pairs = [
        Caption(mode, image, before, after)
        for mode in said[0]
        if mode in said[1]
        for image, (before, after) in enumerate(zip(said[0][mode], said[1][mode], strict=False), 1)
    ]
    return tuple(one for one in pairs if one.before != one.after), len(pairs)


def _changes(one: Content, other: Content) -> tuple[Change, ...]:
    a, b = _made_of(one), _made_of(other)
    if one.stages and other.stages:  # else that one was not compared with LAVIS is said once: another proof
        a, b = a | _compared_with(one), b | _compared_with(other)
    whole = {what: (a.get(what, "none"), b.get(what, "none")) for what in [*a, *b]}
    return tuple(Change(what, *values) for what, values in whole.items() if values[0] != values[1])


def _made_of(report: Content) -> dict[str, str]:
    """What a run was made of and by, in words; what the report does not say is left out."""
    told: dict[str, Any] = {"model": report.model_name, "proof": report.proof}
    if made := report.provenance:
        told |= {
            "dtype": made.dtype,
            "language model": made.language_model,
            "image size": made.image_size,
            "prompt": json.dumps(made.prompt),
            "checkpoints": ", ".join(made.checkpoints),
            "files read": f"{as_count(len(made.files), 'file')}, {sum(file.bytes for file in made.files)} bytes",
        }
    told["hash of the weights"] = _weights_hash(report)[:12]
    return _said(told) | _versions(report, {"converted with": "converting", "checked with": "checking"})


def _compared_with(report: Content) -> dict[str, str]:
    """The reference recording, and what is known to be different from it whatever the weights."""
    told: dict[str, Any] = {}
    if recorded := report.provenance and report.provenance.reference:
        told |= {
            "hash of the recording's inputs": recorded.inputs_hash[:12],
            "recording's texts": json.dumps(plain(recorded.texts), ensure_ascii=False),
            "recording made on": recorded.device,
        }
    told |= {
        "threshold": report.threshold,
        "known differences": ", ".join(known.id for known in report.known_differences),
        "attributes that differ": ", ".join(report.attribute_differences),
    }
    return _said(told) | _versions(report, {"reference": "recording"})


def _versions(report: Content, roles: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{library} ({word})": version
        for role, word in roles.items()
        for library, version in report.versions.get(role, {}).items()
    }


def _said(told: Mapping[str, Any]) -> dict[str, str]:
    return {what: str(value) for what, value in told.items() if value not in (None, "")}


def _weights_hash(report: Content) -> str:
    made = report.provenance or report.weights
    return made.weights_hash if made else ""

"""The forms of a sweep: what became of each run (sweep.json), and all of them together (index.json)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from blip2nb.forms import record
from blip2nb.report.schema import Number

INDEX_FORMAT = 2
"""The version of index.json. 1 left out what a run that was not finished lacks."""

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...] | Mapping[str, Scalar]
"""A notebook's parameter."""


@record
class Outcome:
    """What became of a run: its record, beside the report.

    Attributes:
        key: a hash over all that the run depends on; see `sweeps.identity`.
        state: finished, failed or not run.
        verdict: the report's, "" where there is none.
        error, traceback: of a run that failed.
        finished: when, in UTC.
        earlier: it was finished by an earlier sweep.
        folder: where it lies, from the sweep's folder; "" for nowhere.
        executed: the name of the executed notebook, "" for none.
        report: a hash of report.json; "" where there is none.
        keep_model: the converted model was to be kept; `kept` says that there is one.
    """

    run_name: str
    model_name: str
    notebook: str
    parameters: Mapping[str, Value]
    key: str
    state: str
    verdict: str = ""
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0
    finished: str = ""
    earlier: bool = False
    folder: str = ""
    executed: str = ""
    report: str = ""
    keep_model: bool = False
    kept: bool = False


@record
class ProofWords:
    """One proof of a run: passed, explained, failed or not done; in words; and where it is shown."""

    state: str
    words: str
    link: str | None


@record
class Proofs:
    """The five that a run goes through."""

    weights: ProofWords
    pixels: ProofWords
    layers: ProofWords
    logits: ProofWords
    captions: ProofWords

    @property
    def each(self) -> dict[str, ProofWords]:
        """By name, in the order in which they are made."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}  # type: ignore[arg-type]


@record
class WrongAt:
    """Where a run first goes wrong, or differs for a known reason; all in words."""

    stage: str
    module: str
    cause: str
    size: str
    known: bool


@record
class StageColumns:
    """The stages of a run, a value each: what the miniature draws, to three digits.

    Attributes:
        state: rounding, bit-equal, known, fault, not judged, or not a number.
    """

    name: tuple[str, ...]
    local_error: tuple[Number, ...]
    rounding: tuple[Number, ...]
    excess: tuple[Number, ...]
    state: tuple[str, ...]


@record
class Entry:
    """One run in index.json: what became of it, and what the sweep says of it. No text has control characters.

    Attributes:
        result: failed, diverges, no report, not run, incomplete, explained or match.
        page, notebook_page: links from the index's folder; null for none.
        summary: the report's sentence.
        missing: what the proof that was asked for lacks, in sentences.
        causes: in words.
        threshold: null where there is no report.
        versions: what -> library -> version.
        (The others are those of `Outcome`.)
    """

    run_name: str
    model_name: str
    notebook: str
    parameters: Mapping[str, Value]
    key: str
    state: str
    verdict: str
    error: str
    traceback: str
    seconds: float
    finished: str
    earlier: bool
    folder: str
    executed: str
    report: str
    keep_model: bool
    kept: bool
    result: str
    page: str | None
    notebook_page: str | None
    summary: str
    missing: tuple[str, ...]
    causes: tuple[str, ...]
    first_divergence: WrongAt | None
    threshold: float | None
    stages: StageColumns | None
    versions: Mapping[str, Mapping[str, str]]
    proofs: Proofs


@record
class Index:
    """All of index.json.

    Attributes:
        state: failed if a run failed; else diverges if one does; else not run if one was not run; else incomplete if a
            proof that was asked for is; else good.
        sentence: the finding.
        known: known difference, in words -> how many runs show it.
        counts: result -> runs, the worst first.
        seconds: of all that was not finished before.
        versions: what -> library -> those that were met.
        runs: in the order in which they were asked for.
    """

    format: int
    state: str
    sentence: str
    known: Mapping[str, int]
    counts: Mapping[str, int]
    seconds: float
    versions: Mapping[str, Mapping[str, tuple[str, ...]]]
    runs: tuple[Entry, ...]

"""A sweep's report for tests that know it as JSON: dictionaries go in, and come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from records import content, raw, record

from blip2nb.display.overview import entry, files, miniature
from blip2nb.display.overview import index as indexing
from blip2nb.display.overview import junit as junits
from blip2nb.display.overview import markdown as markdowns
from blip2nb.display.overview import page as pages
from blip2nb.display.overview.entry import PROOFS
from blip2nb.display.overview.index import PROOF_SIGNS, RESULTS
from blip2nb.report.sweep import Entry, Index, Outcome

__all__ = ["PROOFS", "PROOF_SIGNS", "RESULTS"]


def summarise(outcome: Mapping[str, Any], report: Any = None) -> dict[str, Any]:
    """One run's entry."""
    found = content(raw(report)) if report is not None else None
    return raw(entry.summarise(record(Outcome, outcome), found))


def index(entries: Sequence[Any]) -> dict[str, Any]:
    """The content of index.json."""
    return raw(indexing.index([record(Entry, one) for one in entries]))


def html(found: Mapping[str, Any]) -> str:
    """index.html."""
    return pages.html(record(Index, found))


def markdown(found: Any) -> str:
    """summary.md."""
    return markdowns.markdown(record(Index, found))


def junit(found: Any) -> str:
    """junit.xml."""
    return junits.junit(record(Index, found))


def texts(found: Mapping[str, Any]) -> dict[str, str]:
    """File name -> its whole content."""
    return files.texts(record(Index, found))


def save(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the four files."""
    return files.save(record(Index, found), folder)


def describe(one: Mapping[str, Any]) -> str:
    """What the miniature shows."""
    return miniature.describe(record(Entry, one))

"""index.html: all runs of a sweep on one page. Needs no network, and links to the runs' folders beside it.

What the page says and in which order is the template's (overview.html.j2).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from markupsafe import Markup

from blip2nb.display import templates
from blip2nb.display.figures.words import as_count
from blip2nb.display.overview import miniature
from blip2nb.display.overview.entry import PROOFS
from blip2nb.display.overview.index import PROOF_SIGNS, RESULTS, SIGNS
from blip2nb.report.sweep import Entry, Index, WrongAt

_MOST_TROUBLES, _MOST_LINKS = 10, 12  # chosen by eye: what is seen without scrolling; below stands everything


def html(index: Index) -> str:
    """index.html: needs no network, and links to the runs' folders beside it."""
    runs = list(enumerate(index.runs))
    drawn = [(number, entry) for number, entry in runs if entry.stages]
    top = miniature.top_decade(index.runs)
    return templates.template("overview.html.j2", count=as_count, seconds=_seconds, unbroken=_unbroken).render(
        index=index,
        runs=runs,
        proofs=PROOFS,
        signs=PROOF_SIGNS,
        result_signs=SIGNS,
        results=RESULTS,
        order=list(RESULTS),
        troubles=_troubles(index.runs),
        most_troubles=_MOST_TROUBLES,
        most_links=_MOST_LINKS,
        failed=[(number, entry) for number, entry in runs if entry.state == "failed"],
        not_run=[entry for _, entry in runs if entry.state == "not run"],
        axis=miniature.axis(top, next((entry.threshold for _, entry in drawn if entry.threshold), 0.0)),
        miniatures=[(number, entry, miniature.draw(entry, top)) for number, entry in drawn],
        given={number: _given(entry) for number, entry in runs},
        packages=sorted({package for found in index.versions.values() for package in found}),
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
        for name, value in entry.parameters.items()
        if value not in (entry.run_name, "") and not (name == "model_name" and entry.run_name.startswith(str(value)))
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
        if entry.state == "failed":
            new, link = _Trouble("Did not finish", "", "", f": {entry.error}", []), f"#failure-{number}"
        elif entry.result == "diverges":
            first = entry.first_divergence or WrongAt("a place that is not told", "", "", "", known=False)
            why = f"; most likely because: {(entry.causes or [entry.summary])[0]}"
            new = _Trouble(f"First wrong at {first.stage}", first.size, first.module, why, [])
            link = entry.proofs.layers.link or entry.page or ""
        else:
            continue
        found.setdefault((new.where, new.why), new).runs.append((entry.run_name, link))
    return list(found.values())

"""A sweep as GitHub's Markdown, for a pull request."""

from __future__ import annotations

import html as escaping
import itertools
import re
from collections.abc import Sequence

from blip2nb.display.overview.entry import PROOFS
from blip2nb.display.overview.index import PROOF_SIGNS, RESULTS, SIGNS
from blip2nb.report.sweep import Entry, Index

MOST_SUMMARY = 60_000
"""Letters of summary.md. GitHub refuses a comment of more than 65,536."""

_MOST_WHY = 300
"""Letters of one reason in the table. Chosen: a few lines of a cell."""

_MOST_TOLD = 2500
"""Letters of a traceback, of its end. Chosen: some thirty lines, so that eight failures fit beside a table."""

_LAST_SENTENCE = 100
"""Letters for the sentence that counts the failures left out, which is shorter than that."""


def markdown(index: Index) -> str:
    """The summary in GitHub's Markdown: the sentence, a table with the worst first, the failures."""
    counts = ", ".join(f"{number} {RESULTS[result]}" for result, number in index.counts.items())
    text = f"## {_escaped(index.sentence)}\n\n{counts}\n\n" if index.runs else f"## {index.sentence}\n"
    ordered = sorted(index.runs, key=lambda entry: list(RESULTS).index(entry.result))
    rows = [_row(entry) for entry in ordered]
    text += f"| run | result | {' | '.join(PROOFS)} | where and why |\n|{'---|' * (len(PROOFS) + 3)}\n" if rows else ""
    shown = _that_fit(rows, MOST_SUMMARY * 2 // 3)  # chosen: a third is left for the failures
    text += "".join(shown)
    if len(shown) < len(rows):
        text += f"\n{len(rows) - len(shown)} more are in index.html.\n"
    failures = [_failure(entry) for entry in ordered if entry.state == "failed"]
    told = _that_fit(failures, MOST_SUMMARY - len(text) - _LAST_SENTENCE)
    text += "".join(told)
    if len(told) < len(failures):
        text += f"\n{len(failures) - len(told)} more failures are in index.html.\n"
    return text


def _that_fit(texts: Sequence[str], room: int) -> list[str]:
    ends = itertools.accumulate(map(len, texts))
    return [text for text, end in zip(texts, ends, strict=True) if end <= room]


def _row(entry: Entry) -> str:
    first = entry.first_divergence
    why = f"{first.stage}, {first.size}: {first.cause}" if first else entry.error
    why = why or " ".join(entry.missing)
    proofs = [f"{PROOF_SIGNS[one.state]} {_escaped(one.words)}" for one in entry.proofs.each.values()]
    result = f"{SIGNS[entry.result]} {RESULTS[entry.result]}"
    return f"| {' | '.join([_code(entry.run_name), result, *proofs, _escaped(_cut(why, _MOST_WHY))])} |\n"


def _failure(entry: Entry) -> str:
    lines = entry.traceback[-_MOST_TOLD:] or entry.error
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    head = f"<b>{escaping.escape(_one_line(entry.run_name))}</b>: {escaping.escape(_cut(entry.error, _MOST_WHY))}"
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

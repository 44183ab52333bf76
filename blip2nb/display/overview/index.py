"""All runs of a sweep in one sentence and one table of contents, and the four files of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from blip2nb.display.figures.words import first_few
from blip2nb.report.sweep import INDEX_FORMAT, Entry, Index

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

SIGNS = {
    "match": "✓",
    "explained": "≈",
    "diverges": "✗",
    "failed": "✗",
    "incomplete": "½",
    "no report": "–",
    "not run": "–",
}
"""The same as signs."""

PROOF_SIGNS = {"passed": "✓", "explained": "≈", "failed": "✗", "not done": "–"}


def index(entries: Sequence[Entry]) -> Index:
    """All runs together.

    Args:
        entries: what `entry.summarise` gave for each, in the order in which they were asked for.
    """
    counts = Counter(entry.result for entry in entries)
    bad = [result for result in ("failed", "diverges", "not run") if counts[result]]
    bad += ["incomplete"] if any(entry.missing for entry in entries) else []
    known = Counter(cause for entry in entries if entry.result == "explained" for cause in entry.causes)
    return Index(
        format=INDEX_FORMAT,
        state=next(iter(bad), "good"),
        sentence=_sentence(entries, counts, len(known)),
        known=dict(known.most_common()),
        counts={result: counts[result] for result in RESULTS if counts[result]},
        seconds=round(sum(entry.seconds for entry in entries if not entry.earlier), 2),
        versions=_versions(entries),
        runs=tuple(entries),
    )


def _sentence(entries: Sequence[Entry], counts: Mapping[str, int], known: int) -> str:
    """The finding: what is wrong, in which runs; else what all of them are."""
    total = len(entries)
    if not total:
        return "Nothing was run"
    failed, diverging = ([one for one in entries if one.result == what] for what in ("failed", "diverges"))
    verb = "diverges" if len(diverging) == 1 else "diverge"
    waiting = f"; {counts['not run']} of {total} not run" if counts["not run"] else ""
    if failed and diverging:
        words = f"{len(failed)} of {total} failed and {len(diverging)} {verb}"
        return f"{words}: {first_few(_named(failed + diverging), 3)}{waiting}"
    if failed:
        return f"{len(failed)} of {total} failed: {first_few(_named(failed), 3)}{waiting}"
    if diverging:
        words = f"{len(diverging)} of {total} {verb}: {first_few(_named(diverging), 3)}"
        first = diverging[0].first_divergence
        return words + (f", first wrong at {first.stage}" if first and len(diverging) == 1 else "") + waiting
    done = total - counts["not run"]
    return f"{_good(entries, counts, done, known)}{waiting}" if done else f"None of {total} was run"


def _named(entries: Iterable[Entry]) -> list[str]:
    return [entry.run_name for entry in entries]


def _good(entries: Sequence[Entry], counts: Mapping[str, int], done: int, known: int) -> str:
    """What the runs are, where nothing is wrong with any."""
    proven, silent = counts["match"] + counts["explained"], counts["no report"]
    lacks = sum(bool(entry.missing) for entry in entries)
    alone = counts["incomplete"] - lacks
    but = f", {'with one known difference' if known == 1 else 'with known differences'}"
    if proven == done:
        who = f"All {done} are" if done > 1 else f"{next(e.run_name for e in entries if e.result in RESULTS)} is"
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


def _versions(entries: Iterable[Entry]) -> dict[str, dict[str, tuple[str, ...]]]:
    found: dict[str, dict[str, set[str]]] = {}
    for entry in entries:
        for what, packages in entry.versions.items():
            for package, version in packages.items():
                found.setdefault(what, {}).setdefault(package, set()).add(version)
    return {what: {one: tuple(sorted(packages[one])) for one in sorted(packages)} for what, packages in found.items()}

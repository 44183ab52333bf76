"""What was measured, kept in a JSON file that grows with every run, and the Markdown drawn from it.

    {"sizes": {"1.5b": {"model", "note", "source_bytes", "stamp", "series", "memory", "in_memory"}, …}, "costs": {…}}

A series is a list of pairs of seconds; memory is in bytes; costs are GB/s. A stamp is the machine, the versions and
whatever else must be equal for two measurements to belong together.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.costs import STEPS, in_one_thread
from benchmarks.synthetic import SIZES, Size

Entry = dict[str, Any]

START_UP_BYTES = 10_000_000
"""Below this a conversion is a process that starts, and a ratio to `cp` says nothing. Chosen: between a twin, 1 MB, and
the next size, 500 MB."""


class Results:
    """The file of results. `save` writes it and its Markdown; nothing else does."""

    def __init__(self, path: Path):
        self.path = path
        self.content: Entry = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"sizes": {}}

    def size(self, size: Size, stamp: Entry, *, fresh: bool = False) -> Entry:
        """What is known of a size: what earlier runs of the same stamp measured, or an empty entry."""
        entry = self.content["sizes"].get(size.name)
        if entry is None or fresh or entry["stamp"] != stamp:
            entry = {"model": size.model, "note": size.note, "stamp": stamp, "series": {}}
            self.content["sizes"][size.name] = entry
        return entry

    def costs(self, rates: dict[str, float], stamp: Entry) -> None:
        """Keep the costs of single steps, in GB/s."""
        self.content["costs"] = {"stamp": stamp, "rates": rates}

    def save(self) -> None:
        """Write JSON and Markdown, each whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"),
            (self.path.with_suffix(".md"), markdown(self.content)),
        ):
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)


def ratios(pairs: Iterable[Entry], above: str, below: str) -> list[float]:
    """One quotient of seconds a pair."""
    return [pair[above] / pair[below] for pair in pairs]


def markdown(content: Entry) -> str:
    """All tables, with machine and versions beneath them."""
    sizes = {name: content["sizes"][name] for name in SIZES if name in content["sizes"]}
    parts = [
        "# What a conversion costs",
        "Written by `python -m benchmarks.convert`; the numbers are in the JSON beside.",
    ]
    for section in (_time, _memory, _in_memory):
        if table := section(sizes):
            parts += table
    if "costs" in content:
        parts += _costs(content["costs"]["rates"])
    parts += _notes(sizes) + _stamps(content, sizes)
    return "\n\n".join(parts) + "\n"


def _time(sizes: dict[str, Entry]) -> list[str]:
    rows = []
    for name, entry in sizes.items():
        for dtype, series in entry["series"].items():
            if not (pairs := series["pairs"]):
                continue
            took = statistics.median(pair["convert"] for pair in pairs)
            copied = statistics.median(pair["copy"] for pair in pairs)
            read, written = entry["source_bytes"], series["output_bytes"]
            quotient = _spread(ratios(pairs, "convert", "copy")) if read > START_UP_BYTES else "start-up alone"
            rates = [f"{read / took / 1e9:.2f}", f"{read / copied / 1e9:.2f}"]
            row = [name, dtype, _gb(read), _gb(written), f"{took:.2f}", f"{copied:.2f}", quotient, *rates]
            rows.append([*row, str(len(pairs))])
    if not rows:
        return []
    said = (
        "`blip2nb convert` as a whole process, start-up and its own fsync included, and `cp -r` of the same source "
        "with `sync`, in turns. Before each, the last output is deleted, the disk synced and the source "
        f"{_cache_states(sizes)}. The ratio is that of a pair: median (smallest to largest)."
    )
    head = ["size", "dtype", "source GB", "output GB", "convert s", "cp + sync s", "convert ÷ cp"]
    return ["## Time", said, table([*head, "convert GB/s", "cp GB/s", "pairs"], rows)]


def _cache_states(sizes: dict[str, Entry]) -> str:
    words = {True: "dropped from the page cache", False: "read once, so that both find the page cache alike"}
    return " or ".join(dict.fromkeys(words[entry["stamp"]["drop_caches"]] for entry in sizes.values()))


def _memory(sizes: dict[str, Entry]) -> list[str]:
    rows = []
    for name, entry in sizes.items():
        if memory := entry.get("memory"):
            peaks = [memory[what] for what in ("convert", "twin", "imports")]
            rows.append([name, *map(_mb, peaks), _mb(peaks[0] - peaks[2]), _mb(peaks[0] - peaks[1])])
    if not rows:
        return []
    said = (
        "Peak anonymous memory (RssAnon, children included, looked at every 10 ms) in MB: of the conversion, of the "
        "conversion of this model's twin, and of a process that only imports what the copying process imports. A "
        "process beside it, which writes tokenizer and configuration for a second, is counted with it."
    )
    return ["## Memory", said, table(["size", "convert", "twin", "imports", "over imports", "over the twin"], rows)]


def _in_memory(sizes: dict[str, Entry]) -> list[str]:
    rows = []
    for name, entry in sizes.items():
        measured = entry.get("in_memory")
        if measured is None:
            continue
        pairs = measured["pairs"]
        if measured["refused"] or not pairs:
            rows.append([name, measured["refused"], *[""] * 5])
            continue
        took = [statistics.median(pair[what] for pair in pairs) for what in ("in_memory", "convert")]
        peaks = [_mb(measured["peak"]), _mb(entry["memory"]["convert"])]
        quotient = _spread(ratios(pairs, "in_memory", "convert"))
        rows.append([name, f"{took[0]:.2f}", f"{took[1]:.2f}", quotient, *peaks, str(len(pairs))])
    if not rows:
        return []
    said = (
        "The plain way: every file loaded, an initialised float32 model beside it, `load_state_dict`, "
        "`save_pretrained`, `sync`; in turns with `blip2nb convert`. Peak anonymous memory in MB."
    )
    head = ["size", "in memory s", "convert s", "in memory ÷ convert", "in memory MB", "convert MB", "pairs"]
    return ["## Everything in memory", said, table(head, rows)]


def _costs(rates: dict[str, float]) -> list[str]:
    said = (
        f"One thread, GB/s. One that does to every byte of a .pth what a conversion does ({', '.join(STEPS)}), one "
        f"after the other, comes to {in_one_thread(rates):.2f} GB/s."
    )
    return [
        "## What bounds it",
        said,
        table(["step", "GB/s"], [[step, f"{rate:.2f}"] for step, rate in rates.items()]),
    ]


def _notes(sizes: dict[str, Entry]) -> list[str]:
    notes = [f"- {name}: {entry['note']}" for name, entry in sizes.items() if entry["note"]]
    said = "Synthetic random weights in the released layout, names, shapes and dtypes (`benchmarks/synthetic.py`)."
    return ["## Sizes", "\n".join([said, *(["", *notes] if notes else [])])] if sizes else []


def _stamps(content: Entry, sizes: dict[str, Entry]) -> list[str]:
    """Machine and versions: once where all agree, else by what was measured there."""
    by_stamp: dict[str, list[str]] = {}
    stamped = {**sizes, **({"costs": content["costs"]} if "costs" in content else {})}
    for name, entry in stamped.items():
        said = "\n".join(
            f"- {what.replace('_', ' ')}: {value}"
            for part in ("machine", "versions")
            for what, value in entry["stamp"][part].items()
        )
        by_stamp.setdefault(said, []).append(name)
    if len(by_stamp) == 1:
        return ["## Machine and versions", *by_stamp]
    return [text for said, names in by_stamp.items() for text in (f"## Machine and versions: {', '.join(names)}", said)]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}" if size >= 10_000_000 else f"{size / 1e9:.4f}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    line: Callable[[Sequence[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return "\n".join([line(head), f"|{'---|' * len(head)}", *map(line, rows)])

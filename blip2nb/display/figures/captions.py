"""F9, the captions: what both models say about each image."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from blip2nb.display.figures.axes import legend_key
from blip2nb.display.figures.style import FAULT, INK, LAVIS, MUTED, TRANSFORMERS, Arrays, Picture, Report, styled
from blip2nb.display.figures.words import as_count, as_token, text_inches, wrap_text


def available(report: Report, arrays: Arrays) -> bool:
    return bool(((report.get("captions") or {}).get("lavis") or {}).get("greedy"))


@styled
def draw(report: Report, arrays: Arrays, width: float = 7.0) -> Figure:
    """F9: what both models say about each image, greedily, and the word at which they part.

    Args:
        report: `captions`, of `lavis` and `huggingface` by way of decoding; `random_weights`.
        arrays: not used.
        width: inches.
    """
    ours, theirs = (report["captions"][side]["greedy"] for side in ("lavis", "huggingface"))
    size = matplotlib.rcParams["font.size"] / 72
    room = width - 0.2 - 4.6 * size
    entries = [_caption_lines(number, a, b, room) for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)]
    notes = [wrap_text(words, width - 0.2) for words in _caption_notes(report)]
    title = wrap_text(_captions_finding(ours, theirs), width - 0.15, "figure.titlesize", "bold")
    top = 0.14 + 1.7 * size * (title.count("\n") + 1)
    listed = 1.5 * size * sum(len(lines) + 0.5 for lines in entries)
    height = top + listed + size * (2.4 + 1.5 * sum(note.count("\n") + 1 for note in notes))
    picture = Picture(width, height, alt_text(report, arrays), layout=None)
    page = picture.add_axes((0, 0, 1, 1))  # in inches from the top left: a page, not a plot
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    picture.suptitle(title, x=0.01, y=1 - 0.06 / height, ha="left", va="top")
    down = top
    for lines in entries:
        for line in lines:
            _caption_line(page, line, down, size)
            down += 1.5 * size
        down += 0.75 * size
    down += 0.4 * size
    keys = {"LAVIS": legend_key("o", LAVIS), "transformers": legend_key("s", TRANSFORMERS)}
    if list(ours) != list(theirs):
        keys["from here they part"] = Line2D([], [], ls="", marker="|", mec=FAULT, mew=1.2)
    page.legend(list(keys.values()), list(keys), loc="upper left", ncols=3, borderpad=0,
                bbox_to_anchor=(0, 1 - down / height), handlelength=1.2, borderaxespad=0)  # fmt: skip
    for note in notes:
        down += 1.5 * size
        page.text(0.01 * width, down, note, va="top", color=MUTED)
        down += 1.5 * size * note.count("\n")
    return picture


@dataclasses.dataclass(frozen=True)
class _Line:
    """One line of a caption: its number and marks if it is the first, then pieces of text that are alike or are not."""

    number: str
    marks: tuple[str, ...]
    pieces: tuple[tuple[str, bool], ...]


def _caption_lines(number: int, ours: str, theirs: str, room: float) -> list[_Line]:
    a, b = _readable_words(ours), _readable_words(theirs)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    if ours == theirs:
        return _broken_up(f"{number}", ("o", "s"), a, len(a), room)
    if a == b:  # the same words; the spaces between them are not
        a, b, alike = [as_token(ours)], [as_token(theirs)], 0
    first = _broken_up(f"{number}", ("o",), a, alike, room)
    return [*first, *_broken_up("", ("s",), b, alike, room)]


def _readable_words(text: str) -> list[str]:
    return [as_token(word, spaces=False) for word in text.split()]


def _broken_up(number: str, marks: tuple[str, ...], words: list[str], alike: int, room: float) -> list[_Line]:
    """Words in lines of at most `room` inches. Bold is wider, so what parts is measured as bold."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0.0
    for place, word in enumerate(words or ["(nothing)"]):
        same = place < alike
        word = f"│{word}" if place == alike else word
        needed = text_inches(word + " ", weight="normal" if same else "bold")
        if lines[-1] and used + needed > room:
            lines.append([])
            used = 0.0
        lines[-1].append((word, same))
        used += needed
    merged = [tuple((" ".join(w for w, _ in group), same) for same, group in itertools.groupby(line, lambda p: p[1]))
              for line in lines]  # fmt: skip
    return [_Line(number if n == 0 else "", marks if n == 0 else (), pieces) for n, pieces in enumerate(merged)]


def _caption_line(page: Axes, line: _Line, down: float, size: float) -> None:
    baseline = down + 0.95 * size
    page.text(0.1 + 1.6 * size, baseline, line.number, ha="right", color=MUTED)
    for mark in line.marks:
        key = legend_key("o", LAVIS) if mark == "o" else legend_key("s", TRANSFORMERS)
        key.set(xdata=[0.1 + (2.6 if mark == "o" else 3.6) * size], ydata=[down + 0.58 * size], markersize=5)
        page.add_line(key)
    x = 0.1 + 4.6 * size
    for text, same in line.pieces:
        weight = "normal" if same else "bold"
        page.text(x, baseline, text, weight=weight, color=INK if same else FAULT)
        x += text_inches(text + " ", weight=weight)


def _captions_finding(ours: Sequence[str], theirs: Sequence[str]) -> str:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    if equal == len(ours):
        return f"Both models say the same of {'all ' if equal > 1 else ''}{as_count(equal, 'image')} (greedy)"
    return f"The captions part on {len(ours) - equal} of {as_count(len(ours), 'image')} (greedy)"


def _caption_notes(report: Report) -> list[str]:
    notes = []
    for mode, values in (report["captions"].get("modes") or {}).items():
        equal = values.get("equal")
        if mode != "greedy" and equal:
            notes.append(f"{_MODES.get(mode, mode)}: {sum(map(bool, equal))} of {len(equal)} equal")
    if report.get("random_weights"):
        notes.append("random weights: this caption is noise on purpose")
    return notes


_MODES = {"beams": "five beams", "default": "five beams as LAVIS sets them by default"}


def alt_text(report: Report, arrays: Arrays) -> str:
    ours, theirs = (report["captions"][side]["greedy"] for side in ("lavis", "huggingface"))
    noise = " The weights are random, so the captions are noise on purpose." if report.get("random_weights") else ""
    return f"{_captions_finding(ours, theirs)}. {as_count(len(ours), 'image')} in all.{noise}"


def table(report: Report, arrays: Arrays) -> list[dict[str, Any]]:
    """A row for each image and way of decoding."""
    said = report["captions"]
    return [
        {"mode": mode, "image": number, "lavis": ours, "transformers": theirs, "equal": ours == theirs}
        for mode in said["lavis"]
        for number, (ours, theirs) in enumerate(zip(said["lavis"][mode], said["huggingface"][mode], strict=True), 1)
    ]

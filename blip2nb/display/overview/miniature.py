"""A run's errors over depth in miniature: a few SVG paths, in the units of its view box."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from blip2nb.display.figures.depth import parts_of
from blip2nb.display.figures.words import as_count
from blip2nb.forms import INFINITE, there
from blip2nb.report.sweep import Entry, WrongAt

# Units of the drawing, chosen by eye, as are the paddings below: two miniatures stand beside each other on a page.
WIDTH, HEIGHT = 320, 118
_LEFT, _RIGHT, _TOP, _LOW, _ZERO = 30, 314, 20, 88, 97
_LETTER = 5.5  # how wide a letter of its font is, at most


@dataclasses.dataclass(frozen=True)
class Miniature:
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
    found = [one for entry in entries if entry.stages for one in entry.stages.excess if one]
    return max(2, math.ceil(math.log10(max((one for one in found if one < INFINITE), default=1.0)) + 0.15))


def _height(excess: float, top: int) -> float:
    share = (math.log10(excess) + 1) / (top + 1)
    return round(_LOW - min(max(share, 0.0), 1.0) * (_LOW - _TOP), 1)


def axis(top: int, threshold: float) -> dict[str, Any]:
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


def draw(entry: Entry, top: int) -> Miniature:
    stages, first = there(entry.stages), entry.first_divergence
    names, states = stages.name, stages.state
    pitch = (_RIGHT - _LEFT) / max(len(names), 1)
    xs = [round(_LEFT + (place + 0.5) * pitch, 1) for place in range(len(names))]
    ys = [_place(*one, top) for one in zip(stages.excess, states, strict=True)]
    base = _height(1.0, top)
    paths = {"stems": "", "dots": "", "known": "", "wrong": ""}
    for x, y, state in zip(xs, ys, states, strict=True):
        kind = {"known": "known", "fault": "wrong", "not a number": "wrong"}.get(state, "dots")
        paths[kind] += f"M{x:g} {y:g}h0" if kind == "dots" else f"M{x:g} {y - 4:g}l4 4-4 4-4-4z"
        if y != _ZERO:
            paths["stems"] += f"M{x:g} {base:g}V{y:g}"
    parts = parts_of(names)
    edges = [round(_LEFT + start * pitch, 1) for _, start, _ in parts[1:]]
    mark = None
    if first and first.stage in names:
        x = xs[names.index(first.stage)]
        anchor = "start" if x < (_LEFT + _RIGHT) / 2 else "end"
        mark = (x - 4 if anchor == "start" else x + 4, anchor, f"{'known: ' * first.known}{first.stage}")
    return Miniature(
        **paths,
        borders="".join(f"M{x:g} {_TOP - 4}V{_ZERO + 5}" for x in edges),
        parts=[
            (name.split(" ")[-1], round(_LEFT + (start + stop) / 2 * pitch, 1))
            for name, start, stop in parts
            if pitch * (stop - start) > _LETTER * len(name.split(" ")[-1])
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
    stages = there(entry.stages)
    counts = Counter(stages.state)
    words = {"rounding": "by rounding alone", "not judged": "not judged", "bit-equal": "bit-equal",
             "known": "for a known reason", "fault": "wrong", "not a number": "not a number"}  # fmt: skip
    said = ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state])
    first = entry.first_divergence
    where = f" {first_words(first)}." if first else ""
    return f"{as_count(len(stages.name), 'place')} from the image to the logits: {said}.{where}"


def first_words(first: WrongAt) -> str:
    how = "Known difference" if first.known else "First wrong"
    return f"{how} at {first.stage}: {first.size}"

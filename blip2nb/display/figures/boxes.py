"""The stages as boxes in parts: what belongs together and what repeats, read off their names, and how each fared."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

from blip2nb.display.figures.depth import Depth
from blip2nb.display.figures.style import Report
from blip2nb.display.figures.words import as_count, as_number, as_times, first_few
from blip2nb.report.schema import FirstDivergence, Stage

DIVERGES, LOST, UNJUDGED, ROUNDS, EQUAL = (
    "diverges", "not a number", "not judged", "agrees to rounding", "bit-equal",
)  # fmt: skip
"""Worst first."""

_MARKS = {DIVERGES: "✗", LOST: "?", UNJUDGED: "?", ROUNDS: "✓", EQUAL: "="}

ARRIVAL = 2.0**-20
"""What arrives somewhere may differ by this much: trace.metrics.ARRIVAL_TOLERANCE, without loading torch."""


def fares_of(report: Report) -> list[str]:
    """How each place fared, in the order of the report."""
    depth = Depth.of(report)
    found = []
    for place in depth.places:
        error = depth.arrival_error[place] if depth.junction[place] else depth.local_error[place]
        if depth.wrong[place] or (depth.junction[place] and error > ARRIVAL):
            found.append(DIVERGES)
        elif depth.broken[place]:
            found.append(LOST)
        elif error == 0:
            found.append(EQUAL)
        else:
            found.append(UNJUDGED if depth.unjudged[place] else ROUNDS)
    return found


def finding(report: Report) -> str:
    """What there is to say of all places in one line: the first that is wrong, or how they agree."""
    fares, first = fares_of(report), report.first_divergence
    counts = Counter(fares)
    if first:
        others = counts[DIVERGES] - 1
        rest = f"{as_count(others, 'other place')} diverge{'s' if others == 1 else ''}" if others else "all else agrees"
        if counts[LOST] + counts[UNJUDGED] and not others:
            rest = f"{as_count(counts[LOST] + counts[UNJUDGED], 'place')} cannot be judged"
        return f"First wrong at {first.stage}: {_first_size(report, first)}; {rest}"
    if counts[DIVERGES]:
        return f"{counts[DIVERGES]} of {len(fares)} places diverge"
    if counts[LOST] + counts[UNJUDGED]:
        return f"{counts[LOST] + counts[UNJUDGED]} of {len(fares)} places cannot be judged, the others agree"
    if counts[EQUAL] == len(fares):
        return f"All {len(fares)} places agree, bit for bit"
    return f"All {len(fares)} places agree: {counts[EQUAL]} bit-equal, {counts[ROUNDS]} to rounding"


def _first_size(report: Report, first: FirstDivergence) -> str:
    stage = next((stage for stage in report.stages if stage.name == first.stage), None)
    return _wrong_by(first.excess, None) if stage is None else _size_words(stage)


def _size_words(stage: Stage) -> str:
    """How wrong a place that diverges is."""
    return _wrong_by(stage.excess, stage.arrival_error if stage.junction else None)


def _wrong_by(excess: float | None, arrival: float | None) -> str:
    if excess is not None and not math.isnan(excess):
        return f"{as_times(excess)} its own rounding"
    if arrival is not None and not math.isnan(arrival):
        return f"off by {as_number(arrival)}"
    return "not a number"


# -- parts and boxes, read off the names


@dataclasses.dataclass(frozen=True)
class Box:
    """One place, or blocks that repeat.

    Attributes:
        label: its name within the part: `post_layernorm`, `block.00 … 38`.
        names: the stages' own names.
        reference, module: its place in LAVIS and in transformers.
        fares: how each of its stages fared.
        words: that in words.
        note: the first divergence, if it is here: its full name, and its cause.
    """

    label: str
    names: tuple[str, ...]
    reference: str
    module: str
    fares: tuple[str, ...]
    words: str
    note: str

    @property
    def fare(self) -> str:
        """Of its stages' the worst."""
        return next(fare for fare in _MARKS if fare in self.fares)


@dataclasses.dataclass(frozen=True)
class Part:
    """Boxes that belong together; a place that belongs to no part has one of its own without a name."""

    name: str
    boxes: tuple[Box, ...]


def in_parts(report: Report) -> list[Part]:
    """The stages in boxes, those in parts, in the order of the report."""
    repeated: dict[str, list[int]] = {}
    for place, stage in enumerate(report.stages):
        repeated.setdefault(_template(stage.name), []).append(place)
    fares = fares_of(report)
    boxes = [(part_of(template), _box(report, fares, places)) for template, places in repeated.items()]
    parts: list[Part] = []
    for name, group in itertools.groupby(boxes, key=lambda pair: pair[0]):
        inside = tuple(box for _, box in group)
        parts += [Part(name, inside)] if name else [Part("", (box,)) for box in inside]
    return parts


def part_of(name: str) -> str:
    """The part that a stage belongs to, or "": `vision` for `vision.block.07`."""
    return _split(_template(name))[0]


def _template(name: str) -> str:
    """`vision.block.07` → `vision.block.{n}`."""
    return ".".join("{n}" if word.isdigit() else word for word in name.split("."))


def _split(name: str) -> tuple[str, str]:
    """(part, name within it): a number goes with the word before it."""
    words = name.split(".")
    last = 2 if len(words) > 1 and (words[-1].isdigit() or words[-1] == "{n}") else 1
    return ".".join(words[:-last]), ".".join(words[-last:])


def _box(report: Report, fares: Sequence[str], places: Sequence[int]) -> Box:
    stages, own = [report.stages[place] for place in places], tuple(fares[place] for place in places)
    names = [stage.name for stage in stages]
    first = report.first_divergence
    label = _split(names[0])[1]
    if len(names) > 1:
        last = names[-1].split(".")[-1]
        label += f" … {last}" if last.isdigit() else f" × {len(names)}"
    note = f"{first.stage}: {first.cause or 'the cause is not known'}" if first and first.stage in names else ""
    return Box(
        label=label,
        names=tuple(names),
        reference=_folded([stage.reference or "—" for stage in stages]),
        module=_folded([stage.module or "—" for stage in stages]),
        fares=own,
        words=_fare_words(stages, own),
        note=note,
    )


def _folded(paths: Sequence[str]) -> str:
    """The paths as one, with {n} for the numbers in which they differ."""
    pieces = [re.split(r"(\d+)", path) for path in paths]
    if len({len(words) for words in pieces}) > 1:
        return f"{paths[0]}, …"
    columns = [list(dict.fromkeys(column)) for column in zip(*pieces, strict=True)]
    if any(len(column) > 1 and not column[0].isdigit() for column in columns):
        return f"{paths[0]}, …"
    return "".join(column[0] if len(column) == 1 else "{n}" for column in columns)


_NUMBERS = 3  # so many blocks' numbers fit beside a box's name; each has a cell of its own beneath


def _fare_words(stages: Sequence[Stage], fares: Sequence[str]) -> str:
    counts = Counter(fares)
    worst = next(fare for fare in _MARKS if fare in counts)
    mark, number = _MARKS[worst], counts[worst]
    if worst == DIVERGES:
        wrong = [stage for stage, fare in zip(stages, fares, strict=True) if fare == DIVERGES]
        if len(stages) == 1:
            return f"{mark} {_size_words(wrong[0])}"
        if number == 1:
            name = wrong[0].name
            which = _split(name)[1] if name.split(".")[-1].isdigit() else name
            return f"{mark} {which}: {_size_words(wrong[0])}"
        numbers = [next(word for word in s.name.split(".")[::-1] if word.isdigit()) for s in wrong]
        return f"{mark} {number} of {len(stages)} diverge: {first_few(numbers, _NUMBERS)}"
    if len(counts) == 1:
        return f"{mark} {worst}"
    if worst == ROUNDS:
        return f"{mark} {number} to rounding, {counts[EQUAL]} bit-equal"
    return f"{mark} {number} of {len(stages)} {worst}"

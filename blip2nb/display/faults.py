"""The faults of a report as people read them: those of one cause together, with place, size, cause and counter-test."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeGuard

from blip2nb.forms import INFINITE
from blip2nb.report.schema import Cause, Content, Fault

MOST_GROUPS = 5
"""So many groups are listed; after that they are counted. Chosen by eye."""

_MOST_PATHS = 3
"""A cause that is found under more paths than this is one group: a model that was rounded is rounded everywhere.
Chosen: query, key and value, which one mistake takes together, are still named; any value from 3 to the number of
layers does."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Faults that have the likeliest cause in common, in the order of the network; never empty."""

    faults: tuple[Fault, ...]

    @property
    def first(self) -> Fault:
        return self.faults[0]

    @property
    def cause(self) -> Cause:
        return self.first.causes[0]

    @property
    def others(self) -> Sequence[Cause]:
        """What else the first of them may come from, the likeliest first."""
        return self.first.causes[1:]

    @property
    def words(self) -> str:
        """The likeliest cause, without the name of the module, which stands beside it."""
        return said(self.first, self.cause)

    @property
    def words_with_more(self) -> str:
        """The same, and in how many places besides."""
        rest = len(self.faults) - 1
        return self.words + (f" … and in {rest} more place{'' if rest == 1 else 's'}" if rest else "")


def grouped(faults: Sequence[Fault]) -> list[Group]:
    """Faults of one cause at paths that differ in their numbers alone are one group, in the order of their first."""
    keys = [_key(fault) for fault in faults]
    paths = Counter(cause for cause, _ in set(keys))
    groups: dict[tuple[str, str], list[Fault]] = {}
    for (cause, path), fault in zip(keys, faults, strict=True):
        groups.setdefault((cause, path if paths[cause] <= _MOST_PATHS else ""), []).append(fault)
    return [Group(tuple(together)) for together in groups.values()]


def _key(fault: Fault) -> tuple[str, str]:
    """The likeliest cause, and where it is but for the numbers."""
    cause = fault.causes[0]
    return cause.id, re.sub(r"\d+", "#", cause.module or fault.module)


def said(fault: Fault, cause: Cause) -> str:
    """A cause in words, without the name of the fault's module."""
    return cause.words.replace(f"{fault.module}.", "") if fault.module else cause.words


def where(fault: Fault) -> str:
    """The stage; a weight that no stage computes with has none."""
    return fault.stage or "the weights"


def size(fault: Fault) -> str:
    """How large a fault is, in words."""
    if _measured(fault.excess):
        return f"{number(fault.excess, '.3g')} × its own rounding"
    if _measured(fault.arrival_error):
        return f"off by {number(fault.arrival_error, '.2g')} on arrival"
    return "not a number" if fault.inside else "seen in the weights alone"


def outcome(cause: Cause) -> str:
    """What the counter-test gave: "with eps 1e-06: 2.6e-05 → 0.0e+00, passed"; "" where there was none."""
    test = cause.counter_test
    if test is None:
        return ""
    before, after = (number(value, ".1e") for value in test.local_error)
    return f"{test.change}: {before} → {after}, {'passed' if test.passed else 'more than rounding is left'}"


def number(value: float | None, form: str) -> str:
    if not _measured(value):
        return "NaN"
    return "∞" if value >= INFINITE else format(value, form)


def _measured(value: float | None) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)


@dataclasses.dataclass(frozen=True)
class Faults:
    """All faults of a report; as text in a terminal, as a table in a notebook.

    Attributes:
        report: a whole one, or what `proof.rows.of_comparison` makes of a comparison.
    """

    report: Content = dataclasses.field(repr=False)

    @property
    def groups(self) -> list[Group]:
        return grouped(self.report.faults)

    def lines(self) -> list[str]:
        """Two lines for each group and one for those left out; none where there is no fault."""
        lines = []
        for group in self.groups[:MOST_GROUPS]:
            fault, test = group.first, outcome(group.cause)
            lines.append(f"{fault.part} {fault.module} ({where(fault)}, {size(fault)})")
            lines.append(f"  {group.words_with_more}{f'; {test}' if test else ''}")
        return lines + ([self._rest] if self._rest else [])

    @property
    def _rest(self) -> str:
        rest = sum(len(group.faults) for group in self.groups[MOST_GROUPS:])
        return f"and {rest} more, of other causes" if rest else ""

    def _repr_html_(self) -> str:
        if not self.groups:
            return f"<p>{html.escape(repr(self))}</p>"
        head = "".join(f"<th align='left'>{word}</th>" for word in ("fault", "where", "likely cause", "counter-test"))
        rows = "".join(map(_row, self.groups[:MOST_GROUPS]))
        rest = f"<p>{self._rest}</p>" if self._rest else ""
        return f"<table><tr>{head}</tr>{rows}</table>{rest}"

    def __repr__(self) -> str:
        return "\n".join(self.lines()) or self._none()

    def _none(self) -> str:
        stages, weights = self.report.stages, self.report.weights
        looked = [f"the {weights.written} tensors that were written"] if weights else []
        if stages:
            looked.append(f"{len(stages)} places, each fed what the reference was fed")
        known = [one.words for one in self.report.known_differences if one.explains]
        but = f" but for what is known ({', '.join(known)})" if known else ""
        alone = "" if stages else "; behaviour was not compared"
        return f"No fault{but}: looked at were {' and '.join(looked)}{alone}."


def _row(group: Group) -> str:
    fault = group.first
    cells = (
        f"{html.escape(fault.part)}, {html.escape(size(fault))}",
        f"{html.escape(where(fault))}<br><code>{html.escape(fault.module)}</code>",
        html.escape(group.words_with_more) + _others(group),
        html.escape(outcome(group.cause)) or "–",
    )
    return "<tr>" + "".join(f"<td align='left' style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>"


def _others(group: Group, most: int = 2) -> str:
    items = ""
    for cause in group.others[:most]:
        test = f" ({outcome(cause)})" if cause.counter_test else ""
        items += f"<li>{html.escape(said(group.first, cause) + test)}</li>"
    return f"<details><summary>or else</summary><ul>{items}</ul></details>" if items else ""

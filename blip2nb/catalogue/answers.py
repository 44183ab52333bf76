"""How what the kit said of a case, and the catalogue itself, show themselves in a notebook and in a terminal."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence

from blip2nb.catalogue.cases import Case
from blip2nb.catalogue.marks import Expected, Marks, said_of
from blip2nb.catalogue.planting import Fault
from blip2nb.forms import settled
from blip2nb.handles import Report
from blip2nb.proof.rows import of_comparison
from blip2nb.trace.causes import CAUSES
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.results import Comparison


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the kit said of a case, beside what is right. Shows both in a notebook.

    Attributes:
        case: what was planted.
        findings: what was said, in the order of the network.
        shows: those of the case's stages that show it, measured on the model before and after, without the diagnosis.
        expected: what a right answer says, of each fault.
        marks: which of it was said; None where a fault cannot be seen, and need not be found.
        comparison: every stage of the model with the fault in it, and the findings.
        error: what the kit raised instead of an answer.
    """

    case: Case
    findings: tuple[Finding, ...]
    shows: tuple[str, ...]
    expected: tuple[Expected, ...]
    marks: Marks | None
    comparison: Comparison
    error: str = ""

    @property
    def visible(self) -> bool:
        """Whether it can be seen at all: it changes a weight, or what a stage gives or gets."""
        return self.marks is not None

    @property
    def first(self) -> Finding | None:
        """What was said of the fault, or of the first of several."""
        return said_of(self.expected[0], self.findings)

    @property
    def report(self) -> Report:
        """What the figures need: `answer.report.figure("depth_trace")`."""
        return Report(settled(of_comparison(self.comparison, self.summary)), {})

    @property
    def summary(self) -> str:
        """Whether the answer is right, in a sentence."""
        marks = self.marks
        if self.error:
            return f"There is no answer: {self.error}"
        if marks is None:
            found = "It was found all the same." if self.findings else "Nothing is said of it, which is right."
            return (
                f"It changes no weight, and no output by more than rounding may: it cannot be seen for certain. {found}"
            )
        if not marks.detected:
            return "It was not found."
        wrong = [what for what in ("stage", "module") if not getattr(marks, what)]
        wrong += [] if marks.first else ["cause (a right one comes later)" if marks.three else "cause"]
        extra = f" Stages that are right were blamed, too: {marks.extra}." if marks.extra else ""
        return (
            f"Found, but not the right {', '.join(wrong)}." if wrong else "Stage, module and cause are right."
        ) + extra

    def rows(self) -> list[tuple[str, str, str]]:
        """Stage, module and cause of each fault: which it is, what it should be, what was said."""
        rows = []
        for one in self.expected if self.visible else ():
            said = said_of(one, self.findings)
            causes = ", ".join(cause.id for cause in said.causes[:3]) if said else ""
            rows += [
                ("stage", one.must[0], said.stage if said else "nothing"),
                ("module", one.target.modules[0], (said.module or "the model itself") if said else ""),
                ("cause", " or ".join(sorted(one.causes)), causes),
            ]
        return rows

    def _head(self) -> str:
        words = " ".join(dict.fromkeys(one.fault.words for one in self.case.faults))
        return f"{self.case}. {words} It shows at {', '.join(self.shows) or 'no stage'}."

    def __repr__(self) -> str:
        width = max((len(should) for _, should, _ in self.rows()), default=0)
        rows = [f"  {what:8}should be {should:{width}}  said {said}" for what, should, said in self.rows()]
        return "\n".join([self._head(), *rows, self.summary])

    def _repr_html_(self) -> str:
        said = [str(finding) for finding in self.findings[:_MOST]]
        said += [f"and {len(self.findings) - _MOST} more"] if len(self.findings) > _MOST else []
        table = _table(("", "should be", "said"), self.rows()) if self.visible else ""
        items = "".join(_element("li", one) for one in said)
        return f"{_element('p', self._head())}{table}{_element('p', self.summary)}<ul>{items}</ul>"


_MOST = 5  # findings shown. Chosen by eye: a fault of the whole model gives one a stage, and any few tell that


@dataclasses.dataclass(frozen=True)
class Listing:
    """A catalogue as a table.

    Attributes:
        faults: by name.
        places: name -> the number of places where the fault fits a model, where one was looked at.
    """

    faults: Mapping[str, Fault]
    places: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def rows(self) -> list[tuple[str, ...]]:
        """Name, kind, places if they were counted, what was done wrong, and what the likely answer is called."""
        return [
            (name, one.kind, *([str(self.places[name])] if self.places else []), one.words, CAUSES[one.cause])
            for name, one in self.faults.items()
        ]

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows(), strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        counted = ["places"] if self.places else []
        return _table(("fault", "kind", *counted, "what is done wrong", "likely cause"), self.rows())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return f"<tr>{''.join(_element(tag, cell, left) for cell in cells)}</tr>"

    left = " style='text-align:left'"  # Jupyter's own is right
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _element(tag: str, text: str, attributes: str = "") -> str:
    return f"<{tag}{attributes}>{html.escape(text)}</{tag}>"

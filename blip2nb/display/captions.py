"""What both models say of each image, in words: what they have in common, and where they part."""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Sequence

from blip2nb.report.schema import Content


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both models' caption of one image.

    Attributes:
        image: its number, from 1.
        alike: the words with which both begin; all that is said where the captions are the same.
        lavis, transformers: how each goes on; "" in both where they are the same.
    """

    image: int
    alike: str
    lavis: str = ""
    transformers: str = ""

    @classmethod
    def of(cls, image: int, ours: str, theirs: str) -> Pair:
        """Compare LAVIS's caption with transformers'."""
        if ours == theirs:
            return cls(image, ours or "(nothing)")
        a, b = ours.split(), theirs.split()
        if a == b:  # the same words; the spaces between them are not
            return cls(image, "", ours.replace(" ", "␣"), theirs.replace(" ", "␣"))
        alike = words_alike(a, b)
        return cls(image, " ".join(a[:alike]), *(" ".join(words[alike:]) or "(end)" for words in (a, b)))

    @property
    def same(self) -> bool:
        return not self.lavis

    @property
    def sides(self) -> tuple[tuple[str, str], ...]:
        """(who, how it goes on) of what there is to say: of one for both, or of each."""
        if self.same:
            return (("both", ""),)
        return (("LAVIS", self.lavis), ("transformers", self.transformers))


def pairs(report: Content) -> list[Pair]:
    """Of each image, decoded greedily; none where captions were not compared."""
    if report.captions is None:
        return []
    ours, theirs = (said.get("greedy", ()) for said in (report.captions.lavis, report.captions.huggingface))
    return [Pair.of(number, a, b) for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)]


def parted_lines(report: Content) -> list[str]:
    """For a terminal: the captions that part, a line for each model, with a bar where they do."""
    return [
        f"image {pair.image}  {who:<12}  {f'{pair.alike} │{rest}'.strip()}"
        for pair in pairs(report)
        if not pair.same
        for who, rest in pair.sides
    ]


def as_html(report: Content) -> str:
    """For a notebook: all of them, folded away; "" where there are none."""
    rows = "".join(
        f"<tr><td>{pair.image}</td><td>{who}</td><td align='left' style='text-align:left'>{html.escape(pair.alike)}"
        + (f" <b style='color:#D55E00'>{html.escape(rest)}</b>" if rest else "")
        + "</td></tr>"
        for pair in pairs(report)
        for who, rest in pair.sides
    )
    summary = "What both models say of each image, decoded greedily"
    head = "".join(f"<th align='left'>{word}</th>" for word in ("image", "who", "caption"))
    return f"<details><summary>{summary}</summary><table><tr>{head}</tr>{rows}</table></details>" if rows else ""


def words_alike(one: Sequence[str], other: Sequence[str]) -> int:
    """With how many words both begin."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))

"""What both models say, in words: what they have in common, where they part, in a terminal and in a notebook."""

from __future__ import annotations

import copy
import html
from pathlib import Path

import pytest
from made_up import REPORTS
from records import content
from test_page import whole

from blip2nb.display import captions, text
from blip2nb.display.captions import Pair
from blip2nb.handles import Report, Run


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ("a cup", "a cup", Pair(1, "a cup")),
        ("", "", Pair(1, "(nothing)")),
        ("a red cup", "a blue cup", Pair(1, "a", "red cup", "blue cup")),
        ("a red", "a red cup", Pair(1, "a red", "(end)", "cup")),
        ("", "a cup", Pair(1, "", "(end)", "a cup")),
        ("a  cup", "a cup", Pair(1, "", "a␣␣cup", "a␣cup")),
    ],
)
def test_two_captions_are_told_by_where_they_part(ours: str, theirs: str, found: Pair) -> None:
    assert Pair.of(1, ours, theirs) == found
    assert found.same == (ours == theirs)


def test_all_captions_are_there_and_those_of_a_model_that_was_not_run_are_not() -> None:
    said = REPORTS["fault"]["captions"]
    found = captions.pairs(content(REPORTS["fault"]))
    assert [pair.same for pair in found] == [True, False, True]
    for pair, ours, theirs in zip(found, said["lavis"]["greedy"], said["huggingface"]["greedy"], strict=True):
        assert f"{pair.alike} {pair.lavis}".split() == ours.split()
        assert f"{pair.alike} {pair.transformers}".split() == theirs.split()
    assert captions.pairs(content({**REPORTS["fault"], "captions": None})) == []


def test_show_prints_the_captions_that_part_and_no_others(tmp_path: Path) -> None:
    told = {}
    for case in ("pass", "fault"):
        Report(content(whole(REPORTS[case]))).save(tmp_path / case)
        told[case] = text.describe(Run(tmp_path / case, tmp_path / case / "model"))
    assert "Where the captions part" not in told["pass"]
    lines = told["fault"].splitlines()
    at = lines.index("Where the captions part, decoded greedily")
    assert lines[at + 1].startswith("  image 2  LAVIS         two dogs lying on the grass │beside a red ball")
    assert lines[at + 2].startswith("  image 2  transformers  two dogs lying on the grass │next to a red ball")
    assert lines[at + 3] == ""


def test_a_notebook_shows_every_caption_as_text() -> None:
    value = copy.deepcopy(whole(REPORTS["fault"]))
    value["captions"]["lavis"]["greedy"][0] = value["captions"]["huggingface"]["greedy"][0] = "<b>cup</b>"
    shown = Report(content(value))._repr_html_()
    assert html.escape("<b>cup</b>") in shown
    assert "<b>cup</b>" not in shown
    assert shown.count("<b style='color:#D55E00'>") == 2
    assert "<details>" not in Report(content({**value, "captions": None, "proof": "weights"}))._repr_html_()

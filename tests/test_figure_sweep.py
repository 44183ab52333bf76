"""A sweep's figure: every run that is drawn says what each proof found, and shows where it goes wrong on one axis."""

from __future__ import annotations

import functools
import math
from typing import Any

import matplotlib
import pytest
from made_up import REPORTS, WIDTHS, collisions, marked, texts, title
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from blip2nb.display import overview
from blip2nb.display.figures import sweep as figure

WORDS = {
    "passed": ("235 equal, bit for bit", "equal", "0.94–1.08 × rounding", "off by 3.1e-7", "18 of 18 equal"),
    "failed": ("1 not the source's (of 235)", "equal", "first wrong at vision.block.02: 41.0 × rounding",
               "off by 0.61; same first token at 81 %", "0 of 18 equal"),
    "not done": ("not run",) * 5,
}  # fmt: skip


def entry(name: str, result: str = "match", case: str = "pass") -> dict[str, Any]:
    """A run as index.json has it, with the stages of a made-up report."""
    report: dict[str, Any] | None = {**REPORTS[case], "known_differences": []} if case else None
    state = {"match": "passed", "diverges": "failed"}.get(result, "not done")
    first = report and report["first_divergence"]
    where = first and {**first, "size": "41.0 × rounding", "known": result == "explained"}
    return {
        "run_name": name, "result": result, "first_divergence": where, "causes": [], "earlier": False, "seconds": 1.0,
        "threshold": report["threshold"] if report else None, "stages": overview._stages(report) if report else None,
        "proofs": {proof: {"state": "passed" if words == "equal" else state, "words": words}
                   for proof, words in zip(overview.PROOFS, WORDS[state], strict=True)},
        "versions": {}, "missing": [],
    }  # fmt: skip


CASES = {
    "good": [entry("tiny-blip2-opt-2.7b"), entry("tiny-blip2-flan-t5-xl", case="full T5")],
    "mixed": [
        entry("tiny-blip2-opt-2.7b", "explained", "fault"),
        entry("tiny-blip2-opt-6.7b-coco--a-long-name-of-a-run", "diverges", "two faults"),
        entry("lost", "failed", ""),
        entry("waiting", "not run", ""),
    ],
    "NaN": [entry("broken", "diverges", "NaN"), entry("zeros", case="zeros")],
    "100 stages": [entry(f"run-{n}", "diverges", "full, faults") for n in range(3)],
    "30 runs": [entry(f"run-{n}", "diverges" if n == 29 else "match", "fault" if n == 29 else "pass")
                for n in range(30)],
}  # fmt: skip


@functools.cache
def picture(case: str, width: float = 7.0) -> Figure:
    drawn = figure.sweep(overview.index(CASES[case]), width)
    drawn.set_dpi(150)
    FigureCanvasAgg(drawn).draw()
    return drawn


def miniatures(drawn: Figure) -> list[Axes]:
    return [axes for axes in drawn.axes if axes.get_yscale() == "log"]


def one_line(words: list[str]) -> set[str]:
    return {" ".join(text.split()) for text in words}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_words_do_not_run_into_each_other(case: str, width: float) -> None:
    assert collisions(picture(case, width)) == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_the_title_is_the_finding(case: str, width: float) -> None:
    assert title(picture(case, width)) == overview.index(CASES[case])["sentence"]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_proof_is_told_by_a_sign_a_word_and_what_was_found(width: float) -> None:
    said = texts(picture("mixed", width))
    for words in ("weights", "pixels", "layers", "logits", "captions"):
        assert words in said
    assert said.count("✗ failed") == 4
    assert said.count("✓ passed") == 1
    assert said.count("– not done") == 15
    assert {"1 not the source's", "equal", "first wrong at vision.block.02", "off by 0.61", "0 of 18 equal"} <= (
        one_line(said)
    )
    assert {"explained", "diverges", "failed", "not run"} <= set(said)
    assert any(words.replace("\n", "") == "tiny-blip2-opt-6.7b-coco--a-long-name-of-a-run" for words in said)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_place_is_drawn_where_it_was_measured(width: float) -> None:
    axes = miniatures(picture("mixed", width))
    assert len(axes) == 2
    for one, case in zip(axes, ("fault", "two faults"), strict=True):
        over = {
            float(n): stage["excess"]
            for n, stage in enumerate(REPORTS[case]["stages"])
            if stage["excess"] is not None and 3 < stage["excess"] < 1e8
        }
        assert marked(one, "wrong", shapes="D") == pytest.approx(over, rel=0.01)
        rest = marked(one, "excess")
        assert len(rest) + len(marked(one, "wrong")) == len(REPORTS[case]["stages"])
        lines = {line.get_label(): line.get_ydata()[0] for line in one.lines}
        assert (lines["1"], lines["threshold"]) == (1.0, REPORTS[case]["threshold"])


@pytest.mark.parametrize("case", CASES)
def test_all_share_one_axis_of_one_height(case: str) -> None:
    axes = miniatures(picture(case))
    assert len({one.get_ylim() for one in axes}) == 1
    heights = [one.get_window_extent().height for one in axes]
    assert heights == pytest.approx([heights[0]] * len(heights))


def test_the_first_divergence_is_named_in_its_miniature() -> None:
    known, wrong = miniatures(picture("mixed"))
    assert [text.get_text() for text in known.texts] == ["vision.post_layernorm"]
    assert [text.get_text() for text in wrong.texts] == ["vision.block.02"]
    assert wrong.texts[0].get_color() == "#D55E00"
    assert known.texts[0].get_color() != "#D55E00"


def test_infinite_and_not_a_number_are_arrowheads_at_the_top() -> None:
    (_, infinite), (broken, _) = miniatures(picture("mixed")), miniatures(picture("NaN"))
    assert len(marked(infinite, "wrong", shapes="^")) == 1
    shown = marked(broken, "wrong", shapes="^")
    stages = REPORTS["NaN"]["stages"]
    nothing = {float(n) for n, s in enumerate(stages) if s["local_error"] is not None and math.isnan(s["local_error"])}
    assert nothing
    assert nothing <= set(shown)


@pytest.mark.parametrize(("width", "most"), [(7.0, 15), (3.4, 8)])
def test_of_many_runs_the_worst_are_drawn_and_it_says_so(width: float, most: int) -> None:
    drawn = picture("30 runs", width)
    assert len(miniatures(drawn)) == most
    said = one_line(texts(drawn))
    assert {"run-29", "run-0"} <= said
    assert "run-28" not in said
    assert any(words.endswith(f"Drawn are the {most} runs that went worst, of 30.") for words in said)
    assert not any("went worst" in words for words in texts(picture("mixed", width)))
    assert drawn.get_figheight() < 11


def test_alt_text_has_the_finding_the_counts_and_the_places() -> None:
    index = overview.index(CASES["mixed"])
    words = figure.alt_text(index)
    assert words.startswith(f"4 runs, five proofs each: {index['sentence']}. ")
    assert "1 not the same model" in words
    assert words.endswith("First wrong: tiny-blip2-opt-6.7b-coco--a-long-name-of-a-run at vision.block.02.")
    assert picture("mixed").alt == words  # type: ignore[attr-defined]


def test_nothing_to_draw_is_said_beforehand() -> None:
    assert not figure.available(overview.index([]))
    assert figure.available(overview.index(CASES["good"]))


def test_it_is_closed_and_leaves_the_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    figure.sweep(overview.index(CASES["good"]))
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before

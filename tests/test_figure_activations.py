"""The activations themselves: what is drawn is what both models computed, and the title says whether they part."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import ARRAYS_OF, FULL, REPORTS, WIDTHS, drawn, marked, report, texts, title
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from records import content

from blip2nb.display import plots
from blip2nb.display.figures import activations
from blip2nb.report.schema import Content

RMS, LOW, HIGH, MAXIMUM = range(4)
NAMES = [each["name"] for each in REPORTS["pass"]["stages"]]


def changed(**changes: Any) -> tuple[Content, dict[str, np.ndarray]]:
    """The report that passes, with transformers' values replaced at some places: x<place>=four numbers."""
    arrays = copy.deepcopy(ARRAYS_OF["pass"])
    for place, values in changes.items():
        arrays["activations/transformers"][int(place[1:])] = values
    return content(REPORTS["pass"]), arrays


def steps(axes: Axes, label: str, at: int = 0) -> dict[float, float]:
    """place -> y of a line drawn in steps, in pieces; `at` picks among the pieces that lie at the same place."""
    found: dict[float, list[float]] = {}
    for line in axes.lines:
        if line.get_label() == label:
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            assert (y[::2] == y[1::2]).all()
            for left, right, height in zip(x[::2], x[1::2], y[::2], strict=True):
                found.setdefault((left + right) / 2, []).append(height)
    return {place: heights[at] for place, heights in found.items()}


def expected(case: str, side: str, column: int) -> dict[float, float]:
    values = ARRAYS_OF[case][f"activations/{side}"][:, column]
    return {float(place): float(value) for place, value in enumerate(values) if not np.isnan(value)}


# ---------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("case", ["pass", "two faults", "NaN", "14 stages", "full T5"])
def test_both_models_values_are_drawn_where_they_are(case: str) -> None:
    axes = drawn("activations", case).axes[0]
    for side, name in (("lavis", "LAVIS"), ("transformers", "transformers")):
        assert marked(axes, f"{name}, maximum") == pytest.approx(expected(case, side, MAXIMUM))
        assert steps(axes, f"{name}, RMS") == pytest.approx(expected(case, side, RMS))
    for at, column in enumerate((LOW, HIGH)):
        assert steps(axes, "transformers, band", at) == pytest.approx(expected(case, "transformers", column))
    corners = np.concatenate([path.vertices for band in axes.collections for path in band.get_paths()])
    for column in (LOW, HIGH):
        for place, value in expected(case, "lavis", column).items():
            near = corners[np.abs(corners[:, 0] - place) < 0.51]
            assert np.isclose(near[:, 1], value, rtol=1e-9).any()


def test_where_both_agree_both_are_still_seen() -> None:
    axes = drawn("activations").axes[0]
    line = {line.get_label(): line for line in axes.lines}
    order = [line.get_label() for line in axes.lines]
    square, disc = line["transformers, maximum"], line["LAVIS, maximum"]
    assert (square.get_marker(), disc.get_marker()) == ("s", "o")
    assert square.get_markersize() > 1.5 * disc.get_markersize()
    assert order.index("transformers, maximum") < order.index("LAVIS, maximum")  # the disc lies on the square
    below, above = line["LAVIS, RMS"], line["transformers, RMS"]
    assert below.get_zorder() < above.get_zorder()
    assert below.get_linewidth() > 1.5 * above.get_linewidth()
    assert (below.get_linestyle(), above.get_linestyle()) == ("-", "--")


def test_a_place_without_floating_point_values_is_a_gap_and_not_a_fault() -> None:
    picture = drawn("activations")
    place = NAMES.index("language.attention_mask")
    assert place not in marked(picture.axes[0], "LAVIS, maximum", "transformers, maximum")
    assert not [patch for patch in picture.axes[0].patches if patch.get_gid() == "NaN"]
    assert "gap: ids and masks, which have no size" in texts(picture)


def test_what_is_not_a_number_in_one_model_is_hatched() -> None:
    picture = drawn("activations", "NaN")
    span = next(patch for patch in picture.axes[0].patches if patch.get_gid() == "NaN")
    assert span.get_hatch()
    assert span.get_x() < NAMES.index("vision.block.04") < span.get_x() + span.get_width()
    assert "NaN" in texts(picture)


def test_what_is_not_a_number_in_both_models_is_hatched_where_the_error_is_not_one_either() -> None:
    arrays = copy.deepcopy(ARRAYS_OF["NaN"])
    arrays["activations/lavis"][NAMES.index("vision.block.04")] = np.nan
    picture = plots.FIGURES["activations"](content(REPORTS["NaN"]), arrays)
    hatched = [patch.get_x() + 0.5 for patch in picture.axes[0].patches if patch.get_gid() == "NaN"]
    assert hatched == [NAMES.index("vision.block.04")]


def test_infinity_is_an_arrowhead_at_the_top() -> None:
    picture = plots.FIGURES["activations"](*changed(x4=(np.inf, 0.1, 9, np.inf)))
    axes = picture.axes[0]
    top = marked(axes, "transformers, maximum", shapes="^")
    assert list(top) == [4.0]
    assert top[4.0] >= max(marked(axes, "LAVIS, maximum").values())
    assert top[4.0] <= axes.get_ylim()[1]
    assert "∞" in [text.get_text() for text in axes.texts]


def test_zeros_have_a_row_that_is_called_zero() -> None:
    axes = plots.FIGURES["activations"](*changed(x7=(0, 0, 0, 0))).axes[0]
    heights = {marked(axes, "transformers, maximum")[7.0], steps(axes, "transformers, RMS")[7.0]}
    assert len(heights) == 1
    height = heights.pop()
    assert height < ARRAYS_OF["pass"]["activations/lavis"][:, LOW][0]
    named = dict(zip(axes.get_yticks(), (label.get_text() for label in axes.get_yticklabels()), strict=True))
    assert named[height] == "zero"
    without = [label.get_text() for label in drawn("activations").axes[0].get_yticklabels()]
    assert not {"zero", "bit-equal"} & set(without)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", REPORTS)
def test_every_value_lies_within_the_axis(case: str, width: float) -> None:
    axes = drawn("activations", case, width).axes[0]
    low, high = axes.get_ylim()
    drawn_values = [*marked(axes, "LAVIS, maximum", "transformers, maximum").values()]
    drawn_values += steps(axes, "transformers, band").values()
    assert low < min(drawn_values)
    assert max(drawn_values) < high


@pytest.mark.parametrize("width", WIDTHS)
def test_depth_has_the_same_ticks_and_bands_as_the_depth_trace(width: float) -> None:
    ours, hero = drawn("activations", "full", width), drawn("depth_trace", "full", width)
    assert len(REPORTS["full"]["stages"]) > sum(FULL)
    assert list(ours.axes[0].get_xticks()) == list(hero.axes[1].get_xticks())
    assert ours.axes[0].get_xlim() == hero.axes[0].get_xlim()
    assert [text.get_text() for text in ours.axes[1].texts] == [text.get_text() for text in hero.axes[2].texts]


# -------------------------------------------------------------------------------------------------- what it says


def test_the_title_says_the_models_are_the_same_and_names_the_largest_value() -> None:
    largest = int(np.nanargmax(ARRAYS_OF["full"]["activations/lavis"][:, MAXIMUM]))
    name, value = REPORTS["full"]["stages"][largest]["name"], ARRAYS_OF["full"]["activations/lavis"][largest, MAXIMUM]
    words = title(drawn("activations", "full"))
    assert words.startswith("The same magnitudes at every stage, within")
    assert words.endswith(f"largest value {value:.0f}, at {name}")
    assert f"{value:.0f}" in [text.get_text() for text in drawn("activations", "full").axes[0].texts]
    assert title(drawn("activations", "zeros")).startswith("Exactly the same magnitudes at every stage")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 15), st.sampled_from([RMS, HIGH, MAXIMUM]), st.floats(1e-3, 1e3))
def test_the_title_says_where_they_part_or_how_far_they_are_from_it(place: int, column: int, factor: float) -> None:
    report, arrays = changed()
    arrays["activations/transformers"] = arrays["activations/lavis"].copy()
    arrays["activations/transformers"][place:, column] *= factor
    words = activations.alt_text(content(report), arrays)
    apart = max(factor, 1 / factor)
    if apart > 1.101:
        assert (
            f"part first at {NAMES[place]}: transformers' {('RMS', '', '99th percentile', 'maximum')[column]}" in words
        )
    elif apart < 1.099:
        assert "The models part" not in words
        if "within" in words:
            assert float(words.split("within ")[1].split(" %")[0]) == pytest.approx(
                100 * (apart - 1), rel=0.06, abs=1e-5
            )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((3.0, 0.01, 2.6, 9.0), "transformers' RMS is"),
        ((np.nan,) * 4, "transformers alone is not a number"),
        ((np.inf, 0.1, 9.0, np.inf), "transformers overflows, up to infinity"),
        ((0.0, 0.0, 0.0, 0.0), "transformers' RMS is 0 × LAVIS's"),
    ],
)
def test_the_title_says_how_they_part(values: tuple[float, ...], words: str) -> None:
    picture = plots.FIGURES["activations"](*changed(x5=values, x9=(100.0, 100.0, 100.0, 100.0)))
    assert title(picture).startswith(f"The models part first at {NAMES[5]}: {words}")
    assert _line_at(picture, "they part") == 5
    assert f"they part: {NAMES[5]}" in texts(picture)


def test_the_first_wrong_stage_is_marked_though_its_magnitudes_agree() -> None:
    picture = drawn("activations", "fault")
    assert _line_at(picture, "first wrong") == NAMES.index("vision.post_layernorm")
    assert "first wrong: vision.post_layernorm" in texts(picture)
    assert title(picture).startswith("The same magnitudes")
    assert _line_at(drawn("activations"), "first wrong") is None


def _line_at(picture: Figure, label: str) -> float | None:
    return next((line.get_xdata()[0] for line in picture.axes[0].lines if line.get_label() == label), None)


def test_the_table_holds_every_stage_and_both_models() -> None:
    rows = plots.table("activations", content(REPORTS["fault"]), ARRAYS_OF["fault"])
    assert [row["name"] for row in rows] == NAMES
    for side in ("lavis", "transformers"):
        found = [[row[f"{side}_{what}"] for what in ("rms", "low", "high", "maximum")] for row in rows]
        np.testing.assert_array_equal(np.array(found, np.float32), ARRAYS_OF["fault"][f"activations/{side}"])


def test_it_is_not_offered_without_both_models_values() -> None:
    one = {"activations/lavis": ARRAYS_OF["pass"]["activations/lavis"]}
    nothing = {key: np.full((23, 4), np.nan) for key in ("activations/lavis", "activations/transformers")}
    for arrays in ({}, one, nothing):
        assert not activations.available(content(report()), arrays)
    assert activations.available(content(report()), ARRAYS_OF["pass"])

"""The ladder of the captions: which image it is of, that its rungs are the report's numbers, and where the two part."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
from conftest import edit_weights
from made_up import REPORTS, WIDTHS, collisions, drawn, steps, texts
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from records import content, raw

from blip2nb import api
from blip2nb.display import plots
from blip2nb.display.figures import captions

SIDES = {"LAVIS": "lavis", "transformers": "transformers"}
TWIN = "tiny-blip2-flan-t5-xl"


def ladder_of(picture: Figure) -> Axes:
    return next(axes for axes in picture.axes if "log-probability" in axes.get_xlabel())


def tokens(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def rungs(axes: Axes, label: str) -> dict[int, float]:
    """row -> log-probability of every mark that is drawn under a label."""
    lines = [line for line in axes.lines if line.get_label() == label]
    return {int(y): float(x) for line in lines for x, y in zip(*line.get_data(), strict=True)}


def spans(axes: Axes, gid: str) -> list[int]:
    return [round(patch.get_y() + 0.5) for patch in axes.patches if patch.get_gid() == gid]


def with_ladder(*ladders: dict[str, list], random_weights: bool = False) -> dict[str, Any]:
    """A report of as many captions as there are ladders."""
    value = copy.deepcopy(REPORTS["pass"])
    said = value["captions"]
    for side, ladder_side in (("lavis", "lavis"), ("huggingface", "transformers")):
        said[side]["greedy"] = ["".join(step[0] for step in one[ladder_side]).strip() for one in ladders]
    said["ladder"] = list(ladders)
    value["random_weights"] = random_weights
    return value


@pytest.mark.parametrize("width", [7.0, 3.4])
def test_the_ladder_is_of_the_first_image_on_which_the_models_part(width: float) -> None:
    picture = drawn("captions", "fault", width)
    axes = ladder_of(picture)
    both = REPORTS["fault"]["captions"]["ladder"][1]
    parting = next(n for n, (a, b) in enumerate(zip(*both.values(), strict=False)) if a[0] != b[0])
    assert tokens(axes)[0] == "␣two"
    assert tokens(axes)[parting] == "␣beside | ␣next"
    assert (spans(axes, "parting"), spans(axes, "tie")) == ([parting], [])
    assert any(f"Image 2 parts at token {parting + 1}:" in words.replace("\n", " ") for words in texts(picture))
    for label, side in SIDES.items():
        assert rungs(axes, label) == pytest.approx({n: step[1] for n, step in enumerate(both[side])})
        assert rungs(axes, f"{label}, runner-up") == pytest.approx({n: step[3] for n, step in enumerate(both[side])})
    assert tokens(axes)[-1].startswith("(end) | ")  # LAVIS's is the shorter by a word


def test_where_none_part_it_is_of_the_nearest_tie() -> None:
    far, near = steps("a cup"), steps("a red boat on the sea")
    near[4][3] = near[4][1] - 0.0004
    picture = plots.FIGURES["captions"](
        content(with_ladder({"lavis": far, "transformers": far}, {"lavis": near, "transformers": near})), {}
    )
    axes = ladder_of(picture)
    assert tokens(axes) == ["␣a", "␣red", "␣boat", "␣on", "␣the", "␣sea"]
    assert (spans(axes, "tie"), spans(axes, "parting")) == ([4], [])
    heading = " ".join(texts(picture)).replace("\n", " ")
    assert "Image 2 comes nearest to a tie: token 5, ␣the before ␣other by 4e-4 nats" in heading
    assert "bit-equal" in axes.get_xlabel()
    ink = {label.get_text(): label.get_color() for label in axes.get_yticklabels()}
    assert len(set(ink.values())) == 1  # nothing is wrong, so nothing has the fault's colour


def test_the_ladder_says_how_far_the_models_are_apart_as_long_as_they_agree() -> None:
    ours, theirs = steps("one two three four"), steps("one two other four")
    theirs[1][1] += 0.003
    theirs[2][1] += 5.0  # of another token, and so no measure of anything
    axes = ladder_of(plots.FIGURES["captions"](content(with_ladder({"lavis": ours, "transformers": theirs})), {}))
    assert axes.get_xlabel().replace("\n", " ").endswith("the models at most 0.003 apart until they part")


def test_a_log_probability_that_is_no_number_is_hatched_and_one_beyond_the_axis_is_an_arrowhead() -> None:
    ours, theirs = steps("a boat at sea"), steps("a boat at sea")
    theirs[1][1] = None
    ours[3][3] = theirs[3][3] = -1e9
    picture = plots.FIGURES["captions"](content(with_ladder({"lavis": ours, "transformers": theirs})), {})
    axes = ladder_of(picture)
    assert spans(axes, "NaN") == [1]
    assert tokens(axes)[1] == "␣boat  NaN"
    assert 1 not in rungs(axes, "transformers")
    assert rungs(axes, "LAVIS")[1] == pytest.approx(ours[1][1])
    arrows = [line for line in axes.lines if line.get_marker() == "<"]
    low, high = axes.get_xlim()
    assert {int(y) for line in arrows for y in line.get_ydata()} == {3}
    assert all(low < x < high for line in arrows for x in line.get_xdata())


@pytest.mark.filterwarnings("error")
def test_thirty_tokens_and_long_words_stay_on_the_page_and_apart() -> None:
    words = [f" {'pneumono' * 3 if n % 5 == 0 else 'sea'}{n}" for n in range(30)]
    both = [[word, -0.5 * n, "https://example.org/a", -0.5 * n - 1.0] for n, word in enumerate(words)]
    for width in (7.0, 3.4):
        picture = plots.FIGURES["captions"](content(with_ladder({"lavis": both, "transformers": both})), {}, width)
        FigureCanvasAgg(picture).draw()
        renderer = picture.canvas.get_renderer()  # type: ignore[attr-defined]
        axes = ladder_of(picture)
        labels = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
        assert len(labels) == 30
        assert all(box.x0 > 0 for box in labels)
        assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(labels))
        beneath = [text.get_window_extent(renderer) for text in axes.texts]
        assert all(box.x0 > axes.bbox.x0 for box in beneath)


def test_where_no_token_has_a_probability_there_is_no_picture() -> None:
    value = copy.deepcopy(REPORTS["fault"])
    for ladders in ([], [{"lavis": [], "transformers": []}]):
        value["captions"]["ladder"] = ladders
        assert "captions" not in plots.available(content(value), {})


@pytest.mark.parametrize("width", WIDTHS)
def test_the_picture_is_the_plot_alone_and_the_alt_text_says_its_caption(width: float) -> None:
    picture = drawn("captions", "fault", width)
    assert picture.axes == [ladder_of(picture)]
    assert not any("a cup on a plate" in words for words in texts(picture))
    assert collisions(picture) == []
    ours, theirs = (REPORTS["fault"]["captions"][side]["greedy"][1].strip() for side in ("lavis", "huggingface"))
    assert f"LAVIS says “{ours}”, transformers “{theirs}”." in plots.alt_text("captions", content(REPORTS["fault"]), {})
    assert "Both say “a cup on a plate”." in plots.alt_text("captions", content(REPORTS["pass"]), {})


def test_the_table_has_every_caption_and_every_token() -> None:
    said = REPORTS["fault"]["captions"]
    rows = captions.table(content(REPORTS["fault"]), {})
    assert len({tuple(row) for row in rows}) == 1
    whole = [row for row in rows if row["token"] is None]
    assert [row["lavis"] for row in whole] == said["lavis"]["greedy"]
    assert [row["equal"] for row in whole] == [True, False, True]
    for image, both in enumerate(said["ladder"], 1):
        chosen = [row for row in rows if row["image"] == image and row["token"]]
        assert len(chosen) == max(len(side) for side in both.values())
        assert [row["lavis_log_probability"] for row in chosen][: len(both["lavis"])] == [s[1] for s in both["lavis"]]
        assert chosen[-1]["transformers"] == both["transformers"][-1][0]
        assert chosen[0]["transformers_runner_up"] == " other"


def test_a_real_ladder_is_what_the_two_models_said(converted, tmp_path) -> None:
    report = api.verify(converted(TWIN), output=tmp_path, figures=False)
    picture = report.figure("captions")
    axes = ladder_of(picture)
    margins = [
        min(step[1] - step[3] for side in both.values() for step in side) for both in raw(report)["captions"]["ladder"]
    ]
    both = raw(report)["captions"]["ladder"][int(np.argmin(margins))]
    assert rungs(axes, "LAVIS") == pytest.approx({n: step[1] for n, step in enumerate(both["lavis"])})
    nearest = np.argmin([min(a[1] - a[3], b[1] - b[3]) for a, b in zip(*both.values(), strict=True)])
    assert spans(axes, "tie") == [nearest]
    apart = max(abs(a[1] - b[1]) for a, b in zip(*both.values(), strict=True))
    assert 0 < apart < 1e-3
    assert "apart" in axes.get_xlabel()


def test_a_model_that_says_something_else_parts_where_its_tokens_do(model_copy, tmp_path) -> None:
    run = model_copy(TWIN)

    def damage(tensors: dict[str, Any]) -> None:
        tensors["language_model.shared.weight"] += 0.05 * tensors["language_model.shared.weight"].flip(0)

    edit_weights(next(run.model.glob("*.safetensors")), damage)
    report = api.verify(run, proof="both", figures=False)
    ladders = raw(report)["captions"]["ladder"]
    partings = [
        next((n for n, (a, b) in enumerate(zip(*both.values(), strict=False)) if a[0] != b[0]), math.inf)
        for both in ladders
    ]
    assert min(partings) < math.inf
    image = next(n for n, parting in enumerate(partings) if parting < math.inf)
    axes = ladder_of(report.figure("captions", width=3.4))
    assert spans(axes, "parting") == [partings[image]]
    assert rungs(axes, "transformers") == pytest.approx(
        {n: step[1] for n, step in enumerate(ladders[image]["transformers"])}
    )

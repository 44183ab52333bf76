"""Inside a stage: every place that computes something is drawn where it was measured, and what goes wrong is named."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from made_up import PLACES, REPORTS, THRESHOLD, WIDTHS, collisions, drawn, fault_at, marked, texts, title
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from records import content

from blip2nb.display import plots

NAME = "inside"


def picture_of(faults: list[dict[str, Any]], width: float = 7.0) -> Figure:
    picture = plots.FIGURES[NAME](content({"faults": faults, "threshold": THRESHOLD}), {}, width)
    picture.set_dpi(150)
    FigureCanvasAgg(picture).draw()
    return picture


def fault(excess: float | None = 41.0, part: str = "norm") -> dict[str, Any]:
    stage = {"name": "vision.block.02", "module": "vision_model.encoder.layers.2", "rounding": 1e-7}
    return fault_at({**stage, "local_error": None if excess is None else 1e-7 * excess, "excess": excess}, part)


def arrows(picture: Figure) -> dict[float, tuple[float, float]]:
    """place -> from where to where its arrow leads."""
    found = [text for text in picture.axes[0].texts if isinstance(text, Annotation) and text.arrow_patch]
    return {float(one.xy[0]): (float(one.xyann[1]), float(one.xy[1])) for one in found}


def test_what_goes_wrong_is_named_and_how_large_it_is() -> None:
    picture = picture_of([fault()])
    assert title(picture) == "Inside vision.block.02 it is the layer_norm2: 41.0 × its own rounding"
    named = [label for label in picture.axes[0].get_xticklabels() if label.get_fontweight() == "bold"]
    assert [label.get_text() for label in named] == ["layer_norm2"]
    assert any(
        words.startswith("norm: eps is 1e-05, the reference has 1e-06 (with eps 1e-06") for words in texts(picture)
    )


def test_places_stand_in_order_where_they_were_measured() -> None:
    one = fault()
    picture = picture_of([one])
    computing = [place for place in one["inside"] if place["rounding"]]
    assert marked(picture.axes[0], "given out", "arriving", "wrong") == pytest.approx(
        {float(n): place["excess"] for n, place in enumerate(computing)}
    )
    arriving = marked(picture.axes[0], "arriving")
    assert set(arriving) == {float(n) for n, place in enumerate(computing) if place["at"] == "in"}
    assert f"not drawn: {len(PLACES) - len(computing)} places that hand on unchanged" in texts(picture)
    names = [label.get_text() for label in picture.axes[0].get_xticklabels()]
    assert names == ["layer_norm1", "attention", "projection", "layer_norm2", "fc1", "activation", "fc2", "residual"]
    lines = {line.get_label(): line.get_ydata()[0] for line in picture.axes[0].lines}
    assert (lines["1"], lines["threshold"]) == (1.0, THRESHOLD)


def test_the_counter_test_is_an_arrow_from_before_to_after() -> None:
    assert arrows(picture_of([fault()])) == {3.0: (pytest.approx(41.0), 1.0)}
    untried = fault()
    untried["causes"] = untried["causes"][2:]
    picture = picture_of([untried])
    assert arrows(picture) == {}
    assert not any("counter-test" in words for words in texts(picture))


def test_several_faults_of_one_stage_are_in_one_picture_and_those_of_others_are_not() -> None:
    one, other, elsewhere = fault(41.0), fault(1e4, "projection"), {**fault(7.0), "stage": "vision.block.03"}
    both = copy.deepcopy(one["inside"])
    both[3] = other["inside"][3]  # looks are of the stage, whichever fault they are kept with
    picture = picture_of([{**one, "inside": both}, {**other, "inside": both}, elsewhere])
    assert title(picture) == "Inside vision.block.02 2 of 8 places are wrong: projection, layer_norm2"
    assert arrows(picture) == {2.0: (pytest.approx(1e4), 1.0), 3.0: (pytest.approx(41.0), 1.0)}


def test_a_fault_of_a_whole_layer_marks_its_places_and_has_no_arrow() -> None:
    layer = {**fault(), "part": "layer", "local_error": 0.7, "excess": 5e6}
    picture = picture_of([layer])
    assert arrows(picture) == {}
    assert any(words.startswith("layer: eps is") for words in texts(picture))


def test_what_is_not_a_number_is_hatched() -> None:
    picture = picture_of([fault(None)])
    assert title(picture) == "Inside vision.block.02 it is the layer_norm2: not a number"
    (span,) = [patch for patch in picture.axes[0].patches if patch.get_gid() == "NaN"]
    assert span.get_x() < 3 < span.get_x() + span.get_width()
    assert 3.0 not in marked(picture.axes[0], "wrong", "given out")


def test_infinity_is_an_arrowhead_at_the_end_of_the_axis() -> None:
    picture = picture_of([fault(math.inf)])
    assert list(marked(picture.axes[0], "wrong", shapes="^")) == [3.0]
    assert title(picture).endswith("∞ × its own rounding")


def test_modules_of_one_name_are_told_apart() -> None:
    one = fault()
    for place, name in zip(one["inside"][7:9], ("output.dense", "intermediate.dense"), strict=True):
        place.update(module=f"qformer.encoder.layer.1.{name}", at="out", rounding=1e-7)
    names = [label.get_text() for label in picture_of([one]).axes[0].get_xticklabels()]
    assert {"output.dense", "intermediate.dense"} < set(names)
    one["inside"][8]["module"] = "decoder.block.1.layer.0"
    names = [label.get_text() for label in picture_of([one]).axes[0].get_xticklabels()]
    assert {"dense", "layer.0"} < set(names)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("excess", [3.2, 41.0, 1e7, 1e9, None])
def test_many_places_are_readable_and_the_wrong_one_keeps_its_name(excess: float | None, width: float) -> None:
    one = fault(excess)
    one["inside"][1:1] = [{**one["inside"][1], "module": f"decoder.layer.{n}.EncDecAttention.q"} for n in range(40)]
    picture = picture_of([one], width)
    assert collisions(picture) == []
    assert "layer_norm2" in [label.get_text() for label in picture.axes[0].get_xticklabels()]


def test_without_a_stage_that_was_opened_there_is_no_picture() -> None:
    assert not plots.available(content({**REPORTS["pass"], "faults": []}), {}).count(NAME)
    flat = fault()
    flat["inside"] = flat["inside"][-1:]  # a stage that is one module
    assert not plots.available(content({**REPORTS["pass"], "faults": [flat]}), {}).count(NAME)
    assert title(picture_of([{**flat, "stage": "vision.embeddings"}, fault()])).startswith("Inside vision.block.02")


def test_its_data_are_all_places_and_what_the_counter_test_made_of_them() -> None:
    rows = plots.table(NAME, content(REPORTS["fault"]), {})
    (one,) = REPORTS["fault"]["faults"]
    assert [row["module"] for row in rows] == [place["module"] for place in one["inside"]]
    assert [row["excess_after"] for row in rows if row["faulty"]] == [1.0]
    assert np.isnan([row["excess_after"] for row in rows if not row["faulty"] and row["rounding"]]).all()
    assert drawn(NAME, "fault").get_figwidth() == 7.0

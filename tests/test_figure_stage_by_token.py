"""Stage by token: every error is where its stage and its position are, and the title says where it sits."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import ARRAYS_OF, REPORTS, WIDTHS, drawn, marked, texts, title
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from records import content

from blip2nb.display import plots
from blip2nb.display.figures import stage_by_token
from blip2nb.report.schema import Content

Made = tuple[dict[str, Any], dict[str, np.ndarray]]
FIRST = "vision.post_layernorm"
NAMES = [each["name"] for each in REPORTS["fault"]["stages"]]


def with_errors(case: str = "fault", **errors: Any) -> Made:
    """A made-up report with the errors of some stages replaced; a stage's dots are written __."""
    value, arrays = copy.deepcopy(REPORTS[case]), dict(ARRAYS_OF[case])
    for name, values in errors.items():
        arrays[f"tokens/{name.replace('__', '.')}"] = np.asarray(values, np.float32)
    return value, arrays


def whole(made: Made) -> tuple[Content, dict[str, np.ndarray]]:
    return content(made[0]), made[1]


def with_patches(side: int, place: int, value: float) -> Made:
    """Vision stages of side² patches that all have an error of 1e-6, but for one of the first wrong one's positions."""
    made = with_errors()
    for name in NAMES:
        if name.startswith("vision"):
            made[1][f"tokens/{name}"] = np.full(1 + side**2, 1e-6, np.float32)
    made[1][f"tokens/{FIRST}"][place] = value
    return made


def panel(picture: Figure, start: str) -> Axes:
    return next(axes for axes in picture.axes if axes.get_title("left").startswith(start))


def mesh(axes: Axes) -> np.ndarray:
    """What is coloured, (positions, stages)."""
    return np.ma.filled(next(c for c in axes.collections if isinstance(c, QuadMesh)).get_array(), np.nan)


def squares(picture: Figure, stage: str, side: int) -> np.ndarray:
    """What the squares over the image are coloured by, (side, side)."""
    over = np.ma.asarray(panel(picture, stage).images[-1].get_array())
    step = len(over) // side
    assert over.mask.reshape(side, step, side, step)[:, 0].all()  # between the squares the image shows
    return over.filled(np.nan)[step // 2 :: step, step // 2 :: step]


def hatched(axes: Axes, word: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of what is hatched so."""
    found = [patch for patch in axes.patches if patch.get_gid() == word]
    assert all(patch.get_hatch() for patch in found)
    return [(p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height()) for p in found]


# ------------------------------------------------------------------------------------------------ what is drawn


PANELS = {
    "pass": {"vision": "vision", "Q-Former": "qformer,projection", "language": "language,logits"},
    "full T5": {
        "vision": "vision",
        "Q-Former": "qformer,projection",
        "encoder": "language.encoder",
        "decoder": "language.decoder,logits",
    },
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", PANELS)
def test_every_error_is_drawn_in_the_panel_of_its_part(case: str, width: float) -> None:
    names = [key.removeprefix("tokens/") for key in ARRAYS_OF[case] if key.startswith("tokens/")]
    for start, heads in PANELS[case].items():
        axes = panel(drawn("stage_by_token", case, width), start)
        own = [name for name in names if name.startswith(tuple(heads.split(",")))]
        errors = np.stack([ARRAYS_OF[case][f"tokens/{name}"] for name in own], axis=1)
        np.testing.assert_allclose(mesh(axes), np.clip(errors, 1e-8, 1))
        assert axes.get_xlim() == (-0.5, len(own) - 0.5)
    drawn_stages = sum(mesh(panel(drawn("stage_by_token", case, width), start)).shape[1] for start in PANELS[case])
    assert drawn_stages == len(names)


def test_two_runs_share_the_colours() -> None:
    for case in REPORTS:
        for axes in drawn("stage_by_token", case).axes:
            for drawing in [*axes.collections, *axes.images[1:]]:
                if isinstance(drawing, QuadMesh) and axes.get_title("left"):
                    assert (drawing.norm.vmin, drawing.norm.vmax) == (1e-8, 1.0)
                    assert drawing.cmap.name == "cividis"


def test_positions_are_named_by_their_tokens() -> None:
    labels = [label.get_text() for label in panel(drawn("stage_by_token"), "language").get_yticklabels()]
    assert labels == ["<image> × 4", "</s>", "a", "␣photo", "␣of", "␣$x$", "␣\\u4e2d", "⏎"]
    axes = panel(drawn("stage_by_token"), "language")
    edges = next(c for c in axes.collections if isinstance(c, QuadMesh)).get_coordinates()[:, 0, 1]
    for tick, place in zip(axes.get_yticks()[1:], range(4, 11), strict=True):
        assert edges[place] < tick < edges[place + 1]
    decoder = [label.get_text() for label in panel(drawn("stage_by_token", "full T5"), "decoder").get_yticklabels()]
    assert decoder == ["<pad>", "a", "␣boat"]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_text_names_as_many_tokens_as_have_room(width: float) -> None:
    value, arrays = with_errors()
    value["sequences"]["language"] += [f" word{number}" for number in range(120)]
    for name in NAMES:
        if f"tokens/{name}" in arrays and name.startswith(("language", "logits")):
            arrays[f"tokens/{name}"] = np.full(131, 1e-6, np.float32)
    picture = plots.FIGURES["stage_by_token"](content(value), arrays, width)
    FigureCanvasAgg(picture).draw()
    boxes = [label.get_window_extent() for label in panel(picture, "language").get_yticklabels()]
    assert len(boxes) > 15
    assert picture.get_figheight() < 12
    for one, other in itertools.combinations(boxes, 2):
        assert min(one.y1, other.y1) - max(one.y0, other.y0) < 2


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 16, 26, 35]), st.data())
def test_no_lone_position_is_lost_from_sight(side: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, side**2))
    picture = plots.FIGURES["stage_by_token"](*whole(with_patches(side, place, 0.5)))
    axes = panel(picture, "vision")
    shown = mesh(axes)
    assert len(shown) <= 151
    row, column = np.argwhere(shown == 0.5)[0]
    assert (shown == 0.5).sum() == 1
    assert column == shown.shape[1] - 1
    edges = next(c for c in axes.collections if isinstance(c, QuadMesh)).get_coordinates()[:, 0, 1]
    height = place - 1 + side + 0.5 if place else side / 2  # the class token's row is as high as `side` patches
    assert edges[row] < height < edges[row + 1]
    over = squares(picture, FIRST, side)
    where = np.argwhere(over == 0.5).tolist()
    assert where == ([[(place - 1) // side, (place - 1) % side]] if place else [])
    name = f"the patch in row {(place - 1) // side}, column {(place - 1) % side}" if place else "the class token"
    counted = f"{1 + side**2} positions"
    assert title(picture).startswith(f"At {FIRST} the error sits in one of {counted}: {name} holds 99.99 % of it")
    together = (len(shown) - 1) < side**2
    assert ("the worst of each" in axes.get_title("left")) == together


def test_exact_zeros_have_a_look_of_their_own_that_the_colour_bar_names() -> None:
    errors = np.full(11, 1e-7)
    errors[3:6] = 0
    picture = plots.FIGURES["stage_by_token"](*whole(with_errors(language__block__01=errors)))
    axes = panel(picture, "language")
    drawing = next(c for c in axes.collections if isinstance(c, QuadMesh))
    zero, least = (drawing.cmap(drawing.norm(value)) for value in (mesh(axes)[4, 2], 1e-8))
    assert max(abs(a - b) for a, b in zip(zero, least, strict=True)) > 0.5
    edges = drawing.get_coordinates()[:, 0, 1]
    assert hatched(axes, "bit-equal") == [(1.5, edges[3], 2.5, edges[6])]
    assert "bit-equal" in texts(picture)
    assert title(drawn("stage_by_token", "zeros")) == "Bit-equal at every position of all 20 stages"
    assert len(hatched(panel(drawn("stage_by_token", "zeros"), "vision"), "bit-equal")) == 8


def test_an_error_below_the_bar_is_not_shown_as_zero() -> None:
    picture = plots.FIGURES["stage_by_token"](*whole(with_errors(language__block__01=np.full(11, 1e-12))))
    axes = panel(picture, "language")
    assert set(mesh(axes)[:, 2]) == {1e-8}
    assert hatched(axes, "bit-equal") == []


def test_what_is_not_a_number_is_hatched() -> None:
    picture = drawn("stage_by_token", "NaN")
    axes = panel(picture, "vision")
    assert [(left, right) for left, _, right, _ in hatched(axes, "NaN")] == [(4.5, 5.5), (5.5, 6.5)]
    assert np.isnan(mesh(axes)[:, 5:7]).all()
    assert "NaN" in texts(picture)
    assert title(picture) == "Not a number at vision.block.04: all 17 positions"
    assert "NaN" not in texts(drawn("stage_by_token"))


def test_patches_that_are_not_numbers_are_hatched_over_the_image() -> None:
    errors = np.full(17, 1e-6)
    errors[6] = np.nan  # the second row's second patch
    picture = plots.FIGURES["stage_by_token"](*whole(with_errors(vision__post_layernorm=errors)))
    assert hatched(panel(picture, FIRST), "NaN") == [(1, 1, 2, 2)]
    assert title(picture) == f"Not a number at {FIRST}: 1 of 17 positions"


# ------------------------------------------------------------------------------------------------ over the image


def test_the_examined_stage_lies_over_the_image_if_it_is_the_vision_towers() -> None:
    value, arrays = with_errors()
    value["examined"]["stage"] = "vision.block.03"
    picture = plots.FIGURES["stage_by_token"](content(value), arrays)
    np.testing.assert_allclose(
        squares(picture, "vision.block.03", 4), arrays["tokens/vision.block.03"][1:].reshape(4, 4)
    )
    image = panel(picture, "vision.block.03").images[0]
    np.testing.assert_array_equal(image.get_array(), arrays["pixels/image"])
    assert image.get_extent() == [0, 4, 4, 0]


def test_else_the_vision_stage_with_the_largest_error_lies_over_it() -> None:
    value, arrays = with_errors(vision__block__01=np.full(17, 0.1))
    value["examined"]["stage"] = "qformer.layer.01"
    picture = plots.FIGURES["stage_by_token"](content(value), arrays)
    assert set(squares(picture, "vision.block.01", 4).ravel()) == {np.float32(0.1)}
    assert "patches 0.1\nclass token 0.1" in texts(picture)


def test_without_image_or_vision_tower_the_rest_is_drawn() -> None:
    value, arrays = with_errors()
    blind = {key: array for key, array in arrays.items() if key != "pixels/image"}
    assert len(panel(plots.FIGURES["stage_by_token"](content(value), blind), FIRST).images) == 1
    rest = {key: array for key, array in arrays.items() if not key.startswith("tokens/vision")}
    for width in WIDTHS:
        picture = plots.FIGURES["stage_by_token"](content(value), rest, width)
        assert [axes.get_title("left").split(":")[0] for axes in picture.axes[:2]] == ["Q-Former", "language"]
        assert title(picture).startswith(f"First wrong at {FIRST}, which is not drawn here. At ")
    assert not stage_by_token.available(content(value), {})
    assert stage_by_token.available(content(value), rest)


# -------------------------------------------------------------------------------------------------- what it says


PLACE = np.arange(11)
TITLES = {
    "is alike everywhere: the worst of 11 tokens, token 10, “⏎”, holds": 1e-6 * (1 + PLACE / 10),
    "sits in one of 11 tokens: token 6, “photo” holds 100 % of it": np.where(PLACE == 6, 0.1, 0),
    "is uneven: the worst of 11 tokens, token 4, “</s>”, holds": np.where(PLACE > 3, 2e-6 - 1e-8 * PLACE, 0),
}


@pytest.mark.parametrize("words", TITLES)
def test_the_title_says_where_the_error_sits(words: str) -> None:
    value, arrays = with_errors("two faults", language__block__01=TITLES[words])
    value["first_divergence"]["stage"] = "language.block.01"
    found = title(plots.FIGURES["stage_by_token"](content(value), arrays))
    assert found.startswith("At language.block.01 the error")
    assert words in found


def test_a_few_places_are_counted() -> None:
    errors = np.full(257, 1e-7)
    errors[[3, 80, 250]] = 0.2, 0.3, 0.2
    value, arrays = with_patches(16, 0, 1e-6)
    arrays[f"tokens/{FIRST}"] = errors.astype(np.float32)
    found = title(plots.FIGURES["stage_by_token"](content(value), arrays))
    few = "in a few places: 3 of 257 positions hold 90 % of it, the patch in row 4, column 15 the most"
    assert found == f"At {FIRST} the error sits {few}"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(2.0**-26, 1, width=32), min_size=11, max_size=11))
def test_the_share_of_the_worst_is_what_the_title_says(errors: list[float]) -> None:
    value, arrays = with_errors("two faults", language__block__01=errors)
    value["first_divergence"]["stage"] = "language.block.01"
    words = stage_by_token.alt_text(content(value), arrays)
    squared = np.square(np.asarray(errors, np.float32).astype(float))
    share = squared.max() / squared.sum()
    assert f"token {int(squared.argmax())}" in words
    said = float(words.split("holds ")[1].split(" %")[0])
    assert said == pytest.approx(100 * share, rel=0.05)
    assert ("sits in one" in words) == (share >= 0.9)
    assert ("an even share is 9.1 %" in words) == ("sits in one" not in words)


def test_the_first_wrong_stage_is_marked_in_its_panel() -> None:
    picture = drawn("stage_by_token", "fault")
    assert list(marked(panel(picture, "vision:"), "first wrong", shapes="v")) == [7.0]
    assert f"first wrong: {FIRST}" in texts(picture)
    assert not any("first wrong" in words for words in texts(drawn("stage_by_token")))
    assert title(drawn("stage_by_token")).startswith("No stage is wrong. At ")


def test_the_table_holds_every_stage_and_position() -> None:
    rows = plots.table("stage_by_token", content(REPORTS["fault"]), ARRAYS_OF["fault"])
    found: dict[str, list[float]] = {}
    for row in rows:
        assert row["position"] == len(found.setdefault(row["name"], []))
        found[row["name"]].append(row["local_error"])
    wanted = {key.removeprefix("tokens/"): a for key, a in ARRAYS_OF["fault"].items() if key.startswith("tokens/")}
    assert set(found) == set(wanted)
    for name, values in found.items():
        np.testing.assert_array_equal(np.array(values, np.float32), wanted[name])
    assert [row["text"] for row in rows if row["name"] == "logits"] == REPORTS["fault"]["sequences"]["language"]

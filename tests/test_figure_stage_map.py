"""The stage map: every stage is in one box, under both libraries' names, and the box says how it fared."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from made_up import ARRAYS_OF, BROKEN, REPORTS, WIDTHS, drawn, report, texts, title
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.text import Text
from records import content

from blip2nb.display import plots
from blip2nb.display.figures.boxes import ARRIVAL
from blip2nb.families.captioners import stages
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE
from blip2nb.variants import VARIANTS

NAME = "stage_map"


@functools.cache
def of_variant(name: str) -> dict[str, Any]:
    """A report of a real variant's own table of stages, where all agrees."""
    found = [
        {"name": each.name, "module": each.module, "reference": each.reference, "junction": each.is_junction,
         "arrival_error": 0.0, "drift": 1e-7, "local_error": 1e-7, "rounding": 1e-7, "excess": 1.0, "bit_equal": False}
        for each in stages.stages(VARIANTS[name])
    ]  # fmt: skip
    return {"stages": found, "threshold": 3.0, "first_divergence": None}


def made_of(names: list[str], wrong: tuple[str, ...] = ()) -> dict[str, Any]:
    """A report of another model's stages."""
    found = [
        {"name": name, "module": f"theirs.{name}", "reference": f"ours.{name.replace('block.', 'layer_')}",
         "junction": False, "arrival_error": 0.0, "drift": 1e-7, "local_error": 1e-7, "rounding": 1e-7,
         "excess": 40.0 if name in wrong else 1.0, "bit_equal": False}
        for name in names
    ]  # fmt: skip
    first = next((each for each in found if each["excess"] > 3), None)
    return {
        "stages": found,
        "threshold": 3.0,
        "first_divergence": first and {"stage": first["name"], "excess": first["excess"], "cause": ""},
    }


def picture_of(value: dict[str, Any], width: float = 7.0) -> Figure:
    picture = plots.FIGURES[NAME](content(value), {}, width)
    picture.set_dpi(100)
    FigureCanvasAgg(picture).draw()
    return picture


def boxes(picture: Figure) -> dict[str, tuple[str, list[str]]]:
    """The bold name in each box -> how it fared, by the box's own mark, and all that is written in it."""
    found = {}
    written = [text for text in picture.axes[0].texts if text.get_text()]
    for patch in picture.axes[0].patches:
        if isinstance(patch, FancyBboxPatch) and patch.get_gid():
            left, top, right, bottom = patch.get_x(), patch.get_y(), *_far_corner(patch)
            inside = [t for t in written if left < _at(t)[0] < right and top < _at(t)[1] < bottom]
            name = next(t.get_text() for t in inside if t.get_weight() == "bold")
            found[f"{name} @ {top:.2f}"] = (patch.get_gid(), [t.get_text() for t in inside])
    return found


def _far_corner(patch: FancyBboxPatch) -> tuple[float, float]:
    return patch.get_x() + patch.get_width(), patch.get_y() + patch.get_height()


def _at(text: Text) -> tuple[float, float]:
    x, y = text.get_position()
    return float(x), float(y)


def cells(picture: Figure) -> dict[str, str]:
    """Stage -> how it fared, of the stages that are cells of a box."""
    marks = [p.get_gid() for p in picture.axes[0].patches if isinstance(p, Rectangle) and p.get_gid()]
    return dict(mark.split(": ") for mark in marks)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("variant", ["blip2-opt-2.7b", "blip2-flan-t5-xl"])
def test_a_real_table_of_stages_becomes_few_boxes_under_both_names(variant: str, width: float) -> None:
    value = of_variant(variant)
    picture = picture_of(value, width)
    names = [key.split(" @ ")[0] for key in boxes(picture)]
    stack = ["position_bias", "block.00 … 23", "final_layer_norm"]
    language = {
        "blip2-opt-2.7b": ["positions", "block.00 … 31", "final_layer_norm"],
        "blip2-flan-t5-xl": [*stack, "input_ids", *stack],
    }[variant]
    assert names == [
        "pixels", "embeddings", "block.00 … 38", "post_layernorm", "embeddings", "layer.00 … 11", "projection",
        "inputs_embeds", "attention_mask", *language, "logits",
    ]  # fmt: skip
    assert len([name for name in names if "…" not in name]) + len(cells(picture)) == len(value["stages"])
    written = set(texts(picture))
    assert {"visual_encoder.blocks.{n}", "vision_model.encoder.layers.{n}", "ln_vision"} <= written
    assert {"Qformer.bert.encoder.layer.{n}", "qformer.encoder.layer.{n}", "language_projection"} <= written
    parts = {"blip2-opt-2.7b": {"language"}, "blip2-flan-t5-xl": {"language", "language.encoder", "language.decoder"}}
    assert {"vision", "qformer", *parts[variant]} <= written
    assert title(picture) == f"All {len(value['stages'])} places agree: {_equal(value)}"


def _equal(value: dict[str, Any]) -> str:
    junctions = sum(stage["junction"] for stage in value["stages"])
    return f"{junctions} bit-equal, {len(value['stages']) - junctions} to rounding"


@pytest.mark.parametrize("width", WIDTHS)
def test_cross_attention_is_named_where_it_leads(width: float) -> None:
    assert texts(picture_of(of_variant("blip2-opt-2.7b"), width)).count("cross-attention") == 1
    assert texts(picture_of(of_variant("blip2-flan-t5-xl"), width)).count("cross-attention") == 2
    assert "cross-attention" not in texts(picture_of(made_of(["vision.a", "encoder.b"]), width))


@pytest.mark.parametrize("case", REPORTS)
def test_boxes_do_not_overlap_and_every_one_holds_its_words(case: str) -> None:
    for width in WIDTHS:
        picture = drawn(NAME, case, width)
        renderer = picture.canvas.get_renderer()  # type: ignore[attr-defined]
        patches = [p for p in picture.axes[0].patches if isinstance(p, FancyBboxPatch) and p.get_gid()]
        extents = [patch.get_window_extent(renderer) for patch in patches]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(extents, 2))
        for text in picture.axes[0].texts:
            box = text.get_window_extent(renderer)
            for extent in extents:
                if text.get_text() and extent.overlaps(box):
                    assert extent.x0 < box.x0, text.get_text()
                    assert box.x1 < extent.x1, text.get_text()
                    assert extent.y0 - 1 < box.y0, text.get_text()
                    assert box.y1 < extent.y1 + 1, text.get_text()


def test_the_divergent_stage_is_lit_with_its_name_and_cause_and_no_other_is() -> None:
    picture = drawn(NAME, "fault")
    lit = {name: words for name, (fare, words) in boxes(picture).items() if fare == "diverges"}
    ((name, words),) = lit.items()
    assert name.startswith("post_layernorm")
    assert "✗ 12.7 × its own rounding" in words
    assert "vision.post_layernorm: eps of the post layer norm:" in " ".join(words)
    assert title(picture) == "First wrong at vision.post_layernorm: 12.7 × its own rounding; all else agrees"
    shades = {p.get_gid(): p.get_facecolor() for p in picture.axes[0].patches if isinstance(p, FancyBboxPatch)}
    assert len({shades[fare] for fare in ("diverges", "agrees to rounding", "bit-equal")}) == 3


def test_of_folded_blocks_the_wrong_one_is_named_and_lit() -> None:
    picture = drawn(NAME, "two faults")
    assert "✗ block.02: 41.0 × its own rounding" in texts(picture)
    assert "✗ block.01: ∞ × its own rounding" in texts(picture)
    assert title(picture).endswith("; 1 other place diverges")
    wrong = {name for name, fare in cells(picture).items() if fare == "diverges"}
    assert wrong == {"vision.block.02", "language.block.01"}
    assert "✗ 2 of 32 diverge: 08, 30" in texts(drawn(NAME, "full, faults"))
    assert len([name for name in cells(drawn(NAME, "full, faults")) if name.startswith("vision.block")]) == 39


def test_when_nothing_is_wrong_the_title_counts_how_places_agree() -> None:
    junctions = sum(stage["junction"] for stage in REPORTS["pass"]["stages"])
    assert title(drawn(NAME)) == f"All 23 places agree: {junctions} bit-equal, {23 - junctions} to rounding"
    assert title(drawn(NAME, "zeros")) == "All 23 places agree, bit for bit"
    assert {fare for fare, _ in boxes(drawn(NAME, "zeros")).values()} == {"bit-equal"}
    value = report()
    next(s for s in value["stages"] if s["name"] == "vision.block.01").update(local_error=0.0, bit_equal=True)
    assert "✓ 5 to rounding, 1 bit-equal" in texts(picture_of(value))


def test_what_is_not_a_number_does_not_agree() -> None:
    picture = drawn(NAME, "NaN")
    assert title(picture) == "3 of 23 places cannot be judged, the others agree"
    assert {"? 2 of 6 not a number", "? 1 of 3 not a number"} <= set(texts(picture))
    assert {name for name, fare in cells(picture).items() if fare == "not a number"} == set(BROKEN)
    hatched = [p.get_gid().split(":")[0] for p in picture.axes[0].patches if p.get_hatch()]
    assert set(hatched) == set(BROKEN)


def test_a_place_where_the_wrong_thing_arrives_diverges() -> None:
    value = report()
    arrived = next(s for s in value["stages"] if s["name"] == "language.inputs_embeds")
    arrived["arrival_error"] = 1.4
    assert title(picture_of(value)) == "1 of 23 places diverge"
    value["first_divergence"] = {"stage": arrived["name"], "excess": None, "cause": "no image in the prompt"}
    picture = picture_of(value)
    assert title(picture) == "First wrong at language.inputs_embeds: off by 1.4; all else agrees"
    assert "language.inputs_embeds: no image in the prompt" in " ".join(texts(picture))
    arrived["arrival_error"] = ARRIVAL_TOLERANCE
    assert title(picture_of({**value, "first_divergence": None})).startswith("All 23 places agree")


def test_what_may_arrive_is_what_the_comparison_allows() -> None:
    assert ARRIVAL == ARRIVAL_TOLERANCE


def test_another_models_stages_are_folded_by_their_names_alone() -> None:
    names = ["embed", *(f"block.{n}" for n in range(12)), "norm", "head"]
    picture = picture_of(made_of(names, wrong=("block.7",)))
    assert [key.split(" @ ")[0] for key in boxes(picture)] == ["embed", "block.0 … 11", "norm", "head"]
    assert {"ours.layer_{n}", "theirs.block.{n}", "✗ block.7: 40.0 × its own rounding"} <= set(texts(picture))
    assert "block.7: the cause is not known" in texts(picture)


def test_parts_of_blocks_that_take_turns_are_a_box_each() -> None:
    names = [f"block.{n}.{part}" for n in range(33) for part in ("norm1", "norm2", "mlp")]
    picture = picture_of(made_of([*names, "head"], wrong=("block.7.mlp",)))
    assert [key.split(" @ ")[0] for key in boxes(picture)] == ["norm1 × 33", "norm2 × 33", "mlp × 33", "head"]
    assert "block.{n}" in texts(picture)
    assert "✗ block.7.mlp: 40.0 × its own rounding" in texts(picture)
    assert len(cells(picture)) == 99


@pytest.mark.parametrize("width", WIDTHS)
def test_a_hundred_places_that_do_not_repeat_are_all_drawn(width: float) -> None:
    names = [f"part{n // 8}.place_{n}" for n in range(100)]
    picture = picture_of(made_of(names), width)
    assert [key.split(" @ ")[0] for key in boxes(picture)] == [f"place_{n}" for n in range(100)]


def test_names_that_are_too_long_keep_their_ends() -> None:
    written = texts(picture_of(of_variant("blip2-flan-t5-xl"), 3.4))
    shortened = [words for words in written if "…" in words and words.startswith("t5_model")]
    assert len(shortened) == 2
    assert all(words.endswith(".relative_attention_bias") for words in shortened)
    picture = picture_of(made_of(["a" * 200, "b" * 200 + ".c"]), 3.4)
    assert len([words for words in texts(picture) if words.startswith(("…a", "…b"))]) == 4  # name, part, both places
    for text in picture.axes[0].texts:
        assert text.get_window_extent().x1 < picture.bbox.x1, text.get_text()


def test_the_table_has_a_row_for_each_stage() -> None:
    rows = plots.table(NAME, content(REPORTS["fault"]), ARRAYS_OF["fault"])
    assert [row["name"] for row in rows] == [stage["name"] for stage in REPORTS["fault"]["stages"]]
    assert [row["name"] for row in rows if row["fare"] == "diverges"] == ["vision.post_layernorm"]
    assert rows[3]["lavis"] == "visual_encoder.blocks.1"
    assert rows[3]["part"] == "vision"


def test_a_place_that_is_not_noted_is_a_dash(tmp_path: Path) -> None:
    value = copy.deepcopy(REPORTS["pass"])
    for each in value["stages"]:
        each["reference"] = ""
    assert "—" in texts(picture_of(value))
    assert plots.save(content(value), {}, tmp_path, formats=("svg",))[0].name == "stage_map.svg"

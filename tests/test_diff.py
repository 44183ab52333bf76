"""Two runs compared: what moved is what the reports say, nothing else is, and runs that are unlike still compare."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, edit_weights
from made_up import REPORTS, WIDTHS, collisions, marked, report, text_boxes, texts, title
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from records import content, raw

import blip2nb
from blip2nb import api
from blip2nb.display.figures import two_runs
from blip2nb.display.text import Note
from blip2nb.errors import RequestError
from blip2nb.handles import Difference, Report, Run

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"


def compared(one: str | dict[str, Any], other: str | dict[str, Any]) -> Difference:
    sides = [REPORTS[side] if isinstance(side, str) else side for side in (one, other)]
    return Difference.of(*(Report(content(side)) for side in sides))


def in_one_line(picture: Figure) -> str:
    return " ".join(words.replace("\n", " ") for words in texts(picture))


@pytest.fixture(scope="module")
def shipped(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A twin that is verified as it is."""
    folder = tmp_path_factory.mktemp("runs") / "as_it_is"
    api.verify(converted(OPT), output=folder, figures=False)
    return Run(folder, converted(OPT).model)


@pytest.fixture(scope="module")
def halved(shipped: Run) -> Run:
    """The same twin with its weights cast to float16, which the user asked for, run in float32 to see what that did."""
    run = api.convert(OPT, output_dir=shipped.folder.parent, run_name="halved", dtype="float16")
    api.verify(run, proof="both", figures=False, dtype="float32")
    return run


# ------------------------------------------------------------------------------------------------- what is compared


def test_a_stage_that_went_wrong_is_named_with_both_numbers() -> None:
    found = compared("pass", "fault")
    before, after = (
        next(s["excess"] for s in REPORTS[case]["stages"] if s["name"] == "vision.post_layernorm")
        for case in ("pass", "fault")
    )
    assert [(move.stage, move.before, move.after) for move in found.moved] == [("vision.post_layernorm", before, after)]
    assert found.still == sum(not stage["junction"] for stage in REPORTS["pass"]["stages"]) - 1
    assert found.finding == "First moved: vision.post_layernorm, error ÷ its own rounding 1.0 × → 12.7 ×"
    assert found.first_wrong == ("", "vision.post_layernorm")
    assert [(one.mode, one.image) for one in found.captions] == [("greedy", 2)]
    assert str(found.captions[0]) == "… lying on the grass beside a red ball … → … lying on the grass next to a red …"
    assert found.captions_compared == 3


@pytest.mark.parametrize("case", ["pass", "fault", "NaN", "zeros", "full T5", "two faults"])
def test_a_run_is_not_different_from_itself(case: str) -> None:
    found = compared(case, copy.deepcopy(REPORTS[case]))
    assert (found.moved, found.captions, found.changes, found.only) == ((), (), (), ((), ()))
    assert found.same_weights
    assert "No stage moved by a tenth or more" in found.finding
    assert all(a == b for a, b in found.logits.values())


@pytest.mark.parametrize(("one", "other"), itertools.permutations(["pass", "fault", "two faults", "zeros", "NaN"], 2))
def test_the_other_way_round_everything_is_turned_round(one: str, other: str) -> None:
    there, back = compared(one, other), compared(other, one)
    assert repr([(m.stage, m.before, m.after) for m in there.moved]) == repr(
        [(m.stage, m.after, m.before) for m in back.moved]
    )
    assert there.only == back.only[::-1]
    assert there.verdicts == back.verdicts[::-1]


def test_a_tenth_is_the_least_that_counts() -> None:
    value = report()
    judged = [stage for stage in value["stages"] if not stage["junction"]]
    for stage, factor in zip(judged, (0.91, 0.89, 1.09, 1.11), strict=False):
        stage["excess"] *= factor
    assert [move.stage for move in compared("pass", value).moved] == [judged[1]["name"], judged[3]["name"]]


def test_zeros_nan_and_infinities_are_moves_and_are_said_as_what_they_are() -> None:
    zeros = compared("pass", "zeros")
    assert len(zeros.moved) == 20
    assert str(zeros.moved[0]) == "1.0 × → bit-equal"
    lost = compared("pass", "NaN")
    assert [move.stage for move in lost.moved] == ["vision.block.04", "vision.block.05", "language.block.01"]
    assert all(math.isnan(move.after) for move in lost.moved)
    assert "NaN" in lost.finding
    infinite = compared("pass", "two faults").moved[-1]
    assert str(infinite) == "1.0 × → ∞ ×"


def test_models_of_another_depth_are_matched_by_stage_and_the_rest_is_counted() -> None:
    found = compared("full T5", "full")
    names = [[stage["name"] for stage in REPORTS[case]["stages"]] for case in ("full T5", "full")]
    for mine, theirs, alone in ((names[0], names[1], found.only[0]), (names[1], names[0], found.only[1])):
        assert list(alone) == [name for name in mine if name not in theirs]
        assert alone
    common = {name for name in names[0] if name in names[1]}
    assert {move.stage for move in found.moved} <= common
    assert f"{len(found.only[1])} stages in B alone: language.positions, language.block.00" in str(found)


def test_parameters_and_versions_that_differ_are_named_and_others_are_not() -> None:
    value = report()
    value["provenance"] |= {"dtype": "bfloat16", "prompt": "", "weights_hash": "0" * 64}
    value["provenance"]["reference"]["device"] = "cuda"
    value["versions"] = {"checked with": {"torch": "2.16.0"}, "reference": {"torch": "1.13"}}
    first = report()
    first["versions"] = {"checked with": {"torch": "2.15.0"}, "reference": {"torch": "1.13"}}
    found = compared(first, value)
    assert {one.what: (one.before, one.after) for one in found.changes} == {
        "dtype": ("auto", "bfloat16"),
        "prompt": ('"a photo of"', '""'),
        "hash of the weights": ("d726e8b8d641", "000000000000"),
        "recording made on": ("cpu", "cuda"),
        "torch (checking)": ("2.15.0", "2.16.0"),
    }
    assert not found.same_weights
    assert "other tensors" in str(found)


def test_weights_alone_beside_both_proofs_are_compared_as_far_as_it_goes(shipped, tmp_path, command) -> None:
    alone = tmp_path / "weights_alone"
    api.verify(shipped.model, proof="weights", output=alone, figures=False)
    found = blip2nb.diff(shipped, alone)
    assert found.verdicts == ("explained", "incomplete")
    assert (found.moved, found.logits, found.captions_compared) == ((), {}, 0)
    assert found.finding == "No stages to compare: the behaviour of weights_alone was not compared"
    assert [(one.what, one.before, one.after) for one in found.changes] == [("proof", "both", "weights")]
    assert found.same_weights
    assert "weights_alone was not compared" in str(found)
    assert isinstance(found.figure(), Note)
    ended = command("diff", shipped.folder, alone, "-o", tmp_path / "two.png")
    assert (ended.status, ended.out) == (2, "")
    assert "was not compared" in ended.err
    assert not (tmp_path / "two.png").exists()
    assert command("diff", alone, alone).status == 0


# --------------------------------------------------------------------------------------------------------- real runs


def altered(one: Run, other: Run) -> set[str]:
    """transformers' names of the tensors whose values are not the same in both directories."""
    from blip2nb.weights.sources import open_folder

    sides = [open_folder(run.model) for run in (one, other)]
    pairs = {name: [side[name].tensor().float() for side in sides] for name in sides[0]}
    return {name for name, (a, b) in pairs.items() if not torch.equal(a, b)}


def test_a_cast_moves_exactly_the_stages_whose_tensors_it_altered(shipped: Run, halved: Run) -> None:
    found = blip2nb.diff(shipped, halved)
    modules = {stage["name"]: stage["module"] for stage in raw(shipped.report)["stages"] if not stage["junction"]}
    names = altered(shipped, halved)
    touched = [stage for stage, module in modules.items() if any(name.startswith(f"{module}.") for name in names)]
    assert 0 < len(touched) < len(modules)
    assert [move.stage for move in found.moved] == touched
    assert found.still == len(modules) - len(touched)
    assert [(one.what, one.before, one.after) for one in found.changes] == [("dtype", "auto", "float16")]
    assert found.same_weights
    assert found.logits["relative"][1] > 10 * found.logits["relative"][0]


def test_a_damaged_copy_is_found_at_the_damaged_stage(shipped: Run, model_copy: Callable[[str], Run]) -> None:
    run = model_copy(OPT)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.decoder.layers.2.fc1.weight"][3] *= 1.01

    edit_weights(run.model / "model.safetensors", damage)
    api.verify(run, proof="both", figures=False)
    found = blip2nb.diff(shipped, run)
    assert [move.stage for move in found.moved] == ["language.block.02"]
    assert found.verdicts == ("explained", "diverges")
    assert found.moved[0].after > 3 > found.moved[0].before


def test_two_architectures_have_a_difference_too(shipped: Run, converted: Callable[[str], Run], tmp_path: Path) -> None:
    api.verify(converted(T5), output=tmp_path / "t5", figures=False)
    found = blip2nb.diff(shipped.folder, str(tmp_path / "t5"))
    told = {one.what: (one.before, one.after) for one in found.changes}
    assert told["model"] == (OPT, T5)
    assert "language.block.00" in found.only[0]
    assert "language.decoder.block.00" in found.only[1]
    assert not found.same_weights
    assert found.captions_compared == len(found.captions) == 18


def test_runs_are_found_by_name_and_what_is_no_run_is_refused(shipped: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shipped.folder.parent)
    assert blip2nb.diff("as_it_is", shipped).names == ("as_it_is", "as_it_is")
    with pytest.raises(RequestError, match="neither a converted directory nor a run"):
        blip2nb.diff(shipped, "no_such_run")
    with pytest.raises(RequestError, match="blip2nb verify"):
        blip2nb.diff(shipped, shipped.model)  # converted there, and verified elsewhere


# -------------------------------------------------------------------------------------------------- the command line


def test_the_command_ends_with_0_whatever_the_difference(
    command: Callable[..., Outcome], shipped: Run, halved: Run, tmp_path: Path
) -> None:
    ended = command("diff", shipped.folder, halved.folder)
    assert ended.status == 0
    assert "dtype  auto → float16" in ended.out
    assert "B  halved: diverges" in ended.out
    picture = tmp_path / "two.png"
    told = command("diff", shipped.folder, halved.folder, "--json", "--output", picture)
    assert (told.status, told.err) == (0, "")
    content = json.loads(told.out)
    found = blip2nb.diff(shipped, halved)
    assert [one["stage"] for one in content["moved"]] == [move.stage for move in found.moved]
    assert content["logits"]["relative"] == list(found.logits["relative"])
    assert content["finding"] == found.finding
    with Image.open(picture) as image:
        assert found.finding in image.text["Description"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "words"), [("two.jpg", "should end with .png"), ("no/two.png", "no folder")])
def test_a_picture_that_cannot_be_written_ends_with_2(
    command: Callable[..., Outcome], shipped: Run, halved: Run, tmp_path: Path, name: str, words: str
) -> None:
    ended = command("diff", shipped.folder, halved.folder, "-o", tmp_path / name)
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_ends_with_2(command: Callable[..., Outcome], shipped: Run, tmp_path: Path) -> None:
    ended = command("diff", shipped.folder, tmp_path)
    assert (ended.status, ended.out) == (2, "")
    assert "nor a run" in ended.err


def test_the_help_says_that_a_difference_is_no_failure(command: Callable[..., Outcome]) -> None:
    words = " ".join(command("diff", "--help").out.split())
    assert "Exit status: 0 whatever the difference" in words
    assert "proves nothing" in words


def test_a_notebook_shows_the_difference_as_html_without_running_what_is_in_it() -> None:
    value = report()
    value["summary"] = "<script>alert(1)</script>"
    value["provenance"]["prompt"] = "<b>"
    shown = compared("pass", value)._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown
    assert "Logits, transformers against LAVIS" in shown


# --------------------------------------------------------------------------------------------------------- the figure

PAIRS = [
    ("pass", "fault"), ("fault", "two faults"), ("pass", "pass"), ("pass", "NaN"), ("pass", "zeros"),
    ("full T5", "full, faults"), ("fault", "14 stages"),
]  # fmt: skip


def pictured(one: str, other: str, width: float = 7.0) -> Figure:
    picture = two_runs.draw(compared(one, other), width)
    picture.set_dpi(150)
    FigureCanvasAgg(picture).draw()
    return picture


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_what_is_drawn_is_both_runs_numbers(one: str, other: str) -> None:
    axes = next(axes for axes in pictured(one, other).axes if axes.get_xlabel())
    moved = compared(one, other).moved
    assert [label.get_text() for label in axes.get_yticklabels()] == [move.stage for move in moved]
    low, high = axes.get_xlim()
    for label, values in (("A", [m.before for m in moved]), ("B", [m.after for m in moved])):
        found = {y: x for x, y in _points(axes, label)}
        for row, value in enumerate(values):
            if math.isnan(value):
                assert row not in found
                assert row in {round(p.get_y() + 0.4) for p in axes.patches if p.get_gid() == "NaN"}
            elif value == 0:
                assert found[row] < axes.get_xticks()[1]
            else:
                assert found[row] == pytest.approx(min(value, high), rel=0.5 if value > high else 1e-9)
                assert low < found[row] < high


def _points(axes: Any, label: str) -> list[tuple[float, float]]:
    lines = [line for line in axes.lines if line.get_label() == label]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_what_is_above_the_threshold_has_the_faults_colour_and_infinity_an_arrowhead() -> None:
    axes = next(axes for axes in pictured("fault", "two faults").axes if axes.get_xlabel())
    wrong = {line.get_label() for line in axes.lines if line.get_markerfacecolor() == "#D55E00"}
    assert wrong == {"A", "B"}
    assert list(marked(axes, "B", shapes=">").values()) == [2.0]
    assert "∞" in [text.get_text() for text in axes.texts]


@pytest.mark.filterwarnings("error")
def test_the_title_is_the_finding_and_the_legend_names_the_runs_and_counts_what_is_not_drawn() -> None:
    picture = pictured("pass", "two faults")
    assert title(picture) == compared("pass", "two faults").finding
    assert "not drawn: 18 stages moved by less than 10 %" in in_one_line(picture)
    unlike = in_one_line(pictured("full T5", "full, faults"))
    found = compared("full T5", "full, faults")
    assert f"{len(found.only[0])} stages in A alone" in unlike
    assert f"{len(found.only[1])} stages in B alone" in unlike
    reports = [Report(content(REPORTS[case])) for case in ("pass", "fault")]
    names = ("a_run", " ".join(["a rather long name of a run"] * 3))
    for width in WIDTHS:
        named = two_runs.draw(Difference.of(*reports, names), width)
        FigureCanvasAgg(named).draw()
        assert {"A: a_run", f"B: {names[1]}"} <= {words.replace("\n", " ") for words in texts(named)}
        assert collisions(named) == []


def test_the_words_tell_what_the_picture_does_not() -> None:
    found = compared("pass", "two faults")
    for words in (str(found), found._repr_html_()):
        for expected in ("A: match", "B: explained", "First wrong at", "vision.block.02", "relative error", "changed"):
            assert expected in words
    assert str(found).index("First wrong at\n  B  vision.block.02") > 0
    assert "First wrong at" not in str(compared("pass", "pass"))


def test_many_moves_are_the_largest_ones_and_the_rest_is_counted() -> None:
    value = report("t5", (39, 12, 24))
    for number, stage in enumerate(stage for stage in value["stages"] if not stage["junction"]):
        stage["excess"] = 10.0 + number
    picture = two_runs.draw(compared("full T5", value))
    axes = next(axes for axes in picture.axes if axes.get_xlabel())
    drawn = [label.get_text() for label in axes.get_yticklabels()]
    every = [move.stage for move in compared("full T5", value).moved]
    assert len(drawn) == 20
    assert drawn == sorted(drawn, key=every.index)
    assert f"{len(every) - 20} smaller moves" in in_one_line(picture)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_no_words_of_the_figure_run_into_each_other_or_off_the_page(one: str, other: str, width: float) -> None:
    picture = pictured(one, other, width)
    assert len(list(text_boxes(picture))) > 5
    assert collisions(picture) == []


def test_alt_text_and_table_hold_the_numbers() -> None:
    given = compared("pass", "fault")
    words = two_runs.alt_text(given)
    assert "vision.post_layernorm" in words
    assert "12.7 ×" in words
    assert "19 stages" in words
    assert words.endswith(".")
    assert "\n" not in words
    rows = two_runs.table(given)
    assert [row["stage"] for row in rows if row["moved"]] == ["vision.post_layernorm"]
    assert [row["a"] for row in rows] == [s["excess"] for s in REPORTS["pass"]["stages"] if not s["junction"]]
    alone = [row for row in two_runs.table(compared("full T5", "full")) if row["b"] is None]
    assert alone[0]["stage"] == "language.encoder.position_bias"

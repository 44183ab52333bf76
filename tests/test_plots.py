"""Every figure is looked at by eye once; here is what must stay true of all of them, and of the numbers in them."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import (
    ARRAYS,
    BROKEN,
    FULL,
    REPORTS,
    THRESHOLD,
    WIDTHS,
    collisions,
    column,
    drawn,
    marked,
    report,
    text_boxes,
    texts,
    title,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from records import content, raw

from blip2nb.display import plots

# -------------------------------------------------------------------------------------------- true of all figures


@pytest.mark.parametrize("name", plots.FIGURES)
def test_a_figure_is_closed_and_leaves_matplotlib_as_it_was(name: str) -> None:
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    picture = plots.FIGURES[name](content(REPORTS["fault"]), ARRAYS)
    FigureCanvasAgg(picture).draw()
    assert isinstance(picture, Figure)
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["depth_trace", "fusion"])
def test_a_notebooks_style_does_not_reach_the_figures(name: str) -> None:
    def pixels_of(picture: Figure) -> bytes:
        canvas = FigureCanvasAgg(picture)
        canvas.draw()
        return bytes(canvas.buffer_rgba())

    plain = pixels_of(plots.FIGURES[name](content(REPORTS["fault"]), ARRAYS, 3.4))
    loud = {"font.size": 30, "font.sans-serif": ["DejaVu Sans Mono"], "axes.facecolor": "black", "xtick.labelsize": 25}
    with matplotlib.rc_context(loud):
        assert pixels_of(plots.FIGURES[name](content(REPORTS["fault"]), ARRAYS, 3.4)) == plain


_BY_STAGE = ("depth_trace", "activations", "stage_by_token", "stage_map")
LAID_OUT = [
    *itertools.product(_BY_STAGE, REPORTS),
    *itertools.product([name for name in plots.FIGURES if name not in _BY_STAGE], ["fault"]),
    ("before_and_after", "two faults"),
    ("before_and_after", "full T5"),
    ("inside", "full, faults"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "case"), LAID_OUT)
def test_no_words_run_into_each_other_or_off_the_page(name: str, case: str, width: float) -> None:
    picture = drawn(name, case, width)
    assert len(list(text_boxes(picture))) > 5
    assert collisions(picture) == []


def test_letters_that_the_font_lacks_and_dollar_signs_are_shown_as_they_are() -> None:
    shown = texts(drawn("logits"))
    assert {"\\u4e2d", "$x", "a$", "⏎", "␣cup", "␣https://exam…"} <= set(shown)
    (words,) = [text for text in drawn("depth_trace", "fault").findobj(Text) if text.get_text().count("$") == 2]
    assert not words.get_parse_math()


# ------------------------------------------------------------------------------------------------- the depth trace


def test_the_title_names_the_first_wrong_stage_and_by_how_much() -> None:
    assert title(drawn("depth_trace", "fault")).startswith("First wrong at vision.post_layernorm: error 12.7 ×")
    assert "vision.block.02: error 41.0 ×" in title(drawn("depth_trace", "two faults"))


def test_the_title_says_when_nothing_is_wrong() -> None:
    worst = max(REPORTS["pass"]["stages"], key=lambda s: s["excess"] or 0)
    words = title(drawn("depth_trace"))
    assert words.startswith("No stage is wrong")
    assert worst["name"] in words
    assert f"{worst['excess']:.1f} ×" in words
    assert title(drawn("depth_trace", "zeros")).startswith("Bit-equal at all 23 stages")
    assert title(drawn("depth_trace", "NaN")).startswith(f"Not a number at {BROKEN[0]}")


def test_a_junction_that_goes_wrong_is_named_by_what_arrives() -> None:
    value = report()
    each = next(s for s in value["stages"] if s["name"] == "language.inputs_embeds")
    each["arrival_error"] = 1.4
    nothing = {"local_error": None, "excess": None}
    value["first_divergence"] = {"stage": each["name"], "module": "m", "cause": "no image", **nothing}
    picture = plots.FIGURES["depth_trace"](content(value), {})
    assert title(picture) == "First wrong at language.inputs_embeds: what arrives there is off by 1.4"
    place = float(value["stages"].index(each))
    assert marked(picture.axes[0], "wrong", shapes="^") == {place: 1.0}  # beyond the axis: an arrowhead at its end


@pytest.mark.parametrize("case", ["pass", "fault", "full, faults", "full T5"])
def test_errors_are_drawn_where_the_report_says(case: str) -> None:
    above, below = drawn("depth_trace", case).axes[:2]
    local = column(case, "local_error")
    drawn_errors = marked(above, "local error", "wrong")
    assert {place: drawn_errors[place] for place in local} == pytest.approx(local)
    assert marked(below, "excess", "wrong excess") == pytest.approx(column(case, "excess"))
    drift = next(line for line in above.lines if line.get_label() == "drift")
    kept = {float(x): y for x, y in zip(*drift.get_data(), strict=True) if not math.isnan(y)}
    assert kept == pytest.approx({place: value for place, value in column(case, "drift").items() if value})


def test_the_rounding_band_is_each_stages_own() -> None:
    above = drawn("depth_trace").axes[0]
    band = [c for c in above.collections if c.get_label() == "rounding"]
    corners = np.concatenate([path.vertices for c in band for path in c.get_paths()])
    for place, value in column("pass", "rounding").items():
        near = corners[np.abs(corners[:, 0] - place) < 0.51]
        assert np.isclose(near[:, 1], value, rtol=1e-9).any()


def test_what_is_above_the_threshold_looks_wrong_and_nothing_else_does() -> None:
    below = drawn("depth_trace", "full, faults").axes[1]
    excess = column("full, faults", "excess")
    assert set(marked(below, "wrong excess")) == {n for n, value in excess.items() if value > THRESHOLD}
    assert marked(drawn("depth_trace").axes[1], "wrong excess") == {}
    at = {line.get_label(): line.get_ydata()[0] for line in below.lines if line.get_label() in ("1", "threshold")}
    assert at == {"1": 1.0, "threshold": THRESHOLD}


def test_the_first_divergence_is_labelled_with_stage_value_and_cause() -> None:
    first = REPORTS["full, faults"]["first_divergence"]
    picture = drawn("depth_trace", "full, faults")
    text = next(text for text in picture.findobj(Text) if text.get_text().startswith(first["stage"]))
    assert text.get_window_extent().y0 > picture.axes[0].bbox.y1  # over the panel, where no data can be
    label = text.get_text()
    assert f"error {first['local_error']:.1e}".replace("e-0", "e-") in label
    assert first["cause"] in label
    assert "also: language.block.08 (3.2 ×), language.block.30 (350 ×)" in label


def test_exact_zeros_have_a_row_of_their_own() -> None:
    above, below = drawn("depth_trace", "zeros").axes[:2]
    for axes, labels in ((above, ("local error", "arrival error")), (below, ("excess",))):
        heights = set(marked(axes, *labels).values())
        assert len(heights) == 1
        named = {tick.get_loc(): tick.label1.get_text() for tick in axes.yaxis.get_major_ticks()}
        assert named[heights.pop()] == "bit-equal"
    assert len(marked(above, "local error", "arrival error")) == 23


def test_what_is_not_a_number_is_hatched_and_not_drawn() -> None:
    above, below = drawn("depth_trace", "NaN").axes[:2]
    names = [each["name"] for each in REPORTS["NaN"]["stages"]]
    places = {names.index(name) for name in BROKEN}
    for axes in (above, below):
        spans = [patch for patch in axes.patches if patch.get_gid() == "NaN"]
        assert all(span.get_hatch() for span in spans)
        hatched = {n for span in spans for n in range(len(names)) if span.get_x() < n < span.get_x() + span.get_width()}
        assert hatched == places
        assert not places & set(marked(axes, "local error", "excess", "wrong", "wrong excess"))
    assert texts(drawn("depth_trace", "NaN")).count("NaN") == 2  # two neighbours share a word


def test_an_infinite_excess_is_an_arrowhead_that_says_so() -> None:
    below = drawn("depth_trace", "two faults").axes[1]
    place = next(n for n, each in enumerate(REPORTS["two faults"]["stages"]) if each["excess"] == 1e9)
    assert list(marked(below, "wrong excess", shapes="^")) == [place]
    assert "∞ ×" in [text.get_text() for text in below.texts]


def test_two_runs_share_one_error_axis() -> None:
    limits = {drawn("depth_trace", case).axes[0].get_ylim() for case in REPORTS}
    assert len(limits) == 1
    ticks = [tick.label1.get_text() for tick in drawn("depth_trace").axes[0].yaxis.get_major_ticks()]
    assert ticks == ["bit-equal", "1e-8", "1e-6", "1e-4", "0.01", "1"]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_fourth_block_has_a_tick_and_every_part_a_band(width: float) -> None:
    picture = drawn("depth_trace", "full", width)
    names = [each["name"] for each in REPORTS["full"]["stages"]]
    blocks = [n for n, name in enumerate(names) if name[-2:].isdigit() and int(name[-2:]) % 4 == 0]
    assert list(picture.axes[1].get_xticks()) == blocks
    assert [text.get_text() for text in picture.axes[2].texts] == ["vision", "Q-Former", "projection", "language"]
    borders = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in picture.axes[2].patches]
    assert borders[0][0] == -0.5
    assert borders[-1][1] == len(names) - 0.5
    assert [end for _, end in borders[:-1]] == [start for start, _ in borders[1:]]


def test_t5_has_a_band_for_each_stack() -> None:
    words = [text.get_text() for text in drawn("depth_trace", "full T5").axes[2].texts]
    assert words == ["vision", "Q-Former", "projection", "language encoder", "language decoder"]


# ------------------------------------------------------------------------------------------- before and after a fix


def test_only_stages_that_the_fix_moves_are_drawn_and_the_rest_is_counted() -> None:
    picture = drawn("before_and_after", "full, faults")
    stages = {each["name"]: each for each in REPORTS["full, faults"]["stages"] if each["fixed"]}
    axes = picture.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["vision.post_layernorm", "language.block.08", "language.block.30"]
    for what, key in (("as shipped", None), ("with the fix", "fixed")):
        lines = [line for line in axes.lines if line.get_label() == what]
        found = {names[int(y)]: x for line in lines for x, y in zip(*line.get_data(), strict=True)}
        assert found == pytest.approx({name: (stages[name][key] if key else stages[name])["excess"] for name in names})
    assert f"not drawn: {len(stages) - 3} stages moved by less than 10 %" in texts(picture)
    assert "language.block.30 goes from 350 × to" in title(picture)


def test_a_tenth_is_the_least_move_that_is_drawn() -> None:
    value = report()
    for each, factor in zip((s for s in value["stages"] if s["fixed"]), (0.91, 0.89, 1.09, 1.11), strict=False):
        each["fixed"]["excess"] = each["excess"] * factor
    picture = plots.FIGURES["before_and_after"](content(value), {})
    moved = [s["name"] for s in value["stages"] if s["fixed"]]
    assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == [moved[1], moved[3]]


def test_a_fix_that_moves_everything_keeps_the_largest_moves() -> None:
    value = report(sizes=FULL)
    for number, each in enumerate(s for s in value["stages"] if s["fixed"]):
        each["excess"] = 10.0 + number
    picture = plots.FIGURES["before_and_after"](content(value), {})
    labels = [label.get_text() for label in picture.axes[0].get_yticklabels()]
    moved = [each["name"] for each in value["stages"] if each["fixed"]]
    assert 5 < len(labels) < 30
    assert labels[-1] == "logits"
    assert moved[0] not in labels
    assert labels == sorted(labels, key=moved.index)
    assert f"{len(moved) - len(labels)} smaller moves" in " ".join(texts(picture))


# --------------------------------------------------------------------------------------------------- the other ones


def test_logits_are_drawn_position_by_position() -> None:
    kl, tokens, risk, difference = (
        next(a for a in drawn("logits").axes if start in a.get_ylabel() + a.get_xlabel())
        for start in ("KL", "logit, last", "margin", "position in")
    )
    for axes, key in ((kl, "logits/kl"), (difference, "logits/max_abs")):
        values = {float(n): float(v) for n, v in enumerate(ARRAYS[key])}
        found = marked(axes, "positions")
        zero = found.pop(3.0)
        assert values.pop(3.0) == 0
        assert zero < axes.get_yticks()[1]
        assert found == pytest.approx(values)
    for label, key in (("LAVIS", "logits/top_lavis"), ("transformers", "logits/top_huggingface")):
        line = next(line for line in tokens.lines if line.get_label() == label)
        np.testing.assert_array_equal(line.get_xdata(), ARRAYS[key][-1, :10])
    assert sorted(marked(risk, "positions")) == pytest.approx(sorted(ARRAYS["logits/margin"]))
    assert "none can flip" in title(drawn("logits"))


def test_a_position_can_flip_where_the_difference_passes_half_the_margin() -> None:
    values = dict(ARRAYS)
    values["logits/margin"] = np.full(40, 0.2)
    values["logits/max_abs"] = np.full(40, 0.0999)
    values["logits/max_abs"][[7, 9]] = 0.1001
    picture = plots.FIGURES["logits"](content(REPORTS["fault"]), values)
    assert "2 of 40 can flip" in title(picture)
    risk = next(axes for axes in picture.axes if "margin" in axes.get_xlabel())
    lines = {line.get_label(): np.array(line.get_data()) for line in risk.lines}
    assert set(lines["could flip"][1]) == {0.1001}
    assert lines["positions"].shape == (2, 38)
    margin, difference = lines["margin ÷ 2"]
    np.testing.assert_allclose(difference, margin / 2)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(*(st.integers(0, n - 1) for n in (3, 224, 224)), st.integers(-128, 127)), max_size=4))
def test_no_lone_pixel_is_lost_from_sight(changes: list[tuple[int, int, int, int]]) -> None:
    difference = np.zeros((3, 224, 224), np.int16)
    for channel, row, across, value in changes:
        difference[channel, row, across] = value
    picture = plots.FIGURES["pixels"](content(REPORTS["pass"]), {**ARRAYS, "pixels/default": difference})
    panel = next(axes for axes in picture.axes if "default" in axes.get_title("left"))
    image = panel.images[0]
    shown = np.asarray(image.get_array())
    assert np.abs(shown).max() == np.abs(difference).max()
    for _, row, across in zip(*np.nonzero(difference), strict=True):
        assert shown[row * len(shown) // 224, across * len(shown) // 224] != 0
    white = image.cmap(image.norm(0))
    assert all(image.cmap(image.norm(value)) != white for value in shown[shown != 0])
    assert image.norm.vmin == -image.norm.vmax
    share = np.count_nonzero(difference) / difference.size
    assert ("bit-equal" in panel.get_xlabel()) == (share == 0)


def test_the_share_of_pixels_that_differ_is_said() -> None:
    picture = drawn("pixels")
    assert "0.0066 %" in title(picture)
    assert "sees LAVIS's pixels exactly" in title(picture)
    assert any(words.startswith("0.0066 % differ") and "at most by 1" in words for words in texts(picture))


def test_captions_that_are_noise_on_purpose_are_called_that_and_a_real_models_are_not() -> None:
    noise = "random weights: this caption is noise on purpose"
    assert "part on 1 of 3 images" in title(drawn("captions", "fault"))
    assert noise in texts(drawn("captions", "fault", 3.4))
    picture = plots.FIGURES["captions"](content({**REPORTS["pass"], "random_weights": False}), {})
    assert "Both models say the same of all 3 images" in title(picture)
    assert noise not in texts(picture)


def test_bytes_are_stacked_by_what_happened_to_them() -> None:
    axes = drawn("files").axes[0]
    table = REPORTS["pass"]["weights"]["bytes_by_kind"]
    for kind in ("Rename", "FuseQueryValueBias"):
        bars = [patch for patch in axes.patches if patch.get_gid() == kind]
        sizes = [kinds[kind] for kinds in table.values() if kind in kinds]
        assert [bar.get_width() * 1e9 for bar in bars] == pytest.approx(sizes)
    fused = next(patch for patch in axes.patches if patch.get_gid() == "FuseQueryValueBias")
    assert fused.get_x() * 1e9 == pytest.approx(table["vision_model"]["Rename"])
    words = " ".join(texts(drawn("files"))).replace("\n", " ")
    assert "2 tied to another, 1 dropped as a buffer, 0 unused by LAVIS" in words
    assert "235 written, 7.73 GB" in title(drawn("files"))


def test_a_missing_tensor_is_the_title_of_the_files() -> None:
    value = copy.deepcopy(REPORTS["pass"])
    value["weights"].update(missing=["qformer.layernorm.bias"], roundtrip=False)
    picture = plots.FIGURES["files"](content(value), {})
    assert title(picture) == "Not all tensors are accounted for: 1 missing"
    words = " ".join(texts(picture)).replace("\n", " ")
    assert "Missing: qformer.layernorm.bias." in words
    assert "THE WAY BACK DIFFERS" in words


def test_the_fused_bias_is_drawn_in_its_three_parts() -> None:
    panels = [axes for axes in drawn("fusion").axes if "bias and a" in axes.get_title("left")]
    panels += [axes for axes in drawn("fusion").axes if "one bias" in axes.get_title("left")]
    assert len(panels) == 2
    for axes in panels:
        parts = {c.get_gid(): c for c in axes.collections if isinstance(c, LineCollection)}
        for place, name in ((0, "query"), (2, "value")):
            segments = np.array(parts[name].get_segments())
            np.testing.assert_allclose(segments[:, 1, 1], ARRAYS[f"fusion/{name}"])
            assert segments[0, 0, 0] == place * 24 + 0.5
        assert len({tuple(part.get_color()[0]) for part in parts.values()}) == len(parts)


def test_a_key_bias_that_is_not_zero_or_not_free_is_said() -> None:
    assert "1.3e-7, rounding alone" in title(drawn("fusion"))
    assert "0.31" in title(drawn("fusion"))
    wrong = {**ARRAYS, "fusion/fused": ARRAYS["fusion/fused"].copy()}
    wrong["fusion/fused"][30] = 0.02
    value = {**REPORTS["pass"], "fusion": {"block": 0, "key_bias_effect": 0.1, "query_bias_effect": 0.3}}
    picture = plots.FIGURES["fusion"](content(value), wrong)
    assert "should be rounding alone" in title(picture)
    assert "not zero: 0.02" in texts(picture)
    assert "channel (NOT query, zeros, value)" in texts(picture)
    assert "zeros" in texts(drawn("fusion"))
    assert "channel (bit-equal: query, zeros, value)" in texts(drawn("fusion"))


# ------------------------------------------------------------------------------------ alt text, files and notebooks


def test_alt_texts_hold_the_numbers() -> None:
    wanted = {
        "depth_trace": ["23 stages", "vision.post_layernorm", "12.7 ×", "2.3e-6"],
        "before_and_after": ["vision.post_layernorm", "12.7 ×", "19 stages"],
        "activations": ["23 stages", "1.5e-4 %", "value 25, at logits"],
        "stage_by_token": ["vision.post_layernorm", "17 positions", "class token", "20 %"],
        "token_by_channel": ["17 positions × 48 channels", "Fault at vision.post_layernorm", "everywhere", "4.8 %"],
        "signature": ["residual = 0.001 × value: a scale", "99.99 %", "offset 0 %"],
        "inside": ["Inside vision.post_layernorm it is the layer_norm2: 12.7 ×", "8 places", "eps is 1e-05", "passed"],
        "stage_map": ["23 places", "vision.post_layernorm", "12.7 ×", "all else agrees"],
        "logits": ["4e-6", "1e-4", "2e-10", "98 %"],
        "pixels": ["bit-equal", "0.3 %", "0.015"],
        "captions": ["1 of 3 images", "noise on purpose"],
        "files": ["235 written", "7.73 GB", "Q-Former 420 MB"],
        "fusion": ["1.3e-7", "0.31"],
        "worst_image": ["Of 7 images $x$", "its captions differ", "5e-7 nats", "1e-4", "captions of it differ"],
    }
    assert set(wanted) == set(plots.FIGURES)
    for name, numbers in wanted.items():
        words = plots.alt_text(name, content(REPORTS["fault"]), ARRAYS)
        assert [number for number in numbers if number not in words] == [], words
        assert words.endswith(".")
        assert "\n" not in words


def test_what_there_is_no_data_for_is_skipped(tmp_path: Any) -> None:
    bare = {**REPORTS["pass"], "stages": [], "logits": None, "captions": None, "pixel_values": None, "fusion": None}
    assert plots.available(content(bare), {}) == ["files"]
    assert [path.name for path in plots.save(content(bare), {}, tmp_path)] == ["files.png"]
    assert plots.available(content(REPORTS["fault"]), ARRAYS) == list(plots.FIGURES)
    assert "logits" not in plots.available(
        content(REPORTS["fault"]), {k: v for k, v in ARRAYS.items() if k != "logits/kl"}
    )
    unfixed = copy.deepcopy(REPORTS["pass"])
    for each in unfixed["stages"]:
        each["fixed"] = None
    assert "before_and_after" not in plots.available(content(unfixed), ARRAYS)


def test_saved_files_are_named_by_width_and_carry_their_alt_text(tmp_path: Any) -> None:
    value = {**REPORTS["fault"], "logits": None, "captions": None, "pixel_values": None, "fusion": None, "faults": []}
    folder = tmp_path / "run" / "figures"
    paths = plots.save(content(value), {}, folder, widths=(7.0, 3.4), formats=("png", "svg", "pdf"))
    stems = ("stage_map", "depth_trace", "before_and_after", "files")
    ends = [f"{width}.{kind}" for width in ("-7in", "-3.4in") for kind in ("png", "svg", "pdf")]
    assert {path.name for path in paths} == {stem + end for stem in stems for end in ends}
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths}
    from PIL import Image

    with Image.open(folder / "depth_trace-3.4in.png") as image:
        assert image.text["Description"] == plots.alt_text("depth_trace", content(value), {})
        assert image.width == round(3.4 * 200)
    assert "First wrong at vision.post_layernorm" in (folder / "depth_trace-7in.svg").read_text()
    pdf = (folder / "files-7in.pdf").read_bytes()
    assert b"/Type3" not in pdf
    assert b"/Subtype /Type0" in pdf


def test_the_same_report_gives_the_same_files(tmp_path: Any) -> None:
    value = {**REPORTS["pass"], "stages": [], "logits": None, "captions": None, "pixel_values": None, "fusion": None}
    value["examined"] = None
    once = plots.save(content(value), ARRAYS, tmp_path / "once", formats=("png", "svg", "pdf"))
    again = plots.save(content(value), ARRAYS, tmp_path / "again", formats=("png", "svg", "pdf"))
    assert len(once) == 3
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


IMPORTS = """
from blip2nb.display import plots
from blip2nb.forms import made_of
from blip2nb.report.schema import Content
"""


@pytest.mark.parametrize("setup", ["", "%matplotlib inline"])
def test_a_notebook_shows_a_figure_once_and_as_png(setup: str) -> None:
    import nbclient
    from nbformat import v4

    fixture = {name: raw(content(REPORTS["pass"]))[name] for name in ("weights", "captions")}
    cells = [f"{setup}\n{IMPORTS}\nreport = made_of(Content, {fixture!r})", "plots.FIGURES['files'](report, {})",
             "plots.FIGURES['captions'](report, {})", "figure = plots.FIGURES['files'](report, {})"]  # fmt: skip
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in cells])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    shown = [["image/png" in output.get("data", {}) for output in cell.outputs] for cell in notebook.cells]
    assert shown == [[], [True], [True], []]

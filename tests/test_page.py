"""report.html: what a colleague is sent says everything, runs nothing foreign, and gives nothing away."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import io
import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import ARRAYS_OF, BROKEN, REPORTS, arrays, fault_at
from PIL import Image
from reading import Page
from records import content, raw

from blip2nb import api
from blip2nb.display import page, plots, text
from blip2nb.families.captioners.mapping import entries
from blip2nb.handles import Run
from blip2nb.variants import variant

TWIN = "tiny-blip2-opt-2.7b"

# ------------------------------------------------------------------------------------------------ made-up reports


def whole(report: dict[str, Any], model: str = TWIN, unused: int = 5) -> dict[str, Any]:
    """A made-up report with the rest of what a verification writes."""
    names = [[list(e.sources), e.target or "", e.kind, list(e.shape), "eva_vit_g.pth"] for e in entries(variant(model))]
    names += [[[f"visual_encoder.blocks.39.unused.{n}"], "", "Unused", [], ""] for n in range(unused)]
    same = {"equal": [True] * 3}
    known = {
        "id": "post_layernorm_eps", "stage": "vision.post_layernorm", "module": "vision_model.post_layernorm",
        "attribute": "eps", "lavis": 1e-5, "transformers": 1e-6, "words": "eps of the post layer norm",
        "why": "They are built with another number.", "fix": "model.vision_model.post_layernorm.eps = 1e-5",
        "explains": ["vision.post_layernorm"],
        "counter_test": {"local_error": [1e-5, 0.0], "excess": [12.7, 1.0]},
    }  # fmt: skip
    return {
        **report,
        "model_name": model, "proof": "both", "seconds": 3.67, "summary": "The same model but for one known cause.",
        "known_differences": [known] if report["verdict"] == "explained" else [], "attribute_differences": [],
        "faults": [],  # what is known is none
        "weights": {**report["weights"], "modules_checked": 241, "misshapen": [], "roundtrip_differences": [],
                    "modules_different": [], "names": names},
        "logits": {**report["logits"], "top1_agreement": 1.0, "fixed": {"relative": 3e-7}},
        "captions": {**report["captions"], "equal": True, "modes": {"greedy": same, "beams": same, "default": same}},
        "versions": {"checked with": {"blip2nb": "0.1.0", "torch": "2.15.0"}, "reference": {"torch": "2.14.1"}},
    }  # fmt: skip


def full_arrays() -> dict[str, np.ndarray]:
    """As many values as a model of full size has: 257 patches, 1408 channels."""
    rng, value = np.random.default_rng(2), dict(ARRAYS_OF["full T5"])
    for name, errors in value.items():
        if name.startswith("tokens/vision"):
            value[name] = (np.nanmedian(errors) * 10 ** rng.normal(0, 0.3, 257)).astype(np.float32)
        if name.startswith("tokens/qformer"):
            value[name] = (np.nanmedian(errors) * 10 ** rng.normal(0, 0.3, 32)).astype(np.float32)
    ours = rng.normal(0, 1, (257, 1408)).astype(np.float32)
    image = np.asarray(Image.effect_mandelbrot((224, 224), (-2, -1.5, 1, 1.5), 60).convert("RGB"))
    return value | {
        **arrays(width=1408), "examined/lavis": ours,
        "examined/transformers": (ours * 1.001 + rng.normal(0, 1e-4, ours.shape)).astype(np.float32),
        "pixels/image": image, "images/worst": image,
        "pixels/default": rng.integers(-1, 2, (3, 224, 224)).astype(np.int8),
    }  # fmt: skip


def weights_alone(complete_with: str = "blip2nb capture x") -> dict[str, Any]:
    bare = {"stages": [], "logits": None, "captions": None, "pixel_values": None, "fusion": None, "examined": None}
    value = {**whole(REPORTS["pass"]), **bare, "proof": "weights", "verdict": "incomplete", "sequences": {}}
    value["incomplete"] = [
        {"id": "no_lavis", "proof": "behaviour", "words": "Behaviour was not compared with LAVIS's."}
    ]
    return {**value, "complete_with": complete_with, "provenance": {**value["provenance"], "reference": None}}


def diverging() -> dict[str, Any]:
    value = whole(REPORTS["two faults"])
    value["weights"]["modules_different"] = [f"module {n} is not its counterpart" for n in range(30)]
    first, last = REPORTS["two faults"]["faults"]
    again = {**first, "stage": "vision.block.04", "module": first["module"].replace(".2.", ".4.")}
    return {**value, "verdict": "diverges", "known_differences": [], "faults": [first, again, last]}


def rounded(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is found of a model that somebody rounded: the same cause in two parts of every block."""
    found = [
        fault_at(stage, part) for stage in report["stages"] if not stage["junction"] for part in ("mlp", "projection")
    ]
    for fault in found:
        name = f"{fault['module']}.weight"
        words = f"{name}: every value is the right one rounded to bfloat16"
        fault["causes"] = [{**fault["causes"][0], "id": "rounded_weights", "module": name, "words": words}]
    return found


FULL = whole(REPORTS["full T5"], "blip2-flan-t5-xl", 39)
FULL["known_differences"] = []
FULL["verdict"] = "diverges"
FULL["faults"] = REPORTS["full T5"]["faults"] + rounded(REPORTS["full T5"])
FULL_ARRAYS = full_arrays()
CASES: dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]] = {
    "match": (whole(REPORTS["pass"]), {}),  # without the figures that need arrays
    "explained": (whole(REPORTS["fault"]), ARRAYS_OF["fault"]),
    "diverges": (diverging(), {}),
    "incomplete": (weights_alone(), {}),
    "NaN": ({**whole(REPORTS["NaN"]), "verdict": "diverges"}, ARRAYS_OF["NaN"]),
    "full": (FULL, FULL_ARRAYS),
}

# ------------------------------------------------------------------------------------------------ reading a page


class Read(Page):
    """report.html."""

    def rows(self, kind: str) -> list[list[str]]:
        """The cells of all tables of that class, without their heads."""
        rows: list[list[str]] = []
        inside = False
        for element in self.elements:
            if element.tag == "table":
                inside = kind in element.attributes.get("class", "").split()
            elif element.tag == "tr" and inside:
                rows.append([])
            elif element.tag in ("th", "td") and inside and element.attributes.get("scope") != "col":
                rows[-1].append(element.text)
        return [row for row in rows if row]


@functools.cache
def source(case: str) -> str:
    report, *more = CASES[case]
    return page.render(content(report), *more)


@functools.cache
def read(case: str) -> Read:
    return Read(source(case))


# ------------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_in_words_comes_first(case: str) -> None:
    report, elements = CASES[case][0], read(case).elements
    title = next(element for element in elements if element.tag == "h1")
    assert title.text.lower() == f"{report['model_name']} {text.VERDICTS[report['verdict']]}".lower()
    summary = next(n for n, e in enumerate(elements) if e.attributes.get("class") == "summary")
    assert elements[summary].text == report["summary"]
    assert summary < next(n for n, element in enumerate(elements) if element.tag == "h2")


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_that_show_prints(case: str) -> None:
    assert set(text.numbers(content(CASES[case][0]))) <= {tuple(row) for row in read(case).rows("key")}


def test_what_is_explained_comes_with_its_remedy_and_how_to_caption() -> None:
    said = {element.text for element in read("explained").all("dd")}
    code = [element.text for element in read("explained").all("pre")]
    assert "Yes, as it is. With the line below, set after loading, the difference is gone too." in said
    assert any("differ from LAVIS's by 4e-6 of their size" in one and "3e-7" in one for one in said)
    assert code[0] == "model.vision_model.post_layernorm.eps = 1e-5"
    assert "from_pretrained('model') model.vision_model.post_layernorm.eps = 1e-5 # eps of the post layer" in code[1]
    compile(text.program(content(CASES["explained"][0])), "usage", "exec")


def test_captions_that_change_are_not_called_safe() -> None:
    report = copy.deepcopy(CASES["explained"][0])
    report["captions"]["equal"] = False
    assert "Without it, some of its words are not LAVIS's" in page._safe(content(report))


def test_where_it_first_goes_wrong_and_why() -> None:
    report, found = CASES["diverges"][0], read("diverges")
    first = report["first_divergence"]
    rows = dict(row for row in found.rows("key") if len(row) == 2)
    assert rows["first wrong at"] == first["stage"]
    assert rows["in transformers"] == first["module"]
    assert rows["most likely because"] == first["cause"]
    assert rows["error ÷ its own rounding"].startswith("41.0 ×")
    items = [element.text for element in found.all("li")]
    assert "module 19 is not its counterpart" in items
    assert "module 20 is not its counterpart" not in items
    assert "and 10 more" in items
    assert "To caption as LAVIS does" not in {element.text for element in found.all("h3")}


@pytest.mark.parametrize(
    ("given", "command"),
    [
        ("blip2nb capture x --output /a/tape", f"blip2nb capture {TWIN} --output tape.safetensors"),
        (
            "blip2nb capture x --source '/home/jane doe/a.pth' --base /b --output /a/tape",
            f"blip2nb capture {TWIN} --source YOUR_FILES --base WHAT_THEY_WERE_TRAINED_FROM --output tape.safetensors",
        ),
    ],
)
def test_what_completes_a_proof_is_told_without_paths(given: str, command: str) -> None:
    said = Read(page.render(content(weights_alone(given)), {}))
    assert f"{command} blip2nb verify RUN --tape tape.safetensors" in [element.text for element in said.all("pre")]
    assert not {"Place by place", "What both models say", "One caption, token by token"} & {
        element.text for element in said.all("h2", "h3")
    }


def test_what_is_missing_is_listed_with_the_command_that_completes_it() -> None:
    report = copy.deepcopy(CASES["match"][0])
    words = "The weights were cast to bfloat16, and their source is not here to be compared with them."
    report["incomplete"] = [{"id": "weights", "proof": "weights", "words": words}]
    report |= {"verdict": "incomplete", "complete_with": "blip2nb verify /home/jane/m --source /home/jane/a.pth"}
    said = Read(page.render(content(report), {}))
    assert words in [element.text for element in said.all("li")]
    assert "blip2nb verify RUN --proof both --source YOUR_FILES" in [element.text for element in said.all("pre")]
    assert any(element.text.startswith("Not proven.") for element in said.all("dd"))


def test_a_checkpoint_of_ones_own_is_named_in_the_commands() -> None:
    report = copy.deepcopy(CASES["match"][0])
    assert text.commands(content(report)) == f"blip2nb convert {TWIN}\nblip2nb verify {TWIN}"
    report["provenance"] |= {"checkpoints": ["blip2_pretrained_opt2.7b.pth", "my best.pth"], "dtype": "float16"}
    commands = f"blip2nb convert {TWIN} --source 'my best.pth' --dtype float16\nblip2nb verify '{TWIN}--my best'"
    assert text.commands(content(report)) == commands


# --------------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("case", CASES)
def test_faults_are_there_before_the_numbers_and_only_where_there_are_any(case: str) -> None:
    sections = [e.attributes["id"] for e in read(case).all("section") if "id" in e.attributes]
    assert ("faults" in sections) == bool(CASES[case][0]["faults"])
    assert "faults" not in sections or sections.index("faults") < sections.index("numbers")


def fault_lines(found: Read) -> list[str]:
    """What stands in the line of each group of faults, closed."""
    at = [n for n, e in enumerate(found.elements) if e.attributes.get("class") == "fault"]
    assert all(found.elements[n].tag == "details" and found.elements[n + 1].tag == "summary" for n in at)
    return [found.elements[n + 1].text for n in at]


def test_a_fault_says_where_how_large_why_and_what_the_counter_test_gave() -> None:
    one, other = fault_lines(read("diverges"))
    first = CASES["diverges"][0]["faults"][0]
    error = f"{first['local_error']:.1e}"
    assert one == (
        f"{first['stage']} norm {first['module']} eps is 1e-05, the reference has 1e-06 … and in 1 more place "
        f"41 × its own rounding with eps 1e-06: {error} → 0.0e+00, passed"
    )
    assert other.startswith("language.block.01 norm")
    assert "∞ × its own rounding" in other


def test_a_fault_opens_to_the_other_causes_and_to_its_inside() -> None:
    found, first = read("diverges"), CASES["diverges"][0]["faults"][0]
    items = [element.text for element in found.all("li")]
    failed = next(one for one in items if one.startswith("the activation is relu"))
    assert failed.endswith("more than rounding is left)")
    assert "mode is 'a', the reference has 'b' (read off both modules; no counter-test)" in items
    assert any("What speaks for it: read off both modules." in element.text for element in found.all("p"))
    rows = found.rows("inside")
    opened = [place for fault in (first, CASES["diverges"][0]["faults"][2]) for place in fault["inside"]]
    assert [row[1] for row in rows] == [place["module"] for place in opened]
    assert [row[2] == "FAULT" for row in rows] == [place["faulty"] for place in opened]
    assert next(row for row in rows if row[2] == "FAULT")[4] == "41"
    assert [row[0] for row in found.rows("where")] == ["vision.block.02", "vision.block.04"]


def test_more_than_200_faults_are_a_few_lines() -> None:
    faults = CASES["full"][0]["faults"]
    assert len(faults) > 200
    lines = fault_lines(read("full"))
    assert len(lines) < 10
    counted = [re.search(r"and in (\d+) more place", line) for line in lines]
    assert sum(1 + int(found[1] if found else 0) for found in counted) == len(faults)
    assert sum("rounded to bfloat16" in line for line in lines) < 4


# ---------------------------------------------------------------------------------------------------- the contents


@pytest.mark.parametrize("case", CASES)
def test_what_both_models_say_is_there_in_words(case: str) -> None:
    said = CASES[case][0]["captions"] or {side: {"greedy": []} for side in ("lavis", "huggingface")}
    pairs = zip(said["lavis"]["greedy"], said["huggingface"]["greedy"], strict=True)
    wanted = []
    for number, (ours, theirs) in enumerate(pairs, 1):
        sides = [("both", ours)] if ours == theirs else [("LAVIS", ours), ("transformers", theirs)]
        wanted += [[str(number), who, " ".join(caption.split())] for who, caption in sides]
    assert read(case).rows("said") == wanted
    if case == "explained":
        parted = [e.text for e in read(case).all("span") if e.attributes.get("class") == "wrong"]
        assert [words.split(" in ")[0] for words in parted] == ["beside a red ball", "next to a red ball"]


@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_there_for_a_desk_and_a_phone(case: str) -> None:
    report, values = CASES[case]
    names, found = plots.available(content(report), values), read(case)
    order = [name for name in page._READING if name in names]
    pictures = found.all("img")
    assert [e.attributes["alt"] for e in pictures] == [plots.alt_text(name, content(report), values) for name in order]
    headings = [element for element in found.all("h3") if element.attributes.get("id") in names]
    assert [element.text for element in headings] == [page._READING[name][0] for name in order]
    for wide, narrow in zip(pictures, found.all("source"), strict=True):
        for attributes, url, pixels in ((wide.attributes, "src", 1400), (narrow.attributes, "srcset", 870)):
            with Image.open(io.BytesIO(base64.b64decode(attributes[url].removeprefix("data:image/png;base64,")))) as it:
                assert (it.mode, it.width) == ("P", pixels)
                assert (int(attributes["width"]), int(attributes["height"])) == it.size


def test_every_figure_is_explained() -> None:
    assert set(plots.FIGURES) <= set(page._READING)
    said = source("explained")
    report, values = CASES["explained"]
    for name in plots.available(content(report), values):
        assert page._READING[name][1].split("'")[0] in said


@pytest.mark.parametrize("case", CASES)
def test_figures_carry_their_data_up_to_a_limit(case: str) -> None:
    report, values = CASES[case]
    found = read(case)
    totals = [
        len(plots.table(name, content(report), values))
        for name in page._READING
        if name in plots.available(content(report), values)
    ]
    summaries = [element.text for element in found.all("summary") if element.text.startswith("The data of")]
    said = [int(words.split(", ")[-1].split()[0]) for words in summaries]
    assert said == [total for total in totals if total]
    notes = [element.text for element in found.all("p") if element.text.startswith(f"The first {page.MOST_ROWS} of ")]
    assert len(notes) == sum(total > page.MOST_ROWS for total in totals)
    shown = sum(min(total, page.MOST_ROWS) for total in totals)
    assert len(found.all("tr")) > shown


@pytest.mark.parametrize("case", ["match", "explained", "diverges", "NaN", "full"])
def test_every_stage_is_in_the_table_and_the_faulty_ones_say_so(case: str) -> None:
    report, rows = CASES[case][0], read(case).rows("stages")
    assert [row[0] for row in rows] == [stage["name"] for stage in report["stages"]]
    for row, stage in zip(rows, report["stages"], strict=True):
        assert (row[5], row[6]) == (stage["reference"], stage["module"])
    over = {s["name"] for s in report["stages"] if s["excess"] is not None and s["excess"] > report["threshold"]}
    broken = set(BROKEN) if case == "NaN" else set()
    assert {row[0] for row in rows if row[1].startswith("FAULT")} == over | broken
    assert {row[0] for row in rows if "not a number" in row[1]} == broken


@pytest.mark.parametrize("case", CASES)
def test_every_name_is_in_the_table(case: str) -> None:
    names, rows = CASES[case][0]["weights"]["names"], read(case).rows("names")
    assert [(row[0].split(" "), row[1]) for row in rows] == [(name[0], name[1] or "–") for name in names]
    assert {row[2] for row in rows} <= {"renamed", "fused", "tied", "left out", "not used"}
    choices = [element.text for element in read(case).all("option")][1:]
    counted = {choice.split(" (")[0]: int(choice.split("(")[1].strip(")").replace(",", "")) for choice in choices}
    assert counted == {word: [row[2] for row in rows].count(word) for word in {row[2] for row in rows}}


def test_at_full_size_it_has_1331_names_and_stays_below_3_megabytes() -> None:
    assert len(FULL["weights"]["names"]) == 1331
    assert len(FULL["stages"]) >= 100
    assert len(source("full").encode()) < 3_000_000


# ------------------------------------------------------------------------------------------- what a browser makes of it


@pytest.mark.parametrize("case", CASES)
def test_a_screen_reader_finds_its_way(case: str) -> None:
    found = read(case)
    assert [element.attributes["lang"] for element in found.all("html")] == ["en"]
    for landmark in ("header", "nav", "main", "footer", "h1", "title"):
        assert len(found.all(landmark)) == 1, landmark
    levels = [int(element.tag[1]) for element in found.all("h1", "h2", "h3", "h4")]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [element.attributes["id"] for element in found.elements if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    links = [element.attributes["href"] for element in found.all("a")]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert links[0] == "#main"
    sections = [e.attributes["id"] for e in found.all("section") if "id" in e.attributes]
    assert [link for link in links if link.removeprefix("#") in sections] == [f"#{one}" for one in sections]
    for element in found.elements:
        for kind in ("for", "aria-labelledby"):
            assert set(element.attributes.get(kind, "").split()) <= set(ids)
    assert {element.attributes.get("scope") for element in found.all("th")} == {"row", "col"}
    labelled = {element.attributes["for"] for element in found.all("label")}
    assert {element.attributes["id"] for element in found.all("input", "select")} == labelled
    regions = [element for element in found.elements if element.attributes.get("class", "").startswith("scroll")]
    assert all(e.attributes["tabindex"] == "0" and e.attributes["aria-label"] for e in regions)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_loaded_from_anywhere(case: str) -> None:
    found = read(case)
    for element in found.elements:
        for kind in ("src", "srcset", "href", "action", "data", "poster"):
            assert element.attributes.get(kind, "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in element.attributes if name.startswith("on") or name == "style"]
    assert not found.all("link", "iframe", "object", "embed", "base")
    assert not re.search(r"url\(|@import|expression", found.all("style")[0].text)


@pytest.mark.parametrize("case", ["explained", "full"])
def test_only_its_own_style_and_script_may_run(case: str) -> None:
    found = read(case)
    policy = next(e.attributes["content"] for e in found.all("meta") if "http-equiv" in e.attributes)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for kind in ("style", "script"):
        (element,) = found.all(kind)
        digest = hashlib.sha256("".join(element.parts).encode()).digest()
        assert rules[f"{kind}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert [element.tag for element in found.elements].index("meta") < [e.tag for e in found.elements].index("style")


def test_the_search_finds_the_elements_it_works_on() -> None:
    ids = {element.attributes.get("id") for element in read("match").elements}
    wanted = re.findall(r'"((?:filter|names)[\w-]*)"', read("match").all("script")[0].text)
    assert set(wanted) == {"filter", "filter-text", "filter-operation", "filter-count", "names-table"}
    assert set(wanted) <= ids
    form = next(element for element in read("match").all("form"))
    assert "hidden" in form.attributes  # without JavaScript there is the whole table, and nothing that does not work


def test_what_a_model_or_a_file_says_is_text() -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}'
    report, values = copy.deepcopy(CASES["diverges"])
    report["summary"] = report["first_divergence"]["cause"] = evil
    report["captions"]["lavis"]["greedy"][0] = report["captions"]["ladder"][0]["lavis"][0][0] = evil
    report["provenance"]["files"][0]["name"] = report["provenance"]["prompt"] = evil
    report["attribute_differences"] = [evil]
    for fault in report["faults"]:
        fault["module"] = fault["part"] = fault["inside"][0]["part"] = fault["inside"][0]["module"] = evil
        for cause in fault["causes"]:
            cause["words"] = cause["evidence"] = evil
        fault["causes"][0]["counter_test"]["change"] = evil
    report["weights"]["names"][0] = [[evil], evil, evil, [1], evil]
    report["versions"] = {evil: {evil: evil}}
    found = Read(page.render(content(report), values))
    assert len(found.all("script")) == 1
    assert len(found.all("img")) == len(plots.available(content(report), values))
    for tag in ("p", "td", "th", "li", "option"):
        assert any("".join(evil.split()) in "".join(element.text.split()) for element in found.all(tag)), tag
    assert "{{ 7 * 7 }}" in found.all("p")[1].text


def test_a_page_is_the_same_each_time() -> None:
    report, *more = CASES["incomplete"]
    assert page.render(content(report), *more) == source("incomplete")


# -------------------------------------------------------------------------------------------------------- a real run


@pytest.fixture
def run(model_copy: Callable[[str], Run], tmp_path: Path) -> Run:
    """A converted twin in a folder that tells who its owner is."""
    folder = tmp_path / "jane-doe" / "secret-project"
    folder.parent.mkdir()
    model_copy(TWIN).folder.rename(folder)
    return Run(folder, folder / "model")


def test_a_verification_leaves_a_page_that_names_no_place(run: Run) -> None:
    report = api.verify(run)
    assert run.left()["page"] == run.page == run.folder / "report.html"
    assert not list(run.folder.glob("*.partial"))
    said = run.page.read_text(encoding="utf-8")
    saved = {path.stem: Image.open(path) for path in run.figures.iterdir()}
    assert said == page.render(run.report.content, run.report.arrays, saved)  # it shows the figures that lie beside it
    for place in ("jane-doe", "secret-project", str(Path.home()), tempfile.gettempdir(), str(Path.cwd())):
        assert place not in said, place
    rows = Read(said).rows("names")
    assert [row[1] for row in rows] == [name[1] or "–" for name in report.content.weights.names]
    run.forget_proof()
    assert "page" not in run.left()


def test_without_figures_there_is_no_page_and_none_of_an_earlier_report(run: Run) -> None:
    run.page.write_text("an earlier report's")
    api.verify(run, proof="weights", figures=False)
    assert not run.page.exists()
    api.draw(run)
    said = run.page.read_text(encoding="utf-8")
    assert raw(run.report)["complete_with"].count("jane-doe") > 1
    assert "jane-doe" not in said
    assert "blip2nb verify RUN" in said


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        page.save(content({**CASES["incomplete"][0], "verdict": "?"}), {}, path)
    (tmp_path / "report.html.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        page.save(content(CASES["incomplete"][0]), CASES["incomplete"][1], path)
    assert path.read_text() == "old"


def test_a_damaged_model_says_so(model_copy: Callable[[str], Run], tmp_path: Path) -> None:
    from conftest import edit_weights

    run = model_copy(TWIN)
    name = "qformer.encoder.layer.1.attention.attention.query.weight"
    edit_weights(run.model / "model.safetensors", lambda tensors: tensors[name].mul_(1.01))
    said = page.render(api.verify(run, proof="both", figures=False).content, {})
    found = Read(said)
    assert found.all("h1")[0].text == f"{TWIN} Not the same model"
    rows = dict(row for row in found.rows("key") if len(row) == 2)
    assert rows["first wrong at"] == "qformer.layer.01"
    assert name in rows["most likely because"]
    assert "FAULT: more than rounding" in {row[1] for row in found.rows("stages")}
    assert str(tmp_path) not in said

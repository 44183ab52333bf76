"""The overview of a sweep: at a glance which variants are proven, which are not, where, and one click to the proof."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import overviews as overview
import pytest
from conftest import edit_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reading import Element, Page

from blip2nb import api

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
TWO_FAULTS, MISSING, WEIGHTS = f"{OPT}--two-faults", f"{OPT}--missing", f"{OPT}--weights"
SCREAM = "\x1b[0;31mRequestError\x1b[0m\x1b]0;title\x07: \x1b[1;32mno <b>file</b>\x1b[0m | `here`\x00\ud800"
PROJECTION = "vision_model.encoder.layers.3.self_attn.projection.weight"

# ------------------------------------------------------------------------------------------------- runs of real twins


def outcome(name: str, state: str = "finished", **more: Any) -> dict[str, Any]:
    """What a sweep says of one run."""
    folder = {"finished": name, "failed": f"{name}--failed", "not run": ""}[state]
    made = {
        "run_name": name, "model_name": name.partition("--")[0], "notebook": "convert", "verdict": "", "error": "",
        "parameters": {"model_name": name.partition("--")[0], "proof": "both"}, "state": state, "traceback": "",
        "seconds": 14.2, "finished": "2026-11-24T16:03:11+00:00", "earlier": False, "folder": folder,
        "executed": "convert.ipynb",
    }  # fmt: skip
    return made | more


def summarised(name: str, report: dict[str, Any], **more: Any) -> dict[str, Any]:
    if name == WEIGHTS:  # for which they were asked
        more = {"parameters": {"model_name": OPT, "proof": "weights"}} | more
    return overview.summarise(outcome(name, verdict=report["verdict"], **more), report)


FAILED = overview.summarise(
    outcome(f"{OPT}--float8", "failed", error="RequestError: no such dtype.", traceback=f"{SCREAM}\nsecond line")
)
NOT_RUN = overview.summarise(outcome(f"{OPT}--later", "not run", seconds=0, finished=""))
SILENT = overview.summarise(outcome("step by step", notebook="02_rename"))


def transpose_and_change_activation(model: Path) -> None:
    edit_weights(model / "model.safetensors", lambda it: it.update({PROJECTION: it[PROJECTION].T.contiguous()}))
    config = json.loads((model / "config.json").read_text())
    config["qformer_config"]["hidden_act"] = "gelu_new"
    (model / "config.json").write_text(json.dumps(config))


def remove(model: Path) -> None:
    edit_weights(model / "model.safetensors", lambda tensors: tensors.pop(PROJECTION))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's output: twins that were converted and verified, whole, broken, and by their weights alone."""
    folder = tmp_path_factory.mktemp("sweep")
    for name, change, options in (
        (OPT, None, {}),
        (T5, None, {"figures": False}),
        (TWO_FAULTS, transpose_and_change_activation, {}),
        (MISSING, remove, {}),
        (WEIGHTS, None, {"proof": "weights"}),
    ):
        run = api.convert(name.partition("--")[0], output=folder / name / "model")
        if change:
            change(run.model)
        api.verify(run, **options)
    for name in (OPT, T5, TWO_FAULTS, MISSING, WEIGHTS, FAILED["folder"], SILENT["folder"]):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "convert.ipynb").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def reports(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/report.json")}


@pytest.fixture(scope="module")
def entries(reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    made = {name: summarised(name, reports[name]) for name in (OPT, T5, TWO_FAULTS, MISSING, WEIGHTS)}
    return made | {one["run_name"]: one for one in (FAILED, NOT_RUN, SILENT)}


@pytest.fixture(scope="module")
def whole(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return overview.index(list(entries.values()))


# --------------------------------------------------------------------------------------------------- reading a page


class Read(Page):
    """index.html."""

    def rows(self) -> list[list[Element]]:
        """The cells of the table of runs, a list a run."""
        rows: list[list[Element]] = []
        for element in self.elements:
            if element.tag == "tr" and "data-run" in element.attributes:
                rows.append([])
            elif rows and element.tag in ("th", "td") and len(rows[-1]) < 2 + len(overview.PROOFS):
                rows[-1].append(element)
        return rows


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> Read:
    return Read(overview.html(whole))


# ---------------------------------------------------------------------------------------------------- what was found


@pytest.mark.parametrize(
    ("names", "state", "sentence"),
    [
        ([OPT, T5], "good", "All 2 are the same model as LAVIS's, with one known difference"),
        ([OPT], "good", f"{OPT} is the same model as LAVIS's, with one known difference"),
        (
            [OPT, T5, TWO_FAULTS],
            "diverges",
            f"1 of 3 diverges: {TWO_FAULTS}, first wrong at vision.block.03",
        ),
        ([TWO_FAULTS, OPT, MISSING], "diverges", f"2 of 3 diverge: {TWO_FAULTS}, {MISSING}"),
        (
            [OPT, FAILED["run_name"], TWO_FAULTS],
            "failed",
            f"1 of 3 failed and 1 diverges: {FAILED['run_name']}, {TWO_FAULTS}",
        ),
        ([OPT, FAILED["run_name"]], "failed", f"1 of 2 failed: {FAILED['run_name']}"),
        (
            [OPT, NOT_RUN["run_name"]],
            "not run",
            f"{OPT} is the same model as LAVIS's, with one known difference; 1 of 2 not run",
        ),
        ([NOT_RUN["run_name"]], "not run", "None of 1 was run"),
        (
            [OPT, WEIGHTS],
            "good",
            "1 of 2 is the same model as LAVIS's, with one known difference; of 1 the weights alone were compared, "
            "and are the same",
        ),
        ([SILENT["run_name"]], "good", "1 finished and left no report"),
        ([], "good", "Nothing was run"),
    ],
)
def test_the_first_sentence_is_the_finding(
    entries: dict[str, dict[str, Any]], names: list[str], state: str, sentence: str
) -> None:
    found = overview.index([entries[name] for name in names])
    assert (found["state"], found["sentence"]) == (state, sentence)
    read = Read(overview.html(found))
    assert [read.all(tag)[0].text for tag in ("title", "h1")] == [sentence, sentence]
    assert sum(found["counts"].values()) == len(names)
    assert len(read.rows()) == len(names)


def test_all_that_match_have_no_difference(entries: dict[str, dict[str, Any]]) -> None:
    same = {**entries[OPT], "result": "match"}
    assert overview.index([same, same])["sentence"] == "All 2 are the same model as LAVIS's"
    mixed = overview.index([same, same, entries[T5]])
    assert mixed["sentence"] == "All 3 are the same model as LAVIS's, 1 of them with one known difference"
    assert mixed["known"] == {"eps of the post layer norm: LAVIS 1e-05, transformers 1e-06": 1}


def test_the_five_proofs_are_told_in_words(entries: dict[str, dict[str, Any]], reports: dict[str, Any]) -> None:
    def of(name: str) -> dict[str, str]:
        return {proof: f"{one['state']}: {one['words']}" for proof, one in entries[name]["proofs"].items()}

    written = reports[OPT]["weights"]["written"]
    excess = [s["excess"] for s in reports[OPT]["stages"] if s["excess"] and s["name"] != "vision.post_layernorm"]
    logits = reports[OPT]["logits"]
    modes = reports[OPT]["captions"]["modes"]
    equal = sum(sum(mode["equal"]) for mode in modes.values())
    told = of(OPT)
    assert told["weights"] == f"passed: {written} equal, bit for bit"
    assert told["pixels"] == "passed: equal"
    rounding = f"{min(excess):.2f}–{max(excess):.2f} × rounding"
    assert told["layers"] == f"explained: known: vision.post_layernorm; else {rounding}"
    small = re.fullmatch(r"explained: off by (\S+); (\S+) with the remedy", told["logits"])
    assert small
    assert float(small[1]) == pytest.approx(logits["relative"], rel=0.05)
    assert float(small[2]) == pytest.approx(logits["fixed"]["relative"], rel=0.05)
    assert told["captions"].startswith(f"explained: {equal} of 18 equal" if equal < 18 else "passed: 18 of 18 equal")
    broken = of(TWO_FAULTS)
    assert broken["weights"] == f"failed: 1 not the source's (of {written})"
    assert re.fullmatch(r"failed: first wrong at vision\.block\.03: \S+ × rounding", broken["layers"])
    assert broken["logits"].startswith("failed: off by ")
    assert broken["captions"] == "failed: 0 of 18 equal"
    assert of(MISSING)["weights"] == f"failed: 1 missing (of {written})"
    assert set(list(of(MISSING).values())[1:]) == {"not done: it does not load"}
    assert set(list(of(WEIGHTS).values())[1:]) == {"not done: not compared"}
    assert set(of(FAILED["run_name"]).values()) == {"not done: did not finish"}
    assert set(of(NOT_RUN["run_name"]).values()) == {"not done: not run"}
    assert set(of(SILENT["run_name"]).values()) == {"not done: left no report"}


def test_a_divergence_shows_in_a_proof_whatever_it_is(reports: dict[str, Any]) -> None:
    """Some, such as a model in training mode, leave every number right."""
    report = copy.deepcopy(reports[OPT])
    report |= {"verdict": "diverges", "summary": "First wrong at pixels, in model: the whole model is in training mode"}
    assert summarised(OPT, report)["proofs"]["layers"] == {
        "state": "failed",
        "words": report["summary"],
        "link": f"./{OPT}/report.html#stages",
    }
    half = copy.deepcopy(reports[T5])
    half |= {"verdict": "match", "computed_in": "bfloat16", "known_differences": []}
    half["stages"] = [stage for stage in half["stages"] if stage["name"] != "vision.post_layernorm"]
    half["captions"] |= {"equal": False, "equal_when_fixed": False}
    half["captions"]["modes"]["greedy"]["equal"] = [False] * 6
    found = summarised(T5, half)["proofs"]
    assert found["layers"]["state"] == "passed"
    assert found["captions"]["state"] == "explained"
    assert found["captions"]["words"].endswith("the others by rounding")


def test_what_is_drawn_is_what_was_measured(entries: dict[str, dict[str, Any]], reports: dict[str, Any]) -> None:
    stages, report = entries[TWO_FAULTS]["stages"], reports[TWO_FAULTS]
    assert stages["name"] == [stage["name"] for stage in report["stages"]]
    for key in ("rounding", "excess"):
        for said, stage in zip(stages[key], report["stages"], strict=True):
            assert said == (stage[key] if stage[key] is None else pytest.approx(stage[key], rel=0.01))
    over = [stage["name"] for stage in report["stages"] if (stage["excess"] or 0) > report["threshold"]]
    wrong = [n for n, state in zip(stages["name"], stages["state"], strict=True) if state in ("fault", "known")]
    assert wrong == over
    assert dict(zip(stages["name"], stages["state"], strict=True))["vision.post_layernorm"] == "known"
    assert len(json.dumps(entries[TWO_FAULTS])) < 6000


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_says_what_index_json_says(whole: dict[str, Any], page: Read) -> None:
    texts = overview.texts(whole)
    said = json.loads(texts["index.json"])
    assert said == whole
    for run, cells in zip(said["runs"], page.rows(), strict=True):
        assert cells[0].text.startswith(run["run_name"])
        assert overview.RESULTS[run["result"]] in cells[1].text
        for proof, cell in zip(run["proofs"].values(), cells[2:], strict=True):
            assert cell.text == f"{overview.PROOF_SIGNS[proof['state']]} {proof['state']} {proof['words']}"
    assert texts["index.html"] == overview.html(said)


def test_every_link_leads_to_where_it_says(folder: Path, whole: dict[str, Any]) -> None:
    overview.save(whole, folder)
    read = Read((folder / "index.html").read_text(encoding="utf-8"))
    unwritten = {f"./{T5}/report.html"}  # verified without its figures, which leaves no page
    anchors = {str(path): set(Read(path.read_text(encoding="utf-8")).ids) for path in folder.glob("*/report.html")}
    followed = 0
    for link in {element.attributes["href"] for element in read.all("a")}:
        address = urlsplit(link)
        assert not address.scheme
        assert not address.netloc
        if not address.path:
            assert address.fragment in read.ids, link
        elif address.path not in unwritten:
            target = folder / unquote(address.path)
            assert target.is_file(), link
            assert not address.fragment or address.fragment in anchors[str(target)], link
            followed += bool(address.fragment)
    assert followed > 10
    assert whole["runs"][2]["proofs"]["layers"]["link"] == f"./{TWO_FAULTS}/report.html#faults"


def test_a_model_that_does_not_load_has_a_report_to_click_on(folder: Path) -> None:
    said = (folder / MISSING / "report.html").read_text(encoding="utf-8")
    assert f"{PROJECTION} is missing" in said


def test_what_goes_wrong_stands_first_with_place_cause_and_runs(whole: dict[str, Any], page: Read) -> None:
    items = [element.text for element in page.all("li")]
    told = next(one for one in items if one.startswith("First wrong at vision.block.03, ") and "× rounding" in one)
    assert "in vision_model.encoder.layers.3.self_attn.projection; most likely because: " in told
    assert "it is the right matrix transposed" in told
    assert told.endswith(f"1 run: {TWO_FAULTS}")
    assert any(one.startswith("Did not finish: RequestError: no such dtype.") for one in items)
    order = page.ids
    assert order.index("wrong") < order.index("runs") < order.index("errors") < order.index("failures")
    again = {**whole["runs"][2], "run_name": "another", "versions": {}}
    both = Read(overview.html(overview.index([{**whole["runs"][2], "versions": {}}, again])))
    assert [one.text for one in both.all("li") if one.text.endswith(f"2 runs: {TWO_FAULTS}, another")]


def test_nothing_wrong_has_no_such_section(entries: dict[str, dict[str, Any]]) -> None:
    ids = Read(overview.html(overview.index([entries[OPT]]))).ids
    assert not {"wrong", "failures", "not-run"} & set(ids)
    assert {"runs", "errors", "versions"} <= set(ids)


def test_a_miniature_marks_every_place_with_a_handful_of_elements(whole: dict[str, Any]) -> None:
    source = overview.html(whole)
    pictures = re.findall(r"<svg viewBox.*?</svg>", source, re.DOTALL)
    drawn = [run for run in whole["runs"] if run["stages"]]
    assert len(pictures) == len(drawn) == 3
    for text, run in zip(pictures, drawn, strict=True):
        picture = ElementTree.fromstring(text)
        paths = {one.get("class"): one.get("d") or "" for one in picture.iter("path")}
        states = run["stages"]["state"]
        assert paths["dots"].count("h0") == states.count("rounding") + states.count("bit-equal")
        assert paths.get("fault", "").count("z") == states.count("fault")
        assert paths.get("known", "").count("z") == states.count("known")
        assert len(list(picture.iter())) < 20
        words = {one.text for one in picture.iter("text")}
        first = run["first_divergence"]
        assert ("known: " if first["known"] else "") + first["stage"] in words
        named = (picture.get("aria-labelledby") or "").split()
        assert [one.get("id") for one in picture if one.tag in ("title", "desc")] == named
        described = picture.findtext("desc") or ""
        assert described.startswith(f"{len(states)} places from the image to the logits: ")
        assert first["stage"] in described
    heights = [re.findall(r"M[\d.]+ ([\d.]+)V", text)[0] for text in pictures]
    assert len(set(heights)) == 1  # stems start at 1: the axis is one for all
    assert "#d55e00" in source


def test_what_is_wrong_without_a_number_is_drawn_at_the_top(entries: dict[str, dict[str, Any]]) -> None:
    broken = copy.deepcopy(entries[TWO_FAULTS])
    place = broken["stages"]["name"].index("vision.block.03")
    broken["stages"]["state"][place], broken["stages"]["excess"][place] = "not a number", None
    tops = []
    for entry in (broken, entries[TWO_FAULTS]):
        source = overview.html(overview.index([entry]))
        tops.append(re.search(r'class="fault" d="M[\d.]+ ([\d.]+)l', source))
    assert tops[0]
    assert tops[1]
    assert float(tops[0][1]) <= float(tops[1][1])
    assert "1 not a number" in overview.describe(broken)


def test_a_screen_reader_finds_its_way(page: Read) -> None:
    assert [element.attributes["lang"] for element in page.all("html")] == ["en"]
    for landmark in ("header", "nav", "main", "footer", "h1", "title"):
        found = [one for one in page.all(landmark) if not one.attributes.get("id", "").startswith("name-")]
        assert len(found) == 1, landmark  # a miniature has a title too
    levels = [int(element.tag[1]) for element in page.all("h1", "h2", "h3")]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = page.ids
    assert len(ids) == len(set(ids))
    assert page.all("a")[0].attributes["href"] == "#main"
    for element in page.elements:
        for kind in ("for", "aria-labelledby"):
            assert set(element.attributes.get(kind, "").split()) <= set(ids)
    assert {element.attributes.get("scope") for element in page.all("th")} == {"row", "col"}
    labelled = {element.attributes["for"] for element in page.all("label")}
    assert {element.attributes["id"] for element in page.all("input", "select")} == labelled
    regions = [element for element in page.elements if "scroll" in element.classes]
    assert all(one.attributes["tabindex"] == "0" and one.attributes["aria-label"] for one in regions)
    assert len(page.all("caption")) == 1


def test_only_its_own_style_and_script_run_and_nothing_is_loaded(page: Read) -> None:
    policy = next(e.attributes["content"] for e in page.all("meta") if "http-equiv" in e.attributes)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("style", "script"):
        (element,) = page.all(kind)
        digest = hashlib.sha256("".join(element.parts).encode()).digest()
        assert rules[f"{kind}-src"] == f"'sha256-{base64.b64encode(digest).decode()}'"
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on") or name in ("style", "src")]
    assert not page.all("link", "iframe", "object", "embed", "base", "img")
    assert not re.search(r"url\(|@import|expression", page.all("style")[0].text)


def test_the_filters_find_what_they_work_on(page: Read) -> None:
    wanted = re.findall(r'"((?:filter|runs)[\w-]*)"', page.all("script")[0].text)
    assert set(wanted) == {"filter", "filter-text", "filter-result", "filter-count", "filter-none", "runs-table"}
    assert set(wanted) <= set(page.ids)
    assert "hidden" in page.all("form")[0].attributes  # without JavaScript there is the whole table
    rows = [one.attributes for one in page.all("tr") if "data-run" in one.attributes]
    drawn = {one.attributes["data-drawn"] for one in page.all("li") if "data-drawn" in one.attributes}
    assert drawn < {row["data-run"] for row in rows}
    choices = {one.attributes["value"] for one in page.all("option")} - {""}
    assert choices == {row["data-result"] for row in rows}


# ------------------------------------------------------------------------------------------------------ many of them


def test_200_runs_of_100_places_are_one_page(reports: dict[str, Any]) -> None:
    report = copy.deepcopy(reports[TWO_FAULTS])
    block = next(stage for stage in report["stages"] if stage["name"] == "vision.block.02")
    place = report["stages"].index(block)
    more = [{**block, "name": f"vision.block.{n}"} for n in range(10, 110 - len(report["stages"]))]
    report["stages"][place:place] = more
    assert len(report["stages"]) == 100
    runs = [summarised(f"run-{n:03d}", report) for n in range(150)]
    long = overview.summarise(outcome("lost", "failed", error="it is full " * 30, traceback=f"{SCREAM}\n" * 4000))
    runs += [{**long, "run_name": f"lost-{n}"} for n in range(50)]
    texts = overview.texts(overview.index(runs))
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    assert sizes["index.html"] < 1_600_000
    assert sizes["index.json"] < 1_800_000
    assert len(texts["summary.md"]) < 65_536
    read = Read(texts["index.html"])
    assert len(read.rows()) == 200
    assert len(read.elements) < 15_000
    assert "more are in index.html" in texts["summary.md"]
    assert "more failures are in index.html" in texts["summary.md"]
    assert len(ElementTree.fromstring(texts["junit.xml"].encode()).findall("testsuite/testcase")) == 200
    assert "letters are left out here; the executed notebook has them" in long["traceback"]
    assert long["traceback"].startswith("RequestError")
    assert len([one for one in read.all("li") if one.text.startswith("First wrong at")]) == 1  # one cause, one line


# ----------------------------------------------------------------------------------------------------- what is foreign

PIECES = [
    "<script>alert(1)</script>", "</details>", "]]>", "&amp;", "{{ 7 * 7 }}", "--", "../", "a:b", "%2e", "@user",
    "|", "`", "``", "```\n", " ", "\r\n", "\n\n",
    "\x1b[31m", "\x1b[", "\x1b]0;", "\x00", "\x0b", "\ud800", "\uffff",
]  # fmt: skip
FOREIGN = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), min_size=1, max_size=8).map("".join)


@settings(max_examples=60)
@given(name=FOREIGN, error=FOREIGN, traceback=FOREIGN, value=FOREIGN)
def test_what_a_run_says_is_text_everywhere(name: str, error: str, traceback: str, value: str) -> None:
    made = {"error": error, "traceback": traceback, "parameters": {"prompt": value, value: 1}}
    entry = overview.summarise(outcome(name, "failed", **made))
    index = overview.index([entry, NOT_RUN])
    texts = overview.texts(index)
    for text in texts.values():
        text.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", text)
    assert json.loads(texts["index.json"]) == index
    read = Read(texts["index.html"])
    assert len(read.all("script")) == 1
    assert len(read.rows()) == 2
    assert read.rows()[0][0].text.startswith(" ".join(entry["run_name"].split()))
    assert all(urlsplit(one.attributes["href"]).scheme == "" for one in read.all("a"))
    case = ElementTree.fromstring(texts["junit.xml"].encode()).find("testsuite/testcase")
    assert case is not None
    assert case.get("name") == entry["run_name"]
    assert [(p.get("name"), p.get("value")) for p in case.iter("property")] == [
        (key, str(one)) for key, one in entry["parameters"].items()
    ]
    tokens = MarkdownIt("commonmark").enable("table").parse(texts["summary.md"])
    kinds = [token.type for token in tokens]
    assert kinds.count("tr_open") == 3
    assert kinds.count("td_open") == 2 * (3 + len(overview.PROOFS))
    blocks = [token.content.split("<summary>")[0] for token in tokens if token.type == "html_block"]
    assert blocks == ["<details>", "</details>\n"]
    assert not [one for token in tokens for one in token.children or [] if one.type in ("html_inline", "link_open")]
    (told,) = [token.content for token in tokens if token.type == "fence"]
    assert told.strip("\n") == (entry["traceback"] or entry["error"]).strip("\n")


def test_a_run_that_broke_off_after_its_report_shows_both(reports: dict[str, Any]) -> None:
    """A notebook that asserts its verdict ends with an error because of what the report says."""
    made = {"verdict": "diverges", "error": "AssertionError: it diverges", "folder": TWO_FAULTS}
    entry = overview.summarise(outcome(TWO_FAULTS, "failed", **made), reports[TWO_FAULTS])
    index = overview.index([entry])
    assert index["sentence"] == f"1 of 1 failed: {TWO_FAULTS}"
    read = Read(overview.html(index))
    assert read.rows()[0][4].text.startswith("✗ failed first wrong at vision.block.03")
    links = [one.attributes["href"] for one in read.all("a")]
    assert f"./{TWO_FAULTS}/report.html#faults" in links
    assert "#failure-0" in links
    assert f"{TWO_FAULTS}: AssertionError: it diverges" in [one.text for one in read.all("p")]


def test_a_terminals_colours_are_nowhere(whole: dict[str, Any]) -> None:
    assert FAILED["traceback"] == "RequestError: no <b>file</b> | `here`\nsecond line"
    for text in overview.texts(whole).values():
        assert "\x1b" not in text
        assert "[0;31m" not in text
    assert "no &lt;b&gt;file&lt;/b&gt;" in overview.html(whole)


# ------------------------------------------------------------------------------------------------- for other programs


def test_a_build_server_sees_failures_errors_and_what_was_skipped(whole: dict[str, Any]) -> None:
    suites = ElementTree.fromstring(overview.junit(whole).encode())
    assert {key: suites.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "8", "failures": "2", "errors": "1", "skipped": "1",
    }  # fmt: skip
    cases = {case.get("name"): case for case in suites.iter("testcase")}
    assert {case.get("classname") for case in cases.values()} == {"convert", "02_rename"}
    kinds = {name: [child.tag for child in case if child.tag != "properties"] for name, case in cases.items()}
    assert kinds == {
        OPT: [], T5: [], TWO_FAULTS: ["failure"], MISSING: ["failure"], WEIGHTS: [], FAILED["run_name"]: ["error"],
        NOT_RUN["run_name"]: ["skipped"], SILENT["run_name"]: [],
    }  # fmt: skip
    failure = cases[TWO_FAULTS].find("failure")
    assert failure is not None
    assert (failure.get("message") or "").startswith("First wrong at vision.block.03: ")
    assert "it is the right matrix transposed" in (failure.get("message") or "")
    assert cases[FAILED["run_name"]].findtext("error") == FAILED["traceback"]
    assert cases[OPT].find("properties/property[@name='proof']") is not None


def test_a_pull_request_sees_the_worst_first(whole: dict[str, Any]) -> None:
    lines = overview.markdown(whole).splitlines()
    assert lines[0].startswith("## 1 of 8 failed and 2 diverge: ")
    rows = [line.split(" | ")[0].strip("| `") for line in lines if line.startswith("| `")]
    assert rows[0] == FAILED["run_name"]
    assert set(rows[1:3]) == {TWO_FAULTS, MISSING}
    assert sorted(rows) == sorted(run["run_name"] for run in whole["runs"])
    assert f"<details><summary><b>{FAILED['run_name']}</b>: RequestError: no such dtype.</summary>" in lines


def test_what_was_kept_from_an_earlier_sweep_says_so_and_took_no_time(entries: dict[str, dict[str, Any]]) -> None:
    index = overview.index([{**entries[OPT], "earlier": True}, entries[T5]])
    assert index["seconds"] == 14.2
    assert "kept from an earlier sweep" in Read(overview.html(index)).rows()[0][0].text
    assert index["versions"]["checked with"]["blip2nb"] == [entries[OPT]["versions"]["checked with"]["blip2nb"]]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    return lambda name: (tmp_path / name).read_text(encoding="utf-8")


def test_the_files_are_whole_or_as_they_were(
    whole: dict[str, Any], tmp_path: Path, written: Callable[[str], str]
) -> None:
    paths = overview.save(whole, tmp_path / "new")
    assert [path.name for path in paths] == ["index.html", "index.json", "summary.md", "junit.xml"]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)
    assert {path.name: path.read_text(encoding="utf-8") for path in paths} == overview.texts(whole)
    (tmp_path / "index.html").write_text("old")
    (tmp_path / "index.html.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        overview.save(whole, tmp_path)
    assert written("index.html") == "old"

"""Faults as people read them: few lines however many there are, with module, cause and counter-test."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import REPORTS, fault_at, texts
from PIL import Image
from records import content, raw, record

from blip2nb import api
from blip2nb.display import text
from blip2nb.display.faults import MOST_GROUPS, Faults, grouped, outcome, said, size
from blip2nb.display.figures import inside
from blip2nb.forms import INFINITE
from blip2nb.handles import Report, Run
from blip2nb.report.schema import Fault

OPT = "tiny-blip2-opt-2.7b"
EVIL = "<script>alert('1')</script> & <b>"


def fault(number: int = 0, part: str = "norm", tower: str = "vision_model", **about: Any) -> Fault:
    measured = {"local_error": 2.6e-5, "rounding": 1e-7, "excess": 41.0}
    stage = {"name": f"vision.block.{number:02d}", "module": f"{tower}.encoder.layers.{number}", **measured}
    return record(Fault, fault_at(stage, part) | about)


def blamed(id: str, module: str, words: str = "something", **about: Any) -> Fault:
    """A fault of one cause that was not tried."""
    cause = {"id": id, "words": words, "module": module, "evidence": "", "counter_test": None}
    return fault(module=module.rpartition(".")[0], causes=[cause], **about)


# -- which belong together


def test_one_cause_in_every_layer_is_one_group() -> None:
    (one,) = grouped([fault(n) for n in range(12)])
    assert one.words_with_more == "eps is 1e-05, the reference has 1e-06 … and in 11 more places"
    assert (one.first.stage, len(one.faults)) == ("vision.block.00", 12)
    assert grouped([fault(3)])[0].words_with_more == "eps is 1e-05, the reference has 1e-06"


def test_other_causes_and_other_paths_are_other_groups() -> None:
    found = [fault(0), fault(0, tower="qformer"), blamed("bias_missing", "vision_model.encoder.layers.0.fc1.bias")]
    assert [len(group.faults) for group in grouped(found)] == [1, 1, 1]


def test_a_cause_that_is_everywhere_is_one_group() -> None:
    paths = [f"{tower}.layers.{n}.{name}.weight" for tower in ("a", "b") for n in range(9) for name in ("q", "k", "v")]
    found = [blamed("rounded_weights", path) for path in paths]
    assert [len(group.faults) for group in grouped([fault(0), *found])] == [1, len(paths)]


@given(st.lists(st.tuples(st.sampled_from(["eps", "scale"]), st.sampled_from("abcdef"), st.integers(0, 20))))
def test_no_fault_is_lost_and_their_order_is_kept(made: list[tuple[str, str, int]]) -> None:
    found = [blamed(id, f"{name}.{n}.weight") for id, name, n in made]
    groups = grouped(found)
    place = {id(one): n for n, one in enumerate(found)}
    order = [[place[id(one)] for one in group.faults] for group in groups]
    assert sorted(n for group in order for n in group) == list(range(len(found)))
    assert all(group == sorted(group) for group in order)
    assert [group[0] for group in order] == sorted(group[0] for group in order)
    assert all(len({one.causes[0].id for one in group.faults}) == 1 for group in groups)


# -- the words


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"excess": 947.4958}, "947 × its own rounding"),
        ({"excess": 222548.87}, "2.23e+05 × its own rounding"),
        ({"excess": INFINITE}, "∞ × its own rounding"),
        ({"excess": math.inf}, "∞ × its own rounding"),
        ({"excess": None, "arrival_error": 1.4, "inside": []}, "off by 1.4 on arrival"),
        ({"excess": None}, "not a number"),
        ({"excess": math.nan}, "not a number"),
        ({"excess": None, "local_error": None, "inside": []}, "seen in the weights alone"),
    ],
)
def test_a_fault_says_how_large_it_is(about: dict[str, Any], words: str) -> None:
    assert size(fault(**about)) == words


def test_a_counter_test_says_what_was_changed_and_what_became_of_the_error() -> None:
    passed, failed, untried = fault().causes
    assert outcome(passed) == "with eps 1e-06: 2.6e-05 → 0.0e+00, passed"
    assert outcome(failed) == "with gelu: 2.6e-05 → 2.6e-05, more than rounding is left"
    assert outcome(untried) == ""
    test = dataclasses.replace(passed.counter_test, local_error=(None, 0.0))
    lost = dataclasses.replace(passed, counter_test=test)
    assert outcome(lost).startswith("with eps 1e-06: NaN →")


def test_a_cause_does_not_repeat_the_module_that_stands_beside_it() -> None:
    one = fault(2)
    assert one.module in one.causes[0].words
    assert said(one, one.causes[0]) == "eps is 1e-05, the reference has 1e-06"
    swapped = dataclasses.replace(one.causes[0], words="layers.2 holds the weights of layers.3")
    assert said(dataclasses.replace(one, module="layers.2"), swapped) == swapped.words
    assert said(dataclasses.replace(one, module=""), swapped) == swapped.words


def test_a_handful_of_lines_however_many_there_are() -> None:
    many = [blamed(f"cause {n}", "a.weight", f"words {n}", part="mlp") for n in range(MOST_GROUPS + 4)]
    lines = Faults(content({"faults": [*(fault(n) for n in range(6)), *many]})).lines()
    assert len(lines) == 2 * MOST_GROUPS + 1
    assert lines[0] == "norm vision_model.encoder.layers.0.layer_norm2 (vision.block.00, 41 × its own rounding)"
    assert lines[1].startswith(
        "  eps is 1e-05, the reference has 1e-06 … and in 5 more places; with eps 1e-06: 2.6e-05"
    )
    assert lines[-1] == "and 5 more, of other causes"


def test_without_faults_it_says_in_one_sentence_what_was_looked_at() -> None:
    told = {"stages": REPORTS["pass"]["stages"], "weights": {"written": 235}, "faults": []}
    assert repr(Faults(content(told))) == (
        "No fault: looked at were the 235 tensors that were written and 23 places, each fed what the reference was fed."
    )
    known = {**told, "known_differences": [{"words": "an eps", "explains": ["x"]}, {"words": "beams", "explains": []}]}
    assert repr(Faults(content(known))).startswith("No fault but for what is known (an eps): ")
    assert repr(Faults(content({**told, "stages": []}))).endswith("; behaviour was not compared.")
    assert repr(Faults(content({"stages": told["stages"]}))).startswith(
        "No fault: looked at were 23 places"
    )  # any two modules
    assert Faults(content(told))._repr_html_() == f"<p>{Faults(content(told))!r}</p>"


def test_in_a_notebook_the_other_causes_open_and_everything_is_text() -> None:
    shown = Faults(content({"faults": [fault()]}))._repr_html_()
    assert shown.count("<tr>") == 2
    assert shown.count("<li>") == 2
    before, after = shown.split("<details>")
    assert "eps is 1e-05" in before
    assert "the activation is relu" in after
    evil = {**raw(fault()), "part": EVIL, "module": EVIL, "stage": EVIL}
    for cause in evil["causes"]:
        cause["words"] = EVIL
    evil["causes"][0]["counter_test"]["change"] = EVIL
    shown = Faults(content({"faults": [evil]}))._repr_html_()
    assert "<script" not in shown
    assert "<b>" not in shown
    assert shown.count("&lt;script&gt;") == 7


# -- a real one


@pytest.fixture(scope="module")
def broken(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A twin whose configuration has another eps for every norm of the vision tower, verified."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(converted(OPT).model, folder / "model")
    config = folder / "model" / "config.json"
    settings = json.loads(config.read_text())
    settings["vision_config"]["layer_norm_eps"] = 1e-5
    config.write_text(json.dumps(settings))
    run = Run(folder, folder / "model")
    api.verify(run, figures=False)
    return run


def test_a_broken_twin_is_told_in_two_lines(broken: Run) -> None:
    lines = text.describe(broken).splitlines()
    (title,) = [n for n, line in enumerate(lines) if line.startswith("What goes wrong")]
    assert lines[title] == "What goes wrong, and the likely cause (12 in all)"
    where, why, end = lines[title + 1 : title + 4]
    assert where.startswith("  norm vision_model.encoder.layers.0.layer_norm1 (vision.block.00, ")
    assert why.startswith("    eps is 1e-05, the reference has 1e-06 … and in 11 more places; with eps 1e-06: ")
    assert why.endswith(" → 0.0e+00, passed")
    assert end == ""
    assert "eps is 1e-05, the reference has 1e-06" in broken.report._repr_html_()


def test_a_sound_twin_has_no_such_lines(converted: Callable[[str], Run], tmp_path: Path) -> None:
    report = api.verify(converted(OPT), output=tmp_path, figures=False)
    assert raw(report)["faults"] == []
    assert "likely cause" not in text.verdict_html(report.content)
    assert repr(Faults(report.content)).startswith("No fault but for what is known (eps of the post layer norm")


def test_its_report_draws_itself_the_same_from_memory_and_from_disk(broken: Run) -> None:
    found = broken.report.content
    assert inside.available(found, {})
    picture = Report(found).figure("inside", 3.4)
    assert {"layer_norm1", "layer_norm2", "attention", "fc1", "activation"} <= set(texts(picture))
    assert "2 of 9 places are wrong: layer_norm1, layer_norm2" in inside.alt_text(found, {})
    after = {row["module"].rpartition(".")[2]: row["excess_after"] for row in inside.table(found, {}) if row["faulty"]}
    assert after == {"layer_norm1": 1.0, "layer_norm2": 1.0}


def test_the_explorer_opens_a_stage_with_a_fault_and_goes_from_one_to_the_next(broken: Run) -> None:
    from blip2nb import explore

    explorer = explore(broken)
    assert explorer.stage.value == "vision.block.00"
    assert "eps is 1e-05" in explorer._causes.value
    assert "more place" in explorer._causes.value, "both norms of this stage, and of no other"
    assert Image.open(io.BytesIO(explorer._inside.value)).width > 1000
    first = explorer._inside.value
    explorer.next_fault.click()
    assert explorer.stage.value == "vision.block.01"
    assert explorer._inside.value != first
    explorer.stage.value = "projection"
    assert (explorer._causes.value, explorer.inside()) == ("", None)
    assert explorer._inside.layout.display == "none"
    explorer.next_fault.click()
    assert explorer.stage.value == "vision.block.00", "from the last on to the first"
    assert explorer._inside.layout.display is None

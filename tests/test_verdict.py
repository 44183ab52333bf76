"""The verdict is a pure function of what was found: every way it can come out, and what may be asked for."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
from records import content

from blip2nb import api
from blip2nb.display.text import describe, numbers, usage, verdict_html
from blip2nb.errors import RequestError
from blip2nb.forms import INFINITE, settled
from blip2nb.handles import Report, Run
from blip2nb.lavis_env import reference
from blip2nb.proof.verdict import judge
from blip2nb.variants import TWINS, variant

OPT = "tiny-blip2-opt-2.7b"
AT = ["vision.post_layernorm"]
EPS = {
    "id": "post_layernorm_eps",
    "stage": "vision.post_layernorm",
    "words": "eps",
    "lavis": 1e-5,
    "transformers": 1e-6,
}


FAULT = {"causes": [{"id": "bias_missing"}]}


def stage(excess=1.0, fixed=1.0, arrival=0.0):
    return {
        "name": "vision.post_layernorm",
        "arrival_error": arrival,
        "excess": excess,
        "fixed": {"arrival_error": arrival, "excess": fixed},
    }


def found(stages, explains=(), captions=True, captions_fixed=True, pixels=True, faults=(), **weights):
    whole = {"missing": [], "unexpected": [], "misshapen": [], "roundtrip_differences": [], "modules_different": []}
    return {
        "proof": "both",
        "computed_in": "float32",
        "threshold": 3.0,
        "weights": {**whole, "roundtrip": True, "modules_equal": True, "written": 9, "dtype": "auto", **weights},
        "stages": stages,
        "known_differences": [{**EPS, "explains": list(explains)}],
        "captions": {"equal": captions, "equal_when_fixed": captions_fixed},
        "pixel_values": {"equal": pixels},
        "logits": {"relative": 1e-5, "top1_agreement": 1.0, "fixed": {"relative": 1e-7}},
        "first_divergence": {"stage": "vision.post_layernorm", "module": "vision_model.post_layernorm", "cause": "eps"},
        "faults": list(faults),
        "incomplete": [],
    }


def missing(content, *ids):
    return {**content, "incomplete": [{"id": id, "proof": "behaviour", "words": f"{id} is missing."} for id in ids]}


@pytest.mark.parametrize(
    ("found", "verdict", "causes", "words"),
    [
        (found([stage()]), "match", [], "the captions"),
        (found([stage(150)], AT), "explained", ["post_layernorm_eps"], "safe to ship"),
        (found([stage(150)], AT, captions=False), "explained", ["post_layernorm_eps"], "apply the fix"),
        (found([stage()], captions=False), "explained", ["post_layernorm_eps"], "apply the fix"),
        (found([stage(150, fixed=20)], AT, faults=[FAULT]), "diverges", ["bias_missing"], "First wrong at"),
        (found([stage(150)], faults=[FAULT, FAULT]), "diverges", ["bias_missing"], "2 faults in all"),
        (found([stage()], captions=False, captions_fixed=False), "diverges", [], "captions do not"),
        (found([stage()], pixels=False), "diverges", [], "image processor"),
        (found([stage()], missing=["x"]), "diverges", [], "x is missing"),
        (found([stage()], modules_different=["a is not b"], modules_equal=False), "diverges", [], "a is not b"),
        (missing({**found([]), "proof": "weights"}, "no_lavis"), "incomplete", [], "bit for bit. no_lavis is missing."),
        (missing(found([stage()]), "stages"), "incomplete", [], "No fault was found, but not everything was judged."),
        (missing(found([stage(150)], AT), "stages"), "incomplete", ["post_layernorm_eps"], "stages is missing."),
        (missing(found([stage(150)], faults=[FAULT]), "stages"), "diverges", ["bias_missing"], "First wrong at"),
        (missing(found([stage()], missing=["x"]), "no_lavis"), "diverges", [], "x is missing"),
        (
            missing(found([stage()], captions=False, captions_fixed=False), "stages", "captions"),
            "incomplete",
            ["post_layernorm_eps"],
            "captions is missing.",
        ),
    ],
)
def test_every_finding_has_its_verdict(found, verdict, causes, words):
    answer = judge(content(found))
    assert (answer.verdict, answer.causes) == (verdict, tuple(causes))
    assert words in answer.summary


def test_a_report_survives_the_disk_and_says_the_same(converted, tmp_path):
    report = api.verify(converted(OPT), output=tmp_path, figures=False)
    again = Report.load(tmp_path)
    assert again.content == report.content
    assert again.verdict == "explained"
    assert set(again.arrays) == set(report.arrays)
    shown = describe(Run(tmp_path, converted(OPT).model))
    assert all(label in shown for label, _ in numbers(report.content))
    assert "explained" in report._repr_html_()
    assert "<script" not in verdict_html(dataclasses.replace(report.content, summary="<script>"))
    logits = dataclasses.replace(report.content.logits, kl=math.inf, relative=math.nan)
    odd = dataclasses.replace(report.content, logits=logits)
    Report(odd, {}).save(tmp_path / "odd")
    read = Report.load(tmp_path / "odd")
    assert (read.content.logits.kl, read.content.logits.relative) == (INFINITE, None)
    assert read.content == settled(odd)


def test_figures_that_cannot_be_drawn_are_told_apart_from_those_there_are_not(converted, tmp_path):
    report = api.verify(converted(OPT), proof="weights", output=tmp_path, figures=False)
    assert "was not compared" in report.figure("depth_trace")
    assert report.figure("files").get_size_inches()[0] == pytest.approx(7)
    with pytest.raises(RequestError, match="there are stage_map"):
        report.figure("nothing")


def test_the_lines_shown_caption_as_lavis_does(converted):
    """What `show` tells people to type is run here, word for word, and gives LAVIS's own captions."""
    from transformers import AutoProcessor, Blip2ForConditionalGeneration  # the names the lines use

    from blip2nb.families.captioners.inputs import demo_images
    from blip2nb.trace.tape import Tape

    name = "tiny-blip2-flan-t5-xl-coco"  # its default beams are among those that both libraries agree on
    space = {"AutoProcessor": AutoProcessor, "Blip2ForConditionalGeneration": Blip2ForConditionalGeneration}
    lines = usage(variant(name).prompt, converted(name).model)
    for number, image in enumerate(demo_images(variant(name))[:2]):
        space["image"] = image
        exec("\n".join(lines[:-1]), space)
        ids = eval(lines[-1], space)
        said = space["processor"].batch_decode(ids, skip_special_tokens=True)[0].strip()
        tape = Tape(reference.SHIPPED_TAPES / f"{name}.safetensors")
        assert said == tape.metadata["captions"]["default"]["text"][number]


def test_a_proof_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    with pytest.raises(RequestError, match="auto, weights, both"):
        api.check_proof("bth", OPT)
    for name in TWINS:
        api.check_proof("both", name, output_dir=str(tmp_path), lavis_python="none")  # a recording ships with the kit
    with pytest.raises(RequestError, match="needs an environment with LAVIS"):
        api.check_proof("both", "blip2-opt-2.7b", output_dir=str(tmp_path), lavis_python="none")
    with pytest.raises(RequestError, match="needs an environment with LAVIS"):
        api.check_proof("both", OPT, "/some/folder", output_dir=str(tmp_path), lavis_python="none")
    api.check_proof("auto", "blip2-opt-2.7b", lavis_python="none")


def test_a_model_too_large_for_the_machine_is_not_started(monkeypatch):
    assert reference.memory_short(variant(OPT)) == ""
    pages = {"SC_PHYS_PAGES": 4_000_000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert "takes 61.1 GB of memory; this machine has 16.4 GB" in reference.memory_short(variant("blip2-flan-t5-xxl"))


@pytest.mark.parametrize(
    ("cells", "refused"),
    [
        (["a = 1\nb = 2", "CHECK"], None),
        (["a = 1\nb = 2", "# Parameters\na = 3\n", "CHECK"], None),
        (["a = 1\nb = 2", "# Parameters\na = 3\n", "CHECK", "# Parameters\na = 4\n", "CHECK"], None),
        (["a = 1\nb = 2", "# Parameters\naa = 3\n", "CHECK"], "aa"),
        (["a = 1", "# Parameters\na = 3\n", "%xmode Plain", "# Parameters\na = 3\n", "CHECK"], None),
    ],
)
def test_injected_parameters_are_checked_against_the_declared_ones(cells, refused):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        for cell in cells:
            ran = shell.run_cell(cell.replace("CHECK", "import blip2nb; blip2nb.check_notebook()"), store_history=True)
        error = ran.error_in_exec
    finally:
        InteractiveShell.clear_instance()
    if refused is None:
        assert error is None
    else:
        assert f"no parameter '{refused}'" in str(error)

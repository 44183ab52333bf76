"""Looking around in a run by hand: both models' values at a stage, a stage entered, the widget."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_weights
from PIL import Image
from records import raw

import blip2nb
from blip2nb import trace
from blip2nb.errors import RequestError
from blip2nb.handles import Run

EPS = "vision.post_layernorm"
pytestmark = pytest.mark.usefixtures("lavis_begins_warm")


@pytest.fixture(scope="module")
def proven(converted, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("proven")
    run = Run(folder, Path(shutil.copytree(converted("tiny-blip2-opt-2.7b").model, folder / "model")))
    blip2nb.verify(run, lavis_python="none", figures=False)
    yield run
    run.release()


def stage_of(run: Run, name: str) -> dict:
    return next(stage for stage in raw(run.report)["stages"] if stage["name"] == name)


# -- values


@pytest.mark.parametrize(("fed", "key"), [("own", "drift"), ("lavis", "local_error")])
@pytest.mark.parametrize("name", ["vision.block.02", EPS, "qformer.layer.01", "language.block.00", "logits"])
def test_the_values_of_both_sides_have_the_error_that_the_report_states(proven, fed, key, name) -> None:
    sides = proven.tensor(name, fed)
    lavis, transformers = sides
    assert lavis.shape == transformers.shape
    assert sides.error == pytest.approx(stage_of(proven, name)[key], rel=1e-6)
    by_hand = np.linalg.norm(sides.difference) / np.linalg.norm(lavis.astype(np.float64))
    assert sides.error == pytest.approx(by_hand, rel=1e-6, abs=1e-12)


def test_the_values_are_kept_and_not_computed_again(proven, monkeypatch) -> None:
    before = proven.tensor("logits")
    written = (proven.folder / "activations.safetensors").stat().st_mtime_ns
    proven.release()
    # a restarted kernel that needed the model would fail
    monkeypatch.setattr("blip2nb.families.captioners.huggingface.load", None)
    after = proven.tensor("logits")
    assert np.array_equal(before.transformers, after.transformers)
    assert (proven.folder / "activations.safetensors").stat().st_mtime_ns == written


def test_values_of_another_model_are_not_taken_for_this_ones(model_copy) -> None:
    run = model_copy("tiny-blip2-flan-t5-xl")
    before = run.tensor("logits")
    path = run.model / "model.safetensors"
    edit_weights(path, lambda tensors: tensors["language_model.lm_head.weight"].mul_(2))
    after = run.tensor("logits")
    run.release()
    assert np.allclose(after.transformers, 2 * before.transformers, rtol=1e-5)


def test_at_a_junction_there_is_what_arrives(proven) -> None:
    assert proven.tensor("pixels", "lavis").error == 0
    assert proven.tensor("language.attention_mask").lavis.dtype == np.int64


def test_a_wrong_name_gets_the_nearest_one(proven) -> None:
    with pytest.raises(RequestError, match=r"Did you mean 'vision.block.01'\? There are 24"):
        proven.tensor("vison.block.1")
    with pytest.raises(RequestError, match="fed should be one of own, lavis"):
        proven.tensor("logits", "both")


def test_without_a_recording_the_command_that_makes_one_is_named(tmp_path, source_copy) -> None:
    source = source_copy("tiny-blip2-opt-2.7b")
    edit_weights(source / "blip2_pretrained_opt2.7b.pth", lambda tensors: tensors["query_tokens"].add_(1))
    run = blip2nb.convert("tiny-blip2-opt-2.7b", source, output_dir=tmp_path)
    with pytest.raises(RequestError, match=r"no recording of LAVIS that fits .* blip2nb capture"):
        run.tensor("logits")


# -- a stage entered


def test_a_fault_is_put_right_and_put_back_by_hand(proven) -> None:
    step = proven.step(EPS, lavis_python="none")
    assert step.reference is None
    shipped = step()
    assert shipped.fault
    assert shipped.excess == pytest.approx(stage_of(proven, EPS)["excess"], rel=1e-6)
    step.candidate.module.eps = 1e-5
    assert step().local_error == 0
    step.candidate.module.eps = 1e-6
    assert step().excess == shipped.excess
    assert "a fault" in repr(shipped)
    assert "recorded only" in repr(step)
    assert "<details>" in step._repr_html_()


@pytest.mark.parametrize("name", ["vision.block.03", "qformer.layer.00", "language.block.02", "logits"])
def test_a_stage_entered_gives_what_the_report_says_of_it(proven, name) -> None:
    outcome = proven.step(name, lavis_python="none")()
    assert outcome.excess == pytest.approx(stage_of(proven, name)["excess"], rel=1e-3)
    assert not outcome.fault


def test_changed_inputs_have_no_recording_to_be_compared_with(proven) -> None:
    step = proven.step(EPS, lavis_python="none")
    outcome = step(input=torch.zeros_like(step.candidate.inputs["input"]))
    assert outcome.reference is None
    assert not outcome.fault
    assert "no live reference" in repr(outcome)
    with pytest.raises(ValueError, match="called with input, not with 'hidden'"):
        step(hidden=torch.zeros(1))


def test_what_was_changed_in_memory_is_not_kept_as_the_models_values(model_copy) -> None:
    run = model_copy("tiny-blip2-opt-2.7b")
    step = run.step(EPS, lavis_python="none")
    with torch.no_grad():
        step.candidate.module.weight.zero_()
    assert step().fault
    assert run.tensor(EPS).error < 1e-3
    run.release()


def test_nothing_can_be_run_where_values_only_arrive(proven) -> None:
    with pytest.raises(RequestError, match="pixels is where values arrive"):
        proven.step("pixels", lavis_python="none")


@pytest.mark.lavis
@pytest.mark.parametrize("model", ["tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"])
def test_both_models_are_live_and_run_on_the_same_inputs(model, model_copy) -> None:
    run = model_copy(model)
    step = run.step(EPS)
    assert torch.equal(step().reference, step.expected), "LAVIS gives again what it gave when it was recorded"
    assert "live" in repr(step)
    assert "LayerNorm" in repr(step.reference)
    assert "def forward" in step.reference.source.data
    inputs = torch.randn(step.candidate.inputs["input"].shape, generator=torch.Generator().manual_seed(0))
    assert step(input=inputs).fault
    step.candidate.module.eps = 1e-5
    assert step(input=inputs).local_error == 0
    step.reference.execute("module.eps = 1e-6")
    assert step(input=inputs).fault, "a change on LAVIS's side counts as well"
    names = [stage.name for stage in blip2nb.verify(run, figures=False).content.stages]
    last = [name for name in names if "block" in name][-1]
    outcome = run.step(last)()
    assert not outcome.fault, "fed the same, whatever was changed upstream"
    assert outcome.reference is not None
    run.release()


@pytest.mark.lavis
def test_looking_at_another_run_ends_the_first_ones_lavis(model_copy, proven) -> None:
    run = model_copy("tiny-blip2-opt-2.7b")
    kernel = Path(run.step("vision.block.00").reference.session.connection_file)
    assert kernel.exists()
    assert proven.tensor("logits").stage == "logits"
    assert not kernel.exists()


@pytest.mark.lavis
def test_an_error_over_there_comes_back_with_its_traceback(model_copy) -> None:
    run = model_copy("tiny-blip2-opt-2.7b")
    step = run.step("vision.block.00")
    with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero") as caught:
        step.reference.execute("1 / 0")
    assert "Traceback" in caught.value.traceback
    assert step.reference.execute("1 + 1") == "2"
    with pytest.raises(RuntimeError, match="shape"):
        step(hidden_states=torch.zeros(1, 3, 5))
    kernel = step.reference.session.connection_file
    with pytest.raises(RuntimeError, match="LAVIS's kernel ended"):
        step.reference.execute("import os; os._exit(1)")
    assert not run.step("vision.block.00")().fault, "the next step starts another"
    run.release()
    assert not Path(kernel).exists(), "nothing of the kernel stays"


def test_any_two_modules_can_be_entered() -> None:
    torch.manual_seed(0)
    reference = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8)).eval()
    candidate = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU("tanh"), torch.nn.Linear(8, 8)).eval()
    candidate.load_state_dict(reference.state_dict())
    stage = trace.Stage("activation", "1", "1", inputs={"input": ":input"})
    step = trace.enter_both(reference, candidate, stage, torch.randn(4, 8))
    assert step().fault
    assert step.reference is not None
    step.candidate.module.approximate = "none"
    assert not step().fault
    assert not step(input=torch.randn(4, 8)).fault


# -- the widget


@pytest.fixture(scope="module")
def explorer(proven):
    return blip2nb.explore(proven)


def picture(explorer) -> Image.Image:
    return Image.open(io.BytesIO(explorer._picture.value))


def test_the_explorer_begins_at_the_fault(explorer) -> None:
    assert explorer.stage.value == EPS
    assert explorer.tensors.stage == EPS
    assert len(explorer.stage.options) == 24
    assert picture(explorer).width > 1000


def test_every_view_is_drawn_and_follows_the_controls(explorer) -> None:
    seen = set()
    for view in dict(explorer.view.options).values():
        explorer.view.value = view
        seen.add(picture(explorer).tobytes())
    assert len(seen) == len(explorer.view.options), "no two views show the same"
    explorer.view.value = "one_position"
    first = picture(explorer).tobytes()
    explorer.token.value = 5
    assert picture(explorer).tobytes() != first
    explorer.fed.value = "own"
    assert explorer.tensors.fed == "own"
    explorer.stage.value = "language.block.01"
    assert "run.tensor('language.block.01', fed='own')" in explorer._words.value
    assert explorer.token.max == explorer.tensors.lavis.shape[1] - 1
    apart = np.abs(explorer.tensors.difference[0]).max(axis=1)
    assert explorer.token.value == apart.argmax(), "a new stage is looked at where it differs most"
    explorer.view.value = "captions"
    one = picture(explorer).tobytes()
    explorer.image.value = 3
    assert picture(explorer).tobytes() != one


def test_what_has_no_picture_says_so(explorer) -> None:
    explorer.view.value, explorer.stage.value = "signature", "language.attention_mask"
    assert ("No picture of this" in explorer._words.value) == (explorer.figure() is None)
    explorer.stage.value = EPS


def test_where_there_is_no_widget_the_figure_is_shown(explorer) -> None:
    data, _ = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert Image.open(io.BytesIO(data["image/png"])).width > 1000


def test_a_run_whose_behaviour_was_not_compared_says_so(model_copy) -> None:
    run = model_copy("tiny-blip2-opt-2.7b")
    blip2nb.verify(run, proof="weights", figures=False)
    explorer = blip2nb.explore(run)
    assert "Behaviour was not compared" in explorer._words.value


def test_runs_and_values_show_themselves_as_tables(proven) -> None:
    assert "report.json" in proven._repr_html_()
    shown = proven.tensor("logits")._repr_html_()
    assert shown.count("<tr>") == 4
    assert f"{proven.tensor('logits').lavis.max():.4g}" in shown

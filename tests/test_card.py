"""The model card says what is known, gives nothing away, and never takes the place of somebody's own."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, snapshot
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from PIL import Image
from records import record

from blip2nb import api
from blip2nb.conversion.hub import CARD, FIGURE, README, is_edited, keep_card, sign, unsigned
from blip2nb.display import card
from blip2nb.families.captioners.inputs import demo_images
from blip2nb.handles import Report, Run
from blip2nb.lavis_env import reference
from blip2nb.report.manifest import Manifest
from blip2nb.variants import VARIANTS

OPT = "tiny-blip2-opt-2.7b"
SOMEBODY = "---\nlicense: mit\n---\n# Mine\n"


@pytest.fixture(scope="module")
def reports(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """What a verification of the twin found, and what one of its weights alone does."""
    folder = tmp_path_factory.mktemp("proof")
    run = Run(folder, Path(shutil.copytree(converted(OPT).model, folder / "model")))
    found = {proof: api.verify(run, proof=proof, figures=False) for proof in ("both", "weights")}
    return {found["both"].verdict: found["both"], found["weights"].verdict: found["weights"]}


@pytest.fixture
def run(model_copy: Callable[[str], Run]) -> Run:
    made = model_copy(OPT)
    for name in CARD:
        (made.model / name).unlink(missing_ok=True)
    return made


def of(name: str, **change: Any) -> Manifest:
    """The manifest of a released model, as far as a card reads it."""
    one = VARIANTS[name]
    whole = {
        "dtype": "auto", "weights_hash": "0" * 64, "parameters": {"a": "1", "b": "2"},
        "origins": {"a": "eva_vit_g.pth", "b": one.checkpoint}, "checkpoints": [one.checkpoint],
        "written": {"c": "3"}, "shards": {"model.safetensors": {"bytes": 7_000_000_000, "hash": "f" * 64}},
        "tied": {}, "dropped": {}, "unused": {}, "no_way_back": {}, "bytes_by_kind": {},
        "versions": {"torch": "2.15.0"},
        "files": [{"name": one.checkpoint, "size": 1_234_567, "mtime_ns": 1_699_999_999_123_456_789}],
    }  # fmt: skip
    return record(Manifest, {"model": name, "variant": dataclasses.asdict(one), **whole, **change})


def code(text: str, language: str) -> list[str]:
    return [one.content for one in MarkdownIt("commonmark").parse(text) if one.type == "fence" and one.info == language]


# -- what it says


def test_before_the_proof_it_says_that_there_was_none_and_how_to_make_it(run: Run):
    assert card.write(run)
    text = (run.model / README).read_text()
    assert "**Not verified yet.**" in text
    assert code(text, "sh") == [f"blip2nb convert {OPT}\nblip2nb verify {OPT}\n"]
    assert "## The proof" not in text
    assert not (run.model / FIGURE).exists()


def test_after_the_proof_it_says_verdict_numbers_and_remedy_and_shows_where_errors_arise(
    run: Run, reports: dict[str, Report]
):
    reports["explained"].save(run.folder)
    assert card.write(run)
    text = (run.model / README).read_text()
    assert f"**Verified: the same model, but for a known difference.** {reports['explained'].content.summary}" in text
    assert "Not verified" not in text
    for number in (run_hash := Manifest.read(run.model).weights_hash, "6 of 6 equal in every token", "bit for bit"):
        assert number in text
    assert len(run_hash) == 64
    (python,) = code(text, "python")
    assert "model.vision_model.post_layernorm.eps = 1e-5" in python
    picture = re.search(rf"!\[(.+)\]\({FIGURE}\)", text)
    assert picture is not None
    assert "First wrong at vision.post_layernorm" in picture[1]
    with Image.open(run.model / FIGURE) as image:
        assert image.width == 896
        assert (run.model / FIGURE).stat().st_size < 100_000


def test_its_lines_of_python_caption_as_the_report_says_lavis_does(
    run: Run, reports: dict[str, Report], tmp_path: Path
):
    """They are run, on an image of the demo, in a folder where `model` is the converted directory."""
    reports["explained"].save(run.folder)
    card.write(run)
    (python,) = code((run.model / README).read_text(), "python")
    demo_images(run.variant)[0].save(tmp_path / "photo.png")
    said = io.StringIO()
    lines = python.replace("photo.jpg", str(tmp_path / "photo.png")).replace("'model'", repr(str(run.model)))
    exec(lines, {"print": lambda text: print(text, file=said)})
    captions = reports["explained"].content.captions
    assert captions is not None
    assert said.getvalue().strip() == captions.huggingface["default"][0].strip()


def test_a_proof_of_the_weights_alone_is_called_incomplete_and_takes_the_figure_away(
    run: Run, reports: dict[str, Report]
):
    for verdict in ("explained", "incomplete"):
        reports[verdict].save(run.folder)
        assert card.write(run)
    text = (run.model / README).read_text()
    assert "**Not verified in full.**" in text
    assert not (run.model / FIGURE).exists()
    assert FIGURE not in text


def test_a_model_that_is_not_the_same_is_not_to_be_used(reports: dict[str, Report], run: Run):
    found = reports["explained"]
    wrong = dataclasses.replace(found.content, verdict="diverges", summary="First wrong at vision.block.02.")
    text = card.render(Manifest.read(run.model), Report(wrong, found.arrays))
    assert "**Do not use it: not the same model.** First wrong at vision.block.02." in text
    assert "Verified:" not in text


def test_a_report_of_another_model_is_not_taken_for_this_ones(run: Run, reports: dict[str, Report]):
    found = reports["explained"].content
    made = dataclasses.replace(found.provenance, weights_hash="of another")
    Report(dataclasses.replace(found, provenance=made)).save(run.folder)
    assert card.write(run)
    assert "**Not verified yet.**" in (run.model / README).read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_metadata_of_every_model_goes_through_the_hubs_library_unchanged(name: str, tmp_path: Path):
    (tmp_path / README).write_text(card.render(of(name)))
    data = metadata_load(tmp_path / README)
    assert data == ModelCard.load(tmp_path / README).data.to_dict() == card.metadata(of(name)).to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert ("random-weights" in data["tags"]) == VARIANTS[name].twin
    assert not {"license", "base_model", "base_model_relation", "model-index"} & data.keys()


def test_a_fine_tuned_model_names_what_it_was_tuned_from_and_its_checkpoint():
    tuned = of(
        "blip2-opt-2.7b-coco", checkpoints=["blip2_caption_opt2.7b.pth", "checkpoint|best.pth"], dtype="bfloat16"
    )
    data, text = card.metadata(tuned).to_dict(), card.render(tuned)
    assert (data["base_model"], data["base_model_relation"]) == ("Salesforce/blip2-opt-2.7b-coco", "finetune")
    assert "language" not in data
    for words in (
        "`checkpoint¦best.pth`, over `blip2_caption_opt2.7b.pth`",
        "364 × 364",
        "`a photo of`",
        "in bfloat16",
    ):
        assert words in text
    assert code(text, "sh")[0].startswith("blip2nb convert blip2-opt-2.7b-coco --source 'checkpoint|best.pth' --dtype")


def test_its_tables_are_tables_also_with_names_that_mean_something_in_markdown():
    odd = of("blip2-opt-2.7b", files=[{"name": "a|b`c*.pth", "size": 1, "mtime_ns": 2}])
    html = MarkdownIt("commonmark").enable("table").render(card.render(odd).split("---\n", 2)[2])
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    assert len(rows) > 12
    assert all(len(re.findall("<t[dh]", row)) in (2, 3) for row in rows)
    assert "a¦b'c*.pth" in html
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.S)


# -- what it does not say


def test_it_names_no_folder_of_this_machine_and_no_time(run: Run, reports: dict[str, Report], converted):
    reports["explained"].save(run.folder)
    card.write(run)
    text = (run.model / README).read_text() + card.render(Manifest.read(run.model), reports["incomplete"])
    for place in (Path.home(), Path.cwd(), run.folder, converted(OPT).model, Path(os.environ["BLIP2NB_CACHE"])):
        assert str(place) not in text
    assert not re.search(r"(?<![\w.:/])/(?!/)\w+/", re.sub(r"https://\S+", "", text)), "a path"
    assert "mtime" not in text
    assert str(Manifest.read(run.model).files[0].mtime_ns) not in text


# -- whose it is


def test_a_card_that_was_edited_stays(run: Run, reports: dict[str, Report]):
    card.write(run)
    path = run.model / README
    path.write_text(path.read_text().replace("## Limitations", "## Limitations\n\n- Mine."))
    reports["explained"].save(run.folder)
    there = snapshot(run.model)
    assert not card.write(run)
    assert snapshot(run.model) == there


@pytest.mark.parametrize("content", [SOMEBODY.encode(), b"", b"\xff\xfe not text", sign("text").encode() + b"more"])
def test_what_somebody_else_wrote_is_not_the_kits(run: Run, content: bytes):
    (run.model / README).write_bytes(content)
    assert is_edited(run.model)
    assert not card.write(run)
    assert (run.model / README).read_bytes() == content


def test_other_line_endings_are_no_edit(run: Run):
    card.write(run)
    path = run.model / README
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert not is_edited(run.model)


def test_signing_is_undone_by_reading_it():
    text = card.render(of("blip2-opt-2.7b"))
    plain = unsigned(text)
    assert plain is not None
    assert sign(plain) == text
    assert text.count("<!--") == 1


def test_an_edited_card_is_kept_where_the_directory_is_written_anew_and_the_kits_is_not(run: Run, tmp_path: Path):
    new = tmp_path / "new"
    new.mkdir()
    card.write(run)
    keep_card(run.model, new)
    assert list(new.iterdir()) == []
    (run.model / README).write_text(SOMEBODY)
    (run.model / FIGURE).write_bytes(b"a picture of mine")
    keep_card(run.model, new)
    assert {path.name: path.read_bytes() for path in new.iterdir()} == {
        README: SOMEBODY.encode(),
        FIGURE: b"a picture of mine",
    }


# -- whole, or not at all


def test_where_there_is_no_room_for_card_and_figure_the_old_card_stays_alone(
    run: Run, reports: dict[str, Report], caplog: pytest.LogCaptureFixture
):
    card.write(run)
    there = snapshot(run.model)
    reports["explained"].save(run.folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # enough for the card, not for its figure
    try:
        assert not card.write(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(run.model) == there
    assert "was not written" in caplog.text


def test_what_is_no_file_in_the_cards_place_stays(run: Run):
    (run.model / README).mkdir()
    assert not card.write(run)
    assert (run.model / README).is_dir()


# -- beside what else looks at the directory


def test_the_card_is_no_part_of_what_is_checked_and_goes_nowhere_on_the_way_back(
    run: Run, command: Callable[..., Outcome], tmp_path: Path
):
    assert card.write(run)
    assert command("convert", "--check", run.model).status == 0
    assert command("revert", run.model, "--output", tmp_path / "back.pth").status == 0
    (run.model / README).write_text(SOMEBODY)
    assert command("convert", "--check", run.model).status == 0


def test_a_directory_with_a_card_is_kept_by_the_same_conversion(run: Run, command: Callable[..., Outcome]):
    assert card.write(run)
    there = snapshot(run.model)
    assert command("convert", OPT, "--output", run.model).status == 0
    assert snapshot(run.model) == there


# -- when it is written


def test_convert_writes_the_card_verify_the_verdict_and_the_report_still_holds(tmp_path: Path):
    """Neither the card nor its figure make a report one of another model."""
    run = api.convert(OPT, output=tmp_path / "model")
    assert "**Not verified yet.**" in (run.model / README).read_text()
    api.verify(run, figures=False)
    assert "**Verified" in (run.model / README).read_text()
    assert (run.model / FIGURE).is_file()
    assert reference.report_holds(run)
    (run.model / "config.json").touch()
    assert not reference.report_holds(run)


def test_a_proof_that_is_kept_elsewhere_leaves_the_directory_as_it_is(run: Run, tmp_path: Path):
    there = snapshot(run.model)
    api.verify(run, output=tmp_path / "elsewhere", figures=False)
    assert snapshot(run.model) == there


def test_a_card_that_was_edited_outlives_another_conversion_of_the_directory(run: Run, command: Callable[..., Outcome]):
    (run.model / README).write_text(SOMEBODY)
    request = ("convert", OPT, "--output", run.model, "--dtype", "bfloat16", "--overwrite")
    assert command(*request).status == 0
    assert Manifest.read(run.model).dtype == "bfloat16"
    assert (run.model / README).read_text() == SOMEBODY
    assert command("convert", "--check", run.model).status == 0


def test_a_card_that_was_deleted_is_written_by_the_same_conversion(run: Run, command: Callable[..., Outcome]):
    assert command("convert", OPT, "--output", run.model).status == 0
    assert "**Not verified yet.**" in (run.model / README).read_text()

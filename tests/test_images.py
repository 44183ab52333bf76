"""Images and texts of one's own: what is shown, that both models see the same pixels, and what many say together."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from records import raw
from safetensors.torch import load_file

from blip2nb import api
from blip2nb.display import plots
from blip2nb.errors import RequestError
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.inputs import choose, demo_image, read_texts
from blip2nb.families.captioners.stages import stages
from blip2nb.handles import Run
from blip2nb.lavis_env import reference
from blip2nb.proof import takes
from blip2nb.proof.behaviour import tape_images
from blip2nb.report import schema
from blip2nb.report.manifest import Manifest
from blip2nb.trace.comparison import compare
from blip2nb.trace.metrics import distance
from blip2nb.trace.stage import places, places_inside
from blip2nb.trace.tape import Tape, save_tape
from blip2nb.variants import variant

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
TEXTS = ["a photo of", "a red boat"]
SKIPPED = {"cut.png": "damaged", "empty.jpg": "not an image", "more": "a folder", "notes.txt": "not an image"}


def every_kind(folder: Path) -> Path:
    """A folder with an image of every kind of pixels, of odd sizes, and with what is no image."""
    folder.mkdir()
    demo = demo_image()
    for mode in ("RGB", "L", "LA", "RGBA", "P", "1"):
        demo.convert(mode).save(folder / f"{mode.lower()}.png")
    veiled = demo.convert("RGBA")
    veiled.putalpha(Image.linear_gradient("L").resize(demo.size))
    veiled.save(folder / "veiled.png")
    demo.convert("P").save(folder / "p-clear.png", transparency=3)
    demo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)).save(folder / "sixteen.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be shown turned by a quarter
    demo.crop((10, 10, 200, 120)).save(folder / "turned.jpg", exif=turned)
    demo.resize((2000, 3)).save(folder / "wide.png")
    Image.new("RGB", (1, 1), (9, 200, 30)).save(folder / "dot.png")
    whole = (folder / "rgb.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(whole)
    (folder / "more").mkdir()
    (folder / "more" / "rgb.png").write_bytes(whole)
    return folder


# -- what is shown


def test_a_folders_images_are_shown_by_name_and_what_is_none_is_named(tmp_path, caplog):
    folder = every_kind(tmp_path / "pictures")
    chosen = choose(variant(OPT), folder)
    names = [picture.name for picture in chosen.pictures]
    assert names == sorted(path.name for path in folder.iterdir() if path.name not in {*SKIPPED, ".hidden.png"})
    assert {one.name: one.why for one in chosen.skipped}.keys() == SKIPPED.keys()
    for one in chosen.skipped:
        assert one.why.startswith(SKIPPED[one.name])
        assert f"{one.name} is skipped: {one.why}" in caplog.text
    assert str(tmp_path) not in caplog.text
    modes = {picture.name: picture.mode for picture in chosen.pictures}
    assert {modes[f"{mode}.png"] for mode in ("rgb", "l", "la", "rgba", "p", "1")} == {
        "RGB",
        "L",
        "LA",
        "RGBA",
        "P",
        "1",
    }
    assert (modes["cmyk.jpg"], modes["sixteen.png"]) == ("CMYK", "I;16")
    for picture in chosen.pictures:
        with Image.open(folder / picture.name) as file:
            assert picture.load().tobytes() == file.convert("RGB").tobytes()
            assert picture.size == file.size  # also of the one that a viewer would turn
    takes_of = chosen.takes(variant(OPT))
    assert [take["image"] for take in takes_of] == names
    assert takes_of[0]["texts"] == {"text_input": ["a photo of a small boat on the sea"]}
    assert takes_of[0]["prompt"] == variant(OPT).prompt


def test_files_and_folders_may_be_mixed_and_each_is_shown_once(tmp_path):
    one, other = (tmp_path / name for name in ("one", "other"))
    for folder, names in ((one, "ba"), (other, "a")):
        folder.mkdir()
        for name in names:
            demo_image().save(folder / f"{name}.png")
    chosen = choose(variant(T5), [other, one / "b.png", one, other / "a.png"], TEXTS)
    assert [picture.name for picture in chosen.pictures] == ["a.png", "b.png", "a.png (2)"]
    told = chosen.takes(variant(T5))
    assert [(take["image"], take["prompt"]) for take in told[:3]] == [("a.png", t) for t in TEXTS] + [
        ("b.png", TEXTS[0])
    ]
    assert all(take["texts"]["text_input"] == [take["prompt"]] and take["texts"]["text_output"] for take in told)


def test_texts_alone_go_with_the_demos_images(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\ufeffa photo of\n\n  ein schönes Bild \n", encoding="utf-8")
    chosen = choose(variant(OPT), wanted_texts=read_texts(file))
    assert chosen.texts == ("a photo of", "ein schönes Bild")
    assert len(chosen.pictures) == 6
    assert chosen.pictures[0].load().tobytes() == demo_image().tobytes()
    assert choose(variant(OPT)) is None
    assert choose(variant(OPT), "", "") is None
    assert choose(variant(OPT), (), [""]).texts == ("",)  # no prompt, which is asked for


def test_another_pixel_text_or_order_is_another_input_and_another_name_is_not(tmp_path):
    pictures = {name: tmp_path / f"{name}.png" for name in ("one", "same", "other")}
    demo_image().save(pictures["one"])
    demo_image().save(pictures["same"], compress_level=0)
    changed = demo_image()
    changed.putpixel((0, 0), (0, 0, 0))
    changed.save(pictures["other"])

    def of(images, texts=()):
        return choose(variant(OPT), [pictures[name] for name in images], texts).inputs_hash(variant(OPT))

    assert of(["one"]) == of(["same"])
    different = [of(["one"]), of(["other"]), of(["one", "other"]), of(["other", "one"]), of(["one"], ["a photo of"])]
    assert len(set(different)) == len(different)


def test_what_pil_holds_for_a_bomb_is_skipped(tmp_path, monkeypatch):
    Image.new("1", (3000, 3000)).save(tmp_path / "bomb.png")
    demo_image().save(tmp_path / "fine.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    chosen = choose(variant(OPT), tmp_path)
    assert [picture.name for picture in chosen.pictures] == ["fine.png"]
    assert [(one.name, one.why) for one in chosen.skipped] == [
        ("bomb.png", "larger than PIL's limit of 2000000 pixels")
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--images", "{tmp}/nowhere"], "nowhere does not exist. Expected an image, or a folder of images."),
        (["--images", "{tmp}/bare"], "No image in {tmp}/bare can be shown (0 looked at)."),
        (["--images", "{tmp}/words"], "can be shown (1 looked at; a.txt: not an image that PIL can read)."),
        (["--images", "{tmp}/words/a.txt"], "There is no image to show: a.txt is skipped, not an image"),
        (
            ["--texts", "{tmp}/nowhere"],
            "cannot be read (No such file or directory). Expected a file with one text a line.",
        ),
        (["--texts", "{tmp}/bare"], "cannot be read (Is a directory)."),
        (["--texts", "{tmp}/blank.txt"], "holds no text. Expected one a line."),
        (["--texts", "{tmp}/dot.png"], "is not a text file in UTF-8."),
        (["--text", "a", "--proof", "weights"], "and proof weights runs neither: leave out one of them."),
        (["--text", "a", "--lavis-python", "none"], "needs an environment with LAVIS"),
        (
            ["--text", "a", "--tape", "{tape}"],
            "was recorded on other images or texts. Leave out images and texts, or the tape",
        ),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_sentence(given, said, tmp_path, command, converted):
    for folder in ("bare", "words"):
        (tmp_path / folder).mkdir()
    (tmp_path / "words" / "a.txt").write_text("a")
    (tmp_path / "blank.txt").write_text("\n \n")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    places = {"tmp": tmp_path, "tape": reference.shipped_tape(variant(OPT))}
    folder = tmp_path / "proof"
    done = command("verify", converted(OPT).model, "--output", folder, *(one.format(**places) for one in given))
    assert done.status == 2
    assert said.format(**places) in done.said[-1]
    assert "Traceback" not in done.err
    assert not folder.exists()


# -- the tape of many takes


def test_a_tape_joined_of_parts_gives_each_take_back(tmp_path):
    first = {"a": torch.randn(3, 5), "b": torch.arange(7), "image.0": torch.arange(13).to(torch.uint8)}
    second = {"a": torch.randn(3, 5).half(), "b": torch.tensor([True, False, True]), "same": torch.zeros(4)}
    third = {"a": torch.randn(2).bfloat16(), "also": torch.zeros(4), "too": torch.zeros(4), "none": torch.zeros(0, 3)}
    parts = []
    for number, tensors in enumerate((second, third), 1):
        save_tape(tmp_path / str(number), tensors)
        parts.append((f"take.{number}/", tmp_path / str(number)))
    save_tape(tmp_path / "tape", first, {"x": 1}, parts)
    tape = Tape(tmp_path / "tape")
    assert (tape.takes, tape.metadata) == (3, {"x": 1})
    for number, tensors in enumerate(({"a": first["a"], "b": first["b"]}, second, third)):
        held = tape.take(number)
        assert held.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert held[name].dtype == tensor.dtype
            assert torch.equal(held[name], tensor)
    assert torch.equal(tape["take.2/too"], third["too"])
    assert len(load_file(tmp_path / "tape")) == len(first) + len(second) + len(third) - 1  # equal ones are stored once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "tape"]
    with pytest.raises(KeyError, match="holds no"):
        tape.take(3)


def test_a_shipped_recording_is_a_tape_of_one_take():
    tape = Tape(reference.shipped_tape(variant(OPT)))
    assert tape.takes == 1
    held = tape.take(0)
    assert held.keys() == {name for name in tape.names() if not name.startswith("image.")}
    assert torch.equal(held["ln_vision:x"], tape["ln_vision:x"])


# -- what many takes say together


def test_the_worst_of_all_is_found_and_whose_it_is():
    names = ["a", "b", "c", "d"]
    assert takes.spread([1.0, 4.0, 2.0, 3.0], names) == schema.Spread(2.5, 4.0, 1, "b")
    assert takes.spread([1.0, 0.5, 1.0], names, least=True) == schema.Spread(1.0, 0.5, 1, "b")
    assert takes.spread([None, 2.0, None, 1.0], names) == schema.Spread(1.5, 2.0, 1, "b")
    assert takes.spread([None, None], names) is None
    lost = takes.spread([1.0, math.inf, math.nan, 2.0], names)
    assert math.isnan(takes.spread([1.0, math.nan, 2.0, 3.0], names).worst)
    assert (lost.worst, lost.image) in ((math.inf, "b"), (math.nan, "c"))


LADDER = [[5, -0.1, 6, -3.0], [7, -0.69310, 8, -0.69320], [9, -0.2, 5, -2.0]]


@pytest.mark.parametrize(
    ("step", "error", "tied"),
    [
        ([8, -0.69312, 7, -0.69318], 1e-4, True),
        ([8, -0.69312, 7, -0.69318], 4e-5, False),  # LAVIS's own margin is wider than that can tell apart
        ([8, -0.10000, 7, -2.30000], 1e-4, False),  # this model is sure of it
        ([8, -0.69312, 6, -0.69318], 1e-4, False),  # LAVIS's choice is not even its second
        ([6, -0.69312, 7, -0.69318], 1e-4, False),
        ([8, -0.69312, 7, -0.69318], None, False),  # there is more than rounding
        ([8, -0.69312, 7, math.nan], 1e-4, False),
        ([8, -0.69312, 7, -0.69318], math.nan, False),
    ],
)
def test_a_caption_that_parts_at_a_tie_is_told_from_a_divergence(step, error, tied):
    ours = [LADDER[0], step, [1, -0.5, 2, -1.0]]
    sides = [{"ids": [[row[0] for row in steps]], "steps": [steps]} for steps in (LADDER, ours)]
    assert takes.ties(None, [None], [""], *sides, [error]) == [tied]
    assert takes.ties(None, [None], [""], sides[0], sides[0], [error]) == [False]  # nothing parts


# -- against LAVIS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return every_kind(tmp_path_factory.mktemp("shown") / "pictures")


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder, converted, lavis_begins_warm):
    """A run of OPT's twin, verified on an image of every kind: LAVIS records them."""
    made = tmp_path_factory.mktemp("run")
    shutil.copytree(converted(OPT).model, made / "model")
    api.verify(Run(made, made / "model"), images=folder, figures=False)
    return Run(made, made / "model")


@pytest.fixture(scope="module")
def of_opt(run):
    """LAVIS's recording of an image of every kind."""
    return Tape(reference.images_tape(run))


@pytest.fixture(scope="module")
def of_t5(tmp_path_factory, folder, lavis_begins_warm):
    """LAVIS's recording of two images with two texts each."""
    path = tmp_path_factory.mktemp("t5") / "tape.safetensors"
    return api.capture(T5, images=two_of(folder), texts=TEXTS, output=path)


def two_of(folder: Path) -> list[Path]:
    return [folder / "rgb.png", folder / "wide.png"]


@pytest.mark.lavis
def test_both_models_see_the_same_pixels_of_every_kind_of_image(of_opt, folder, converted):
    tape = of_opt
    loaded = huggingface.load(converted(OPT).model)
    told = tape.metadata["takes"]
    assert tape.takes == len(told) == 13
    for number, (take, held) in enumerate(zip(told, tape_images(tape), strict=True)):
        with Image.open(folder / take["image"]) as file:
            image = file.convert("RGB")
        assert held.tobytes() == image.tobytes()
        ours = loaded.processor(images=[image], text=[""], return_tensors="pt")["pixel_values"]
        assert torch.equal(ours, tape.take(number)["pixel_values"]), take["image"]
        assert torch.equal(ours, tape.take(number)["visual_encoder:x"]), take["image"]
    assert [one["name"] for one in tape.metadata["skipped"]] == sorted(SKIPPED)


@pytest.mark.lavis
def test_every_take_is_recorded_whole_and_the_first_from_within_too(of_opt, of_t5):
    for name, tape in ((OPT, of_opt), (T5, of_t5)):
        table = stages(variant(name))
        within = set(places_inside(table)) - set(places(table))
        for number in range(tape.takes):
            held = tape.take(number)
            assert all(place in held for place in places(table))
            assert bool(within & held.keys()) == (number == 0)
        for said in tape.metadata["captions"].values():
            assert all(len(values) == tape.takes for values in said.values())
        assert len(tape.metadata["captions"]["greedy"]["steps"]) == tape.takes
    number = [take["image"] for take in of_opt.metadata["takes"]].index("rgb.png")
    shipped, live = Tape(reference.shipped_tape(variant(OPT))), of_opt.take(number)
    for place in places(stages(variant(OPT))):  # the demo's own image and text: what the kit's recording holds
        assert distance(live[place], shipped[place]) < 1e-5


@pytest.mark.lavis
def test_a_text_is_what_stands_beside_the_image_and_the_prompt(of_t5, converted):
    tape = of_t5
    loaded = huggingface.load(converted(T5).model)
    told = tape.metadata["takes"]
    assert [(take["image"], take["prompt"]) for take in told] == [
        (n, t) for n in ("rgb.png", "wide.png") for t in TEXTS
    ]
    images, prompts = takes.shown(tape, tape_images(tape))
    ours = takes.caption(loaded, images, prompts, num_beams=1, max_new_tokens=30)
    assert ours["ids"] == tape.metadata["captions"]["greedy"]["ids"]
    for number, text in enumerate(prompts):
        ids = tape.take(number)["t5_model.encoder.embed_tokens:0"]
        assert loaded.processor.tokenizer.decode(ids[0], skip_special_tokens=True) == text


@pytest.mark.lavis
@pytest.mark.parametrize("name", [OPT, T5])
def test_a_captions_score_is_the_sum_of_its_ladder(name, of_opt, of_t5, converted):
    tape = {OPT: of_opt, T5: of_t5}[name]
    loaded = huggingface.load(converted(name).model)
    images, prompts = takes.shown(tape, tape_images(tape))
    said = takes.caption(loaded, images[:2], prompts[:2], num_beams=1, max_new_tokens=30)
    for image, prompt, ids, steps in zip(images, prompts, said["ids"], said["steps"], strict=False):
        assert takes.score(loaded, image, prompt, ids) == pytest.approx(sum(step[1] for step in steps), abs=1e-3)
    beams = {"ids": said["ids"]}
    other = {"ids": [[*ids[:-1], ids[0]] for ids in said["ids"]]}
    assert takes.ties(loaded, images[:2], prompts[:2], beams, other, [1e-6] * 2) == [False, False]
    assert takes.ties(loaded, images[:2], prompts[:2], beams, other, [1e3] * 2) == [True, True]


@pytest.mark.lavis
def test_a_fault_that_only_some_images_show_is_found_on_them(of_opt, converted):
    """A block that cuts its values off where the first image does not reach, which would alone prove it right."""
    tape = of_opt
    model = variant(OPT)
    loaded = huggingface.load(converted(OPT).model)
    loaded.model.vision_model.post_layernorm.eps = 1e-5
    table = stages(model)
    block = loaded.model.vision_model.encoder.layers[1].mlp.fc1
    most: list[float] = []
    held = block.register_forward_hook(lambda module, args, out: most.append(out.max().item()))
    images = tape_images(tape)
    inputs = huggingface.forward_inputs(loaded, model, images[0], tape.metadata["texts"])
    with torch.no_grad():
        loaded.model(**inputs)
    held.remove()
    block.register_forward_hook(lambda module, args, out: out.clamp(max=1.001 * max(most)))
    shipped = compare(tape, loaded.model, table, inputs)
    assert not shipped.faults
    measured = takes.measure(loaded, model, tape, table, [], (shipped, None), lambda word: None)
    nothing = schema.Decoding((True,) * tape.takes, (False,) * tape.takes, (), ())
    told = [takes.Told(take["image"], "", "", (1, 1), "RGB") for take in tape.metadata["takes"]]
    found = raw(takes.aggregate(told, measured, {"greedy": nothing}))
    assert found["left"] == ["vision.block.01"]
    shows = found["stages"]["vision.block.01"]["left"]
    assert 0 < shows < tape.takes
    assert found["worst"]["why"] == "first wrong at vision.block.01"
    assert found["problem"].startswith("First wrong at vision.block.01 on ")
    assert f"({shows} of {tape.takes} images and texts)" in found["problem"]
    errors = takes.errors(measured, tape)
    assert [error is None for error in errors] == [bool(one["left"]) for one in found["each"]]


@pytest.mark.lavis
def test_a_verification_of_many_images_says_it_of_all_and_shows_the_worst(run, folder):
    report = json.loads((run.folder / "report.json").read_text())
    assert raw(report)["verdict"] == "explained"
    images = raw(report)["images"]
    assert images["count"] == len(images["names"]) == len(images["each"]) == 13
    assert [one["name"] for one in images["skipped"]] == sorted(SKIPPED)
    assert str(folder) not in json.dumps(images)
    assert images["explained"] == ["vision.post_layernorm"]
    assert (images["left"], images["problem"]) == ([], None)
    chosen = choose(run.variant, folder)
    assert reference.report_holds(run, "none", chosen)
    assert not reference.report_holds(run, "none")  # what the notebooks start from is a report on the demo's inputs
    assert all(one["pixels_equal"] for one in images["each"])
    norm = images["stages"]["vision.post_layernorm"]
    assert norm["excess"]["worst"] >= norm["excess"]["median"] > 3
    assert norm["fixed"]["excess"]["worst"] < 2
    assert norm["faulty"] == sum("vision.post_layernorm" in one["faults"] for one in images["each"])
    for name, stage in images["stages"].items():
        assert stage["left"] == 0, name
    worst = images["logits"]["max_abs"]
    assert worst["worst"] == max(one["max_abs"] for one in images["each"]) == images["each"][worst["take"]]["max_abs"]
    assert worst["image"] == images["names"][worst["take"]]
    for mode, said in images["captions"].items():
        equal = raw(report)["captions"]["modes"][mode]["equal"]
        assert (said["of"], said["equal"]) == (13, sum(equal))
        assert said["different"] == [number for number, same in enumerate(equal) if not same]
    saved = run.report
    assert saved.arrays["images/kl"].shape == (13, len(images["worst"]["tokens"]))
    assert saved.arrays["images/excess"].shape == (13, len(images["stages"]))
    alone = images["each"][0]
    assert alone["kl"] == pytest.approx(raw(report)["logits"]["kl"], abs=1e-15)
    assert "worst_image" in plots.available(saved.content, saved.arrays)
    for width in plots.WIDTHS:
        assert saved.figure("worst_image", width).get_figwidth() == width
    words = plots.alt_text("worst_image", saved.content, saved.arrays)
    assert f"Of 13 images {images['worst']['image']} is the worst" in words
    rows = plots.table("worst_image", saved.content, saved.arrays)
    assert [row["image"] for row in rows if row["position"] is None] == images["names"]


@pytest.mark.lavis
def test_each_image_is_verified_with_each_text_and_not_recorded_again(of_t5, folder, model_copy, command):
    run = model_copy(T5)
    kept = reference.images_tape(run)
    kept.write_bytes(Path(of_t5.path).read_bytes())
    given = [word for path in two_of(folder) for word in ("--images", path)]
    given += [word for text in TEXTS for word in ("--text", text)]
    done = command("verify", run.folder, *given, "--lavis-python", "none", "--no-figures", "--json")
    assert done.status == 0
    report = json.loads(done.out)
    images = raw(report)["images"]
    assert (images["count"], images["texts"]) == (2, TEXTS)
    told = [(one["image"], one["text"]) for one in images["each"]]
    assert told == [(name, text) for name in images["names"] for text in TEXTS]
    assert (images["worst"]["image"], images["worst"]["text"]) == told[images["worst"]["take"]]
    assert images["worst"]["tokens"] == raw(report)["sequences"]["language.decoder"]
    assert raw(report)["captions"]["equal_when_fixed"] is True


@pytest.mark.lavis
def test_only_a_recording_of_the_same_inputs_is_found(of_t5, folder, model_copy):
    run = model_copy(T5)
    manifest = Manifest.read(run.model)
    model = manifest.variant
    shown = two_of(folder)
    reference.images_tape(run).write_bytes(Path(of_t5.path).read_bytes())
    assert reference.find_tape(run, manifest, choose(model, shown, TEXTS)).takes == 4
    assert reference.find_tape(run, manifest, choose(model, shown[:1], TEXTS)) is None
    assert reference.find_tape(run, manifest, choose(model, shown)) is None
    run.tape_path.write_bytes(Path(of_t5.path).read_bytes())  # of other inputs, where the demo's is looked for
    assert reference.find_tape(run, manifest).path == str(reference.shipped_tape(model))
    other = dataclasses.replace(manifest, weights_hash="another's")
    assert reference.find_tape(run, other, choose(model, shown, TEXTS)) is None


@pytest.mark.lavis
@pytest.mark.parametrize("name", [OPT, T5])
def test_a_text_that_lavis_would_cut_short_is_refused(name, tmp_path):
    with pytest.raises(RequestError, match=r"LAVIS reads 32 tokens of a text; 'boat boat.* has \d+. Shorten it."):
        api.capture(name, texts="boat " * 40, output=tmp_path / "tape.safetensors")
    assert not list(tmp_path.iterdir())

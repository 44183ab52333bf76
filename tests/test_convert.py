"""A converted directory is what transformers' users expect, and `convert` treats their files with care."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, edit_weights, snapshot
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Blip2ForConditionalGeneration, GenerationConfig

from blip2nb import api
from blip2nb.conversion.assemble import open_model
from blip2nb.conversion.files import own_files
from blip2nb.errors import RequestError
from blip2nb.families.captioners.inputs import demo_image
from blip2nb.families.captioners.mapping import entries
from blip2nb.handles import Run
from blip2nb.lavis_env import reference
from blip2nb.trace.tape import Tape
from blip2nb.variants import TWINS, variant
from blip2nb.weights.hashing import sha256_of
from blip2nb.weights.sources import open_folder

Converted = Callable[[str], Run]
OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"


def digests(folder: Path) -> dict[str, str]:
    """Name to digest of everything saved in a converted directory, in one file or many."""
    saved = open_folder(folder)
    return {name: sha256_of(stored.tensor()) for name, stored in saved.items()}


def load(run: Run, **options) -> Blip2ForConditionalGeneration:
    return Blip2ForConditionalGeneration.from_pretrained(run.model, local_files_only=True, **options)


@pytest.mark.parametrize("name", TWINS)
def test_it_loads_with_no_key_missing_or_left_over(converted: Converted, name: str):
    model, info = load(converted(name), output_loading_info=True)
    assert {what: list(keys) for what, keys in info.items() if keys} == {}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert type(AutoProcessor.from_pretrained(converted(name).model)).__name__ == "Blip2Processor"


@pytest.mark.parametrize("name", TWINS)
def test_it_captions_an_image_as_lavis_did(converted: Converted, name: str):
    folder = converted(name).model
    model, processor = load(converted(name)), AutoProcessor.from_pretrained(folder, backend="pil")
    recorded = Tape(reference.SHIPPED_TAPES / f"{name}.safetensors").metadata
    inputs = processor(images=demo_image(), text=recorded["prompt"], return_tensors="pt")
    ids = model.generate(**inputs, num_beams=1, max_new_tokens=30)
    skip = 1 if variant(name).language.kind == "t5" else inputs["input_ids"].shape[1]
    caption = processor.batch_decode(ids[:, skip:], skip_special_tokens=True)[0].strip()
    assert caption == recorded["captions"]["greedy"]["text"][0] != ""


@pytest.mark.parametrize("name", TWINS)
def test_the_processor_puts_the_models_image_tokens_before_the_prompt(converted: Converted, name: str):
    folder = converted(name).model
    processor, config = AutoProcessor.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    queries = variant(name).qformer.queries
    assert processor.num_query_tokens == config["num_query_tokens"] == queries
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image_token == config["image_token_index"]
    assert image_token < load(converted(name)).get_input_embeddings().num_embeddings
    inputs = processor(images=demo_image(), text="a photo of", return_tensors="pt")
    assert inputs["input_ids"][0, :queries].tolist() == [image_token] * queries
    assert image_token not in inputs["input_ids"][0, queries:]
    side = variant(name).image_size
    assert inputs["pixel_values"].shape == (1, 3, side, side)


@pytest.mark.parametrize("name", TWINS)
def test_a_caption_begins_and_ends_where_lavis_begins_and_ends_it(converted: Converted, name: str):
    folder = converted(name).model
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    text = load(converted(name)).config.text_config
    generation = GenerationConfig.from_pretrained(folder)
    if variant(name).language.kind == "opt":
        line_break = tokenizer("\n", add_special_tokens=False).input_ids
        assert line_break == [text.eos_token_id]
        assert (text.bos_token_id, text.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    else:
        assert (text.eos_token_id, text.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert (text.bos_token_id, text.decoder_start_token_id) == (1, 0)
        assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    assert generation.eos_token_id == text.eos_token_id
    assert generation.bos_token_id == text.bos_token_id
    assert generation.pad_token_id == text.pad_token_id
    assert (generation.num_beams, generation.max_new_tokens) == (5, 30)


@pytest.mark.parametrize("name", TWINS)
def test_just_the_tensors_marked_tied_share_memory(converted: Converted, name: str):
    state = load(converted(name)).state_dict()
    memory: dict[int, list[str]] = {}
    for tensor, value in state.items():
        memory.setdefault(value.data_ptr(), []).append(tensor)
    shared = {tensor for names in memory.values() if len(names) > 1 for tensor in names}
    tied = [entry for entry in entries(variant(name)) if entry.kind == "Tied"]
    targets = {source: entry.target for entry in entries(variant(name)) for source in entry.sources}
    assert shared == {entry.target for entry in tied} | {targets[entry.of] for entry in tied}
    assert ("language_model.lm_head.weight" in shared) == (variant(name).language.kind == "opt")


@pytest.mark.parametrize("name", [name for name in TWINS if "t5" in name])
def test_t5_computes_the_exact_gelu_that_lavis_gives_it(converted: Converted, name: str):
    language = load(converted(name)).language_model
    assert language.config.dense_act_fn == "gelu"
    values = torch.linspace(-4, 4, 101)
    for stack, layer in ((language.encoder, 1), (language.decoder, 2)):
        act = stack.block[0].layer[layer].DenseReluDense.act
        assert torch.equal(act(values), torch.nn.functional.gelu(values))


@pytest.mark.parametrize("name", TWINS)
def test_dtype_auto_keeps_every_tensors_stored_dtype(converted: Converted, name: str):
    model = variant(name)
    source, saved = open_model(own_files(model), model).tensors, open_folder(converted(name).model)
    assert {entry.target: saved[entry.target].dtype for entry in entries(model) if not entry.optional} == {
        entry.target: source[entry.sources[0]].dtype for entry in entries(model) if not entry.optional
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [OPT, T5])
def test_another_dtype_is_each_tensor_cast_to_what_transformers_loads_it_as(
    converted: Converted, tmp_path: Path, name: str, dtype: str
):
    """transformers holds some parts in float32 even in a float16 model; rounding those would lose bits for nothing."""
    run = api.convert(name, output=tmp_path / "model", dtype=dtype)
    model, info = load(run, dtype=getattr(torch, dtype), output_loading_info=True)
    assert info["missing_keys"] == set()
    loaded = {tensor: value.dtype for tensor, value in model.state_dict().items()}
    assert (set(loaded.values()) == {getattr(torch, dtype)}) == (dtype != "float16")
    kept = load_file(converted(name).model / "model.safetensors")
    assert digests(run.model) == {tensor: sha256_of(value.to(loaded[tensor])) for tensor, value in kept.items()}


@pytest.mark.parametrize("name", [OPT, T5])
def test_shards_hold_what_one_file_holds(converted: Converted, tmp_path: Path, name: str):
    run = api.convert(name, output=tmp_path / "model", max_shard_size="300KB")
    shards = sorted(run.model.glob("*.safetensors"))
    assert len(shards) > 2
    assert digests(run.model) == digests(converted(name).model)
    one, many = load(converted(name)).state_dict(), load(run).state_dict()
    assert one.keys() == many.keys()
    assert all(torch.equal(one[tensor], many[tensor]) for tensor in one)


def test_converting_again_keeps_what_is_there(command: Callable[..., Outcome], model_copy: Converted):
    model = model_copy(OPT).model
    there = snapshot(model)
    done = command("convert", OPT, "--output", model)
    assert (done.status, done.out.strip()) == (0, str(model))
    assert snapshot(model) == there


def test_the_same_weights_from_elsewhere_are_the_same_conversion(model_copy: Converted, source_copy):
    model = model_copy(OPT).model
    there = snapshot(model)
    folder = source_copy(OPT)
    for path in folder.rglob("*.*"):
        path.touch()
    assert api.convert(OPT, folder, model).model == model
    assert snapshot(model) == there


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", "processor_config.json", "tokenizer.json"])
def test_a_directory_that_lost_a_file_is_not_taken_for_finished(model_copy: Converted, gone: str):
    model = model_copy(OPT).model
    before = {path.name for path in model.iterdir()}
    (model / gone).unlink()
    api.convert(OPT, output=model)
    assert {path.name for path in model.iterdir()} == before


def test_a_directory_that_lost_a_file_but_is_another_models_is_still_refused(model_copy: Converted):
    model = model_copy(T5).model
    (model / "config.json").unlink()
    there = snapshot(model)
    with pytest.raises(RequestError, match="holds another run's model"):
        api.convert(OPT, output=model)
    assert snapshot(model) == there


def louder(tensors: dict[str, torch.Tensor]) -> None:
    tensors["ln_vision.weight"] += 1


def test_other_weights_in_the_same_folder_are_refused_and_overwrite_replaces_them(
    command: Callable[..., Outcome], model_copy: Converted, source_copy
):
    model, folder = model_copy(OPT).model, source_copy(OPT)
    edit_weights(folder / variant(OPT).checkpoint, louder)
    there, before = snapshot(model.parent), digests(model)
    refused = command("convert", OPT, "--source", folder, "--output", model)
    assert refused.status == 2
    assert f"blip2nb: {model} holds another run's model ({OPT}," in refused.said[-1]
    assert snapshot(model.parent) == there
    assert command("convert", OPT, "--source", folder, "--output", model, "--overwrite").status == 0
    assert {name for name, value in digests(model).items() if value != before[name]} == {
        "vision_model.post_layernorm.weight"
    }
    assert {path.name for path in model.parent.iterdir()} == {model.name, "run.json"}


def test_a_checkpoint_is_laid_over_the_models_own_files(converted: Converted, source_copy, tmp_path: Path):
    checkpoint = edit_weights(source_copy(OPT) / variant(OPT).checkpoint, louder)
    run = api.convert(OPT, checkpoint, tmp_path / "model")
    before, after = (load_file(one.model / "model.safetensors") for one in (converted(OPT), run))
    changed = "vision_model.post_layernorm.weight"
    assert torch.equal(after.pop(changed), before.pop(changed) + 1)
    assert {name: sha256_of(value) for name, value in after.items()} == {n: sha256_of(v) for n, v in before.items()}
    origins = json.loads((run.model / "blip2nb.json").read_text())["origins"]
    assert origins["ln_vision.weight"] == checkpoint.name


def test_a_checkpoint_with_only_what_was_trained_is_enough(converted: Converted, tmp_path: Path):
    torch.save({"model": {"ln_vision.bias": torch.full((44,), 0.25)}}, tmp_path / "fine-tuned.pth")
    run = api.convert(OPT, tmp_path / "fine-tuned.pth", tmp_path / "model")
    before, after = digests(converted(OPT).model), digests(run.model)
    assert {name for name in after if after[name] != before[name]} == {"vision_model.post_layernorm.bias"}


@pytest.mark.parametrize("name", [OPT, T5])
def test_a_folder_is_a_source_whatever_the_form_of_its_language_model(
    converted: Converted, source_copy, tmp_path: Path, name: str
):
    folder = source_copy(name)
    language = folder / variant(name).language_folder
    held = open_folder(language)
    tensors = {tensor: stored.tensor().clone() for tensor, stored in held.items()}
    for path in [*language.glob("*model*.safetensors*"), *language.glob("*model*.bin*")]:
        path.unlink()
    if name == OPT:
        save_file(tensors, language / "model.safetensors")
    else:
        torch.save(tensors, language / "pytorch_model.bin")
    run = api.convert(name, folder, tmp_path / "model")
    assert digests(run.model) == digests(converted(name).model)


def test_it_needs_nothing_but_the_directory(converted: Converted, tmp_path: Path):
    """Moved elsewhere, with the source gone, it loads as before."""
    run = Run(tmp_path, Path(shutil.copytree(converted(T5).model, tmp_path / "moved")))
    text = "".join(path.read_text() for path in run.model.glob("*.json") if path.name != "tokenizer.json")
    assert str(own_files(variant(T5)).vision.parent) not in text
    assert load(run).num_parameters() == load(converted(T5)).num_parameters()


def test_overwrite_never_replaces_what_is_not_a_conversion(tmp_path: Path, source_copy):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    with pytest.raises(RequestError, match="not a conversion of this kit"):
        api.convert(OPT, output=thesis, overwrite=True)
    assert (thesis / "chapter.txt").read_text() == "years of work"
    source = source_copy(OPT)
    before = {path.name for path in source.iterdir()}
    for place in (source, source / "opt-2.7b", source / "opt-2.7b" / "inside", source.parent):
        with pytest.raises(RequestError, match=r"cannot be the output|not a conversion"):
            api.convert(OPT, source, place, overwrite=True)
    assert {path.name for path in source.iterdir()} == before


def test_a_verdict_does_not_outlive_the_model_it_was_given_for(tmp_path: Path, source_copy):
    run = api.convert(OPT, output=tmp_path / "model")
    api.verify(run, proof="weights", figures=False)
    assert run.report.verdict == "incomplete"
    source = source_copy(OPT)
    edit_weights(source / variant(OPT).checkpoint, lambda tensors: tensors["query_tokens"].add_(1))
    api.convert(OPT, source, tmp_path / "model", overwrite=True)
    with pytest.raises(RequestError, match="verify"):
        _ = run.report


def test_figures_of_an_earlier_report_do_not_stay(tmp_path: Path):
    run = api.convert(OPT, output=tmp_path / "model")
    api.verify(run)
    assert (run.figures / "depth_trace.png").is_file()
    (run.figures / "mine.png").write_bytes(b"kept")
    api.verify(run, proof="weights")
    assert {path.name for path in run.figures.iterdir()} == {"files.png", "mine.png"}


def test_the_same_weights_with_another_tokenizer_or_shard_size_are_converted_again(tmp_path: Path, source_copy):
    source = source_copy(OPT)
    run = api.convert(OPT, source, tmp_path / "model")
    config = source / "opt-2.7b" / "special_tokens_map.json"
    config.write_text(config.read_text() + "\n")
    written = (run.model / "model.safetensors").stat().st_mtime_ns
    api.convert(OPT, source, tmp_path / "model")
    again = (run.model / "model.safetensors").stat().st_mtime_ns
    assert again != written
    api.convert(OPT, source, tmp_path / "model")
    assert (run.model / "model.safetensors").stat().st_mtime_ns == again
    api.convert(OPT, source, tmp_path / "model", max_shard_size="300KB")
    assert (run.model / "model.safetensors.index.json").is_file()
    assert not (run.model / "model.safetensors").exists()


@pytest.mark.parametrize("name", [OPT, T5])
def test_nothing_of_this_machine_is_in_a_converted_directory(converted: Converted, name: str):
    folder = converted(name).model
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(folder.parent) not in text
        assert str(own_files(variant(name)).vision.parent) not in text
        assert "local_files_only" not in text
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert not isinstance(config.get("extra_special_tokens"), list), "transformers 4 reads a mapping under this name"


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(RequestError, match=r"needs \d\.\d+ MB, and 1 kB are free"):
        api.convert(OPT, output=tmp_path / "model")
    assert not list(tmp_path.iterdir())

"""The twins: the same bits everywhere, in the forms real files take, and different from each other as those are."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from blip2nb.conversion.assemble import open_model
from blip2nb.conversion.files import own_files
from blip2nb.families.captioners.mapping import entries, plan
from blip2nb.lavis_env.reference import SHIPPED_TAPES
from blip2nb.trace.tape import Tape
from blip2nb.twins import FORMS, Form, twin_tensors
from blip2nb.variants import RELEASED, TWINS, VARIANTS, variant
from blip2nb.weights.convert import target_slots
from blip2nb.weights.hashing import sha256_of, sha256_of_all
from blip2nb.weights.sources import open_file, open_folder
from blip2nb.weights.stored import digest_of


def weights_hash(name: str) -> str:
    return sha256_of_all({tensor: sha256_of(value) for tensor, value in twin_tensors(variant(name)).items()})


def test_twins_are_bit_identical_in_a_process_with_other_hashes_and_threads(tmp_path: Path):
    script = (
        "import pathlib, sys, torch\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "from blip2nb.twins import write_twin\n"
        "from blip2nb.variants import TWINS, variant\n"
        "for name in TWINS:\n"
        "    write_twin(variant(name), pathlib.Path(sys.argv[2]) / name)\n"
    )
    threads = "1" if torch.get_num_threads() > 1 else "2"
    environment = {**os.environ, "PYTHONHASHSEED": "1234" if os.environ.get("PYTHONHASHSEED") != "1234" else "4321"}
    subprocess.run([sys.executable, "-c", script, threads, str(tmp_path)], env=environment, check=True)
    for name in TWINS:
        here, there = own_files(variant(name)).vision.parent, tmp_path / name
        files = sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.is_file())
        assert files == sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
        for file in files:
            if file.endswith((".pth", ".bin", ".safetensors")):
                one, other = open_file(here / file), open_file(there / file)
                assert list(one) == list(other)
                assert all(one[tensor].digest() == other[tensor].digest() for tensor in one)
            else:
                assert (here / file).read_bytes() == (there / file).read_bytes(), file


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_the_one_that_lavis_was_recorded_on(name: str):
    assert weights_hash(name) == Tape(SHIPPED_TAPES / f"{name}.safetensors").metadata["weights_hash"]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_dtypes_that_the_released_files_have(name: str):
    model = variant(name)
    half = {tensor.split(".")[0] for tensor, value in twin_tensors(model).items() if value.dtype == torch.float16}
    single = {tensor.split(".")[0] for tensor, value in twin_tensors(model).items() if value.dtype == torch.float32}
    expected = {"opt_model"} if model.language.kind == "opt" else set()
    assert half == expected | (set() if model.vision_in_checkpoint else {"visual_encoder"})
    assert not half & single
    assert single >= {"query_tokens", "Qformer", "ln_vision"}
    stored = open_file(own_files(model).vision)
    assert {value.dtype for tensor, value in stored.items() if tensor != "head.bias"} <= {"F16", "F32"}
    assert stored["cls_token"].dtype == "F16"  # eva_vit_g.pth is half, also where a checkpoint is laid over it


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_a_whole_source_of_finite_values(name: str):
    model = variant(name)
    source = open_model(own_files(model), model)
    work = plan(model, source.shapes())
    assert sum(slot.size for slot in target_slots(work, source)) < 5_000_000
    values = twin_tensors(model)
    assert sorted(values) == sorted(tensor for entry in work.written for tensor in entry.sources)
    assert all(source.tensors[tensor].digest() == digest_of(value) for tensor, value in values.items())
    assert all(value.isfinite().all() and (value != value.flatten()[0]).any() for value in values.values())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Form)])
def test_the_twins_cover_every_form_that_files_take(field: str):
    assert set(FORMS) == set(TWINS)
    assert len({getattr(form, field) for form in FORMS.values()}) > 1


@pytest.mark.parametrize("name", TWINS)
def test_a_twins_files_have_the_form_it_claims(name: str):
    model, form = variant(name), FORMS[name]
    files = own_files(model)
    stem, ending = ("model", "safetensors") if form.safetensors else ("pytorch_model", "bin")
    parts = sorted(path.name for path in files.language.glob(f"*.{ending}"))
    assert not list(files.language.glob("*.bin" if form.safetensors else "*.safetensors"))
    assert len(parts) == form.shards
    assert (f"{stem}.{ending}" in parts) == (form.shards == 1)
    assert (files.language / f"{stem}.{ending}.index.json").exists() == (form.shards > 1)
    language = set(open_folder(files.language))
    assert any(tensor.startswith("decoder.layers.") for tensor in language) == (form.bare and "opt" in name)
    copies = {entry.sources[0].split(".", 1)[1] for entry in entries(model) if entry.kind == "Tied"}
    assert (copies <= language) == form.copies
    vision = set(open_file(files.vision))
    unused = {f"blocks.{model.vision.layers}.norm1.weight", "norm.weight", "head.bias"}
    assert vision & unused == (unused if form.unused else set())
    for path in (files.vision, *files.checkpoints):
        assert zipfile.is_zipfile(path) == form.zipped
    content = torch.load(files.checkpoints[0], weights_only=True)
    assert set(content) == ({"model", "optimizer", "config", "scaler", "epoch"} if form.trainer else {"model"})
    left = {entry.sources[0]: content["model"].get(entry.sources[0]) for entry in entries(model) if entry.optional}
    assert [value is not None for value in left.values()] == [form.trainer] * len(left)
    assert ("visual_encoder.cls_token" in content["model"]) == model.vision_in_checkpoint
    config = json.loads((files.language / "config.json").read_text())
    assert config["model_type"] == model.language.kind


@pytest.mark.parametrize("name", RELEASED)
def test_a_twin_differs_from_its_original_in_sizes_alone(name: str):
    model, twin = variant(name), variant(f"tiny-{name}")
    sizes = {"name", "vision", "qformer", "language", "twin"}
    for field in dataclasses.fields(model):
        if field.name not in sizes:
            assert getattr(twin, field.name) == getattr(model, field.name), field.name
    assert twin.language.kind == model.language.kind
    assert (twin.vision.patch, twin.qformer.queries) == (model.vision.patch, model.qformer.queries)
    assert twin.qformer.cross_every == model.qformer.cross_every
    for vision in (twin.vision, model.vision):
        assert vision.mlp == int(vision.width * 4.3637)  # how LAVIS computes it


@pytest.mark.parametrize("name", RELEASED)
def test_the_twins_differ_from_each_other_as_the_released_ones_do(name: str):
    for other in RELEASED:
        for field in dataclasses.fields(VARIANTS[name]):
            same = getattr(variant(name), field.name) == getattr(variant(other), field.name)
            twins = getattr(variant(f"tiny-{name}"), field.name) == getattr(variant(f"tiny-{other}"), field.name)
            assert same == twins, (name, other, field.name)
        sizes = [variant(f"{prefix}{one}").language for prefix in ("", "tiny-") for one in (name, other)]
        for field in ("width", "mlp"):
            a, b, twin_a, twin_b = (getattr(size, field) for size in sizes)
            assert (a < b) == (twin_a < twin_b), (name, other, field)


def test_no_two_twins_share_a_tensor():
    hashes = {name: weights_hash(name) for name in TWINS}
    assert len(set(hashes.values())) == len(TWINS)
    first, second = (twin_tensors(variant(name))["query_tokens"] for name in TWINS[:2])
    assert not torch.equal(first, second)


def test_a_coco_twins_own_vision_tower_is_laid_over_the_224_pixel_one():
    model = variant("tiny-blip2-opt-2.7b-coco")
    files = own_files(model)
    positions = "visual_encoder.pos_embed"
    assert open_file(files.vision)["pos_embed"].shape[1] == (224 // 14) ** 2 + 1
    assert open_model(files, model).tensors[positions].shape[1] == (364 // 14) ** 2 + 1

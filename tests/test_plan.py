"""`plan` says what `convert` then does, `convert --check` whether a directory is still what was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, edit_weights, snapshot

from blip2nb import api
from blip2nb.conversion.files import own_files
from blip2nb.families.captioners.huggingface import load
from blip2nb.families.captioners.mapping import parameter_count
from blip2nb.handles import Run
from blip2nb.lavis_env import reference
from blip2nb.report.manifest import Manifest
from blip2nb.variants import RELEASED, TWINS, variant
from blip2nb.weights import download

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
Command = Callable[..., Outcome]


@pytest.fixture
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, and servers that nobody answers for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("BLIP2NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "LAVIS_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("name", TWINS)
def test_what_is_planned_is_what_is_read_and_written(converted, tmp_path: Path, name: str, dtype: str):
    planned = api.plan(name, output=tmp_path / "model", dtype=dtype)
    assert not (tmp_path / "model").exists()
    assert planned.exact
    assert not planned.problems
    run = converted(name) if dtype == "auto" else api.convert(name, output=tmp_path / "model", dtype=dtype)
    kinds = Manifest.read(run.model).bytes_by_kind
    assert planned.writes == sum(size for sizes in kinds.values() for size in sizes.values())
    assert planned.shards == len(Manifest.read(run.model).shards)
    files = own_files(variant(name))
    assert [one.path for one in planned.reads] == [str(path) for path in files.parts()]
    assert sum(one.size for one in planned.reads) == sum(path.stat().st_size for path in files.weight_files())
    assert planned.memory_float32 == 4 * sum(
        parameter.numel() for parameter in load(converted(name).model).model.parameters()
    )


def test_a_checkpoint_and_its_base_are_planned_too(command: Command, tmp_path: Path, converted):
    torch.save({"model": {"ln_vision.bias": torch.zeros(44)}}, tmp_path / "mine.pth")
    arguments = [OPT, "--source", tmp_path / "mine.pth", "--base", converted(OPT).model, "--output", tmp_path / "out"]
    planned = json.loads(command("plan", *arguments, "--json").out)
    assert [one["name"] for one in planned["reads"]] == ["model/", "mine.pth"]
    assert planned["exact"]
    said = command("plan", *arguments)
    assert said.status == 0
    assert "mine.pth" in said.out
    assert "for converting, whatever the model's size" in said.out


@pytest.mark.usefixtures("nothing_at_hand")
@pytest.mark.parametrize("name", RELEASED)
def test_what_is_not_here_is_planned_from_shapes_with_where_it_would_come_from(command: Command, tmp_path: Path, name):
    ended = command("plan", name, "--output", tmp_path / "model", "--json")
    planned = json.loads(ended.out)
    assert ended.status == (2 if planned["problems"] else 0)
    assert not planned["exact"]
    assert all(not one["here"] and one["estimated"] and "127.0.0.1:9" in one["where"] for one in planned["reads"])
    vision = variant(name).vision
    total = parameter_count(variant(name)) + vision.layers * vision.width  # the zeros of the key biases
    assert planned["memory_float32"] == total * 4 == 2 * planned["memory_half"]
    assert total * 2 < planned["writes"] <= total * 4
    assert planned["writes"] <= planned["fetch_bytes"] + 1000_000  # coco reads a vision tower that is laid over
    assert planned["memory_converting"] < 2**28
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("nothing_at_hand")
def test_a_language_model_in_the_hugging_face_cache_is_found_there(command: Command, tmp_path: Path):
    """As the hub's library lays it out: files under their hash, and links to them. A hole stands for the weights."""
    model = variant("blip2-opt-2.7b")
    blobs = tmp_path / "hub" / "models--facebook--opt-2.7b" / "blobs"
    snapshot_folder = blobs.parent / "snapshots" / "0123abc"
    for folder in (blobs, snapshot_folder, blobs.parent / "refs"):
        folder.mkdir(parents=True)
    (blobs.parent / "refs" / "main").write_text("0123abc")
    header = json.dumps({"decoder.embed_tokens.weight": {
        "dtype": "F16", "shape": [50272, 2560], "data_offsets": [0, 50272 * 2560 * 2]
    }}).encode()  # fmt: skip
    weights = blobs / ("a" * 64)
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(weights, 8 + len(header) + 50272 * 2560 * 2)
    (snapshot_folder / "model.safetensors").symlink_to(weights)
    own = own_files(variant(OPT)).language
    for path in own.iterdir():
        if path.suffix in (".json", ".txt"):
            shutil.copyfile(path, blobs / path.name)
            (snapshot_folder / path.name).symlink_to(blobs / path.name)
    planned = json.loads(command("plan", model.name, "--output", tmp_path / "model", "--json").out)
    (language,) = (one for one in planned["reads"] if one["name"] == "opt-2.7b/")
    assert language["here"]
    assert language["path"] == str(snapshot_folder)
    assert language["where"] == "the Hugging Face cache"
    assert language["size"] >= weights.stat().st_size


def test_too_little_disk_is_said_there_and_then(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    ended = command("plan", OPT, "--output", tmp_path / "model")
    assert ended.status == 2
    assert "!! Too little disk" in ended.out
    assert "name an output on another disk" in ended.out


def test_more_memory_than_there_is_keeps_the_behaviour_from_being_compared():
    assert (
        "takes 61.1 GB of memory" in reference.memory_short(variant("blip2-flan-t5-xxl"))
        or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 61e9
    )


# -- convert --check


def test_a_finished_directory_and_its_source_are_found_to_be_whole(command: Command, model_copy, tmp_path: Path):
    run = model_copy(T5)
    before = snapshot(run.model)
    ended = command("convert", "--check", run.model)
    assert (ended.status, snapshot(run.model)) == (0, before)
    assert "is whole" in ended.out
    assert "its source is the one it was made from" in ended.out
    found = json.loads(command("convert", "--check", run.model, "--json").out)
    assert found == {"output": str(run.model), "source_checked": True, "wrong": []}


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "gone"])
def test_what_changed_since_it_was_written_is_named(command: Command, model_copy, file: str):
    run: Run = model_copy(OPT)
    if file == "gone":
        file = "generation_config.json"
        (run.model / file).unlink()
    elif file == "model.safetensors":
        flip(run.model / file, (run.model / file).stat().st_size - 1)
    else:
        (run.model / file).write_text((run.model / file).read_text() + " ")
    ended = command("convert", "--check", run.model)
    assert ended.status == 1
    assert "is not as it was written" in ended.out
    assert file in ended.out


def test_a_source_that_changed_since_is_named(command: Command, source_copy, tmp_path: Path):
    folder = source_copy(OPT)
    run = api.convert(OPT, folder, tmp_path / "model")
    assert command("convert", "--check", run.model).status == 0
    edit_weights(folder / variant(OPT).checkpoint, lambda tensors: tensors["query_tokens"][0, 0].add_(1))
    ended = command("convert", "--check", run.model)
    assert ended.status == 1
    assert "query_tokens" in ended.out
    assert "in the source is not what was converted" in ended.out


def test_a_directory_that_is_not_ours_cannot_be_checked(command: Command, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    ended = command("convert", "--check", tmp_path)
    assert ended.status == 2
    assert "expected a directory that `blip2nb convert` wrote" in ended.said[0]

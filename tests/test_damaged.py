"""Files that are damaged: a bit that flipped, anywhere, is found and what it hit is named."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401 (or every conversion would start a process for its configuration)
from conftest import edit_weights, flip, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2nb import api
from blip2nb.conversion.directory import check_model
from blip2nb.conversion.files import open_source
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.variants import variant
from blip2nb.weights.sources import open_file, open_folder

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


@pytest.mark.parametrize("name", [NORM, "query_tokens", "opt_proj.weight"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_in_a_pth_is_found_and_its_tensor_named(tmp_path: Path, source_copy: Copy, name: str, where: str):
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint
    one = open_file(path)[name]
    flip(path, one.offset + {"first": 0, "middle": one.nbytes // 2, "last": one.nbytes - 1}[where])
    with pytest.raises(RequestError, match=f"{name} in {path} does not have the checksum that the file says"):
        api.convert(OPT, folder, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def test_a_bit_flipped_anywhere_in_a_pth_is_refused_or_changes_nothing(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run]
):
    """Names, offsets and sizes beside the tensors included."""
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint
    whole, good = path.read_bytes(), weights(converted(OPT).model)
    directory = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 4)
    first = open_file(path)["query_tokens"].offset
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(directory, len(whole) - 1), st.integers(0, first))
    refused = []

    @given(places, st.integers(0, 7))
    @settings(max_examples=60)
    def flipped(at: int, bit: int) -> None:
        path.write_bytes(whole)
        flip(path, at, bit)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        try:
            run = api.convert(OPT, folder, tmp_path / "model")
        except RequestError as error:
            refused.append(str(error))
        else:
            assert weights(run.model) == good

    flipped()
    assert len(refused) > 15


def test_a_flipped_bit_in_what_several_tensors_are_cut_from_is_found(tmp_path: Path, source_copy: Copy):
    """Views of one storage have no checksum of their own."""
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint

    def join(tensors: dict[str, torch.Tensor]) -> None:
        both = torch.cat([tensors["ln_vision.weight"], tensors["ln_vision.bias"]])
        tensors["ln_vision.weight"], tensors["ln_vision.bias"] = both[:44], both[44:]
        tensors["opt_proj.weight"] = tensors["opt_proj.weight"].T.contiguous().T

    whole = api.convert(OPT, folder, tmp_path / "whole" / "model")
    edit_weights(path, join)
    joined = api.convert(OPT, folder, tmp_path / "joined" / "model")
    assert weights(joined.model) == weights(whole.model)
    for name in ("ln_vision.bias", "opt_proj.weight"):
        at = open_file(path)[name].offset + 4
        flip(path, at)
        with pytest.raises(RequestError, match=f"{name} in {path} does not have the checksum"):
            api.convert(OPT, folder, tmp_path / "model")
        flip(path, at)
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_flipped_bit_in_the_list_of_tensors_is_refused(tmp_path: Path, source_copy: Copy, share: float):
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint
    with zipfile.ZipFile(path) as archive:
        (record,) = [one for one in archive.infolist() if one.filename.endswith("data.pkl")]
        start = path.read_bytes().index(archive.read(record)[:64])
    flip(path, start + int(share * record.file_size))
    with pytest.raises(RequestError, match=r"is not a whole PyTorch file \(.*data.pkl does not have the checksum"):
        api.convert(OPT, folder, tmp_path / "model")


def test_a_pth_that_was_saved_without_checksums_still_converts(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run]
):
    folder = source_copy(OPT)
    torch.serialization.set_crc32_options(False)
    try:
        for path in (folder / "eva_vit_g.pth", folder / variant(OPT).checkpoint):
            torch.save(torch.load(path, weights_only=True), path)
            assert all(stored.crc32 is None for stored in open_file(path).values())
    finally:
        torch.serialization.set_crc32_options(True)
    assert weights(api.convert(OPT, folder, tmp_path / "model").model) == weights(converted(OPT).model)


def as_the_hub_keeps_it(language: Path) -> list[Path]:
    """Put a language model's files into a cache of the hub's layout, large ones under their SHA-256, and link it."""
    cache = language.with_name("models--google--flan-t5-xl")
    snapshots, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshots.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(language.iterdir()):
        hasher = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / hasher(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshots / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    language.rmdir()
    language.symlink_to(snapshots)
    return [path for path in blobs.iterdir() if len(path.name) == 64]


def test_the_hubs_cache_converts_through_its_links_and_a_damaged_file_of_it_is_refused(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run]
):
    folder = source_copy(T5)
    blobs = as_the_hub_keeps_it(folder / "flan-t5-xl")
    assert len(blobs) == 2
    run = api.convert(T5, folder, tmp_path / "model")
    assert weights(run.model) == weights(converted(T5).model)
    for blob in blobs:
        at = blob.stat().st_size - 3
        flip(blob, at)
        with pytest.raises(RequestError, match=r"is not the file that the hub has .* Delete it and download it again"):
            api.convert(T5, folder, tmp_path / "again" / "model")
        assert not (tmp_path / "again").exists()
        flip(blob, at)


def test_what_is_damaged_after_the_conversion_is_named_by_a_check(tmp_path: Path, source_copy: Copy):
    """A safetensors file has no checksum: what changed in it before the conversion nobody can know."""
    folder = source_copy(T5)
    run = api.convert(T5, folder, tmp_path / "model", max_shard_size="300KB")
    wanted = variant(T5)
    assert check_model(run.model, open_source(wanted, folder)) == []

    saved = open_folder(run.model)
    name, one = next((name, one) for name, one in saved.items() if name.endswith("wo.weight"))
    flip(one.path, one.offset + one.nbytes // 2, bit=3)
    assert check_model(run.model, None) == [f"{name} ({one.path.name}) is not as it was written"]
    flip(one.path, one.offset + one.nbytes // 2, bit=3)

    source = open_source(wanted, folder).tensors.tensors
    for lavis in ("t5_model.encoder.final_layer_norm.weight", "query_tokens", "visual_encoder.cls_token"):
        held = source[lavis]
        flip(held.path, held.offset, bit=3)
        said = check_model(run.model, open_source(wanted, folder))
        assert said == [f"{lavis} ({held.path.name}) in the source is not what was converted"]
        flip(held.path, held.offset, bit=3)
    flip(run.model / "tokenizer.json", 2000)
    assert check_model(run.model, None) == ["tokenizer.json is not as it was written"]

"""The readers: every form real files take gives the same tensors; what is damaged or unsafe is refused, not run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import edit_weights
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from blip2nb.conversion.assemble import lay_over, open_model
from blip2nb.conversion.files import own_files
from blip2nb.errors import RequestError
from blip2nb.families.captioners.mapping import entries
from blip2nb.variants import TWINS, variant
from blip2nb.weights.hashing import DTYPE_NAMES, sha256_of
from blip2nb.weights.sources import open_file, open_folder, shapes

# one tensor of every dtype, and the shapes that are easily got wrong
TENSORS = {f"one.{name}": torch.arange(12).reshape(3, 4).to(dtype) for dtype, name in DTYPE_NAMES.items()}
TENSORS |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).reshape(2, 3).T}
PLAIN = {name: tensor.contiguous() for name, tensor in TENSORS.items()}


def check(source, tensors=TENSORS) -> None:
    assert sorted(source) == sorted(tensors)
    assert shapes(source) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert {name: source[name].dtype for name in tensors} == {n: DTYPE_NAMES[t.dtype] for n, t in tensors.items()}
    assert {name: sha256_of(source[name].tensor()) for name in tensors} == {n: sha256_of(t) for n, t in tensors.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize(
    "wrap",
    [lambda tensors: tensors, lambda tensors: {"model": tensors, "optimizer": {"state": {}}, "epoch": 4}],
    ids=["bare", "model_key"],
)
def test_a_pth_gives_its_tensors_in_every_form(tmp_path: Path, wrap, zipped: bool):
    path = tmp_path / "weights.pth"
    torch.save(wrap(TENSORS), path, _use_new_zipfile_serialization=zipped)
    check(open_file(path))


def test_a_state_dict_of_trained_parameters_is_read_as_tensors(tmp_path: Path):
    linear = torch.nn.Linear(3, 2)
    torch.save({"model": dict(linear.named_parameters())}, tmp_path / "weights.pth")
    check(open_file(tmp_path / "weights.pth"), {name: value.detach() for name, value in linear.named_parameters()})


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize(
    ("stem", "ending", "save"), [("model", "safetensors", save_file), ("pytorch_model", "bin", torch.save)]
)
def test_a_hub_folder_gives_its_tensors_in_one_file_or_shards(tmp_path: Path, stem, ending, save, shards: int):
    write_shards(tmp_path, PLAIN, stem, ending, save, shards)
    check(open_folder(tmp_path))


def write_shards(folder: Path, tensors, stem: str, ending: str, save, shards: int) -> None:
    if shards == 1:
        save(tensors, folder / f"{stem}.{ending}")
        return
    weight_map = {}
    for number in range(shards):
        part = dict(list(tensors.items())[number::shards])
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{ending}"
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_safetensors_come_before_bin_where_a_folder_has_both(tmp_path: Path):
    save_file({"which": torch.tensor([1])}, tmp_path / "model.safetensors")
    torch.save({"which": torch.tensor([2])}, tmp_path / "pytorch_model.bin")
    assert open_folder(tmp_path)["which"].tensor().item() == 1


@given(st.lists(st.sets(st.sampled_from("abcde"), min_size=1), min_size=1, max_size=4))
@settings(max_examples=25)
def test_the_later_part_of_a_union_wins(tmp_path_factory: pytest.TempPathFactory, parts: list[set[str]]):
    folder = tmp_path_factory.mktemp("union")
    for number, names in enumerate(parts):
        save_file({name: torch.full((number + 1,), number) for name in names}, folder / f"{number}.safetensors")
    sources = [open_file(folder / f"{number}.safetensors") for number in range(len(parts))]
    union = lay_over(sources, variant("tiny-blip2-opt-2.7b")).tensors
    last = {name: number for number, names in enumerate(parts) for name in names}
    assert set(union) == set(last)
    for name, number in last.items():
        assert union[name].tensor().tolist() == [number] * (number + 1)
        assert union[name].shape == (number + 1,)
        assert union[name].path == folder / f"{number}.safetensors"


@pytest.mark.parametrize("name", TWINS)
def test_the_three_parts_of_a_twin_are_one_source_with_the_checkpoint_on_top(name: str):
    model = variant(name)
    files = own_files(model)
    whole = open_model(files, model).tensors
    checkpoint = open_file(files.checkpoints[0])
    aliases = {entry.sources[0] for entry in entries(model) if entry.kind == "Tied"}
    for tensor in set(checkpoint) - aliases:
        assert whole[tensor] == checkpoint[tensor]
        assert whole[tensor].path == files.checkpoints[0]
    assert not aliases & set(whole)
    assert any(stored.path.parent == files.language for stored in whole.values())


def file_bytes(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> tuple[Path, bytes]:
    path = folder / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=kind == "zip")
    return path, path.read_bytes()


@pytest.mark.parametrize("kind", ["zip", "before_1.6", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_file_whose_download_broke_off_is_said_to_be_not_whole(tmp_path: Path, kind: str, share: float):
    path, whole = file_bytes(tmp_path, kind, {"weight": torch.randn(100, 100)})
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(RequestError, match=r"is not a whole (PyTorch|safetensors) file") as error:
        open_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "before_1.6", "safetensors"])
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path, kind: str):
    path, whole = file_bytes(tmp_path, kind, PLAIN)

    @given(st.integers(0, len(whole) - 1))
    @example(1)
    @example(len(whole) - 1)
    @settings(max_examples=60)
    def refused(size: int) -> None:
        path.write_bytes(whole[:size])
        with pytest.raises(RequestError) as error:
            open_file(path)
        assert str(path) in str(error.value)

    refused()


class RunsCode:
    """An object whose pickle touches a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "before_1.6", "plain_pickle"])
@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, kind: str, name: str):
    path, marker = tmp_path / name, tmp_path / "code-ran"
    content = {"model": {"weight": torch.zeros(2), "extra": RunsCode(marker)}}
    if kind == "plain_pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    torch.load(path, weights_only=False) if kind != "plain_pickle" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the object is harmless: this test would prove nothing"
    marker.unlink()
    with pytest.raises(RequestError, match="would run code"):
        open_file(path) if name == "weights.pth" else open_folder(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("where", ["../outside.safetensors", "{absolute}", "sub/inside.safetensors", "..", ".", "", 7])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, where: object, index: str):
    folder = tmp_path / "hub"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        save_file({"weight": torch.zeros(2)}, place)
    name = str(tmp_path / "outside.safetensors") if where == "{absolute}" else where
    (folder / index).write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(RequestError, match="a shard must lie beside its index") as error:
        open_folder(folder)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": null}', "\0"])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(RequestError, match="is not an index of shards"):
        open_folder(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path):
    write_shards(tmp_path, PLAIN, "model", "safetensors", save_file, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(RequestError, match=r"names model-00002-of-00003\.safetensors, which is not in"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(1), {"epoch": 3}, {}, {1: torch.zeros(1)}, {"model": {}}]
)
def test_a_pth_without_named_tensors_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(RequestError, match=r"should hold a dict of tensors|holds no tensors"):
        open_file(tmp_path / "weights.pth")


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RequestError, match=r"should hold one of model\.safetensors.*found: notes\.txt"):
        open_folder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_dtype_no_checkpoint_of_lavis_has_is_refused_with_the_tensors_name(tmp_path: Path, dtype, ending: str):
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)({"weight": torch.zeros(2)}, path)
    edit_weights(path, lambda tensors: tensors.update(weight=tensors["weight"].to(dtype)))
    with pytest.raises(RequestError, match="weight has dtype"):
        open_file(path)

"""Second names of one tensor: copies that agree, disagree, or stand for the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401 (or every conversion would start a process for its configuration)
from conftest import edit_weights, weights
from forks import grow
from safetensors.torch import load_file

from blip2nb import api
from blip2nb.conversion.files import open_source
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.report.manifest import Manifest
from blip2nb.variants import variant
from blip2nb.weights.sources import open_file

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


SHARED = "t5_model.shared.weight"
ALIASES = ("t5_model.encoder.embed_tokens.weight", "t5_model.decoder.embed_tokens.weight")


def shared(folder: Path) -> torch.Tensor:
    return open_source(variant(T5), folder).tensors.tensors[SHARED].tensor().clone()


def written(run: Run, name: str) -> torch.Tensor:
    return load_file(run.model / "model.safetensors")[name]


def test_a_checkpoint_that_holds_only_a_copy_in_another_dtype_is_fine(tmp_path: Path, source_copy: Copy):
    """As LAVIS's trainer leaves it: the language model was not trained, and its copies slipped into the file."""
    folder = source_copy(T5)
    original = shared(folder)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {NORM: torch.ones(44), **{name: original.bfloat16() for name in ALIASES}}}, path)
    run = api.convert(T5, path, tmp_path / "model", base=folder)
    assert Manifest.read(run.model).tied == dict.fromkeys(ALIASES, f"tied to {SHARED}, cast to BF16")
    assert torch.equal(written(run, "language_model.shared.weight"), original)


@pytest.mark.parametrize("name", ALIASES)
def test_a_copy_that_disagrees_is_refused(tmp_path: Path, source_copy: Copy, name: str):
    folder = source_copy(T5)
    original = shared(folder).bfloat16()
    original.view(-1)[-1] += 1
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {NORM: torch.ones(44), name: original}}, path)
    with pytest.raises(RequestError, match=f"{name} should be a copy of {SHARED}, but the values in checkpoint.pth"):
        api.convert(T5, path, tmp_path / "model", base=folder)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint.pth"}


@pytest.mark.parametrize("with_copies", [True, False])
def test_a_checkpoint_that_trained_the_embedding_wins_over_the_copies_of_its_base(
    tmp_path: Path, source_copy: Copy, with_copies: bool
):
    folder = source_copy(T5)  # whose language model holds both copies, in float32
    trained = (shared(folder) * 1.5).bfloat16()
    path = tmp_path / "checkpoint.pth"
    copies = {name: trained.clone() for name in ALIASES} if with_copies else {}
    torch.save({"model": {SHARED: trained, **copies}}, path)
    run = api.convert(T5, path, tmp_path / "model", base=folder)
    assert torch.equal(written(run, "language_model.shared.weight"), trained)
    assert Manifest.read(run.model).origins[SHARED] == "checkpoint.pth"
    assert Manifest.read(run.model).tied == dict.fromkeys(ALIASES, f"tied to {SHARED}")
    path = tmp_path / "half.pth"
    torch.save({"model": {SHARED: trained, ALIASES[0]: shared(folder)}}, path)
    with pytest.raises(RequestError, match=f"{ALIASES[0]} should be a copy of"):
        api.convert(T5, path, tmp_path / "half", base=folder)


@pytest.mark.parametrize("kept", [ALIASES, ALIASES[:1], ALIASES[1:]], ids=["both", "encoder", "decoder"])
def test_a_copy_stands_for_the_original_where_nothing_else_has_it(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run], kept: tuple[str, ...]
):
    folder = source_copy(T5)
    for path in (folder / "flan-t5-xl").glob("*.safetensors"):
        gone = {SHARED, *ALIASES} - set(kept)
        edit_weights(path, lambda tensors, gone=gone: [tensors.pop(n.removeprefix("t5_model."), None) for n in gone])
    index = folder / "flan-t5-xl" / "model.safetensors.index.json"
    files = [open_file(path) for path in (folder / "flan-t5-xl").glob("*.safetensors")]
    weight_map = {name: one.path.name for held in files for name, one in held.items()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    run = api.convert(T5, folder, tmp_path / "model")
    assert weights(run.model) == weights(converted(T5).model)
    assert set(Manifest.read(run.model).tied) == set(kept)


def test_a_copy_that_lies_crosswise_in_its_file_is_compared_all_the_same(tmp_path: Path):
    """Of several pieces, which are cut at other places than the original's."""
    folder = grow(tmp_path / "source", width=1400, layers=1)
    path, name = folder / variant(OPT).checkpoint, "opt_model.lm_head.weight"
    embedding = "model.decoder.embed_tokens.weight"
    original = open_file(folder / "opt-2.7b" / "pytorch_model.bin")[embedding].tensor().float()

    def save(copy: torch.Tensor) -> None:
        edit_weights(path, lambda tensors: tensors.update({name: copy.T.contiguous().T}))
        assert open_file(path)[name].strides is not None

    save(original)
    run = api.convert(OPT, folder, tmp_path / "model")
    assert Manifest.read(run.model).tied == {name: f"tied to opt_model.{embedding}, cast to F32"}
    original[-1, -1] += 1
    save(original)
    with pytest.raises(RequestError, match=f"{name} should be a copy of opt_model.{embedding}"):
        api.convert(OPT, folder, tmp_path / "other")

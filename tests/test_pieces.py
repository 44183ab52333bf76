"""Converting piece by piece: memory that does not grow with the model, casts to the bits that torch casts to, and$
values that are no numbers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401 (or every conversion would start a process for its configuration)
from conftest import edit_weights
from forks import Forks, grow
from safetensors.torch import load_file

from blip2nb import api
from blip2nb.errors import RequestError
from blip2nb.weights.sources import open_file
from blip2nb.weights.stored import digest_of

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


# -- memory


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
def test_a_large_optimizer_beside_the_weights_costs_no_memory(tmp_path: Path, forks: Forks, zipped: bool):
    state = {number: {"exp_avg": torch.zeros(10_000_000)} for number in range(6)}
    content = {"model": {"wide": torch.ones(10_000_000)}, "optimizer": {"state": state}}
    torch.save(content, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    del content, state
    assert (tmp_path / "checkpoint.pth").stat().st_size > 270_000_000
    assert forks.memory("@read_one_tensor", tmp_path / "checkpoint.pth") < 20_000_000
    (tmp_path / "checkpoint.pth").unlink()


def test_memory_does_not_grow_with_the_model(tmp_path: Path, forks: Forks):
    source = grow(tmp_path / "source", width=1024, layers=16)
    assert sum(path.stat().st_size for path in source.rglob("*.*")) > 400_000_000
    small = forks.memory("convert", OPT, "--output", tmp_path / "small" / "model")
    request = ("convert", OPT, "--source", source, "--output")
    assert forks.memory(*request, tmp_path / "large" / "model") < small + 64_000_000
    assert forks.memory(*request, tmp_path / "cast" / "model", "--dtype", "float32") < small + 64_000_000
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


# -- casting, piece by piece


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A source whose language model is in float32, with tensors of several pieces."""
    folder = tmp_path_factory.mktemp("in_float32")
    yield grow(folder / "source", width=512, layers=1, dtype=torch.float32)
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("turned", [False, True], ids=["straight", "crosswise"])
def test_a_tensor_of_several_pieces_is_cast_to_the_bits_torch_casts_it_to(
    tmp_path: Path, in_float32: Path, dtype: str, turned: bool
):
    source = shutil.copytree(in_float32, tmp_path / "source")
    bin_file = source / "opt-2.7b" / "pytorch_model.bin"
    values = torch.randn(2048, 512, generator=torch.Generator().manual_seed(1)) ** 3 * 100
    values[0, :8] = torch.tensor([0.0, -0.0, 6e-8, 2.5e-8, 65504.0, 1e-40, -65519.0, 1.00048828125])
    if dtype == "float32":
        values = values.double() * (1 + 1e-9)
    short_name = FC1.removeprefix("opt_model.")
    edit_weights(bin_file, lambda tensors: tensors.update({short_name: values.T.contiguous().T if turned else values}))
    stored = open_file(bin_file)[short_name]
    assert stored.nbytes >= 4 << 20
    assert (stored.strides is not None) == turned
    run = api.convert(OPT, source, tmp_path / "model", dtype=dtype)
    made = load_file(run.model / "model.safetensors")["language_model.model.decoder.layers.0.fc1.weight"]
    assert digest_of(made) == digest_of(values.to(getattr(torch, dtype)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e6])
@pytest.mark.parametrize("at", [0, 2048 * 512 // 2 + 7, -1])
def test_a_value_that_is_no_number_or_too_large_is_found_wherever_it_is(
    tmp_path: Path, in_float32: Path, value: float, at: int
):
    source = shutil.copytree(in_float32, tmp_path / "source")
    short_name = FC1.removeprefix("opt_model.")
    edit_weights(
        source / "opt-2.7b" / "pytorch_model.bin",
        lambda tensors: tensors[short_name].view(-1).__setitem__(at, value),
    )
    words = "holds 1 NaN or infinite values" if not math.isfinite(value) else r"too large for F16"
    with pytest.raises(RequestError, match=rf"{FC1} .*{words}"):
        api.convert(OPT, source, tmp_path / "runs" / "model", dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}

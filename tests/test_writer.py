"""The writer: what is written is what the safetensors library reads, and a directory is finished or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from blip2nb.errors import RequestError
from blip2nb.weights.hashing import DTYPE_NAMES, DTYPES, digest
from blip2nb.weights.writer import Slot, parse_size, shard, shard_file, whole_directory, write_index

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and up to three dimensions, empty ones and views that lie crosswise among them."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 50
    tensor = values.abs().to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


def write(folder: Path, content: dict[str, torch.Tensor], largest: int) -> list[str]:
    shards = shard([Slot(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in content.items()], largest)
    for one in shards:
        with shard_file(folder / one.name, one) as out:
            for slot in one.slots:
                out.write(content[slot.name])
    write_index(folder, shards)
    return [one.name for one in shards]


@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=8), st.integers(1, 400))
@settings(max_examples=60)
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory: pytest.TempPathFactory, content, largest: int):
    folder = tmp_path_factory.mktemp("written")
    names = write(folder, content, largest)
    read = [load_file(folder / name) for name in names]
    assert {name: digest(tensor) for one in read for name, tensor in one.items()} == {
        name: digest(tensor) for name, tensor in content.items()
    }
    assert sum(map(len, read)) == len(content)
    sizes = [sum(tensor.nbytes for tensor in one.values()) for one in read]
    assert all(size <= largest or len(one) == 1 for size, one in zip(sizes, read, strict=True))
    index = folder / "model.safetensors.index.json"
    if len(names) == 1:
        assert names == ["model.safetensors"]
        assert not index.exists()
    else:
        assert names == [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
        written = json.loads(index.read_text())
        assert written["weight_map"] == {name: file for file, one in zip(names, read, strict=True) for name in one}
        assert written["metadata"] == {"total_size": sum(sizes)}


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float16)])
def test_a_tensor_other_than_the_one_announced_is_refused(tmp_path: Path, wrong: torch.Tensor):
    (one,) = shard([Slot("weight", "F32", (2,))], 100)
    with pytest.raises(ValueError, match="weight was announced as"), shard_file(tmp_path / one.name, one) as out:
        out.write(wrong)


def test_leaving_before_the_last_tensor_is_an_error(tmp_path: Path):
    (one,) = shard([Slot("first", "F32", (2,)), Slot("second", "F32", (2,))], 100)
    with pytest.raises(ValueError, match="lacks 1 tensor"), shard_file(tmp_path / one.name, one) as out:
        out.write(torch.zeros(2))


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("new")
    (folder / "part").mkdir()
    (folder / "part" / "weights").write_text("new")


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [True, False], ids=["over_an_old_one", "new"])
def test_a_directory_that_was_not_finished_leaves_nothing(tmp_path: Path, failure: type[BaseException], before: bool):
    if before:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old").write_text("old")
    there = snapshot(tmp_path)

    def broken() -> None:
        with whole_directory(tmp_path / "model") as folder:
            fill(folder)
            raise failure

    with pytest.raises(failure):
        broken()
    assert snapshot(tmp_path) == there


def test_an_old_directory_is_replaced_whole(tmp_path: Path):
    target = tmp_path / "deep" / "model"
    for _ in range(2):
        with whole_directory(target) as folder:
            fill(folder)
            assert not (target / "config.json").exists() or (target / "old").exists()
        assert sorted(snapshot(tmp_path)) == [
            "deep", "deep/model", "deep/model/config.json", "deep/model/part", "deep/model/part/weights",
        ]  # fmt: skip
        (target / "old").write_text("old")


def test_a_killed_run_leaves_the_old_directory_and_the_next_run_finishes(tmp_path: Path):
    target = tmp_path / "model"
    with whole_directory(target) as folder:
        (folder / "config.json").write_text("old")
    script = (
        "import os, pathlib, signal, sys\n"
        "from blip2nb.weights.writer import whole_directory\n"
        "with whole_directory(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'config.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(target)], check=False).returncode == -9
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["model"]
    assert (target / "config.json").read_text() == "old"
    with whole_directory(target) as folder:
        (folder / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "new"


@given(st.integers(1, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from(["", "B"]), st.booleans())
def test_a_size_is_read_as_decimal_units(number: int, unit: str, byte: str, lower: bool):
    text = f"{number}{unit}{byte}"
    assert parse_size(text.lower() if lower else text) == number * 1000 ** " KMGT".index(unit or " ")
    assert parse_size(f" {number} {unit}{byte} ") == parse_size(text)
    assert parse_size(number) == number


@pytest.mark.parametrize("text", ["", "GB", "0", "0GB", "-5GB", "5GiB", "5 GB extra", "five", "1e9", "nan", -1, 0])
def test_what_is_not_a_size_is_refused_with_what_was_found(text: str | int):
    with pytest.raises(RequestError, match="such as 5GB or 200MB was expected") as error:
        parse_size(text)
    assert repr(text) in str(error.value)


def test_a_fraction_of_a_unit_is_a_size():
    assert parse_size("1.5GB") == 1_500_000_000

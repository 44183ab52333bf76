"""The writer: what is written is what the safetensors library reads, and a directory is finished or not there."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from blip2nb.errors import RequestError
from blip2nb.weights import writer
from blip2nb.weights.hashing import DTYPE_NAMES, DTYPES, sha256_of
from blip2nb.weights.sources import open_file
from blip2nb.weights.stored import contents
from blip2nb.weights.writer import ShardFile, Slot, parse_size, shard, whole_directory, write_index

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and up to three dimensions, empty ones and views that lie crosswise among them."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 50
    tensor = values.abs().to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


def write(folder: Path, content: dict[str, torch.Tensor], largest: int, piece: int = 1 << 20) -> list[str]:
    """Write as the converter does: every tensor in pieces, in an order other than the file's."""
    shards = shard([Slot(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in content.items()], largest)
    for one in shards:
        with contextlib.closing(ShardFile(folder, one)) as out:
            for slot in reversed(one.slots):
                data = contents(content[slot.name])[1]
                out.write(slot.name, (data[at : at + piece] for at in range(0, len(data), piece)))
            out.finish()
    write_index(folder, shards)
    return [one.name for one in shards]


@given(st.dictionaries(NAMES, tensors(), min_size=1, max_size=8), st.integers(1, 400))
@settings(max_examples=60)
def test_what_is_written_is_what_safetensors_reads(tmp_path_factory: pytest.TempPathFactory, content, largest: int):
    folder = tmp_path_factory.mktemp("written")
    names = write(folder, content, largest)
    read = [load_file(folder / name) for name in names]
    assert {name: sha256_of(tensor) for one in read for name, tensor in one.items()} == {
        name: sha256_of(tensor) for name, tensor in content.items()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direct", [True, False], ids=["past_the_page_cache", "through_it"])
def test_large_tensors_that_begin_anywhere_arrive_whole(tmp_path: Path, monkeypatch, dtype: torch.dtype, direct: bool):
    """Whole pages go to the disk past the page cache, what is left at both ends through it."""
    if not direct:
        monkeypatch.setattr(writer, "_open_direct", lambda path: -1)
    sizes = (3, 700_001, 5, 1_300_000, 1, 262_144, 2048)
    content = {f"t{n}": torch.randn(size).to(dtype) for n, size in enumerate(sizes)}
    save_file(content, tmp_path / "source.safetensors")
    (one,) = shard([Slot(name, DTYPE_NAMES[dtype], tuple(t.shape)) for name, t in content.items()], 1 << 30)
    source = open_file(tmp_path / "source.safetensors")
    with contextlib.closing(ShardFile(tmp_path, one)) as out:
        assert (out._direct >= 0) == direct or sys.platform != "linux"
        for name in content:
            out.write(name, source[name].pieces())
        out.finish()
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in content.items())


@pytest.mark.parametrize("count", [7, 9])
def test_more_or_fewer_bytes_than_were_announced_are_refused(tmp_path: Path, count: int):
    (one,) = shard([Slot("weight", "F32", (2,))], 100)
    with contextlib.closing(ShardFile(tmp_path, one)) as out, pytest.raises(ValueError, match="weight was announced"):
        out.write("weight", [bytes(4), bytes(count - 4)])


def test_a_shard_has_its_name_only_once_it_is_whole(tmp_path: Path):
    (one,) = shard([Slot("weight", "F32", (2,))], 100)
    with contextlib.closing(ShardFile(tmp_path, one)) as out:
        out.write("weight", [bytes(8)])
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors.partial"]
        out.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


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

"""A `.pth` that is written tensor by tensor: PyTorch reads it, and it is whole or not there."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip2nb.weights.checkpoint import write_checkpoint
from blip2nb.weights.sources import open_file
from blip2nb.weights.stored import Stored

NAMES = ("a", "b", "c")


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, Stored]:
    made = {name: torch.randn(500, 400 + number) for number, name in enumerate(NAMES)}
    made["b"] = made["b"].bfloat16()
    save_file(made, tmp_path / "source.safetensors")
    return dict(open_file(tmp_path / "source.safetensors"))


def test_pytorch_reads_it_and_the_same_tensors_make_the_same_file(tmp_path: Path, tensors: dict[str, Stored]):
    counted: list[int] = []
    write_checkpoint(tmp_path / "one.pth", tensors, counted.append)
    write_checkpoint(tmp_path / "another.pth", tensors)
    read = torch.load(tmp_path / "one.pth", weights_only=True, mmap=True)["model"]
    assert all(torch.equal(read[name], tensors[name].tensor()) for name in NAMES)
    assert [read[name].dtype for name in NAMES] == [torch.float32, torch.bfloat16, torch.float32]
    assert sum(counted) == (tmp_path / "one.pth").stat().st_size
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()


def test_a_disk_that_fills_up_is_said_as_the_system_says_it_and_what_stood_there_stays(
    tmp_path: Path, tensors: dict[str, Stored]
):
    target = tmp_path / "out" / "one.pth"
    target.parent.mkdir()
    target.write_text("before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_checkpoint(target, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(target.parent) == ["one.pth"]
    assert target.read_text() == "before"


def test_an_interruption_leaves_nothing(tmp_path: Path, tensors: dict[str, Stored]):
    def interrupt(count: int) -> None:
        if count > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "out" / "one.pth", tensors, interrupt)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """128 MB of tensors: what is held beyond the start is a few pieces of them."""
    save_file({f"t{n}": torch.zeros(4 << 20) for n in range(8)}, tmp_path / "source.safetensors")
    tensors = dict(open_file(tmp_path / "source.safetensors"))
    held: list[int] = []
    write_checkpoint(tmp_path / "small.pth", {"t0": tensors["t0"].rows(0, 1000)})
    start = anonymous()
    write_checkpoint(tmp_path / "one.pth", tensors, lambda count: held.append(anonymous()))
    assert max(held) - start < 32_000_000


def anonymous() -> int:
    """Bytes of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

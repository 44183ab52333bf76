"""Disks that are full, too small, or not to be written to."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forks import Forks, one_sentence

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


@contextlib.contextmanager
def disk(place: Path, options: str) -> Iterator[Path]:
    """A small disk of its own, for as long as it is needed."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root on Linux can mount a small disk to fill")
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a disk to fill")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path: Path, forks: Forks):
    with disk(tmp_path / "disk", "size=32m") as place:
        said = one_sentence(forks.run("convert", OPT, "--output", place / "runs" / "model"))
        assert " MB, and 33.6 MB are free there" in said
        assert "Make room" in said
        assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("fill_before", "leave"),
    [
        pytest.param("os.mkdir {}/runs/.model.partial", 0, id="before_the_journal"),
        pytest.param("os.mkdir {}/runs/.model.partial", 500_000, id="before_the_weights"),
        pytest.param("config.json", 0, id="before_the_configuration"),
        pytest.param("tokenizer_config.json", 0, id="before_the_tokenizer"),
        pytest.param("blip2nb.json", 4096, id="before_the_manifest"),
    ],
)
def test_a_disk_that_fills_up_meanwhile_is_said_and_nothing_is_left(
    tmp_path: Path, forks: Forks, fill_before: str, leave: int
):
    with disk(tmp_path / "disk", "size=80m") as place:
        request = ("convert", OPT, "--output", place / "runs" / "model")
        full = forks.run(*request, below=str(place), fill_before=fill_before.format(place), leave=leave)
        assert f"The disk is full: {place}/runs/model did not fit, and nothing was left" in one_sentence(full)
        assert [path.name for path in place.iterdir()] == ["filling"]
        (place / "filling").unlink()
        assert forks.run(*request).status == 0


def test_a_disk_that_fills_up_is_said_whichever_library_notices_first(tmp_path: Path, forks: Forks):
    """The tokenizer is written by a library with errors of its own, while another thread takes room too."""
    with disk(tmp_path / "disk", "size=80m") as place:
        for pages in range(1, 13):
            how = {"below": str(place), "fill_before": "tokenizer_config.json", "leave": pages * 4096}
            full = forks.run("convert", OPT, "--output", place / "model", **how)
            assert "The disk is full" in one_sentence(full)
            assert [path.name for path in place.iterdir()] == ["filling"]
            (place / "filling").unlink()


def test_a_file_larger_than_the_system_allows_is_said_and_nothing_is_left(tmp_path: Path, forks: Forks):
    said = one_sentence(forks.run("convert", OPT, "--output", tmp_path / "runs" / "model", largest=600_000))
    assert "larger than may be written here. Use a smaller max_shard_size" in said
    assert not list(tmp_path.iterdir())
    more = ("--max-shard-size", "400KB")
    assert forks.run("convert", OPT, "--output", tmp_path / "model", *more, largest=600_000).status == 0


@pytest.mark.parametrize("inside", ["model", "runs/model"])
def test_a_place_that_cannot_be_written_to_is_said_and_nothing_is_done(tmp_path: Path, forks: Forks, inside: str):
    with disk(tmp_path / "disk", "size=80m,ro") as place:
        said = one_sentence(forks.run("convert", OPT, "--output", place / inside))
        assert f"{place / inside} cannot be written (Read-only file system)" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_said_and_nothing_is_done(tmp_path: Path, forks: Forks):
    tmp_path.chmod(0o555)
    try:
        said = one_sentence(forks.run("convert", OPT, "--output", tmp_path / "model"))
        assert "cannot be written (Permission denied)" in said
        assert not list(tmp_path.iterdir())
    finally:
        tmp_path.chmod(0o755)

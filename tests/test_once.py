"""Nothing is done twice: a verification's forward passes, and its figures."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from records import raw
from torch.nn.modules.module import register_module_forward_pre_hook

from blip2nb import api
from blip2nb.conversion import directory
from blip2nb.conversion.files import open_source
from blip2nb.conversion.hub import FIGURE
from blip2nb.display import narrow
from blip2nb.display.figures.style import Picture
from blip2nb.handles import Run
from blip2nb.lavis_env.reference import SHIPPED_TAPES
from blip2nb.once import once
from blip2nb.proof import verify
from blip2nb.proof.captions import MODES
from blip2nb.proof.subject import Subject
from blip2nb.report.manifest import Manifest
from blip2nb.trace.tape import Tape
from blip2nb.twins import write_twin
from blip2nb.variants import variant
from blip2nb.weights import sources
from blip2nb.weights.stored import Stored

TWIN = "tiny-blip2-opt-2.7b"


@contextlib.contextmanager
def counted_calls(kind: str) -> Iterator[list[torch.nn.Module]]:
    """The modules of a class that are called while the block runs."""
    called: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, _arguments: object) -> None:
        if type(module).__name__ == kind:
            called.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()


def test_a_verification_takes_three_forward_passes(converted: Callable[[str], Run]) -> None:
    """As shipped, with the known difference put right, and fed LAVIS's values. Captions go past the whole model."""
    tape = Tape(SHIPPED_TAPES / f"{TWIN}.safetensors")
    with counted_calls("Blip2ForConditionalGeneration") as passes, counted_calls("Blip2VisionModel") as towers:
        report = verify.verify(Subject(converted(TWIN).model, tape))
    assert raw(report)["causes"] == ["post_layernorm_eps"]
    assert len(passes) == 3
    assert len(towers) == 3 + len(MODES)


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Alt text and width of every figure that is drawn in this process."""
    drawn: list[tuple[str, float]] = []
    draw = Picture.draw

    def note(picture: Picture, renderer: object) -> None:
        drawn.append((picture.alt, picture.get_figwidth()))
        draw(picture, renderer)

    monkeypatch.setattr(Picture, "draw", note)
    return drawn


def test_a_figure_is_drawn_once_for_the_files_the_page_the_card_and_the_notebook(
    model_copy: Callable[[str], Run], drawings: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "cores", lambda: 1)
    run = model_copy(TWIN)
    report = api.verify(run)
    files = {path.stem: path.read_bytes() for path in run.figures.glob("*.png")}
    assert len(files) > 10
    assert [width for _, width in drawings].count(7.0) == len(files)
    assert len(set(drawings)) == len(drawings) == 2 * len(files)
    shown = {name: report.figure(name) for name in files}
    assert {name: picture._repr_png_()[0] for name, picture in shown.items()} == files
    with Image.open(run.model / FIGURE) as card:
        assert card.width == 896
    assert len(drawings) == 2 * len(files)

    one: Figure = shown["logits"]
    one.axes[0].set_title("changed by hand")
    changed = one._repr_png_()[0]
    assert Image.open(io.BytesIO(changed)).tobytes() != Image.open(io.BytesIO(files["logits"])).tobytes()
    one.axes[0].set_title("and once more")
    one.savefig(io.BytesIO())
    assert one._repr_png_()[0] not in (changed, files["logits"])
    assert report.figure("logits") is not one


def test_what_a_phone_is_shown_comes_from_another_core_and_is_the_same(
    model_copy: Callable[[str], Run], drawings: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = model_copy(TWIN)
    report = api.verify(run, proof="weights", figures=False)
    pages = []
    for cores in (1, 2):
        monkeypatch.setattr(narrow, "cores", functools.partial(int, cores))
        api.draw(run)
        pages.append(run.page.read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    there = {name for name in ("stage_map", "files") if (run.figures / f"{name}.png").is_file()}
    assert there == {path.stem for path in run.figures.glob("*.png")}
    assert [width for _, width in drawings].count(3.4) == len(there)  # of the first of the two
    assert report.figure("files").get_figwidth() == 7.0


def test_a_process_that_draws_ends_with_who_started_it_and_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "cores", lambda: 2)
    before = set(psutil.Process().children())
    with narrow.narrow_pictures(tmp_path) as wait:
        assert wait() == {}  # there is no report
    with contextlib.suppress(KeyboardInterrupt), narrow.narrow_pictures(tmp_path):
        assert set(psutil.Process().children()) - before
        raise KeyboardInterrupt
    assert not set(psutil.Process().children()) - before


def long_ago(folder: Path) -> None:
    """What has just been written is read each time, since it might change again within the clock's tick."""
    for path in folder.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))


def test_a_source_is_parsed_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which model it is, whether it fits, what it holds, and what to check it against, in one process."""
    parsed: list[str] = []
    real = sources.read_torch_file
    monkeypatch.setattr(sources, "read_torch_file", lambda path: (parsed.append(path.name), real(path))[1])
    write_twin(variant(TWIN), tmp_path / "released")
    trained = torch.load(tmp_path / "released" / variant(TWIN).checkpoint, weights_only=True)
    config = {"model": {"arch": "blip2_opt", "model_type": variant(TWIN).lavis_type}}
    torch.save({**trained, "config": config}, tmp_path / "checkpoint_best.pth")
    long_ago(tmp_path)
    run = api.convert(TWIN, tmp_path / "checkpoint_best.pth", base=tmp_path / "released", output_dir=tmp_path / "out")
    files = sorted(parsed)
    assert "checkpoint_best.pth" in files
    assert files == sorted(set(files))
    assert not api.check(run).wrong
    assert sorted(parsed) == files


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    read: list[str] = []

    @once
    def text(path: Path) -> str:
        read.append(path.name)
        return path.read_text()

    path = tmp_path / "a"
    path.write_text("one")
    assert (text(path), text(path), len(read)) == ("one", "one", 2)  # it might change again within the clock's tick
    long_ago(tmp_path)
    assert (text(path), text(path), len(read)) == ("one", "one", 3)
    path.write_text("two")
    assert text(path) == "two"
    long_ago(tmp_path)
    path.rename(tmp_path / "b")
    (tmp_path / "a").write_text("new")
    long_ago(tmp_path)
    assert text(tmp_path / "a") == "new"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        text(path)


def test_weights_whose_hash_a_conversion_knows_are_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest knows it where the files are as they were; else all that they hold is read."""
    write_twin(variant(TWIN), tmp_path / "released")
    run = api.convert(TWIN, tmp_path / "released", output_dir=tmp_path / "out")
    opened = open_source(variant(TWIN), tmp_path / "released")
    computed = directory.weights_hash(opened)
    monkeypatch.setattr(Stored, "digest", None)
    known = directory.as_converted(opened, run.model)
    assert directory.weights_hash(known) == computed == Manifest.read(run.model).weights_hash
    long_ago(tmp_path / "released")
    assert directory.as_converted(opened, run.model) is opened
    assert directory.as_converted(opened, tmp_path) is opened

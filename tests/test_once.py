"""Nothing is done twice: a verification's forward passes, and its figures."""

from __future__ import annotations

import contextlib
import functools
import io
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
from blip2nb.conversion.hub import FIGURE
from blip2nb.display import narrow
from blip2nb.display.figures.style import Picture
from blip2nb.handles import Run
from blip2nb.lavis_env.reference import SHIPPED_TAPES
from blip2nb.proof import verify
from blip2nb.proof.captions import MODES
from blip2nb.proof.subject import Subject
from blip2nb.trace.tape import Tape

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

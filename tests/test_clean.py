"""What takes space, and removing it: only what the kit wrote, only what was named, and nothing that is in use."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import Outcome, snapshot
from filelock import FileLock
from jupyter_client.manager import start_new_kernel
from records import raw
from safetensors.torch import load_file, save_file

import blip2nb
from blip2nb import api, clean
from blip2nb.errors import RequestError
from blip2nb.families.captioners import huggingface
from blip2nb.forms import dumps
from blip2nb.handles import Run
from blip2nb.report.manifest import Manifest
from blip2nb.report.sweep import Outcome as SweepOutcome
from blip2nb.sizes import as_bytes
from blip2nb.sweeps.place import HIDDEN, RECORD
from blip2nb.twins import write_twin
from blip2nb.variants import variant
from blip2nb.weights.writer import JOURNAL

Command = Callable[..., Outcome]
TWIN = "tiny-blip2-opt-2.7b"
ROOT = Path(__file__).parent.parent
HUB_MODEL = "facebook/opt-2.7b"


def file(path: Path, size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def run_folder(folder: Path) -> Path:
    """A run as the kit leaves it, but for what is in its files."""
    for name in ("model/blip2nb.json", "model/config.json", "report.json", "arrays.safetensors", "figures/logits.png"):
        file(folder / name)
    header = json.dumps({"__metadata__": {"blip2nb": "{}"}}).encode()
    (folder / "tape.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches for the kit, whose is returned, and for LAVIS and Hugging Face beside it."""
    for name, place in (("BLIP2NB_CACHE", "kit"), ("TORCH_HOME", "torch")):
        monkeypatch.setenv(name, str(tmp_path / "caches" / place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "caches" / "huggingface"))
    return tmp_path / "caches" / "kit"


@pytest.fixture
def outputs(tmp_path: Path, cache: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


def listed(outputs: Path) -> dict[str, clean.Item]:
    items = clean.survey(outputs)
    assert len({item.name for item in items}) == len(items)
    return {item.name: item for item in items}


# -- the list


def test_without_names_everything_is_listed_and_nothing_changes(command: Command, outputs: Path, cache: Path):
    assert command("clean", "--output-dir", outputs / "none").out.split() == ["total", "0", "B"]
    run_folder(outputs / "mine")
    file(cache / "twins" / f"{TWIN}-r1" / "eva_vit_g.pth", 5000)
    file(cache / "lavis" / "eva_vit_g.pth", 70_000)
    before = snapshot(outputs.parent)
    ended = command("clean", "--output-dir", outputs, "--json")
    found = json.loads(ended.out)
    sizes = {row["name"]: row["bytes"] for row in found["items"]}
    tape = (outputs / "mine" / "tape.safetensors").stat().st_size
    assert sizes == {
        "mine/model": 2000, "mine/tape": tape, "mine/rest": 3000, "twins": 5000, "downloads/eva_vit_g.pth": 70_000,
    }  # fmt: skip
    assert (ended.status, found["bytes"]) == (0, sum(sizes.values()))
    words = command("clean", "--output-dir", outputs).out.splitlines()
    assert [line.split()[0] for line in words] == [*sizes, "total"]
    assert words[0].split()[1:3] == ["2", "kB"]
    assert words[-1].split()[1:] == ["80", "kB"]
    assert snapshot(outputs.parent) == before


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1 MB"), (7_400_000_000, "7.4 GB")]
)
def test_sizes_are_in_the_units_of_disks(size: int, words: str):
    assert as_bytes(size) == words


def test_the_caches_of_others_are_shown_and_kept(command: Command, outputs: Path, cache: Path):
    lavis = file(cache.parent / "torch" / "hub" / "checkpoints" / "eva_vit_g.pth", 9000)
    file(cache.parent / "torch" / "hub" / "checkpoints" / "resnet50.pth")  # nothing that the kit would read
    repository = cache.parent / "huggingface" / f"models--{HUB_MODEL.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1234")
    weights = repository / "blobs" / "model.safetensors"
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", weights.name):
        link(repository / "snapshots" / "1234" / name, file(repository / "blobs" / name, 50))
    save_file({"weight": torch.zeros(100)}, weights)
    items = listed(outputs)
    sizes = {name: item.size for name, item in items.items()}
    assert sizes == {"lavis/eva_vit_g.pth": 9000, "huggingface/opt-2.7b": 150 + weights.stat().st_size}
    assert f"hf cache rm model/{HUB_MODEL}" in items["huggingface/opt-2.7b"].kept
    for name in ("lavis", "lavis/eva_vit_g.pth", "huggingface/opt-2.7b"):
        ended = command("clean", name, "--yes", "--output-dir", outputs)
        assert (ended.status, len(ended.said)) == (2, 1)
    assert lavis.is_file()
    assert weights.is_file()


# -- removing


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["mine/model"], {"mine/tape", "mine/rest", "yours/model", "yours/tape", "yours/rest"}),
        (["mine/tape", "yours/rest"], {"mine/model", "mine/rest", "yours/model", "yours/tape"}),
        (["mine"], {"yours/model", "yours/tape", "yours/rest"}),
        (["mine/", "yours"], set()),
        (["outputs/mine/", "outputs/yours/model"], {"yours/tape", "yours/rest"}),
        (["--models"], {"mine/tape", "mine/rest", "yours/tape", "yours/rest"}),
    ],
)
def test_what_is_named_goes_and_the_rest_stays(
    command: Command, outputs: Path, names: list[str], left: set[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(outputs.parent)  # a path completed by the shell is a name, too
    for name in ("mine", "yours"):
        run_folder(outputs / name)
    sizes = {name: item.size for name, item in listed(outputs).items()}
    ended = command("clean", *names, "--yes", "--json", "--output-dir", outputs)
    removed = json.loads(ended.out)
    assert ended.status == 0
    assert set(listed(outputs)) == left
    assert removed["bytes"] == sum(size for name, size in sizes.items() if name not in left)
    assert not [path for path in outputs.rglob("*") if path.name.startswith(".")]
    assert {path.name for path in outputs.iterdir()} == {name.split("/")[0] for name in left}, "no empty folders"


def test_a_name_of_a_run_and_of_something_else_is_refused_and_a_path_says_which(
    command: Command, outputs: Path, cache: Path
):
    twin = file(cache / "twins" / f"{TWIN}-r1" / "eva_vit_g.pth")
    for name in ("twins", "unfinished"):
        run_folder(outputs / name)
    ended = command("clean", "twins", "--yes", "--output-dir", outputs)
    assert (ended.status, len(ended.said)) == (2, 1)
    assert f"{outputs / 'twins'}" in ended.err
    unfinished(outputs / "mine")
    for name in (outputs / "twins", "unfinished"):
        assert command("clean", name, "--yes", "--output-dir", outputs).status == 0
    assert set(listed(outputs)) == {"unfinished/model", "unfinished/tape", "unfinished/rest", "twins"}
    assert command("clean", "twins", "--yes", "--output-dir", outputs).status == 0
    assert not twin.exists()


def test_the_caches_of_the_kit_can_be_emptied(command: Command, outputs: Path, cache: Path):
    for name in (f"twins/{TWIN}-r1/eva_vit_g.pth", "lavis/eva_vit_g.pth", "hub/opt-2.7b/config.json"):
        file(cache / name)
    stranger = file(cache / "lavis" / "notes.txt")
    assert command("clean", "twins", "downloads", "--yes", "--output-dir", outputs).status == 0
    assert [path for path in cache.rglob("*") if path.is_file()] == [stranger]


def test_there_is_a_question_first(outputs: Path, command: Command, monkeypatch: pytest.MonkeyPatch):
    run_folder(outputs / "mine")
    before = snapshot(outputs)
    refused = command("clean", "mine", "--output-dir", outputs)  # the tests have no terminal
    assert (refused.status, refused.out, len(refused.said)) == (2, "", 1)
    assert "--yes" in refused.err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []
    monkeypatch.setattr("typer.confirm", lambda text, **options: asked.append(text))  # the answer is None: no
    declined = command("clean", "mine/model", "--output-dir", outputs)
    assert (declined.status, declined.out, len(asked)) == (0, "", 1)
    assert "mine/model" in declined.err
    assert snapshot(outputs) == before
    monkeypatch.setattr("typer.confirm", lambda text, **options: True)
    assert command("clean", "mine/model", "--output-dir", outputs).status == 0
    assert not (outputs / "mine" / "model").exists()


@pytest.mark.parametrize("name", ["", "nothing", "min", "mine/mode", "..", "/", "../outside", "mine/../../outside"])
def test_a_name_that_is_nobodys_is_refused(command: Command, outputs: Path, name: str):
    run_folder(outputs / "mine")
    run_folder(outputs.parent / "outside")
    before = snapshot(outputs.parent)
    ended = command("clean", "mine/tape", name, "--yes", "--output-dir", outputs)
    assert (ended.status, ended.out, len(ended.said)) == (2, "", 1)
    assert snapshot(outputs.parent) == before
    if name == "mine/mode":
        assert "Did you mean 'mine/model'?" in ended.err


# -- what is not the kit's


def test_a_folder_that_is_no_run_is_listed_and_stays(command: Command, outputs: Path):
    file(outputs / "photos" / "model" / "config.json")
    file(outputs / "strange" / "tape.safetensors")
    tape = run_folder(outputs / "mine") / "tape.safetensors"
    file(outputs / ".backup.partial" / "half")
    file(outputs / ".backup.old")
    (outputs / "recorded").mkdir()
    shutil.move(tape, outputs / "recorded")
    before = snapshot(outputs)
    for name in ("photos", "strange", ".backup.partial", ".backup.old", "unfinished"):
        ended = command("clean", name, "--yes", "--output-dir", outputs)
        assert (ended.status, len(ended.said)) == (2, 1)
    assert snapshot(outputs) == before
    assert listed(outputs)["photos/other"].size == 1000
    assert listed(outputs)["recorded/tape"].kept == "", "a recording of the kit's, on its own, is a run"


def test_what_somebody_put_into_a_run_stays(command: Command, outputs: Path):
    run = run_folder(outputs / "mine")
    (run / "model" / "blip2nb.json").unlink()  # another program's, then
    theirs = [file(run / name) for name in (".model.old", ".notes.partial/half", "model/config.json", "notes.txt")]
    ended = command("clean", "mine", "--yes", "--output-dir", outputs)
    assert ended.status == 0
    assert "mine/other stays: it is not of this kit: .model.old, .notes.partial, notes.txt" in ended.err
    assert "mine/model stays: it is not a conversion of this kit" in ended.err
    assert sorted(path for path in outputs.rglob("*") if path.is_file()) == theirs


@pytest.mark.parametrize("what", ["", "model", "tape.safetensors", "figures"])
def test_links_are_not_followed(command: Command, outputs: Path, what: str):
    elsewhere = run_folder(outputs.parent / "elsewhere")
    if what:
        run_folder(outputs / "mine")
        place = outputs / "mine" / what
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        link(place, elsewhere / what)
    else:
        link(outputs / "mine", elsewhere)
    before = snapshot(elsewhere)
    items = listed(outputs)
    name = {"": "mine", "model": "mine/model", "tape.safetensors": "mine/tape", "figures": "mine/rest"}[what]
    assert "link" in items[name].kept
    assert command("clean", name, "--yes", "--output-dir", outputs).status == 2
    command("clean", "mine", "--models", "--yes", "--output-dir", outputs)
    assert snapshot(elsewhere) == before


def test_a_link_in_a_model_goes_and_what_it_leads_to_stays(command: Command, outputs: Path):
    precious = file(outputs.parent / "precious" / "weights", 5000)
    link(run_folder(outputs / "mine") / "model" / "folder", precious.parent)
    link(outputs / "mine" / "model" / "file", precious)
    assert listed(outputs)["mine/model"].size < 5000
    assert command("clean", "mine/model", "--yes", "--output-dir", outputs).status == 0
    assert not (outputs / "mine" / "model").exists()
    assert precious.is_file()


def test_what_became_a_link_since_it_was_listed_is_refused(outputs: Path):
    run_folder(outputs / "mine")
    items = [listed(outputs)["mine/model"]]
    elsewhere = (outputs / "mine" / "model").rename(outputs.parent / "elsewhere")
    link(outputs / "mine" / "model", elsewhere)
    with pytest.raises(RequestError, match="a link to another place"):
        clean.remove(items)
    assert (elsewhere / "blip2nb.json").is_file()


def test_a_model_that_was_given_its_own_place_in_outputs_is_found_with_its_proof(command: Command, outputs: Path):
    shutil.move(run_folder(outputs / "mine") / "model", outputs / "named")
    (outputs / "mine").rename(outputs / "named-proof")
    assert set(listed(outputs)) == {"named", "named-proof/tape", "named-proof/rest"}
    assert command("clean", "--models", "--yes", "--output-dir", outputs).status == 0
    assert set(listed(outputs)) == {"named-proof/tape", "named-proof/rest"}


# -- unfinished work


def unfinished(folder: Path, name: str = "model") -> Path:
    file(folder / f".{name}.partial" / JOURNAL)
    file(folder / f".{name}.lock", 0)
    return folder / f".{name}.partial"


def test_unfinished_work_has_rows_of_its_own_and_goes_at_one_word(command: Command, outputs: Path, cache: Path):
    unfinished(outputs / "broken_off")
    run = unfinished(run_folder(outputs / "mine")).parent
    for name in (".model.old/blip2nb.json", "tape.safetensors.partial", ".back.pth.partial"):
        file(run / name)
    unfinished(outputs, "named")
    unfinished(cache / "twins", f"{TWIN}-r1")
    for ending in (".0123456789ab.partial", ".fedcba987654.partial", ".lock"):
        file(cache / "lavis" / f"eva_vit_g.pth{ending}")
    sizes = {name: item.size for name, item in listed(outputs).items() if item.group == clean.UNFINISHED}
    assert sizes == {
        "broken_off/unfinished": 1000, "mine/unfinished": 4000, "unfinished": 1000, "twins/unfinished": 1000,
        "downloads/eva_vit_g.pth.0123456789ab.partial": 3000,
    }  # fmt: skip
    assert command("clean", "unfinished", "--yes", "--output-dir", outputs).status == 0
    assert set(listed(outputs)) == {"mine/model", "mine/tape", "mine/rest"}
    assert not [path for path in [*outputs.rglob("*"), *cache.rglob("*")] if path.name.startswith(".")]
    assert not (outputs / "broken_off").exists()


def test_what_a_sweep_left_is_unfinished_and_the_notebook_that_it_ran_is_no_stranger(command: Command, outputs: Path):
    run = run_folder(outputs / "swept")
    record = SweepOutcome("swept", TWIN, "convert", {}, "0123", "finished", executed="convert.ipynb")
    (run / RECORD).write_text(dumps(record))
    for notebook in ("convert.ipynb", "mine.ipynb"):
        file(run / notebook)
    file(outputs / HIDDEN / "other.0123456789ab" / "other" / "half.bin", 5000)
    with FileLock(outputs / HIDDEN / "lock"):
        assert command("clean", "unfinished", "--yes", "--output-dir", outputs).status == 2
    assert listed(outputs)["unfinished"].size == 5000
    assert command("clean", "unfinished", "swept", "--yes", "--output-dir", outputs).status == 0
    assert [path for path in outputs.rglob("*") if path.is_file()] == [run / "mine.ipynb"]


def test_a_model_that_was_set_aside_is_a_model_and_not_unfinished(command: Command, outputs: Path):
    """A run that was killed between taking the old model away and putting the new one there left the only copy."""
    for folder, name in ((run_folder(outputs / "mine"), "model"), (outputs, "named")):
        shutil.copytree(outputs / "mine" / "model", folder / f".{name}.old")
    shutil.rmtree(outputs / "mine" / "model")
    assert {name for name, item in listed(outputs).items() if item.group == clean.MODELS} == {"mine/model", "named"}
    assert command("clean", "unfinished", "--yes", "--output-dir", outputs).status == 2
    assert command("clean", "mine", "--models", "--yes", "--output-dir", outputs).status == 0
    assert list(outputs.iterdir()) == []


HOLD = (
    "import sys, time\n"
    "from filelock import FileLock\n"
    "lock = FileLock(sys.argv[1])\n"
    "lock.acquire()\n"
    "print('held', flush=True)\n"
    "time.sleep(120)\n"
)


@pytest.fixture
def hold() -> Iterator[Callable[[Path], None]]:
    """Have another process hold a lock."""
    running: list[subprocess.Popen[str]] = []

    def start(lock: Path) -> None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        running.append(subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None
        assert running[-1].stdout.readline() == "held\n"

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_what_another_process_is_writing_stays(command: Command, outputs: Path, cache: Path, hold):
    unfinished(run_folder(outputs / "mine"))
    unfinished(outputs / "other")
    file(cache / "lavis" / "eva_vit_g.pth.0123456789ab.partial")
    hold(outputs / "mine" / ".model.lock")
    hold(cache / "lavis" / "eva_vit_g.pth.lock")
    for name in ("mine/unfinished", "mine/model", "downloads"):
        ended = command("clean", name, "--yes", "--output-dir", outputs)
        assert (ended.status, len(ended.said)) == (2, 1)
        assert "another process is writing it" in ended.err
    ended = command("clean", "unfinished", "--yes", "--output-dir", outputs)
    assert ended.status == 0
    assert {line.split()[0] for line in ended.said} == {
        "mine/unfinished",
        "downloads/eva_vit_g.pth.0123456789ab.partial",
    }
    assert not (outputs / "other").exists()
    assert (outputs / "mine" / ".model.partial" / JOURNAL).is_file()
    assert (outputs / "mine" / "model" / "blip2nb.json").is_file()
    assert (cache / "lavis" / "eva_vit_g.pth.0123456789ab.partial").is_file()


def test_what_another_process_has_begun_to_write_since_it_was_listed_stays(outputs: Path):
    run_folder(outputs / "mine")
    items = [listed(outputs)["mine/model"]]
    with FileLock(outputs / "mine" / ".model.lock"), pytest.raises(RequestError, match="another process is writing it"):
        clean.remove(items)
    assert (outputs / "mine" / "model" / "blip2nb.json").is_file()


@pytest.mark.parametrize("name", ["model", ".model.old", ".model.partial"])
def test_a_model_whose_removal_was_interrupted_does_not_look_whole(
    outputs: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Nor is it put back, or gone on with, by the next conversion, which takes what lies there under these names."""
    run = run_folder(outputs / "mine")
    file(run / "model" / JOURNAL)
    (run / "model").rename(run / name)
    lock = file(run / ".model.lock", 0)

    def interrupted(folder: Path) -> None:
        assert lock.exists(), "nobody else can begin meanwhile"
        (folder / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clean.remove([item for item in clean.survey(outputs) if run / name in item.paths])
    assert {path.name for path in run.iterdir() if "model" in path.name} == {".model.removed"}
    clean.remove(clean.choose(clean.survey(outputs), ["unfinished"])[0])
    assert set(listed(outputs)) == {"mine/tape", "mine/rest"}


def test_what_may_not_be_removed_is_one_sentence(command: Command, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    run_folder(outputs / "mine")
    monkeypatch.setattr(Path, "rename", refuse)
    ended = command("clean", "mine/model", "--yes", "--output-dir", outputs)
    assert (ended.status, len(ended.said)) == (2, 1)
    assert "model cannot be removed (Permission denied)" in ended.err


# -- a run that keeps its report alone


def test_finish_removes_the_model_and_show_says_so(model_copy: Callable[[str], Run], command: Command):
    run = model_copy(TWIN)
    api.verify(run, proof="weights", figures=False, lavis_python="none")
    whole = api.show(run)
    blip2nb.finish(run)
    assert run.model.is_dir(), "kept unless told otherwise"
    kept = snapshot(run.folder)
    blip2nb.finish(run, keep_model=False)
    blip2nb.finish(run, keep_model=False)  # as when the cell is run again
    assert snapshot(run.folder) == {
        name: content for name, content in kept.items() if name.split("/")[0] != "model"
    }  # fmt: skip
    assert "removed" not in whole
    for target in (run.folder, run.model):
        said = command("show", target)
        assert said.status == 0
        assert "converted again (the converted model was removed)" in said.out
        assert f"removed from {run.model}" in said.out
    again = command("verify", run.folder)
    assert (again.status, len(again.said)) == (2, 1)
    assert "Convert it first" in again.err


def test_a_model_beside_its_report_is_found_from_there(converted: Callable[[str], Run], tmp_path: Path):
    shutil.copytree(converted(TWIN).model, tmp_path / "named")
    run = Run.of_model(tmp_path / "named")
    api.verify(run, proof="weights", figures=False)
    assert Run.find(tmp_path / "named") == Run.find(tmp_path / "named-proof") == run
    blip2nb.finish(run, keep_model=False)
    assert Run.find(tmp_path / "named") == Run.find(tmp_path / "named-proof") == run
    assert "removed" in api.show(run)


def test_finish_leaves_a_model_that_is_not_the_kits(tmp_path: Path):
    strange = Run(tmp_path, file(tmp_path / "model" / "config.json").parent)
    with pytest.raises(RequestError, match="not a conversion of this kit"):
        blip2nb.finish(strange, keep_model=False)
    linked = Run(tmp_path / "run", tmp_path / "run" / "model")
    link(linked.model, run_folder(tmp_path / "elsewhere") / "model")
    with pytest.raises(RequestError, match="a link"):
        blip2nb.finish(linked, keep_model=False)
    assert (tmp_path / "elsewhere" / "model" / "blip2nb.json").is_file()


def test_verify_can_discard_the_model(command: Command, model_copy: Callable[[str], Run]):
    run = model_copy(TWIN)
    ended = command("verify", run.model, "--proof", "weights", "--no-figures", "--no-keep-model")
    assert ended.status == 0
    assert {path.name for path in run.folder.iterdir()} == {"report.json", "arrays.safetensors"}


def test_the_notebook_keeps_the_report_alone_and_the_model_can_be_made_again(tmp_path: Path, kernels_begin_warm: None):
    papermill = Path(sys.executable).parent / "papermill"
    command = [papermill, "convert.ipynb", tmp_path / "out.ipynb", "-p", "output_dir", tmp_path]
    done = subprocess.run(
        [*map(str, command), "-p", "keep_model", "false", "-p", "run_name", "2024"],
        cwd=ROOT / "notebooks", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    left = {"report.json", "arrays.safetensors", "report.html", "figures"}
    assert {path.name for path in (tmp_path / "2024").iterdir()} == left
    report = json.loads((tmp_path / "2024" / "report.json").read_text())
    assert raw(report)["verdict"] == "explained"
    cells = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"]
    said = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert any(f"wrote {tmp_path / '2024' / 'model'}" in text for text in said)
    assert "the converted model was removed" in said[-2]
    assert cells[-1].source.startswith("assert ")
    again = api.convert(TWIN, output_dir=tmp_path, run_name="2024")
    assert Manifest.read(again.model).weights_hash == raw(report)["weights"]["weights_hash"]


# -- Jupyter's Stop button


class Kernel:
    """A kernel that runs cells as JupyterLab has it run them."""

    def __init__(self) -> None:
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "notebooks"))

    def run(self, code: str, meanwhile: Callable[[], object] = lambda: None) -> tuple[str, str]:
        """What a cell prints, and the name of the exception it ends with."""
        request = self.client.execute(code)
        meanwhile()
        said, ended = "", ""
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            said += content["text"] if kind == "stream" else ""
            ended = content["ename"] if kind == "error" else ended
            if kind == "status" and content["execution_state"] == "idle":
                return said, ended

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(kernels_begin_warm: None) -> Iterator[Kernel]:
    running = Kernel()
    yield running
    running.close()


def test_the_stop_button_stops_a_conversion_and_the_same_cell_goes_on(tmp_path: Path, kernel: Kernel):
    twin = variant(TWIN)
    larger = dataclasses.replace(twin.language, width=512, layers=24, heads=8, mlp=2048)
    write_twin(dataclasses.replace(twin, language=larger), tmp_path / "source")  # 153 MB
    cells = [cell.source for cell in nbformat.read(ROOT / "notebooks" / "convert.ipynb", 4).cells]
    parameters = next(cell for cell in cells if cell.startswith("model_name"))
    convert = next(cell for cell in cells if "blip2nb.convert(" in cell)
    checks = next(cell for cell in cells if "check_notebook" in cell)
    given = f"source, output_dir, lavis_python = {str(tmp_path / 'source')!r}, {str(tmp_path)!r}, 'none'"
    for cell in (parameters, given, checks):
        assert kernel.run(cell)[1] == ""
    partial = tmp_path / TWIN / ".model.partial"

    def stop() -> None:
        """Press the button when some tensors are written."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            journal = partial / JOURNAL
            if journal.is_file() and journal.read_bytes().count(b"\n") > 10:
                kernel.manager.interrupt_kernel()
                return
            time.sleep(0.002)
        pytest.fail("the conversion did not begin")

    _, ended = kernel.run(convert, stop)
    assert ended == "KeyboardInterrupt"
    assert not (tmp_path / TWIN / "model").exists()
    assert not list(partial.glob("*.safetensors")), "nothing that looks like a model"
    assert any(item.name == f"{TWIN}/unfinished" for item in clean.survey(tmp_path))

    said, ended = kernel.run(convert)
    assert ended == ""
    assert "going on with an interrupted run: " in said
    assert not partial.exists()
    run = Run.find(tmp_path / TWIN)
    assert huggingface.load(run.model).model.language_model.config.hidden_size == 512
    written = load_file(run.model / "model.safetensors")
    assert api.verify(run, proof="weights", figures=False).content.weights.roundtrip is True
    assert sum(tensor.nbytes for tensor in written.values()) > 150_000_000

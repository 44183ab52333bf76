"""The faults a conversion must survive, each brought about for real: kills, signals, full disks, damaged files, pickles
that would run code, two runs on one output, and tensors that lie to the reader."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import transformers  # noqa: F401 (or every conversion would start a process for its configuration)
from conftest import Outcome, edit_weights, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from blip2nb import api, cli
from blip2nb.errors import RequestError
from blip2nb.models.configuration import read_language_config, write_configuration
from blip2nb.models.directory import check_model
from blip2nb.models.files import open_source, own_files
from blip2nb.runs import Run
from blip2nb.variants import LanguageSizes, variant
from blip2nb.weights.convert import Manifest
from blip2nb.weights.hashing import DTYPE_NAMES
from blip2nb.weights.mapping import entries
from blip2nb.weights.sources import open_checkpoint, open_file, open_folder
from blip2nb.weights.stored import Stored, digest_of
from blip2nb.weights.threads import at_once
from blip2nb.weights.torchfile import Odd, read_torch_file
from blip2nb.weights.writer import JOURNAL, clear_away, unfinished_directory

pytestmark = pytest.mark.alone  # a signal or a broken connection comes at its moment, however busy the machine

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


# -- processes that are to die: forked from one that has everything imported, so that each begins at once


class Forks:
    """Starts the command line, or a function of this file, in a process of its own: `start("convert", name, …)`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *arguments: object, **how: object) -> int:
        """The new process's id. `how`: see `_child`."""
        return self._ask(start=[*map(str, arguments)], said=str(self.folder), **how)["pid"]

    def wait(self, pid: int) -> Outcome:
        """What it ended with: a status, or the negative of a signal."""
        status = self._ask(wait=pid)["status"]
        said = [self.folder / f"{pid}.{name}" for name in ("out", "err")]
        return Outcome(status, *(path.read_text() if path.exists() else "" for path in said))

    def run(self, *arguments: object, **how: object) -> Outcome:
        return self.wait(self.start(*arguments, **how))

    def memory(self, *arguments: object) -> int:
        """How many bytes of memory of its own a process came to hold at most, beyond those it began with."""
        pid, found = self.start(*arguments, pause=0.05), []
        with contextlib.suppress(ValueError, FileNotFoundError):  # until it has ended
            while True:
                text = Path(f"/proc/{pid}/status").read_text()
                held = (text[text.index(f"{what}:") :].split(None, 2)[1] for what in ("RssAnon", "RssShmem"))
                found.append(sum(map(int, held)) * 1024)
                time.sleep(0.001)
        ended = self.wait(pid)
        assert ended.status == 0, ended.err
        return max(found) - found[0]

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def _ask(self, **request: object) -> dict:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):  # here and below: what is imported only when it is used
        cli.app(["variants"], standalone_mode=False)
    with tempfile.TemporaryDirectory() as folder:
        for name in (OPT, T5):
            files = own_files(variant(name))
            write_configuration(variant(name), read_language_config(files), files.language, Path(folder))
    gc.collect()
    gc.freeze()  # or the first collection in each child would copy all of it
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps({"status": _status(request["wait"])}), flush=True)
            continue
        pid = os.fork()
        if not pid:
            _child(request)
        print(json.dumps({"pid": pid}), flush=True)


def _status(pid: int, patience: float = 60) -> int:
    """What a child ended with. One that hangs is ended."""
    until = time.monotonic() + patience
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _child(request: dict) -> None:
    """Run the command line, or `NAME` for a first argument `@NAME`, and end.

    Args:
        request: `start`, the arguments; `said`, the folder for what is said; and, unless it runs undisturbed:
            `below` with `die_before`, the number of the step in a folder before which it is killed, or with `steps`,
            the file for a list of them all; `fill_before` with `leave`, a step's ending before which the disk
            of `below` is filled, and the bytes that are left; `largest`, the largest file the system lets it write;
            `pause`, how many seconds it waits first.
    """
    status = 70
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            said = open(f"{request['said']}/{os.getpid()}.{name}", "w")  # noqa: SIM115 (it ends with the process)
            os.dup2(said.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        time.sleep(request.get("pause", 0))
        if "largest" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], request["largest"]))
        if "below" in request:
            _watch(**{name: request[name] for name in ("below", *_WATCHED) if name in request})
        first, *rest = request["start"]
        if first.startswith("@"):
            globals()[first[1:]](*rest)
            status = 0
        else:
            sys.argv = ["blip2nb", first, *rest]
            cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_WATCHED = ("die_before", "steps", "fill_before", "leave")
_STEPS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree")


def _watch(below: str, die_before: int = -1, steps: str = "", fill_before: str = "", leave: int = 0) -> None:
    """Have Python say every step that this process takes in a folder, just before it takes it."""

    def step(event: str, arguments: tuple) -> None:
        if event not in _STEPS or not isinstance(arguments[0], str | Path) or below not in str(arguments[0]):
            return
        if str(arguments[0]) in (steps, f"{below}/filling"):
            return
        if len(taken) == die_before:
            os.kill(os.getpid(), signal.SIGKILL)
        taken.append(f"{event} {arguments[0]}")
        if steps:
            Path(steps).write_text("\n".join(taken))
        if fill_before and taken[-1].endswith(fill_before):
            _fill(Path(below) / "filling", leave)

    taken: list[str] = []
    sys.addaudithook(step)


def _fill(path: Path, leave: int) -> None:
    """Take all that is left of a disk but some bytes."""
    with open(path, "ab") as file:
        size = path.stat().st_size
        more = shutil.disk_usage(path.parent).free - leave
        if more > 0:
            os.posix_fallocate(file.fileno(), size, more)


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory, _cache: None) -> Iterator[Forks]:
    found = Forks(tmp_path_factory.mktemp("said"))
    yield found
    found.close()


# -- a source of many megabytes, so that there is something to interrupt


def grow(folder: Path, width: int, layers: int, dtype: torch.dtype = torch.float16) -> Path:
    """A twin's files with a larger language model. The values repeat, so that hundreds of megabytes are soon made."""
    twin = variant(OPT)
    shutil.copytree(own_files(twin).vision.parent, folder)
    language = dataclasses.replace(twin.language, width=width, mlp=4 * width, layers=layers)
    return put_language(folder, language, dtype)


def put_language(folder: Path, language: LanguageSizes, dtype: torch.dtype) -> Path:
    twin = variant(OPT)
    some = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) / 8

    def values(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        return some.to(dtype).repeat(-(-count // len(some)))[:count].view(shape).clone()

    large = [entry for entry in entries(dataclasses.replace(twin, language=language)) if not entry.optional]
    shapes = {entry.sources[0]: entry.shape for entry in large}
    hub = {
        name.removeprefix("opt_model."): values(shape, dtype)
        for name, shape in shapes.items()
        if name.startswith("opt_model.")
    }
    torch.save(hub, folder / twin.language_folder / "pytorch_model.bin")
    projection = {name: values(shapes[name], torch.float32) for name in ("opt_proj.weight", "opt_proj.bias")}
    edit_weights(folder / twin.checkpoint, lambda tensors: tensors.update(projection))
    config = folder / twin.language_folder / "config.json"
    sizes = {"hidden_size": language.width, "ffn_dim": language.mlp, "num_hidden_layers": language.layers}
    config.write_text(json.dumps({**json.loads(config.read_text()), **sizes}))
    return folder


@dataclasses.dataclass(frozen=True)
class Large:
    """A source, and what an undisturbed run makes of it."""

    source: Path
    whole: dict[str, bytes]
    seconds: float

    def request(self, output: Path, *more: object) -> tuple[object, ...]:
        return ("convert", OPT, "--source", self.source, "--output", output / "model", "--max-shard-size", "4MB", *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[Large]:
    folder = tmp_path_factory.mktemp("large")
    made = Large(grow(folder / "source", width=256, layers=14), {}, 0)
    times = []
    for number in range(4):
        begun = time.monotonic()
        ended = forks.run(*made.request(folder / str(number)))
        times.append(time.monotonic() - begun)
        assert ended.status == 0, ended.err
    assert contents(folder / "0" / "model") == contents(folder / "1" / "model")
    yield dataclasses.replace(made, whole=contents(folder / "0" / "model"), seconds=min(times))
    shutil.rmtree(folder)


def noted(output: Path) -> list[dict]:
    """What an unfinished run's journal says is done."""
    path = output / ".model.partial" / JOURNAL
    lines = path.read_text().split("\n")[1:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def ended_midway(forks: Forks, request: tuple[object, ...], output: Path, number: int, count: int = 20) -> Outcome:
    """Run it, and send it a signal when it has noted some tensors; again, where it was done before that."""
    for _ in range(20):
        pid = forks.start(*request)
        journal = output / ".model.partial" / JOURNAL
        until = time.monotonic() + 20
        while time.monotonic() < until and not (output / "model").exists():
            with contextlib.suppress(FileNotFoundError):
                if journal.read_bytes().count(b"\n") > count:
                    break
            time.sleep(0.001)
        os.kill(pid, number)
        ended = forks.wait(pid)
        if ended.status:
            return ended
        shutil.rmtree(output / "model")
    raise AssertionError("it was always done before the signal came")


# -- killed at any moment


def loadable(folder: Path) -> bool:
    """Whether `from_pretrained` would find a model there: a configuration, and weights with their index."""
    names = {path.name for path in folder.iterdir()}
    return "config.json" in names and bool(names & {"model.safetensors", "model.safetensors.index.json"})


def check_killed(output: Path, whole: dict[str, bytes]) -> None:
    """A killed run left its work hidden, or all of it; and nothing that would load is not the whole."""
    assert {path.name for path in output.iterdir()} <= {".model.partial", ".model.lock", "model", "run.json"}
    for folder in (path for path in output.iterdir() if path.is_dir()):
        if folder.name == "model" or loadable(folder):
            held = contents(folder)
            held.pop(JOURNAL, None)
            assert {name: data for name, data in held.items() if name in whole} == held
            assert {name for name in whole if name.endswith(".safetensors")} <= set(held)
    if (output / "model").exists():
        assert contents(output / "model") == whole


def check_resumed(ended: Outcome, output: Path, whole: dict[str, bytes]) -> None:
    assert ended.status == 0, ended.err
    assert contents(output / "model") == whole
    left = {path.name for path in output.iterdir()} - {"model", "run.json"}
    assert left == set()


def test_killed_at_any_moment_and_run_again_the_result_is_the_same_bytes(tmp_path: Path, forks: Forks, large: Large):
    """Fifty kills, alone and several in a row."""
    moments, longest = random.Random(0), 0.9 * large.seconds
    killed = found = attempt = 0
    while killed < 50:
        output = tmp_path / str(attempt)
        stood = False
        for _ in range(1 if attempt % 2 else 5):
            pid = forks.start(*large.request(output))
            time.sleep(moments.uniform(0.02, longest))
            os.kill(pid, signal.SIGKILL)
            if forks.wait(pid).status == -signal.SIGKILL:
                killed += 1
            else:  # it was done before: this machine is faster now
                longest *= 0.9
            if output.exists():
                check_killed(output, large.whole)
            stood = (output / "model").exists()
            if stood:
                break
        done = len(noted(output))
        ended = forks.run(*large.request(output))
        found += bool(done) and f"going on with an interrupted run: {done} tensors" in ended.err
        check_resumed(ended, output, large.whole)
        shutil.rmtree(output)
        attempt += 1
    assert found >= 5, "hardly any run found what the one before it had done: this test would prove little"


def test_killed_before_any_single_step_and_run_again_the_result_is_the_same_bytes(
    tmp_path: Path, forks: Forks, converted: Callable[[str], Run]
):
    """Every file that is opened, renamed, removed: the kill comes just before it. Moments that chance rarely finds."""
    request = ("convert", OPT, "--max-shard-size", "500KB", "--output")
    (tmp_path / "whole").mkdir()
    listed = tmp_path / "steps"
    ended = forks.run(*request, tmp_path / "whole" / "model", below=str(tmp_path / "whole"), steps=str(listed))
    assert ended.status == 0, ended.err
    whole = contents(tmp_path / "whole" / "model")
    steps = listed.read_text().splitlines()
    different = [number for number, step in enumerate(steps) if step not in steps[:number]]
    assert len(different) > 20
    for number in different:
        output = tmp_path / str(number)
        output.mkdir()
        ended = forks.run(*request, output / "model", below=str(output), die_before=number)
        assert ended.status in (-signal.SIGKILL, 0)  # threads take their steps in another order each time
        check_killed(output, whole)
        check_resumed(forks.run(*request, output / "model"), output, whole)
        shutil.rmtree(output)


def test_killed_while_an_old_model_is_replaced_the_old_or_the_new_is_there(tmp_path: Path, forks: Forks):
    request = ("convert", OPT, "--overwrite", "--output")
    for name, more in (("old", ["--dtype", "bfloat16"]), ("new", [])):
        assert forks.run(*request, tmp_path / name / "model", *more).status == 0
    old, new = (contents(tmp_path / name / "model") for name in ("old", "new"))
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    listed = tmp_path / "steps"
    ended = forks.run(*request, tmp_path / "counted" / "model", below=str(tmp_path / "counted"), steps=str(listed))
    assert ended.status == 0, ended.err
    steps = listed.read_text().splitlines()
    first = next(n for n, step in enumerate(steps) if step.startswith("os.rename") and step.endswith("/model"))
    between = 0
    for number in range(first - 2, len(steps)):
        output = tmp_path / str(number)
        shutil.copytree(tmp_path / "old", output)
        forks.run(*request, output / "model", below=str(output), die_before=number)
        if (output / "model").exists():
            assert contents(output / "model") in (old, new)
        else:
            between += 1
            assert contents(output / ".model.old") == old
            with contextlib.suppress(RequestError), unfinished_directory(output / "model", ""):
                raise RequestError("refused")  # the next run does not get to its end
            assert contents(output / "model") == old, "the old model did not come back"
        ended = forks.run(*request, output / "model")
        assert ended.status == 0, ended.err
        assert contents(output / "model") == new
        assert not {path.name for path in output.iterdir()} & {".model.partial", ".model.old", ".model.lock"}
    assert between >= 1


def test_what_a_kill_after_the_last_step_leaves_beside_the_model_can_be_cleared_away(tmp_path: Path):
    for name in ("model", ".model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    (tmp_path / ".model.lock").touch()
    with unfinished_directory(tmp_path / "other", "") as work:
        (work.folder / "config.json").write_text("other")
        clear_away(tmp_path / "other")  # another's, which is being written: left alone
        assert (tmp_path / ".other.lock").exists()
    clear_away(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other"}


def test_nothing_of_a_killed_run_goes_on_writing(tmp_path: Path, forks: Forks):
    """Where transformers is not loaded, another process writes the configuration, and the kill does not reach it."""
    output = tmp_path / "output"
    request = ("convert", OPT, "--output", output / "model")
    begun = subprocess.Popen([sys.executable, "-m", "blip2nb.cli", *map(str, request)], stderr=subprocess.DEVNULL)
    while not noted(output) and begun.poll() is None:
        time.sleep(0.001)
    others = psutil.Process(begun.pid).children()
    assert others
    for other in others:
        other.suspend()  # so that it is still there when the next run ends
    begun.kill()
    begun.wait()
    assert forks.run(*request, "--dtype", "bfloat16").status == 0
    for other in others:
        other.resume()
    psutil.wait_procs(others, timeout=20)
    assert {path.name for path in output.iterdir()} == {"model"}
    assert check_model(output / "model", None) == []
    assert json.loads((output / "model" / "config.json").read_text())["dtype"] == "bfloat16"


# -- resumed work is not trusted


def spot(output: Path, name: str) -> tuple[Path, int, int]:
    """The file of an unfinished run that holds a tensor, where in it the tensor begins, and its bytes."""
    for path in (output / ".model.partial").glob("*.safetensors*"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length else {}
        if name in header:
            begin, end = header[name]["data_offsets"]
            return path, 8 + length + begin, end - begin
    raise AssertionError(f"{name} is in none of them")


def overwrite(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, at: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def zeros(path: Path, at: int, size: int) -> None:
    overwrite(path, at, bytes(size))


DAMAGE: dict[str, Callable[[Path, list[dict]], object]] = {
    "a_flipped_bit": lambda output, done: [
        flip(path, at + size // 2) for path, at, size in (spot(output, one["target"]) for one in done[:3])
    ],
    "zeros_where_the_journal_says_done": lambda output, done: [zeros(*spot(output, one["target"])) for one in done],
    "a_shard_that_is_gone": lambda output, done: spot(output, done[0]["target"])[0].unlink(),
    "a_shard_cut_short": lambda output, done: os.truncate(spot(output, done[0]["target"])[0], 100),
    "a_garbled_header": lambda output, done: overwrite(spot(output, done[0]["target"])[0], 0, bytes(64)),
    "a_torn_last_line": lambda output, done: cut_journal(output, -40),
    "a_last_line_without_its_end": lambda output, done: cut_journal(output, -1),
    "a_last_line_of_zeros": lambda output, done: add_to_journal(output, bytes(300)),
    "half_a_line_more": lambda output, done: add_to_journal(output, b'{"target": "vision_mod'),
    "a_line_of_something_else": lambda output, done: add_to_journal(output, b"7\n"),
    "a_torn_first_line": lambda output, done: cut_journal(output, 30),
    "a_flipped_bit_in_what_the_journal_says": lambda output, done: flip(
        output / ".model.partial" / JOURNAL,
        (output / ".model.partial" / JOURNAL).read_bytes().index(done[2]["written"].encode()) + 20,
    ),
    "an_empty_journal": lambda output, done: cut_journal(output, 0),
    "a_manifest_and_an_index_of_before": lambda output, done: [
        (output / ".model.partial" / name).write_text("{}") for name in ("blip2nb.json", "model.safetensors.index.json")
    ],
}


def cut_journal(output: Path, size: int) -> None:
    path = output / ".model.partial" / JOURNAL
    path.write_bytes(path.read_bytes()[:size])


def add_to_journal(output: Path, data: bytes) -> None:
    with open(output / ".model.partial" / JOURNAL, "ab") as file:
        file.write(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_an_interrupted_run_left_is_read_back_before_it_is_kept(
    tmp_path: Path, forks: Forks, large: Large, damage: str
):
    ended_midway(forks, large.request(tmp_path), tmp_path, signal.SIGKILL)
    done = noted(tmp_path)
    assert len(done) >= 20
    DAMAGE[damage](tmp_path, done)
    if "line" in damage and "first" not in damage:  # what is noted from here on must be found again
        ended_midway(forks, large.request(tmp_path), tmp_path, signal.SIGKILL, len(done) + 10)
        assert len(noted(tmp_path)) > len(done) + 5
    ended = forks.run(*large.request(tmp_path))
    check_resumed(ended, tmp_path, large.whole)
    anew = damage in ("a_torn_first_line", "an_empty_journal")
    assert ("starting anew" in ended.err) == anew
    assert ("going on with an interrupted run" in ended.err) == (not anew)


def test_an_interrupted_run_of_something_else_is_not_gone_on_with(tmp_path: Path, forks: Forks, large: Large):
    other = large.request(tmp_path, "--dtype", "float32")
    ended_midway(forks, other, tmp_path, signal.SIGKILL)
    ended = forks.run(*large.request(tmp_path))
    assert "starting anew" in ended.err
    check_resumed(ended, tmp_path, large.whole)


def test_a_source_that_changed_since_is_begun_anew(tmp_path: Path, forks: Forks, large: Large):
    source = shutil.copytree(large.source, tmp_path / "source")
    output = tmp_path / "output"
    request = dataclasses.replace(large, source=source).request(output)
    ended_midway(forks, request, output, signal.SIGKILL)
    done = noted(output)
    assert done
    edit_weights(source / variant(OPT).checkpoint, lambda tensors: tensors[NORM].add_(1))
    changed = next(name for one in done for name in one["read"])
    edit_weights(
        source / "eva_vit_g.pth",
        lambda tensors: tensors[changed.removeprefix("visual_encoder.")].add_(1),  # of just the same size
    )
    ended = forks.run(*request)
    assert ended.status == 0, ended.err
    assert "starting anew" in ended.err
    fresh = api.convert(OPT, source, tmp_path / "fresh" / "model", max_shard_size="4MB")
    assert contents(output / "model") == contents(fresh.model)
    assert contents(output / "model") != large.whole


# -- stopped by the user


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_kept_hidden_and_gone_on_with(tmp_path: Path, forks: Forks, large: Large, number: int):
    ended = ended_midway(forks, large.request(tmp_path), tmp_path, number)
    assert "Traceback" not in ended.err
    if number == signal.SIGINT:
        assert ended.status == 3
        assert {path.name for path in tmp_path.iterdir()} == {".model.partial"}
    else:
        assert ended.status == -signal.SIGTERM
        assert {path.name for path in tmp_path.iterdir()} == {".model.partial", ".model.lock"}
    done = len(noted(tmp_path))
    assert done >= 20
    ended = forks.run(*large.request(tmp_path))
    assert f"going on with an interrupted run: {done} tensors" in ended.err
    check_resumed(ended, tmp_path, large.whole)


def test_stopping_it_again_and_again_does_no_harm(tmp_path: Path, forks: Forks, large: Large):
    moments = random.Random(0)
    for attempt in range(6):
        output = tmp_path / str(attempt)
        pid = forks.start(*large.request(output))
        time.sleep(moments.uniform(0.2, 0.9) * large.seconds)
        for _ in range(5):
            os.kill(pid, signal.SIGINT)
            time.sleep(0.001)
        stopped = forks.wait(pid)
        stood = (output / "model").exists()
        assert stopped.status or stood
        if output.exists():
            check_killed(output, large.whole)
        check_resumed(forks.run(*large.request(output)), output, large.whole)
        shutil.rmtree(output)


def work_that_is_interrupted(rounds: str) -> None:
    """Many small jobs, again and again, while another process presses Ctrl-C, once a round and at any moment of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counters = mmap.mmap(-1, 16)  # the round that has begun, and the one that was interrupted
    worker, moments, stopped = os.getpid(), random.Random(0), 0
    if not os.fork():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in range(1, int(rounds) + 1):
            while int.from_bytes(counters[:8]) < number:
                if os.getppid() != worker:
                    os._exit(0)
            until = time.perf_counter() + moments.uniform(0, 0.004)
            while time.perf_counter() < until:
                pass
            os.kill(worker, signal.SIGINT)
            counters[8:] = number.to_bytes(8)
        os._exit(0)
    for number in range(1, int(rounds) + 1):
        with contextlib.suppress(KeyboardInterrupt):  # it came before the jobs, or behind them
            counters[:8] = number.to_bytes(8)
            try:
                at_once([lambda: None] * 300)
            except KeyboardInterrupt:
                stopped += 1
            while int.from_bytes(counters[8:]) < number:
                time.sleep(0.0001)
            time.sleep(0.001)
        while int.from_bytes(counters[8:]) < number:
            time.sleep(0.0001)
    print(stopped)


def test_ctrl_c_never_makes_the_threads_wait_for_each_other(forks: Forks):
    ended = forks.run("@work_that_is_interrupted", 400)
    assert ended.status == 0, ended.err
    assert int(ended.out) > 40, "it was hardly ever interrupted while it worked: this test would prove little"


def test_ctrl_c_in_a_terminal_reaches_every_process_and_the_next_run_goes_on(
    tmp_path: Path, forks: Forks, large: Large
):
    """As a shell and Jupyter's Stop send it: to the whole group, the process that writes the configuration included."""
    command = [sys.executable, "-m", "blip2nb.cli", *map(str, large.request(tmp_path))]
    begun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until = time.monotonic() + 60
    while not noted(tmp_path) and time.monotonic() < until:
        time.sleep(0.001)
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=60)
    assert begun.returncode == 3, said
    assert "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == {".model.partial"}
    ended = forks.run(*large.request(tmp_path))
    assert "going on with an interrupted run" in ended.err
    check_resumed(ended, tmp_path, large.whole)


# -- disks


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


def one_sentence(ended: Outcome) -> str:
    """What a refusal says. Lines before it that are no complaint do not count."""
    said = [line for line in ended.said if line.startswith("blip2nb: ")]
    assert (ended.status, len(said), ended.said[-1:], ended.out) == (2, 1, said, ""), ended.err
    assert "Traceback" not in ended.err
    return said[0]


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path: Path, forks: Forks):
    with disk(tmp_path / "disk", "size=32m") as place:
        said = one_sentence(forks.run("convert", OPT, "--output", place / "runs" / "model"))
        assert "needs 0.0 GB" in said
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


# -- damaged files


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("name", [NORM, "query_tokens", "opt_proj.weight"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_flipped_bit_in_a_pth_is_found_and_its_tensor_named(tmp_path: Path, source_copy: Copy, name: str, where: str):
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint
    one = open_file(path)[name]
    flip(path, one.offset + {"first": 0, "middle": one.nbytes // 2, "last": one.nbytes - 1}[where])
    with pytest.raises(RequestError, match=f"{name} in {path} does not have the checksum that the file says"):
        api.convert(OPT, folder, tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def test_a_bit_flipped_anywhere_in_a_pth_is_refused_or_changes_nothing(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run]
):
    """Names, offsets and sizes beside the tensors included."""
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint
    whole, good = path.read_bytes(), weights(converted(OPT).model)
    directory = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 4)
    first = open_file(path)["query_tokens"].offset
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(directory, len(whole) - 1), st.integers(0, first))
    refused = []

    @given(places, st.integers(0, 7))
    @settings(max_examples=60)
    def flipped(at: int, bit: int) -> None:
        path.write_bytes(whole)
        flip(path, at, bit)
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        try:
            run = api.convert(OPT, folder, tmp_path / "model")
        except RequestError as error:
            refused.append(str(error))
        else:
            assert weights(run.model) == good

    flipped()
    assert len(refused) > 15


def test_a_flipped_bit_in_what_several_tensors_are_cut_from_is_found(tmp_path: Path, source_copy: Copy):
    """Views of one storage have no checksum of their own."""
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint

    def join(tensors: dict[str, torch.Tensor]) -> None:
        both = torch.cat([tensors["ln_vision.weight"], tensors["ln_vision.bias"]])
        tensors["ln_vision.weight"], tensors["ln_vision.bias"] = both[:44], both[44:]
        tensors["opt_proj.weight"] = tensors["opt_proj.weight"].T.contiguous().T

    whole = api.convert(OPT, folder, tmp_path / "whole" / "model")
    edit_weights(path, join)
    joined = api.convert(OPT, folder, tmp_path / "joined" / "model")
    assert weights(joined.model) == weights(whole.model)
    for name in ("ln_vision.bias", "opt_proj.weight"):
        at = open_file(path)[name].offset + 4
        flip(path, at)
        with pytest.raises(RequestError, match=f"{name} in {path} does not have the checksum"):
            api.convert(OPT, folder, tmp_path / "model")
        flip(path, at)
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_flipped_bit_in_the_list_of_tensors_is_refused(tmp_path: Path, source_copy: Copy, share: float):
    folder = source_copy(OPT)
    path = folder / variant(OPT).checkpoint
    with zipfile.ZipFile(path) as archive:
        (record,) = [one for one in archive.infolist() if one.filename.endswith("data.pkl")]
        start = path.read_bytes().index(archive.read(record)[:64])
    flip(path, start + int(share * record.file_size))
    with pytest.raises(RequestError, match=r"is not a whole PyTorch file \(.*data.pkl does not have the checksum"):
        api.convert(OPT, folder, tmp_path / "model")


def test_a_pth_that_was_saved_without_checksums_still_converts(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run]
):
    folder = source_copy(OPT)
    torch.serialization.set_crc32_options(False)
    try:
        for path in (folder / "eva_vit_g.pth", folder / variant(OPT).checkpoint):
            torch.save(torch.load(path, weights_only=True), path)
            assert all(stored.crc32 is None for stored in open_file(path).values())
    finally:
        torch.serialization.set_crc32_options(True)
    assert weights(api.convert(OPT, folder, tmp_path / "model").model) == weights(converted(OPT).model)


def as_the_hub_keeps_it(language: Path) -> list[Path]:
    """Put a language model's files into a cache of the hub's layout, large ones under their SHA-256, and link it."""
    cache = language.with_name("models--google--flan-t5-xl")
    snapshots, blobs = cache / "snapshots" / ("0" * 40), cache / "blobs"
    snapshots.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(language.iterdir()):
        hasher = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / hasher(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshots / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    language.rmdir()
    language.symlink_to(snapshots)
    return [path for path in blobs.iterdir() if len(path.name) == 64]


def test_the_hubs_cache_converts_through_its_links_and_a_damaged_file_of_it_is_refused(
    tmp_path: Path, source_copy: Copy, converted: Callable[[str], Run]
):
    folder = source_copy(T5)
    blobs = as_the_hub_keeps_it(folder / "flan-t5-xl")
    assert len(blobs) == 2
    run = api.convert(T5, folder, tmp_path / "model")
    assert weights(run.model) == weights(converted(T5).model)
    for blob in blobs:
        at = blob.stat().st_size - 3
        flip(blob, at)
        with pytest.raises(RequestError, match=r"is not the file that the hub has .* Delete it and download it again"):
            api.convert(T5, folder, tmp_path / "again" / "model")
        assert not (tmp_path / "again").exists()
        flip(blob, at)


def test_what_is_damaged_after_the_conversion_is_named_by_a_check(tmp_path: Path, source_copy: Copy):
    """A safetensors file has no checksum: what changed in it before the conversion nobody can know."""
    folder = source_copy(T5)
    run = api.convert(T5, folder, tmp_path / "model", max_shard_size="300KB")
    wanted = variant(T5)
    assert check_model(run.model, open_source(wanted, folder)) == []

    saved = open_folder(run.model)
    name, one = next((name, one) for name, one in saved.items() if name.endswith("wo.weight"))
    flip(one.path, one.offset + one.nbytes // 2, bit=3)
    assert check_model(run.model, None) == [f"{name} ({one.path.name}) is not as it was written"]
    flip(one.path, one.offset + one.nbytes // 2, bit=3)

    source = open_source(wanted, folder).tensors.tensors
    for lavis in ("t5_model.encoder.final_layer_norm.weight", "query_tokens", "visual_encoder.cls_token"):
        held = source[lavis]
        flip(held.path, held.offset, bit=3)
        said = check_model(run.model, open_source(wanted, folder))
        assert said == [f"{lavis} ({held.path.name}) in the source is not what was converted"]
        flip(held.path, held.offset, bit=3)
    flip(run.model / "tokenizer.json", 2000)
    assert check_model(run.model, None) == ["tokenizer.json is not as it was written"]


# -- two at once


def test_of_two_runs_on_one_output_one_wins_and_the_other_is_told(tmp_path: Path, forks: Forks, large: Large):
    """The first is held up while the second begins."""
    pid = forks.start(*large.request(tmp_path))
    while not (tmp_path / ".model.partial").exists():
        time.sleep(0.0005)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert not (tmp_path / "model").exists(), "it was done too soon"
        said = one_sentence(forks.run(*large.request(tmp_path)))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert f"Another run is writing {tmp_path / 'model'} now" in said
    assert "Wait until it has finished, or name another output" in said
    assert forks.wait(pid).status == 0
    assert contents(tmp_path / "model") == large.whole
    there = snapshot(tmp_path / "model")
    ended = forks.run(*large.request(tmp_path))
    assert ended.status == 0
    assert "already holds this conversion" in ended.err
    assert snapshot(tmp_path / "model") == there
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run.json"}


def test_runs_that_begin_together_leave_one_whole_model(tmp_path: Path, forks: Forks, large: Large):
    refused = 0
    for attempt in range(5):
        output = tmp_path / str(attempt)
        pids = [forks.start(*large.request(output)) for _ in range(3)]
        ended = [forks.wait(pid) for pid in pids]
        assert 0 in [one.status for one in ended]
        for one in ended:
            if one.status:
                assert "Another run is writing" in one_sentence(one)
                refused += 1
        assert contents(output / "model") == large.whole
        assert {path.name for path in output.iterdir()} == {"model", "run.json"}
        shutil.rmtree(output)
    assert refused, "they were never there together: this test would prove nothing"


# -- PyTorch's files, however they come about

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.complex32, torch.uint16, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
]  # fmt: skip


@st.composite
def views(draw: st.DrawFn, storages: list[torch.Tensor]) -> torch.Tensor:
    """A tensor cut from one of these, at any place and with any steps between its elements."""
    held = storages[draw(st.integers(0, len(storages) - 1))]
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = [draw(st.integers(0, 5)) for _ in shape]
    last = sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))
    if last >= len(held):
        shape, strides, last = shape[:1], [1][: len(shape)], max(min(shape[:1], default=1) - 1, 0)
    offset = draw(st.integers(0, len(held) - last - 1))
    form = draw(st.sampled_from(["strided", "whole", "parameter", "attributes"]))
    if form == "whole":
        return held
    view = held.as_strided(shape, strides, offset)
    if form == "attributes":
        view.scale = 2.0  # some trainers note things on their tensors
    if form == "parameter" and view.dtype.is_floating_point:
        return torch.nn.Parameter(view, requires_grad=draw(st.booleans()))
    return view


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.complex_numbers(), st.text(max_size=4),
    st.binary(min_size=1, max_size=4), st.lists(st.integers(), max_size=2), st.sets(st.integers(), max_size=2),
    st.just(torch.float16), st.just(torch.Size([2])), st.just(torch.device("cpu")), st.just((1, "a")),
    st.just(bytearray(b"x")),
)  # fmt: skip


@st.composite
def checkpoints(draw: st.DrawFn, dtypes: list[torch.dtype]) -> dict:
    """Dicts in dicts of tensors, some of which share their storage, and of plain values."""
    storages, leaves = [], [PLAIN, st.just(torch.zeros(0, 3)[:, 1:])]
    for number in range(draw(st.integers(1, 3))):
        values = torch.randn(draw(st.integers(20, 40)), generator=torch.Generator().manual_seed(number)) * 50
        storages.append(values.abs().to(draw(st.sampled_from(dtypes))))
    names = st.text(st.characters(codec="utf-8"), max_size=5)
    leaf = st.one_of(views(storages), views(storages), *leaves)
    return draw(st.dictionaries(names, st.recursive(leaf, lambda inner: st.dictionaries(names, inner, max_size=3))))


def check_same(found: object, expected: object, where: str = "") -> int:
    """Every tensor, by its bits; the number of them."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), where
        assert list(found) == list(expected), where
        return sum(check_same(found[name], expected[name], f"{where}/{name}") for name in expected)
    if not isinstance(expected, torch.Tensor):
        assert not isinstance(found, Stored | Odd), where
        return 0
    assert isinstance(found, Stored | Odd), where
    assert found.shape == tuple(expected.shape), where
    if expected.dtype in DTYPE_NAMES:
        assert isinstance(found, Stored), where
        expected = expected.new_empty(expected.shape).copy_(expected.detach())
        assert found.digest() == digest_of(expected), where
        assert digest_of(found.tensor()) == digest_of(expected), where
    else:
        assert isinstance(found, Odd), where
    return 1


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
def test_a_file_is_read_as_pytorch_itself_reads_it(tmp_path: Path, zipped: bool):
    path = tmp_path / "weights.pth"
    seen = []

    @given(checkpoints(DTYPES if zipped else DTYPES[:12]))
    @settings(max_examples=150)
    def same(content: dict) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        seen.append(check_same(read_torch_file(path), torch.load(path, weights_only=True)))

    same()
    assert sum(seen) > 100


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), st.integers(0, 3), min_size=1))
@settings(max_examples=40)
def test_a_distributed_runs_prefix_is_taken_away_and_nobody_elses(
    tmp_path_factory: pytest.TempPathFactory, names: dict[str, int]
):
    path = tmp_path_factory.getbasetemp() / "prefixed.pth"
    tensors = {f"module.{name}": torch.arange(size) for name, size in names.items()}
    for content in (tensors, {"model": tensors, "module.epoch": 3}):
        torch.save(content, path)
        found, _ = open_checkpoint(path)
        assert {name: one.digest() for name, one in found.items()} == {
            name.removeprefix("module."): digest_of(tensor) for name, tensor in tensors.items()
        }
    torch.save({**tensors, "mod": torch.zeros(1)}, path)
    assert set(open_checkpoint(path)[0]) == {*tensors, "mod"}


def test_a_tensor_that_negates_when_it_is_read_is_refused(tmp_path: Path):
    """PyTorch notes the sign beside the bytes, which would be read as they are."""
    torch.save({"weight": torch._neg_view(torch.ones(3)), "other": torch.ones(3)}, tmp_path / "weights.pth")
    with pytest.raises(RequestError, match="weight has dtype F32 with the sign turned"):
        open_file(tmp_path / "weights.pth")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


CALLED = [
    ("os", "system"), ("posix", "system"), ("subprocess", "Popen"), ("builtins", "eval"), ("builtins", "exec"),
    ("__builtin__", "eval"), ("builtins", "__import__"), ("builtins", "getattr"), ("__builtin__", "getattr"),
    ("builtins", "open"), ("builtins", "compile"), ("builtins", "object"), ("builtins", "type"), ("pickle", "loads"),
    ("functools", "partial"), ("operator", "attrgetter"), ("types", "FunctionType"), ("importlib", "import_module"),
    ("pathlib", "Path.touch"), ("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"),
    ("torch", "nn.Module"), ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch", "float32.__class__"),
    ("collections", "OrderedDict.__init__"), ("collections", "namedtuple"), ("copyreg", "_reconstructor"),
    ("blip2nb.weights.torchfile", "read_torch_file"), ("numpy.core.multiarray", "_reconstruct"), ("codecs", "open"),
    ("_codecs", "lookup"), ("runpy", "run_path"), ("code", "interact"), ("timeit", "timeit"), ("webbrowser", "open"),
]  # fmt: skip
FORMS: dict[str, Callable[[str, str, bytes], bytes]] = {
    "reduce": lambda module, name, given: b"c%s\n%s\n(%stR." % (module.encode(), name.encode(), given),
    "stack_global": lambda module, name, given: b"\x80\x04" + short(module) + short(name) + b"\x93(" + given + b"tR.",
    "inst": lambda module, name, given: b"(" + given + b"i%s\n%s\n." % (module.encode(), name.encode()),
    "obj": lambda module, name, given: b"(c%s\n%s\n" % (module.encode(), name.encode()) + given + b"o.",
    "newobj": lambda module, name, given: b"\x80\x02c%s\n%s\n(%st\x81." % (module.encode(), name.encode(), given),
    "newobj_ex": lambda module, name, given: b"\x80\x04c%s\n%s\n(%st}\x92." % (module.encode(), name.encode(), given),
    "build": lambda module, name, given: b"ccollections\nOrderedDict\n)R}(" + text("__reduce__")
    + b"c%s\n%s\nub." % (module.encode(), name.encode()),
    "in_a_dict": lambda module, name, given: b"}(" + text("model") + b"}(" + text(NORM)
    + b"c%s\n%s\n(%stRuu." % (module.encode(), name.encode(), given),
    "storage_class": lambda module, name, given: b"(" + text("storage")
    + b"c%s\n%s\n" % (module.encode(), name.encode()) + text("0") + text("cpu") + b"K\x01tQ.",
    "through_a_tensor": lambda module, name, given: b"ctorch._tensor\n_rebuild_from_type_v2\n(c%s\n%s\nN(%stNtR."
    % (module.encode(), name.encode(), given),
}  # fmt: skip


def pth(path: Path, pickled: bytes, zipped: bool) -> Path:
    """A file whose structure is this pickle, with one storage of four zeros."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (
                ("data.pkl", pickled),
                ("byteorder", b"little"),
                ("data/0", bytes(16)),
                ("version", b"3"),
            ):
                archive.writestr(f"archive/{name}", data)
        return path
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, system)]
    path.write_bytes(b"".join([*parts, pickled, pickle.dumps(["0"], 2), struct.pack("<q", 4), bytes(16)]))
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(tmp_path: Path, form: str, zipped: bool):
    marker = tmp_path / "code-ran"
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    if form == "reduce":
        pickle.loads(FORMS[form]("os", "system", text(shell)))
        assert marker.exists(), "the pickle is harmless: this test would prove nothing"
        marker.unlink()
    for module, name in CALLED:
        given = text(shell if module in ("os", "posix", "subprocess") else python)
        path = pth(tmp_path / "weights.pth", FORMS[form](module, name, given), zipped)
        with pytest.raises(RequestError, match=r"would run code: it (names|holds)"):
            open_file(path)
        assert not marker.exists(), (module, name)
    time.sleep(0.02)
    assert not marker.exists()


ODDITIES: dict[str, bytes] = {
    "sets_the_code_of_a_function": b"ctorch._utils\n_rebuild_tensor_v2\nN}(" + text("__code__") + b"Nu\x86b.",
    "sets_the_defaults_of_a_function": b"ctorch._utils\n_rebuild_tensor_v2\nN}("
    + text("__defaults__")
    + b"(K\x01tu\x86b.",
    "notes_something_on_a_function": b"ctorch._utils\n_rebuild_tensor_v2\n}(" + text("x") + b"K\x01ub.",
    "sets_something_on_a_class": b"ccollections\nOrderedDict\nN}(" + text("__setstate__") + b"Nu\x86b.",
    "takes_a_dtype_for_a_function": b"ctorch\nfloat32\n)R.",
    "takes_a_dtype_for_a_class": b"\x80\x02ctorch\nfloat32\n)\x81.",
    "has_no_storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00(K\x01t(K\x01t\x89NtR.",
    "has_a_text_for_a_storage": b"ctorch._utils\n_rebuild_tensor_v2\n(" + text("0") + b"K\x00(K\x01t(K\x01t\x89NtR.",
    "calls_for_an_unknown_object": text("os.system") + b"Q.",
    "calls_for_nothing": b")Q.",
    "uses_the_registry_of_extensions": b"\x82\x01.",
    "takes_what_is_not_there": b"(h\x05tR.",
    "is_empty": b".",
    "nests_without_end": b"}(" + b"K\x01}(" * 100_000 + b"u" * 100_000 + b"u.",
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize("oddity", ODDITIES)
def test_an_odd_pickle_is_refused_and_changes_nothing(tmp_path: Path, oddity: str, zipped: bool):
    with pytest.raises(RequestError):
        open_file(pth(tmp_path / "weights.pth", ODDITIES[oddity], zipped))
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "good.pth", _use_new_zipfile_serialization=zipped)
    assert open_file(tmp_path / "good.pth")["weight"].digest() == digest_of(torch.arange(3.0))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
@pytest.mark.parametrize(
    ("key", "count", "offset", "shape", "strides"),
    [
        ("0", 4, 0, [5], [1]), ("0", 4, 4, [1], [1]), ("0", 4, -1, [1], [1]), ("0", 4, 0, [2, 2], [9, 1]),
        ("0", 4, 0, [-2], [1]), ("0", 4, 3, [2], [-1]), ("0", 1 << 40, 0, [1 << 40], [1]), ("0", 5, 0, [5], [1]),
        ("1", 4, 0, [4], [1]), ("0", -4, 0, [4], [1]), ("0", 4, 0, [4], [1, 1]),
    ],
)  # fmt: skip
def test_a_tensor_outside_its_bytes_is_refused(tmp_path: Path, key, count, offset, shape, strides, zipped: bool):
    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            module, name = obj.said
            self.write(b"c%s\n%s\n" % (module.encode(), name.encode()))

        def persistent_id(self, obj):
            return ("storage", FloatStorage, key, "cpu", count, *([] if zipped else [None])) if obj is held else None

    class FloatStorage:
        said = ("torch", "FloatStorage")

    class _rebuild_tensor_v2:
        said = ("torch._utils", "_rebuild_tensor_v2")

        def __reduce__(self):
            return _rebuild_tensor_v2, (held, offset, tuple(shape), tuple(strides), False, None)

    held, out = object(), io.BytesIO()
    Pickler(out, 2).dump({"weight": _rebuild_tensor_v2()})
    with pytest.raises(RequestError, match="is not a whole PyTorch file"):
        open_file(pth(tmp_path / "weights.pth", out.getvalue(), zipped))


# -- memory


def read_one_tensor(path: str) -> None:
    """The process whose memory is looked at: a checkpoint is opened, and one of its tensors read."""
    tensors, _ = open_checkpoint(Path(path))
    tensors["wide"].digest()


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


# -- second names of one tensor

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


if __name__ == "__main__":
    _serve()

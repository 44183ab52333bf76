"""Processes that are to die, forked from one that has everything imported, so that each begins at once; and a source
of many megabytes, so that there is something to interrupt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers  # noqa: F401 (or every conversion would start a process for its configuration)
from conftest import Outcome, edit_weights

from blip2nb import cli
from blip2nb.conversion.files import own_files
from blip2nb.families.captioners.configuration import read_language_config, write_configuration
from blip2nb.families.captioners.mapping import entries
from blip2nb.variants import LanguageSizes, variant
from blip2nb.weights.sources import open_checkpoint
from blip2nb.weights.threads import at_once
from blip2nb.weights.writer import JOURNAL

OPT, T5 = "tiny-blip2-opt-2.7b", "tiny-blip2-flan-t5-xl"
NORM = "ln_vision.weight"
FC1 = "opt_model.model.decoder.layers.0.fc1.weight"
Copy = Callable[[str], Path]


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


# -- what such a process does, when it does not run the command line: `start("@NAME", …)`


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


def read_one_tensor(path: str) -> None:
    """The process whose memory is looked at: a checkpoint is opened, and one of its tensors read."""
    tensors, _ = open_checkpoint(Path(path))
    tensors["wide"].digest()


def one_sentence(ended: Outcome) -> str:
    """What a refusal says. Lines before it that are no complaint do not count."""
    said = [line for line in ended.said if line.startswith("blip2nb: ")]
    assert (ended.status, len(said), ended.said[-1:], ended.out) == (2, 1, said, ""), ended.err
    assert "Traceback" not in ended.err
    return said[0]


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


if __name__ == "__main__":
    _serve()

"""One run on a worker: its notebook in a process of its own, watched, ended when it must be, and put in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from blip2nb.report.store import content_of
from blip2nb.report.sweep import Outcome, Value
from blip2nb.resources import CORES
from blip2nb.sweeps.child import Ended
from blip2nb.sweeps.leftovers import end, end_leftovers, family, note_processes
from blip2nb.sweeps.place import FAILED, RECORD, Place, place, relocate

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", CORES)
_MOST_LOG = 4000  # letters of a dead process's log, of its end. Chosen: some forty lines
_LOOK = 0.5  # seconds between two looks at the clock, and at whether the run is still wanted. Chosen: runs take longer


class Begun(TypedDict):
    """A cell of a run that begins: the run's name, where it is made, the cell's number of how many, and its heading."""

    run: str
    slot: str
    cell: int
    of: int
    title: str


@dataclasses.dataclass(frozen=True)
class Task:
    """All that a worker needs to know of a run. Travels to it, so it holds plain values.

    Attributes:
        folder: where the notebook stands, and runs where that folder is here too.
        text: the notebook itself, for workers that do not have it.
        overwrite: begin anew, whatever stands in its place.
        timeout: seconds after which it is ended; 0 for never.
    """

    name: str
    key: str
    notebook: str
    folder: str
    text: str = dataclasses.field(repr=False)
    parameters: Mapping[str, Value]
    declared: tuple[str, ...]
    output: str
    keep_model: bool
    overwrite: bool
    timeout: float

    def outcome(self, state: str) -> Outcome:
        """What became of it, with nothing but that known."""
        return Outcome(
            run_name=self.name,
            model_name=str(self.parameters.get("model_name", "")),
            notebook=self.notebook,
            parameters=dict(self.parameters),
            key=self.key,
            state=state,
        )

    def failure(self, error: str, traceback: str = "") -> Outcome:
        """What became of one that failed."""
        folder = f"{self.name}{FAILED}"
        return dataclasses.replace(self.outcome("failed"), error=error, traceback=traceback, folder=folder)


def run(task: Task, threads: int, say: Callable[..., None], wanted: Callable[[], bool]) -> Outcome | None:
    """Execute a task and put what it leaves in its place.

    Args:
        threads: for the libraries' arithmetic, and for copying: its share of the machine.
        say: told of each cell as it begins: `cell`, `of`, `title`.
        wanted: asked now and then; where it says no, everything is ended and nothing is left.

    Returns:
        The outcome, which is also the run's record; None for a run that was not wanted any more.
    """
    where = place(task.output)
    workshop = where.begin(task.name, task.key, task.overwrite)
    made = workshop / task.name
    stood = _stands(task, where)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="blip2nb-", ignore_cleanup_errors=True) as sockets:
            process = _start(task, workshop, stood or task.keep_model, threads, sockets)
            said = _attend(task, workshop, process, say, wanted)
    except _NotWanted:
        shutil.rmtree(workshop, ignore_errors=True)
        return None
    relocate(made, workshop, where.address)
    outcome = _judge(task, made, said)
    executed = f"{task.notebook}.ipynb"
    failed = outcome.state == "failed"
    if failed or not (stood or task.keep_model):
        _remove_model(made, failed)
    outcome = dataclasses.replace(
        outcome,
        seconds=round(time.monotonic() - began, 2),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        executed=executed if (made / executed).is_file() else "",
        report=hash_of_report(report.read_bytes() if (report := made / "report.json").is_file() else None),
        keep_model=task.keep_model,
        kept=(made / "model").is_dir(),
    )
    where.publish(workshop, task.name, outcome)
    return outcome


def _stands(task: Task, where: Place) -> bool:
    """Whether somebody's own model is in the run's place: it is not the sweep's to remove."""
    ours = where.read(f"{task.name}/{RECORD}") is not None
    return not task.overwrite and not ours and where.read(f"{task.name}/model/config.json") is not None


def give_up(task: Task, error: str) -> Outcome:
    """The outcome of a run that its worker could not tell of, and whatever it left, in its place."""
    where = place(task.output)
    workshop = where.begin(task.name, task.key, task.overwrite)
    made, executed = workshop / task.name, f"{task.notebook}.ipynb"
    outcome = dataclasses.replace(task.failure(error), executed=executed if (made / executed).is_file() else "")
    _remove_model(made, failed=True)
    relocate(made, workshop, where.address)
    where.publish(workshop, task.name, outcome)
    return outcome


class _NotWanted(Exception):
    """The sweep was stopped, or the run given to another worker."""


def _start(task: Task, workshop: Path, keep: bool, threads: int, sockets: str) -> subprocess.Popen:
    """The notebook's process, told what to do."""
    made = workshop / task.name
    notebook = Path(task.folder, f"{task.notebook}.ipynb")
    if not notebook.is_file() or notebook.read_text(encoding="utf-8") != task.text:
        notebook = workshop / f"{task.notebook}.ipynb"
        notebook.write_text(task.text, encoding="utf-8")
    asked = {
        "input": str(notebook),
        "output": str(made / f"{task.notebook}.ipynb"),
        "folder": task.folder if Path(task.folder).is_dir() else str(workshop),
        "parameters": _injected(task, workshop, keep),
        "sockets": sockets,  # not in the workshop: their paths may not be long, and not every disk can hold them
    }
    with open(workshop / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "blip2nb.sweeps.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **dict.fromkeys(_THREADS, str(threads))},
            start_new_session=True,  # a Ctrl-C in the terminal is the sweep's to deal with
        )
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(f"{json.dumps(asked)}\n".encode())  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    return process


def _injected(task: Task, workshop: Path, keep: bool) -> dict[str, Value]:
    """The parameters as papermill is given them: the run's, and where it goes. A notebook that makes runs of its own
    makes them inside."""
    given = dict(task.parameters)
    if "output_dir" in task.declared:
        given["output_dir"] = str(workshop if "run_name" in task.declared else workshop / task.name)
    if "run_name" in task.declared:
        given["run_name"] = task.name
    if "keep_model" in task.declared:
        given["keep_model"] = keep
    return given


def _attend(
    task: Task, workshop: Path, process: subprocess.Popen, say: Callable[..., None], wanted: Callable[[], bool]
) -> Ended:
    """What the notebook's process said last, or what became of it instead. No process of the run is left then."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    try:
        said = _watch(task, workshop, process.pid, lines, say, wanted)
    finally:
        end(family(process.pid))
        end_leftovers(workshop)  # a kernel whose parent was killed is nobody's child any more
        status = process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # type: ignore[union-attr]
    if "done" in said or "error" in said:
        return said
    return {
        "error": _died(status),
        "kind": "Died",
        "traceback": (workshop / "log").read_text(errors="replace", encoding="utf-8")[-_MOST_LOG:],
    }


def _watch(
    task: Task,
    workshop: Path,
    pid: int,
    lines: queue.Queue[bytes | None],
    say: Callable[..., None],
    wanted: Callable[[], bool],
) -> Ended:
    deadline = time.monotonic() + task.timeout if task.timeout else float("inf")
    while True:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=_LOOK)
            if line is None:
                return {}
            said = json.loads(line)
            if "cell" not in said:
                ended: Ended = said
                return ended
            say(**said)
        note_processes(workshop, family(pid))
        if not wanted():
            raise _NotWanted
        if time.monotonic() > deadline:
            return {"error": f"Not finished after {duration(task.timeout)}, and ended: timeout.", "kind": "Timeout"}


def _read(pipe: Any, lines: queue.Queue[bytes | None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # it was closed
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _died(status: int) -> str:
    if status < 0:
        return f"The process that ran the notebook was killed by signal {-status}: often that is a lack of memory."
    return f"The process that ran the notebook ended with status {status} and without a word."


def duration(seconds: float) -> str:
    """A time in words: 90 s, 15 min, 2 h."""
    for size, word in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {word}"
    return f"{seconds:.3g} s"


def _judge(task: Task, made: Path, said: Ended) -> Outcome:
    """What became of the run. That two models differ is a finding: the notebook says so in its last cell by an error,
    and the report in words."""
    verdict = ""
    if (made / "report.json").is_file():
        path = made / "report.json"
        verdict = content_of(path.read_text(encoding="utf-8"), str(path)).verdict
    found = "done" in said or (verdict == "diverges" and said.get("kind") == "AssertionError")
    if found:
        return dataclasses.replace(task.outcome("finished"), verdict=verdict, folder=task.name)
    error = _ANSI.sub("", said["error"])
    kind = said["kind"]
    if kind == "DeadKernelError":
        error = "The notebook's kernel died: often that is a lack of memory. Fewer workers need less."
    elif kind not in ("RequestError", "Timeout", "Died") and not error.startswith(kind):
        error = f"{kind}: {error}"
    traceback = _ANSI.sub("", said.get("traceback", ""))
    return task.failure(error, traceback)


def hash_of_report(report: bytes | None) -> str:
    """A hash of a report as it stands; "" where there is none."""
    return hashlib.sha256(report).hexdigest() if report is not None else ""


def _remove_model(made: Path, failed: bool) -> None:
    """Without its converted model a run is its report; what failed leaves its notebook alone."""
    shutil.rmtree(made / "model", ignore_errors=True)
    for left in made.glob(".*"):  # what a conversion that did not come to its end had written
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    if failed:
        for tape in made.glob("tape*.safetensors"):
            tape.unlink()

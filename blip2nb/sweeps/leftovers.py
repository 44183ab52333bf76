"""The processes of a run, and ending them: also those that a worker which was killed could not end itself."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from blip2nb.whole import write_whole

_OWNERS = "processes.json"


def note_processes(workshop: Path, processes: Iterable[psutil.Process]) -> None:
    """Leave word of a run's processes in the folder that it is made in."""
    found = []
    for one in processes:
        with contextlib.suppress(psutil.Error):
            found.append((one.pid, one.create_time()))
    write_whole(workshop / _OWNERS, json.dumps({"host": socket.gethostname(), "processes": found}))


def end_leftovers(workshop: Path) -> None:
    """End what still works in a folder though the worker that started it is gone. On another machine it ends by itself:
    a notebook's process ends with the worker it listens to, and a kernel with the process that started it."""
    try:
        noted = json.loads((workshop / _OWNERS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return
    left = []
    if noted["host"] == socket.gethostname():
        for pid, created in noted["processes"]:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created:  # and not another one that was given the number since
                    left.append(process)
    end(left)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, directly or not; none where it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def end(processes: Iterable[psutil.Process], patience: float = 10.0) -> None:
    """Kill processes and wait until they are gone, at most so many seconds.

    Chosen: it takes less than one, unless a disk that does not answer holds a process; then nobody is kept longer.
    """
    processes = list(processes)
    for one in processes:
        with contextlib.suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(processes, timeout=patience)

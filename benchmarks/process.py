"""Running a command as a whole process: how long it takes, and how much memory it and its children hold."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.01  # chosen: what is held for less is missed, and to look more often slows down what is measured

Command = Sequence[str | Path]


class BenchmarkError(RuntimeError):
    """Something cannot be measured; the sentence says why."""


def seconds(command: Command, *, sync: bool = False) -> float:
    """Wall-clock seconds from start to exit, start-up included; with `sync`, until the disk has everything too.

    Raises:
        BenchmarkError: the command failed.
    """
    start = time.perf_counter()
    with _started(command) as process:
        process.wait()
        if sync:
            os.sync()
        return time.perf_counter() - start


def peak_memory(command: Command) -> int:
    """The most bytes of anonymous memory (RssAnon) that a command and its children held at once.

    Looked at every 10 ms. Pages of mapped files are not in it: the system takes those back when it needs them.

    Raises:
        BenchmarkError: the command failed.
    """
    peak = 0
    with _started(command) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_anonymous, _family(process.pid))))
            time.sleep(SAMPLE_SECONDS)
    return peak


@contextlib.contextmanager
def _started(command: Command) -> Iterator[subprocess.Popen[bytes]]:
    """A running process, silent unless it fails, and gone when this is left, however that is."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said, cwd=ROOT)
        try:
            yield process
        finally:
            _end(process)
        if process.returncode != 0:
            raise BenchmarkError(f"{Path(command[0]).name} failed ({process.returncode}): {_last_line(said)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)  # seconds, chosen: to clean up takes one
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = [line for line in re.split(r"[\r\n]+", said.read().decode(errors="replace")) if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _family(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    with contextlib.suppress(OSError):  # it ended while we looked
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in _read(f"/proc/{pid}/task/{thread}/children").split():
                yield from _family(int(child))


def _anonymous(pid: int) -> int:
    """Bytes; 0 for a process that has ended."""
    match = re.search(r"^RssAnon:\s+(\d+) kB", _read(f"/proc/{pid}/status"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""

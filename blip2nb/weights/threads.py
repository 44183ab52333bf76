"""Many small jobs on every core, ended together by the first error or by the user.

Threads are enough: the jobs spend their time in code that lets other threads run (reading, hashing, scanning, writing).
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from blip2nb.resources import cores

_WAITING = 2  # threads beyond one for each core, since some are waiting for the disk. Chosen, not measured


class Stopped(Exception):
    """The work that this thread is part of has been ended."""


@dataclasses.dataclass
class _Stop:
    """Whether the work is to end. A plain value, since setting it must never wait for a lock."""

    asked: bool = False


_work = threading.local()


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do the jobs in some more threads than this process has cores; their results, in order.

    The first error, or an interruption, ends the others at their next `go_on`, and is raised when they have ended.
    """
    stop = _Stop()

    def run(job: Callable[[], Any]) -> Any:
        _work.stop = stop
        go_on()
        return job()

    with _interruption_ends(stop), ThreadPoolExecutor(cores() + _WAITING) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.asked = True
            pool.shutdown(wait=True, cancel_futures=True)
    for one in futures:
        error = None if one.cancelled() else one.exception()
        if error is not None and not isinstance(error, Stopped):
            raise error
    return [one.result() for one in futures]


def go_on() -> None:
    """Raises Stopped where the work that this thread is part of has been ended. To be called between pieces."""
    stop = getattr(_work, "stop", None)
    if stop is not None and stop.asked:
        raise Stopped


@contextlib.contextmanager
def _interruption_ends(stop: _Stop) -> Iterator[None]:
    """Ctrl-C ends the threads first and is raised then. It could come while a lock is being taken that they need: they
    would wait for it forever, and the program for them."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[Any] = []

    def note(*signal_and_frame: Any) -> None:
        came.append(signal_and_frame)
        stop.asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(*came[0])  # Python's own raises
        raise KeyboardInterrupt

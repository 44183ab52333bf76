"""Many small jobs on every core, ended together by the first error or by the user.

Threads are enough: the jobs spend their time in code that lets other threads run (reading, hashing, scanning, writing).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

_WAITING = 2  # threads beyond one for each core, since some are waiting for the disk


class Stopped(Exception):
    """The work that this thread is part of has been ended."""


_work = threading.local()


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do the jobs in some more threads than there are cores; their results, in order.

    The first error, or an interruption, ends the others at their next `go_on`, and is raised when they have ended.
    """
    stop = threading.Event()

    def run(job: Callable[[], Any]) -> Any:
        _work.stop = stop
        go_on()
        return job()

    with ThreadPoolExecutor((os.cpu_count() or 2) + _WAITING) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    for one in futures:
        error = None if one.cancelled() else one.exception()
        if error is not None and not isinstance(error, Stopped):
            raise error
    return [one.result() for one in futures]


def go_on() -> None:
    """Raises Stopped where the work that this thread is part of has been ended. To be called between pieces."""
    stop = getattr(_work, "stop", None)
    if stop is not None and stop.is_set():
        raise Stopped

"""Reading a file once, however many ask what is in it."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_FILES = 16  # a model's: its vision tower, the language model's shards, two or three checkpoints, a manifest
_SETTLED = 2_000_000_000  # ns; the coarsest times of change are FAT's, of two seconds


def once(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """Have `read` read a file once per process, as long as it stays the file it was: by place, size and time of change.

    What was changed a moment ago is read again each time, since a second change could then bear the same time. What
    `read` raises is not kept, and what it gives is shared: nobody may change it.
    """

    @functools.lru_cache(_FILES)
    def kept(path: Path, *state: int) -> T:
        return read(path)

    @functools.wraps(read)
    def read_once(path: Path) -> T:
        try:
            found = os.stat(path)
        except OSError:  # `read` says it better
            return read(path)
        if time.time_ns() - found.st_mtime_ns < _SETTLED:
            return read(path)
        return kept(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    return read_once

"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, text as UTF-8, and put it there when it is whole: what stood there is replaced."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise

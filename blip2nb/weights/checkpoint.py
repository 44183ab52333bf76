"""Writing a `.pth` that PyTorch and LAVIS load. Memory does not grow with it: what is saved is memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from blip2nb.weights.stored import Stored


def write_checkpoint(
    path: Path, tensors: Mapping[str, Stored], progress: Callable[[int], object] = lambda count: None
) -> None:
    """Write {"model": tensors} to `path`, whole or not at all. The same tensors make the same file.

    Args:
        tensors: name -> tensor.
        progress: called with the number of bytes written since the last call.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:  # of an open file PyTorch does not write the name into it
            out = _Out(file, progress)
            out.save({"model": {name: stored.tensor() for name, stored in tensors.items()}})
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class _Out:
    """A file that PyTorch writes to. PyTorch tells of an error in words of its own: here it is the one that came."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], object]):
        self._file, self._progress = file, progress
        self._error: BaseException | None = None

    def save(self, content: object) -> None:
        import torch

        try:
            torch.save(content, self)
        except BaseException as error:
            raise self._error or error from None

    def write(self, piece: bytes | memoryview) -> int:
        try:
            written = self._file.write(piece)
            self._progress(written)
        except BaseException as error:
            self._error = self._error or error
            raise
        return written

    def flush(self) -> None:
        self._file.flush()

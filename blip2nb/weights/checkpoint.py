"""Writing a `.pth` that PyTorch and LAVIS load, tensor by tensor: memory does not grow with it.

`torch.save` wants all tensors in memory. The format is a zip archive whose records are stored as they are: a pickle
that describes the tensors, and their bytes, each beginning at a multiple of 64 (torch/serialization.py, `_save`).
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blip2nb.weights.stored import Stored

_ALIGNMENT = 64
_TYPES = {"F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Stored], progress: Callable[[int], object] = lambda count: None
) -> None:
    """Write {"model": tensors} to `path`, whole or not at all.

    Args:
        tensors: name -> floating-point tensor, row-major.
        progress: called with the number of bytes written since the last call.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                _record(archive, "data.pkl", [_described(tensors)])
                _record(archive, "byteorder", [b"little"])
                for number, stored in enumerate(tensors.values()):
                    with _open(archive, f"data/{number}", stored.nbytes) as record:
                        for piece in stored.pieces():
                            record.write(piece)
                            progress(piece.nbytes)
                _record(archive, "version", [b"3\n"])
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _record(archive: zipfile.ZipFile, name: str, pieces: list[bytes]) -> None:
    with _open(archive, name, sum(map(len, pieces))) as record:
        for piece in pieces:
            record.write(piece)


def _open(archive: zipfile.ZipFile, name: str, size: int) -> Any:
    """A record to write `size` bytes to, padded by an extra field so that they begin where PyTorch wants them."""
    info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that the same tensors make the same file
    info.file_size = size
    assert archive.fp is not None
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0  # what the library adds to the header of a large record
    start = archive.fp.tell() + 30 + len(info.filename) + 4 + zip64
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return archive.open(info, "w")


class _Reference:
    """Stands for the bytes of one tensor in the pickle."""

    def __init__(self, kind: Any, number: int, count: int):
        self.saved = ("storage", kind, str(number), "cpu", count)


class _Pickler(pickle.Pickler):
    """Writes a `Stored` as the call that rebuilds a tensor, and its bytes as the name of a record."""

    def __init__(self, file: io.BytesIO, numbers: Mapping[int, int]):
        super().__init__(file, protocol=2)
        self._numbers = numbers

    def persistent_id(self, value: Any) -> Any:
        return value.saved if isinstance(value, _Reference) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return NotImplemented
        import torch

        steps = [1]
        for size in reversed(value.shape[1:]):
            steps.insert(0, steps[0] * size)
        count = steps[0] * value.shape[0] if value.shape else 1
        reference = _Reference(getattr(torch, _TYPES[value.dtype]), self._numbers[id(value)], count)
        strides = tuple(steps) if value.shape else ()
        arguments: tuple[Any, ...] = (reference, 0, value.shape, strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def _described(tensors: Mapping[str, Stored]) -> bytes:
    file = io.BytesIO()
    numbers = {id(stored): number for number, stored in enumerate(tensors.values())}
    _Pickler(file, numbers).dump({"model": dict(tensors)})
    return file.getvalue()

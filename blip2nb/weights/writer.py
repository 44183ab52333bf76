"""Sharded safetensors, written one tensor at a time, and directories that are either finished or not there.

The safetensors library writes a whole file from memory; here the header is known from the plan, so that the bytes
can follow as they come. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.errors import RequestError
from blip2nb.weights.hashing import tensor_bytes

if TYPE_CHECKING:
    import torch

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor that is to be written: everything the header needs."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name and the tensors in it, in order."""

    name: str
    slots: tuple[Slot, ...]


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "200MB" or a number. Decimal units, as on the hub.

    Raises:
        RequestError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    size = int(float(match.group(1)) * 1000 ** " KMGT".index(match.group(2).upper() or " ")) if match else 0
    if size <= 0:
        raise RequestError(f"A shard size such as 5GB or 200MB was expected, found {text!r}.")
    return size


def shard(slots: Sequence[Slot], largest: int) -> list[Shard]:
    """Fill files in order up to `largest` bytes each; a tensor larger than that has a file to itself."""
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if groups[-1] and filled + slot.size > largest:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled += slot.size
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


@contextlib.contextmanager
def shard_file(path: Path, shard: Shard) -> Iterator[ShardFile]:
    """Open a shard for writing. It is synced to disk on leaving; leaving before the last tensor is an error."""
    with open(path, "wb") as file:
        out = ShardFile(file, shard)
        yield out
        out.close()
        file.flush()
        os.fsync(file.fileno())


class ShardFile:
    """The header at once, then the tensors in the shard's order."""

    def __init__(self, file, shard: Shard):
        self._file = file
        self._shard = shard
        self._next = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in shard.slots:
            header[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [at, at + slot.size]}
            at += slot.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        """The next tensor of the shard. Raises ValueError when it is not the one the header promises."""
        slot = self._shard.slots[self._next]
        data = tensor_bytes(tensor)
        if tuple(tensor.shape) != slot.shape or len(data) != slot.size:
            raise ValueError(f"{slot.name} was announced as {slot}, found {tuple(tensor.shape)} {tensor.dtype}.")
        self._file.write(data)
        self._next += 1

    def close(self) -> None:
        if self._next != len(self._shard.slots):
            raise ValueError(f"{self._shard.name} lacks {len(self._shard.slots) - self._next} tensors.")


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The hub's index of shards; nothing for a single file."""
    if len(shards) > 1:
        weight_map = {slot.name: shard.name for shard in shards for slot in shard.slots}
        total = sum(slot.size for shard in shards for slot in shard.slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` on leaving, synced, or disappears when something is raised.

    A reader therefore never sees a directory that looks finished and is not. What stood at `target` is replaced.
    """
    new = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RequestError(f"{target} cannot be made: {error.filename} is a file. Name another --output.") from error
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                parent.rmdir()
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Sharded safetensors, written one tensor at a time, and directories that are either finished or not there.

The safetensors library writes a whole file from memory; here the header is known from the plan, so that every tensor
has its place before the first is read. The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import mmap
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3
from filelock import FileLock, Timeout

from blip2nb.errors import RequestError
from blip2nb.weights.stored import PIECE, SIZES, Stored

log = logging.getLogger("blip2nb")

Buffer = bytes | bytearray | memoryview


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor that is to be written: everything the header needs."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name and the tensors in it, in order."""

    name: str
    slots: tuple[Slot, ...]

    def header(self) -> bytes:
        """What the file begins with: the length of a JSON text, and the text, padded to a multiple of 8 bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for slot in self.slots:
            entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [at, at + slot.size]}
            at += slot.size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


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


class ShardFile:
    """One shard on its way: the header first, then every tensor at its own place, in any order, from any thread.

    Until `finish` its name ends in `.partial`, so that nothing takes it for a shard.
    """

    def __init__(self, folder: Path, shard: Shard):
        """Make room for the whole file, or go on with what is there.

        Raises:
            OSError: there is no room for it.
        """
        self.path = folder / shard.name
        self.partial = folder / f"{shard.name}.partial"
        header = shard.header()
        self.size = len(header) + sum(slot.size for slot in shard.slots)
        if self.path.is_file():  # the run before this one got as far
            self.path.rename(self.partial)
        self._handle = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _reserve(self._handle, self.size)
            _write_all(self._handle, header, 0)
        except BaseException:
            os.close(self._handle)
            raise
        self._direct = _open_direct(self.partial)
        # the kernel lets one thread at a time write to a file, and those that wait for it burn their core's time
        self._turn = threading.Lock()
        self._places: dict[str, tuple[int, Slot]] = {}
        at = len(header)
        for slot in shard.slots:
            self._places[slot.name] = (at, slot)
            at += slot.size

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Put a tensor in its place, from its bytes in order. Raises ValueError where they are more or fewer."""
        start, slot = self._places[name]
        direct = self._direct >= 0 and slot.size >= _WORTHWHILE
        at = start
        for block in _as_in_pages(pieces, start) if direct else (memoryview(piece).cast("B") for piece in pieces):
            if at + block.nbytes > start + slot.size:
                raise ValueError(f"{name} was announced as {slot}, and has more bytes.")
            first = min(-at % _PAGE, block.nbytes) if direct else block.nbytes
            last = max(first, block.nbytes - (at + block.nbytes) % _PAGE)
            self._put(block[:first], at)
            self._put_direct(block[first:last], at + first)
            self._put(block[last:], at + last)
            at += block.nbytes
        if at != start + slot.size:
            raise ValueError(f"{name} was announced as {slot}, found {at - start} bytes.")

    def _put(self, part: Buffer, at: int) -> None:
        if len(part):
            with self._turn:
                _write_all(self._handle, part, at)

    def _put_direct(self, pages: memoryview, at: int) -> None:
        """Straight to the disk, past the page cache: that takes a third of the time, and leaves the cache to what is
        read. Where the file system turns out not to do it, as any other bytes.

        The same file is also written through the page cache, and read through memory maps (`stored`). On Linux that is
        safe where they concern different pages, as here: a page is always written in the same one of the two ways, and
        a direct write drops what the cache holds of its pages. Elsewhere there is no O_DIRECT, or it is not used.
        """
        try:
            while pages.nbytes:
                written = os.pwrite(self._direct, pages, at)
                pages, at = pages[written:], at + written
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._put(pages, at)

    def stored(self, name: str) -> Stored:
        """Where a tensor is, for reading it back."""
        start, slot = self._places[name]
        return Stored(self.partial, start, slot.dtype, slot.shape)

    def finish(self) -> None:
        """Give it its name, once it is on the disk."""
        os.fsync(self._handle)
        self.close()
        self.partial.rename(self.path)

    def close(self) -> None:
        for handle in (self._handle, self._direct):
            if handle >= 0:
                os.close(handle)
        self._handle = self._direct = -1


# O_DIRECT wants memory, place and length to be multiples of the disk's logical block: 512 or 4096 bytes. Where that is
# more, the write is refused, and goes through the page cache.
_PAGE = 4096
# Bytes from which on a tensor is written past the page cache. Chosen, not measured to the byte: below it are norms and
# biases, a thousandth of a model's bytes, for which a wait for the disk each costs more than the copy that is saved.
_WORTHWHILE = 1 << 18


def _as_in_pages(pieces: Iterable[Buffer], start: int) -> Iterator[memoryview]:
    """The same bytes in blocks that lie in a page of memory as they will in a page of the file, where they begin at
    byte `start`; each is good until the next. All but the last end with a page."""
    room = memoryview(mmap.mmap(-1, PIECE))  # begins at a page
    first = last = start % _PAGE
    for piece in pieces:
        view = memoryview(piece).cast("B")
        while view.nbytes:
            part = view[: PIECE - last]
            room[last : last + part.nbytes] = part
            last, view = last + part.nbytes, view[part.nbytes :]
            if last == PIECE:
                yield room[first:]
                first = last = 0
    if last > first:
        yield room[first:last]


def _open_direct(path: Path) -> int:
    """A handle that writes past the page cache, or -1 where there is no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


def _reserve(handle: int, size: int) -> None:
    """Have the file system set the bytes aside: a full disk shows at once, and what follows need not look for room."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(handle, size)


def _write_all(handle: int, piece: Buffer, at: int) -> None:
    left = memoryview(piece).cast("B")
    while left.nbytes:
        written = os.pwrite(handle, left, at)
        left, at = left[written:], at + written


INDEX = "model.safetensors.index.json"


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The hub's index of shards; nothing for a single file."""
    if len(shards) > 1:
        weight_map = {slot.name: shard.name for shard in shards for slot in shard.slots}
        total = sum(slot.size for shard in shards for slot in shard.slots)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` on leaving, synced, or disappears when something is raised.

    A reader therefore never sees a directory that looks finished and is not. What stood at `target` is replaced.
    """
    with unfinished_directory(target, "") as work:
        yield work.folder


JOURNAL = "unfinished.jsonl"


class Unfinished:
    """A directory that is being filled, and a journal of what in it is done, which the next run goes on from.

    Attributes:
        folder: beside the target, hidden.
        done: what an interrupted run noted with `note`, in its order.
    """

    def __init__(self, folder: Path, identity: str):
        self.folder = folder
        self.done: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        journal = folder / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []
        head = json.dumps({"unfinished": identity}).encode() + b"\n"
        if identity and lines and lines[0] == head:
            self.done = list(_whole_lines(lines[1:]))
        elif folder.exists():
            log.info("an unfinished run of something else lies in %s; starting anew", folder.parent)
            shutil.rmtree(folder)
            lines = []
        folder.mkdir(exist_ok=True)
        self._journal = open(journal, "ab")  # noqa: SIM115 (closed by close)
        self._journal.truncate(sum(map(len, lines[: 1 + len(self.done)])))
        if not lines:
            self._journal.write(head)
        self._journal.flush()

    def note(self, **what: Any) -> None:
        """Note that something is done. From any thread."""
        with self._lock:
            self._journal.write(json.dumps({**what, "check": _check(what)}).encode() + b"\n")
            self._journal.flush()

    def close(self) -> None:
        self._journal.close()


def _whole_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines up to the first that was not written to its end, or is not as it was written."""
    for line in lines:
        try:
            one = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if not isinstance(one, dict) or one.pop("check", None) != _check(one):
            return
        yield one


def _check(what: dict[str, Any]) -> str:
    return blake3(json.dumps(what).encode()).hexdigest()[:16]


@contextlib.contextmanager
def unfinished_directory(target: Path, identity: str) -> Iterator[Unfinished]:
    """A folder to fill that becomes `target` on leaving, synced; what stood there is replaced.

    An interruption (Ctrl-C, Jupyter's Stop, a kill) leaves it hidden beside the target, and the next run that gives the
    same `identity` finds in `done` what was noted. Any other error removes it.

    Args:
        identity: all that decides what is written; "" for what is not worth going on with.

    Raises:
        RequestError: another run is writing there, the place cannot be written to, or the disk is full.
    """
    new = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_of(target), blocking=False)
        lock.acquire()
    except Timeout as error:
        raise RequestError(
            f"Another run is writing {target} now. Wait until it has finished, or name another output."
        ) from error
    except OSError as error:
        _remove_empty(new)
        raise RequestError(_cannot_write(target, error)) from error
    folder = target.with_name(f".{target.name}.partial")
    try:
        _put_back(target)
        work = Unfinished(folder, identity)
        try:
            yield work
        finally:
            work.close()
        for path in folder.rglob("*"):
            sync(path)
        (folder / JOURNAL).unlink()
        sync(folder)
        _put_in_place(folder, target)
    except (KeyboardInterrupt, SystemExit):
        if not identity:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException as error:
        full = _is_full(target.parent)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise RequestError(_cannot_write(target, error)) from error
        if full and not isinstance(error, RequestError):  # libraries say it in words of their own
            raise RequestError(_cannot_write(target, OSError(errno.ENOSPC, ""))) from error
        raise
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if not target.exists() and not folder.exists():
            _remove_empty(new)


def clear_away(target: Path) -> None:
    """Remove what a run that was killed after its last step has left beside the finished directory."""
    lock, old = _lock_of(target), _old_of(target)
    if lock.exists() or old.exists():
        with contextlib.suppress(Timeout, OSError), FileLock(lock, blocking=False):
            shutil.rmtree(old, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _old_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _put_back(target: Path) -> None:
    """What stood at the target, where a run was killed between taking it away and putting the new one there."""
    if _old_of(target).exists() and not target.exists():
        _old_of(target).rename(target)


def _put_in_place(folder: Path, target: Path) -> None:
    old = _old_of(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty: somebody else's by now
            folder.rmdir()


_FULL = 1 << 16  # bytes; a disk that has fewer is full. Chosen: less than any of the files that fill one


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL
    except OSError:
        return False


def _cannot_write(target: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: {target} did not fit, and nothing was left. Make room, or name another output."
    if error.errno == errno.EFBIG:
        return f"A file of {target} is larger than may be written here. Use a smaller max_shard_size."
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{target} cannot be made: {error.filename} is a file. Name another output."
    return f"{target} cannot be written ({error.strerror or error}). Name another output."


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

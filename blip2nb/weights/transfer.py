"""One file from a server: resumed, checked, and given its name only when it is complete."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from blip2nb.bars import progress_bar

log = logging.getLogger("blip2nb")

TIMEOUT = 10.0
"""Seconds to wait for a server to answer, and for the next bytes of an answer: as long as huggingface_hub waits."""

# How often in a row an attempt may bring nothing new, and the seconds before the next, doubled each time: 15 in all.
# Chosen: what a router takes to come back is waited for, and nobody waits a minute to be told that there is no network.
_ATTEMPTS, _PAUSE = 5, 0.5
_BLOCK = 1 << 18  # bytes read at once: a connection of 1 GB/s then asks 4,000 times a second, which costs nothing
_BUSY = (408, 429, 500, 502, 503, 504)  # answers that may differ in a moment
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a file size limit has no room left

_T = TypeVar("_T")


class Broken(OSError):
    """The connection broke or timed out, or the server was busy: another attempt may succeed."""


class Remote(NamedTuple):
    """A file as its server describes it. `mark` is the header ETag, else Last-Modified, else empty; so may `md5` be."""

    url: str
    size: int
    mark: dict[str, str]
    md5: str


def look(url: str, timeout: float) -> Remote:
    """Ask a server to describe a file, without fetching it.

    Raises:
        OSError: the server cannot be reached, refuses, or does not say how long the file is.
    """
    with _ask("HEAD", url, timeout, {}) as answer:
        said = answer.headers
        if not (size := said.get("Content-Length", "")).isdigit() or int(size) == 0:
            raise OSError(f"{url}: expected a file of known length, found {size or 'none'}")
        mark = next(({name: said[name]} for name in ("ETag", "Last-Modified") if said[name]), {})
        hashes = [*said.get_all("x-goog-hash", []), f"md5={said['Content-MD5']}"]  # crc32c=…,md5=…
        md5 = re.search(r"\bmd5=([A-Za-z0-9+/]{22}==)", ",".join(hashes))
        return Remote(url, int(size), mark, base64.b64decode(md5[1]).hex() if md5 else "")


def fetch_file(url: str, path: Path) -> None:
    """Download a file, resuming an earlier attempt. It gets its name only when it is complete.

    Length is always checked, and MD5 if the server gives it. A second process that wants the same file waits.

    Raises:
        OSError: the server cannot be reached, refuses, breaks off or sends something else than announced, or the disk
            is full. The partial download stays if it can be resumed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if path.exists():
            return  # another process has fetched it meanwhile
        remote = persist(path.name, lambda: look(url, TIMEOUT))
        # named after the description, so that different content on the server never continues it
        partial = path.with_name(f"{path.name}.{hashlib.sha256(repr(remote).encode()).hexdigest()[:12]}.partial")
        for older in leftovers(path):
            if older != partial:
                older.unlink()
        with room(path.name, remote.size - _size(partial), path.parent):
            try:
                persist(path.name, lambda: _receive(remote, partial, path.name), lambda: _size(partial))
            except Broken as error:
                found = f"expected {remote.size:,} bytes, found {_size(partial):,} so far ({error})"
                raise OSError(f"{path.name}: {found}; run again to resume") from error
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
                if remote.md5:  # hashed now, so each byte once, however many attempts and processes it took
                    md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
                    if md5 != remote.md5:
                        raise _useless(partial, f"{path.name} came damaged", f"MD5 {remote.md5}", md5)
        partial.replace(path)


def leftovers(path: Path) -> list[Path]:
    """List what unfinished downloads of a file left beside it, those of earlier versions of the kit included."""
    return sorted(path.parent.glob(f"{path.name}.*partial*"))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of a download."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being fetched by another process; waiting for it", path.name)
        lock.acquire()
    try:
        yield
        with contextlib.suppress(OSError):  # the file is there now, so nobody who still waits will write
            Path(lock.lock_file).unlink()
    finally:
        lock.release()


@contextlib.contextmanager
def room(name: str, needed: int, folder: Path) -> Iterator[None]:
    """Refuse bytes that do not fit on a folder's disk, at once or when it fills up meanwhile.

    Raises:
        OSError: they do not fit.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        if needed > shutil.disk_usage(place).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = f"{name} ({needed:,} bytes to come) does not fit on the disk of {folder}"
        raise OSError(f"{what}; make room there and run again to resume") from error


def persist(name: str, work: Callable[[], _T], reached: Callable[[], int] = lambda: 0) -> _T:
    """Repeat work while connections break, until several attempts in a row have brought nothing new.

    Args:
        name: what is being fetched, for the log.
        work: one attempt.
        reached: how far the attempts have come.

    Raises:
        Broken: the last attempt's.
    """
    furthest, idle = reached(), 0
    while True:
        try:
            return work()
        except Broken as error:
            idle = 0 if reached() > furthest else idle + 1
            furthest = max(furthest, reached())  # a server without ranges starts over every time
            if idle == _ATTEMPTS:
                raise
            log.info("%s: %s; trying again", name, error)
        time.sleep(_PAUSE * 2**idle)


def _receive(remote: Remote, partial: Path, name: str) -> None:
    """Make one attempt: ask for the missing bytes, check that they belong to the others, and append them."""
    have = _size(partial)
    if have == remote.size:
        return
    changed = f"{name} has changed on the server, or the server is wrong"
    strong = [mark for mark in remote.mark.values() if not mark.startswith("W/")]  # a weak one is not allowed here
    rest = {"Range": f"bytes={have}-"} | ({"If-Range": strong[0]} if strong else {})
    try:
        answer = _ask("GET", remote.url, TIMEOUT, rest if have else {})
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        raise _useless(partial, changed, f"{remote.size:,} bytes", f"none after {have:,}") from error
    with answer:
        start = 0 if answer.status == 200 else have  # 200: the server knows no ranges, and sends all of it
        wanted = remote.mark | {"Content-Length": str(remote.size - start)}
        if answer.status != 200:
            wanted["Content-Range"] = f"bytes {start}-{remote.size - 1}/{remote.size}"
        for header, value in wanted.items():
            found = answer.headers.get(header, value if header in remote.mark else "none")  # 206 may leave out the mark
            if found != value:
                raise _useless(partial, changed, f"{header} {value}", found)
        scale = {"total": remote.size, "initial": start, "unit": "B", "unit_scale": True}
        with open(partial, "ab") as file, progress_bar(desc=name, leave=False, **scale) as bar:
            file.truncate(start)
            for block in _blocks(answer):
                file.write(block)
                file.flush()  # so that it stays, whatever ends this process
                bar.update(len(block))
            if _size(partial) < remote.size:
                raise Broken("the connection ended early")
            bar.leave = True  # of several attempts the last one's bar stays on screen


def _size(partial: Path) -> int:
    return partial.stat().st_size if partial.exists() else 0


def _useless(partial: Path, problem: str, expected: str, found: str) -> OSError:
    """Delete a download that cannot become the file, and say why."""
    partial.unlink(missing_ok=True)
    end = "the partial download is deleted, run again to start over"
    return OSError(f"{problem}: expected {expected}, found {found}; {end}")


def _ask(method: str, url: str, timeout: float, headers: dict[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in _BUSY:
            raise Broken(reason(error)) from error
        raise
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"{url}: {reason(error)}") from error
    coding = answer.headers.get("Content-Encoding", "identity")
    page = answer.headers.get_content_type() == "text/html"
    if page or coding != "identity":
        answer.close()
        what = "a web page; the network may want a login first" if page else f"one encoded as {coding}"
        raise OSError(f"{url}: expected a plain file, found {what}")
    return answer


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield bytes as soon as they come, so that none are lost when the connection breaks."""
    try:
        while block := answer.read1(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise Broken(reason(error)) from error


def reason(error: BaseException) -> str:
    """Put an error on one line, without a full stop; a server's refusal with the address."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.url}: {error}"
    text = str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")

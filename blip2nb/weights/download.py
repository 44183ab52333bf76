"""A released variant's files: where they are already, and how those that are not here are fetched."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fnmatch
import hashlib
import http.client
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.bars import progress_bar
from blip2nb.errors import RequestError
from blip2nb.variants import Variant
from blip2nb.weights.sources import Files, holds_weights

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger("blip2nb")

LAVIS_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
_TIMEOUT = 10.0  # seconds to wait for a server to answer, and for the next bytes of an answer
_ATTEMPTS = 5  # how often in a row an attempt may bring nothing new
_PAUSE = 0.5  # seconds before the next attempt; twice as long after each that brought nothing
_BLOCK = 1 << 18  # bytes read at once
_BUSY = (408, 429, 500, 502, 503, 504)  # answers that may be another one in a moment
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a file size limit has no room left


def cache_folder() -> Path:
    """Where the kit keeps twins and downloads: $BLIP2NB_CACHE, or the user's cache folder."""
    if "BLIP2NB_CACHE" in os.environ:
        return Path(os.environ["BLIP2NB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blip2nb"


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the three things a released variant is made of.

    `name` is what a user knows it as, a folder's with a slash at its end. `path` is where it is or will be, and
    `where` says that in words. `size` is in bytes, of a folder only what would be read; None when it is not here.
    """

    name: str
    path: Path
    where: str
    size: int | None
    here: bool
    url: str


def locate(variant: Variant) -> list[Part]:
    """Where a released variant's vision tower, language model and checkpoint are, or would come from.

    Looks into the caches of LAVIS, of Hugging Face and of the kit. Asks no server.
    """
    return [_lavis_part("eva_vit_g.pth"), _language_part(variant), _lavis_part(variant.checkpoint)]


def _lavis_part(name: str) -> Part:
    """LAVIS downloads into PyTorch's hub folder, the kit into its own cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    hub = Path(os.environ.get("TORCH_HOME", cache / "torch")).expanduser() / "hub"
    own = cache_folder() / "lavis" / name
    url = LAVIS_URL + name
    for path, where in ((hub / "checkpoints" / name, "LAVIS's download cache"), (own, "the kit's cache")):
        if path.is_file():
            return Part(name, path, where, path.stat().st_size, here=True, url=url)
    return Part(name, own, f"to be fetched from {url}", None, here=False, url=url)


def _language_part(variant: Variant) -> Part:
    """In the Hugging Face cache; or in the kit's, where earlier versions put it."""
    from huggingface_hub import constants, try_to_load_from_cache

    name, url = f"{variant.language_folder}/", f"{constants.ENDPOINT}/{variant.language_model}"
    config = try_to_load_from_cache(variant.language_model, "config.json")
    if isinstance(config, str) and _whole(Path(config).parent):
        folder = Path(config).parent
        return Part(name, folder, "the Hugging Face cache", _folder_size(folder), here=True, url=url)
    own = cache_folder() / "hub" / variant.language_folder
    if _whole(own):
        return Part(name, own, "the kit's cache", _folder_size(own), here=True, url=url)
    place = Path(constants.HF_HUB_CACHE) / f"models--{variant.language_model.replace('/', '--')}"
    return Part(name, place, f"to be fetched from {url}", None, here=False, url=url)


def _whole(folder: Path) -> bool:
    """Whether a hub folder holds a configuration, a tokenizer with its settings, and weights with all their shards."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer_config.json")):
        return False
    slow = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    return (slow or (folder / "tokenizer.json").is_file()) and holds_weights(folder)


def _folder_size(folder: Path) -> int:
    """Bytes of what would be read of a hub folder; in the Hugging Face cache, of what its links lead to."""
    names = _wanted(path.name for path in folder.iterdir() if path.is_file())
    return sum((folder / name).stat().st_size for name in names)


def _wanted(names: Iterable[str]) -> list[str]:
    """Of a hub folder's files those that are read: configuration, tokenizer, and the weights in one form only."""
    top = [name for name in names if "/" not in name]
    small = [n for n in top if n.endswith((".json", ".txt", ".model")) and not n.endswith(".index.json")]
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = f"{stem}.{ending}", f"{stem}.{ending}.index.json"
        if single in top:
            return [*small, single]
        if index in top:
            return [*small, index, *fnmatch.filter(top, f"{stem}-*.{ending}")]
    return small


def remote_size(part: Part, timeout: float = 5.0) -> int | None:
    """How many bytes the server has of a part; None if that cannot be learned within `timeout` seconds."""
    sizes: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            sizes.put(_announced_size(part, timeout))
        except Exception:  # whatever keeps a server from answering: the size is not known
            log.debug("the size of %s is not known", part.name, exc_info=True)
            sizes.put(None)

    # in a thread that may be left behind, since looking up a server's address obeys no timeout
    threading.Thread(target=ask, daemon=True).start()
    try:
        return sizes.get(timeout=timeout)
    except queue.Empty:
        return None


def _announced_size(part: Part, timeout: float) -> int | None:
    if part.name.endswith("/"):
        return sum(file.size or 0 for file in _hub_files(part, timeout))
    with _ask(part.url, timeout, {}, method="HEAD") as answer:
        length = answer.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None


def released_files(variant: Variant) -> Files:
    """A released variant's own files, fetched where they are not at hand.

    Raises:
        RequestError: some are missing and cannot be fetched; the sentence says which and how to give them.
    """
    parts = locate(variant)
    if not all(part.here for part in parts):
        _fetch(variant, [part for part in parts if not part.here])
        parts = locate(variant)
    vision, language, checkpoint = parts
    return Files(vision=vision.path, language=language.path, checkpoints=(checkpoint.path,))


def _fetch(variant: Variant, missing: list[Part]) -> None:
    """Fetch what is missing, after a look whether all the servers can be reached at all."""
    try:
        for part in missing:
            _announced_size(part, _TIMEOUT)
        for part in missing:
            if part.name.endswith("/"):
                _fetch_language(part)
            else:
                fetch_file(part.url, part.path)
        left = [part.name for part in locate(variant) if not part.here]
        if left:
            raise OSError(f"{', '.join(left)} came, but something in it is missing or damaged")
    except OSError as error:
        names = ", ".join(part.name for part in locate(variant) if not part.here)
        raise RequestError(
            f"{variant.name} needs files that are not on this machine and could not be fetched ({_reason(error)}): "
            f"{names}. Put them into one folder, {variant.language_folder}/ being {variant.language_model} with its "
            "tokenizer, and give that folder as source."
        ) from error


def _reason(error: BaseException) -> str:
    """An error on one line, without a full stop; a server's refusal with the address."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.url}: {error}"
    text = str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")


# -- the language model, from the hub


def _fetch_language(part: Part) -> None:
    """Fetch what is read of a language model into the Hugging Face cache. Files that are whole there are not asked for.

    One file after the other, where `snapshot_download` takes several threads: those would have to finish their files,
    gigabytes each, before Ctrl-C has an effect. Within this call the library goes on after a broken connection.
    """
    files = _hub_files(part, _TIMEOUT)
    blobs = part.path / "blobs"  # the cache calls a file by its hash
    here = [file for file in files if (blobs / str(file.lfs.sha256 if file.lfs else file.blob_id)).exists()]
    _check_room(part.name, sum(file.size or 0 for file in files if file not in here), part.path)
    for file in files:
        _fetch_hub_file(part, file.rfilename)


def _fetch_hub_file(part: Part, name: str) -> None:
    from huggingface_hub import hf_hub_download

    for attempt in range(_ATTEMPTS):
        try:
            with _hub_errors(part):
                hf_hub_download(_repository(part), name, etag_timeout=_TIMEOUT)
            return
        except _Broken as error:
            if attempt == _ATTEMPTS - 1:
                raise
            log.info("%s: %s; trying again", name, error)
            time.sleep(_PAUSE * 2**attempt)


def _hub_files(part: Part, timeout: float) -> list[RepoSibling]:
    """What the hub has of a language model that would be read."""
    from huggingface_hub import HfApi

    with _hub_errors(part):
        found = HfApi().model_info(_repository(part), files_metadata=True, timeout=timeout)
    files = {file.rfilename: file for file in found.siblings or []}
    return [files[name] for name in _wanted(files)]


def _repository(part: Part) -> str:
    from huggingface_hub import constants

    return part.url.removeprefix(f"{constants.ENDPOINT}/")


@contextlib.contextmanager
def _hub_errors(part: Part) -> Iterator[None]:
    """The hub's library lets errors of its HTTP library through; which one that is depends on its version."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OSError(_no_room(part.name, part.path)) from error
        raise
    except Exception as error:
        raise _Broken(f"{part.url}: {_reason(error)}") from error


# -- LAVIS's files


class _Broken(OSError):
    """The connection broke or timed out, or the server was busy: another attempt may do."""


@dataclasses.dataclass(frozen=True)
class _Remote:
    """Which file on the server a download is part of. Text that the server does not give is empty; MD5 is in hex."""

    url: str
    total: int
    etag: str = ""
    modified: str = ""
    md5: str = ""

    def same(self, other: _Remote) -> bool:
        """Whether it is still that file, as far as the server lets one know."""
        if self.total != other.total:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.modified and other.modified) or self.modified == other.modified

    def going_on(self, have: int) -> dict[str, str]:
        """The headers to ask for the rest with, or for all of it if the file has changed."""
        validator = self.modified if self.etag.startswith("W/") else self.etag or self.modified
        return {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})


def fetch_file(url: str, path: Path) -> None:
    """Download a file, going on from what an earlier attempt left. It has its name only when all of it is there.

    Beside the target `.partial` holds what has come and `.partial.json` which file on the server that is part of, so
    that the halves of two different files are never joined. The length is always checked, and the MD5 where the server
    gives one. A second process that wants the same file waits for the first.

    Raises:
        OSError: the server cannot be reached, refuses, breaks off or sends something else than announced, or the disk
            is full. What came so far stays if it can be gone on with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if path.exists():
            return  # another process has fetched it meanwhile
        partial = _Partial(url, path)
        _complete(partial)
        partial.finish()


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
        with contextlib.suppress(OSError):  # the file is there now, so that nobody who still waits will write
            Path(lock.lock_file).unlink()
    finally:
        lock.release()


def _complete(partial: _Partial) -> None:
    """Attempt after attempt, until all of it is there or several in a row have brought nothing new."""
    furthest, idle = partial.size() if partial.known() else 0, 0
    while not partial.complete():
        reason = "the connection ended early"
        try:
            _receive(partial)
        except _Broken as error:
            reason = _reason(error)
        if partial.complete():
            return
        idle = 0 if partial.size() > furthest else idle + 1  # a server without ranges starts over every time
        furthest = max(furthest, partial.size())
        if idle == _ATTEMPTS:
            known = partial.known()
            found = f"expected {known.total:,} bytes, found {partial.size():,} so far" if known else "nothing came"
            raise OSError(f"{partial.name}: {found} ({reason}); run again to go on")
        log.info("%s: %s; trying again", partial.name, reason)
        time.sleep(_PAUSE * 2**idle)


def _receive(partial: _Partial) -> None:
    """One attempt: ask for what is missing, see that it fits what is here, and keep what comes."""

    known, have = partial.known(), partial.size()
    try:
        answer = _ask(partial.url, _TIMEOUT, known.going_on(have) if known else {})
    except urllib.error.HTTPError as error:
        if error.code != 416 or known is None:
            raise
        partial.drop()  # there is nothing from here on
        if not partial.begun:
            raise _Broken("it has changed on the server") from error
        raise OSError(
            f"{partial.name}: expected {known.total:,} bytes, found {have:,} and none behind them; what had come was "
            "deleted, run again to start anew"
        ) from error
    with answer:
        if known and answer.status == 206:
            _check_rest(partial, known, have, answer)
            remote = known
        else:
            remote, have = _announced(partial, answer), 0
        _check_room(partial.name, remote.total - have, partial.path.parent)
        if have == 0:
            partial.begin(remote)
        with progress_bar(
            total=remote.total, initial=have, unit="B", unit_scale=True, desc=partial.name, leave=False
        ) as bar:
            partial.write(_blocks(answer), remote, bar.update)
            bar.leave = partial.complete()  # of several attempts the last one's bar stays on screen


def _ask(url: str, timeout: float, headers: Mapping[str, str], method: str = "GET") -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in _BUSY:
            raise _Broken(_reason(error)) from error
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"{url}: {_reason(error)}") from error
    if answer.headers.get_content_type() == "text/html":
        answer.close()
        raise OSError(f"{url} answered with a web page instead of a file; the network may want a login first")
    return answer


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """What comes, as soon as it comes, so that nothing is lost when the connection breaks."""
    try:
        while block := answer.read1(_BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(_reason(error)) from error


def _announced(partial: _Partial, answer: http.client.HTTPResponse) -> _Remote:
    """What a server says of the whole file that it is about to send."""
    coding = answer.headers.get("Content-Encoding", "identity")
    if answer.status != 200 or answer.length is None or coding != "identity":
        raise OSError(
            f"{partial.name}: expected a file of a known length, found an answer {answer.status} of "
            f"{'unknown length' if answer.length is None else f'{answer.length:,} bytes'}, encoded as {coding}"
        )
    etag, modified = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
    return _Remote(partial.url, answer.length, etag, modified, _md5(answer))


def _md5(answer: http.client.HTTPResponse) -> str:
    """The file's MD5 in hex, if the server gives it: `x-goog-hash: crc32c=…,md5=…` or `Content-MD5: …`."""
    hashes = ",".join(answer.headers.get_all("x-goog-hash", []))
    found = re.search(r"\bmd5=([^,\s]+)", hashes)
    try:
        digest = base64.b64decode(found[1] if found else answer.headers.get("Content-MD5", ""), validate=True)
    except ValueError:
        return ""
    return digest.hex() if len(digest) == 16 else ""


def _check_rest(partial: _Partial, known: _Remote, have: int, answer: http.client.HTTPResponse) -> None:
    """That what a server sends from the middle on belongs to what is here. If not, what is here is of no use."""
    said = answer.headers.get("Content-Range", "")
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", said)
    etag, modified = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
    if span and not known.same(_Remote(known.url, int(span[3]), etag, modified)):
        partial.drop()
        raise _Broken("it has changed on the server")
    if not span or int(span[1]) != have:
        partial.drop()
        raise OSError(
            f"{partial.name}: expected bytes {have}-{known.total - 1}/{known.total}, found {said or 'none'}; what had "
            "come was deleted, run again to start anew"
        )


def _check_room(name: str, needed: int, folder: Path) -> None:
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{_no_room(name, folder)}: expected {needed:,} bytes, found {free:,}")


def _no_room(name: str, folder: Path) -> str:
    return f"{name} does not fit on the disk of {folder}, so make room there and run again to go on"


class _Partial:
    """What has come of a file and, in JSON beside it, which file on the server it is part of."""

    def __init__(self, url: str, target: Path):
        self.url = url
        self.name = target.name
        self.path = target.with_name(f"{target.name}.partial")
        self._target = target
        self._notes = target.with_name(f"{target.name}.partial.json")
        self.begun = False  # whether what is here came through this object
        self._md5, self._hashed = hashlib.md5(usedforsecurity=False), 0

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def known(self) -> _Remote | None:
        """What it is part of, if it can be gone on with."""
        try:
            remote = _Remote(**json.loads(self._notes.read_text(encoding="utf-8")))
            return remote if remote.url == self.url and 0 < self.size() <= remote.total else None
        except (OSError, ValueError, TypeError):
            return None

    def complete(self) -> bool:
        known = self.known()
        return known is not None and self.size() == known.total

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)  # first: notes of one file must never lie beside bytes of another
        self._notes.unlink(missing_ok=True)

    def begin(self, remote: _Remote) -> None:
        self.drop()
        self._notes.write_text(json.dumps(dataclasses.asdict(remote), indent=1), encoding="utf-8")
        self.begun = True
        self._md5, self._hashed = hashlib.md5(usedforsecurity=False), 0

    def write(self, blocks: Iterable[bytes], remote: _Remote, moved: Callable[[int], object]) -> None:
        """Add what comes. Unbuffered: what was written is there, whatever ends this process."""
        self._catch_up()
        with open(self.path, "ab", buffering=0) as file:
            for block in blocks:
                if self._hashed + len(block) > remote.total:
                    self.drop()
                    raise OSError(f"{self.name}: expected {remote.total:,} bytes, found more; run again to start anew")
                rest = memoryview(block)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError as error:
                    if error.errno in _FULL:
                        raise OSError(_no_room(self.name, self.path.parent)) from error
                    raise
                self._md5.update(block)
                self._hashed += len(block)
                moved(len(block))

    def finish(self) -> None:
        """Check it, and give it its name."""
        self._catch_up()
        known = self.known()
        if known and known.md5 and known.md5 != self._md5.hexdigest():
            self.drop()
            raise OSError(
                f"{self.name} came damaged: expected MD5 {known.md5}, found {self._md5.hexdigest()}; it was deleted, "
                "run again to start anew"
            )
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())
        self.path.replace(self._target)
        self._notes.unlink(missing_ok=True)

    def _catch_up(self) -> None:
        """Hash what an earlier attempt left."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            file.seek(self._hashed)
            while block := file.read(_BLOCK):
                self._md5.update(block)
                self._hashed += len(block)

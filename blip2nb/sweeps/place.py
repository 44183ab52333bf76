"""Where a sweep's runs go, a folder or an address that fsspec knows, and how a run gets there whole or not at all.

A run is made in a folder of its own that nothing takes for a run, and takes its place when it is finished. What lets it
be recognised later, `sweep.json`, is part of it.
"""

from __future__ import annotations

import contextlib
import html
import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blip2nb.errors import RequestError
from blip2nb.forms import dumps, reads
from blip2nb.report.runs import outputs_folder
from blip2nb.report.sweep import Outcome
from blip2nb.sweeps.leftovers import end_leftovers
from blip2nb.weights.writer import sync
from blip2nb.whole import write_whole

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger("blip2nb")

RECORD = "sweep.json"
HIDDEN = ".sweep"
FAILED = "--failed"
"""Behind a run's name: the folder of its last failure, beside that of its last success."""

_CARRIED = ("model", "tape.safetensors", "tape-images.safetensors", "run.json")


class Place(Protocol):
    """Where runs go. Records, reports and pages are named relative to it."""

    address: str

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Held by a sweep while it runs. Raises RequestError where another one holds it."""

    def records(self) -> dict[str, Outcome]:
        """What sweep.json says, of every run that is there whole, by folder."""

    def read(self, path: str) -> bytes | None:
        """The content of a file of a run, such as tiny-blip2-opt-2.7b/report.json; None where there is none."""

    def begin(self, name: str, key: str, overwrite: bool = False) -> Path:
        """A folder to make a run in: `<this>/<name>` will be the run. Holds what is of use of an earlier one."""

    def publish(self, workshop: Path, name: str, record: Outcome) -> None:
        """Put a finished run, or a failed one, in its place, and remove the folder that it was made in."""

    def write(self, texts: Mapping[str, str]) -> None:
        """Write files over all runs, each whole or not at all."""


def place(output: str | Path = "") -> Place:
    """The place meant by --output: a folder, the checkout's outputs/ unless given, or an address such as s3://….

    Raises:
        RequestError: fsspec does not know such addresses, or lacks a package for them; or it holds a password.
    """
    if "://" not in str(output):
        return Folder(outputs_folder(output))
    return Address(str(output))


class Folder:
    """A folder of this machine, or one that all machines share."""

    def __init__(self, root: Path):
        self.root = root
        self.address = str(root)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        hidden = self.root / HIDDEN
        hidden.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(hidden / "lock", timeout=0):
                self._recover()
                try:
                    yield
                finally:
                    (hidden / "lock").unlink()
        except Timeout as error:
            raise RequestError(
                f"Another sweep is writing to {self.root}. Wait for it, or name another folder as output."
            ) from error
        finally:
            with contextlib.suppress(OSError):  # something was left for the next sweep to go on with
                hidden.rmdir()

    def _recover(self) -> None:
        """A run that was about to be replaced when its sweep was killed gets its place back. A folder that its run had
        left by then is of no use."""
        for path in (self.root / HIDDEN).glob("*"):
            name = path.name.rpartition(".")[0]
            if path.name.endswith(".old") and not (self.root / name).exists():
                path.rename(self.root / name)
            elif path.is_dir() and not (path / name).exists():
                shutil.rmtree(path)

    def records(self) -> dict[str, Outcome]:
        paths = sorted(self.root.glob(f"*/{RECORD}"))
        return _read_records((path.parent.name, path.read_bytes()) for path in paths)

    def read(self, path: str) -> bytes | None:
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def begin(self, name: str, key: str, overwrite: bool = False) -> Path:
        short = key[:12]  # chosen: 48 bits tell a run's own parameters apart, and leave room for its name in a path
        workshop = self.root / HIDDEN / f"{name}.{short}"
        for old in workshop.parent.glob(f"{name}.{'?' * len(short)}"):  # made with other parameters, and not finished
            if old != workshop:
                end_leftovers(old)
                shutil.rmtree(old)
        workshop.mkdir(parents=True, exist_ok=True)
        end_leftovers(workshop)
        run, standing = workshop / name, self.root / name
        run.mkdir(exist_ok=True)
        ours = (standing / RECORD).is_file()  # then its model is made anew; one that somebody converted is kept
        for one in () if overwrite else _CARRIED[ours:]:
            if (standing / one).exists() and not (run / one).exists():
                _same(standing / one, run / one)
        return workshop

    def publish(self, workshop: Path, name: str, record: Outcome) -> None:
        run, final = workshop / name, self.root / record.folder
        _settle(run, record)
        old = self.root / HIDDEN / f"{record.folder}.old"
        if final.exists():
            final.rename(old)
        run.rename(final)
        sync(self.root)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(workshop)
        if record.state == "finished":
            shutil.rmtree(self.root / f"{name}{FAILED}", ignore_errors=True)

    def write(self, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            write_whole(self.root / name, text)


class Address:
    """A place that fsspec reaches. Runs are made in a temporary folder of the machine that runs them and then copied,
    the record last: there is no renaming on an object store, so that a run counts when its record is there."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        try:
            self._connect()
        except (ValueError, ImportError, OSError) as error:
            raise RequestError(f"output {_without_password(address)} cannot be written to: {error}") from error
        if "@" in address.split("://", 1)[1].split("/")[0] and ":" in address.split("://", 1)[1].split("@")[0]:
            raise RequestError(
                f"output {_without_password(address)} holds a password, and would be kept in notebooks. Leave it "
                "out and give it to fsspec: in its configuration, or in the environment."
            )

    def _connect(self) -> tuple[AbstractFileSystem, str]:
        """The file system and the path on it, from fsspec at each use. A run takes minutes to hours, and an FTP server
        ends a connection that is idle for that long: fsspec keeps none of those, so that this is a new one. Of an
        object store it gives the same client again, which connects by itself."""
        import fsspec

        files, root = fsspec.core.url_to_fs(self.address)
        return files, root

    def __reduce__(self) -> tuple[Any, ...]:
        return Address, (self.address,)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield  # an object store has none: two sweeps at once write each run whole, the later one last

    def records(self) -> dict[str, Outcome]:
        files, root = self._connect()
        files.invalidate_cache()
        found = files.glob(f"{root}/*/{RECORD}")
        return _read_records((path.rsplit("/", 2)[-2], files.cat_file(path)) for path in sorted(found))

    def read(self, path: str) -> bytes | None:
        files, root = self._connect()
        try:
            return files.cat_file(f"{root}/{path}")
        except FileNotFoundError:
            return None

    def begin(self, name: str, key: str, overwrite: bool = False) -> Path:
        workshop = Path(tempfile.mkdtemp(prefix="blip2nb-"))
        (workshop / name).mkdir()
        return workshop

    def publish(self, workshop: Path, name: str, record: Outcome) -> None:
        files, root = self._connect()
        run, final = workshop / name, f"{root}/{record.folder}"
        _settle(run, record)
        _remove(files, final)
        for path in sorted(run.rglob("*"), key=lambda path: path.name == RECORD):
            if path.is_file():
                target = f"{final}/{path.relative_to(run).as_posix()}"
                _make(files, target.rsplit("/", 1)[0])
                files.put_file(str(path), target)
        shutil.rmtree(workshop)
        if record.state == "finished":
            _remove(files, f"{root}/{name}{FAILED}")

    def write(self, texts: Mapping[str, str]) -> None:
        files, root = self._connect()
        _make(files, root)
        for name, text in texts.items():
            files.pipe_file(f"{root}/{name}", text.encode())


def _make(files: AbstractFileSystem, folder: str) -> None:
    files.invalidate_cache()  # some remember what was there, and take no word for it that it is fine to be
    if not files.exists(folder):
        files.makedirs(folder, exist_ok=True)


def _remove(files: AbstractFileSystem, folder: str) -> None:
    """The record first: what is left of a run that is being removed is none."""
    if files.exists(f"{folder}/{RECORD}"):
        files.rm_file(f"{folder}/{RECORD}")
    if files.exists(folder):
        files.rm(folder, recursive=True)


def _read_records(found: Iterable[tuple[str, bytes]]) -> dict[str, Outcome]:
    """By folder. What another version of the kit has left, or nobody can read, is no record: that run is made again."""
    records = {}
    for folder, text in found:
        try:
            records[folder] = reads(Outcome, text)
        except ValueError as error:
            log.info("%s/%s is not understood (%s); that run is made again", folder, RECORD, error)
    return records


def _without_password(address: str) -> str:
    kind, rest = address.split("://", 1)
    return f"{kind}://{rest.split('@', 1)[-1]}"


def _same(source: Path, target: Path) -> None:
    """The same files under another name. The kit never writes into a file that is there, so that one copy will do."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # not every file system has hard links
            shutil.copy2(one, other)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))


def relocate(run: Path, workshop: Path, address: str) -> None:
    """Have a run say of itself where it will lie, and not where it was made."""
    for path in (*run.glob("*.ipynb"), run / "report.json"):
        if path.is_file():
            text = moved = path.read_text(encoding="utf-8")
            for here, there in zip(_as_written(str(workshop)), _as_written(address), strict=True):
                moved = moved.replace(here, there)
            if moved != text:
                path.write_text(moved, encoding="utf-8")


def _as_written(path: str) -> list[str]:
    """How a path may stand in a JSON file: as it is, in a shell's quotes, in HTML, or as papermill writes a parameter;
    and each of these with its letters beyond ASCII as they are, or escaped."""
    quoted = path.replace("'", shlex.quote("'")[1:-1])
    parameter = path.encode("unicode_escape").decode().replace('"', '\\"')
    forms = (path, quoted, html.escape(path), html.escape(quoted), parameter)
    return [json.dumps(one, ensure_ascii=escaped)[1:-1] for one in forms for escaped in (True, False)]


def _settle(run: Path, record: Outcome) -> None:
    """Give a run its record, and see that all of it is on the disk."""
    (run / RECORD).write_text(dumps(record), encoding="utf-8")
    for path in run.rglob("*"):
        if path.is_file():
            sync(path)
    sync(run)

"""Released files by name: found where people have them, or fetched from real servers that break off, change and lie."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2nb.conversion.files import own_files
from blip2nb.errors import RequestError
from blip2nb.variants import variant
from blip2nb.weights import download, transfer
from blip2nb.weights.download import Part, locate, remote_size
from blip2nb.weights.transfer import fetch_file

CONTENT = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
SIZE = len(CONTENT)


# -- a server


@dataclasses.dataclass
class Shelf:
    """One file on a server, and the manners of that server. `asked` keeps what every request asked for."""

    content: bytes = CONTENT
    headers: dict[str, str] = dataclasses.field(default_factory=lambda: {"ETag": '"first"'})
    ranges: bool = True
    if_range: bool = True
    cuts: list[int] = dataclasses.field(default_factory=list)  # after how many bytes the next answers break off
    broken_by: str = "end"  # how: an end of the connection, a reset, or silence
    announce: int | None = 0  # by how much the announced length is wrong; None: no length is announced
    surplus: bytes = b""  # what follows behind the end of a range
    shift: int = 0  # by how much a range starts elsewhere than asked
    halfway: Callable[[], object] = lambda: None  # called when half of an answer has been sent
    status: int = 200
    silence: threading.Event = dataclasses.field(default_factory=threading.Event)
    asked: list[str] = dataclasses.field(default_factory=list)
    sent: int = 0
    url: str = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.asked.append(" ".join(filter(None, [handler.command, wanted, condition])))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if self.if_range and condition and (condition not in self.headers.values() or condition.startswith("W/")):
            start = 0  # a weak ETag is no condition
        if start >= len(self.content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.end_headers()
            return
        total, body = len(self.content), self.content
        handler.send_response(206 if start else self.status)
        if start:
            first, end = start + self.shift, total + self.shift
            body = self.content[first:end] + self.surplus
            handler.send_header("Content-Range", f"bytes {first}-{end - 1}/{total}")
        if self.announce is not None:
            handler.send_header("Content-Length", str(len(body) + self.announce))
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            cut = self.cuts.pop(0) if self.cuts else None
            send(handler, body[:cut], self.halfway)
            self.sent += len(body[:cut])
            if cut is not None and self.broken_by == "reset":
                reset(handler)
            if cut is not None and self.broken_by == "silence":
                self.silence.wait(10)


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, halfway: Callable[[], object]) -> None:
    handler.wfile.write(body[: len(body) // 2])
    halfway()
    handler.wfile.write(body[len(body) // 2 :])


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    """End a connection the way that an unplugged router does."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@contextlib.contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server on this machine whose every request goes to `answer`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def do_HEAD(self):
            answer(self)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.handle_error = lambda *arguments: None  # type: ignore[method-assign] # broken pipes are meant here
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    with serving(shelf.answer) as address:
        shelf.url = f"{address}/file.pth"
        yield shelf


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.pth"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PAUSE", 0.001)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def partial(target: Path) -> Path:
    (found,) = target.parent.glob(f"{target.name}.*.partial")
    return found


def begun(shelf: Shelf, target: Path, have: int = 100_000) -> None:
    """An attempt that came this far and no further."""
    shelf.cuts = [have] + [0] * 5 if shelf.ranges else [have] * 6
    with pytest.raises(OSError, match="run again to resume"):
        fetch_file(shelf.url, target)
    assert partial(target).read_bytes() == shelf.content[:have]
    shelf.asked.clear()


def half_is_there(target: Path, size: int = SIZE) -> bool:
    return any(path.stat().st_size == size // 2 for path in target.parent.glob("*.partial"))


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"
FETCH = """
import logging, sys
from pathlib import Path
from blip2nb.weights import transfer
transfer._PAUSE = 0.001
logging.basicConfig(level=logging.INFO)
transfer.fetch_file(sys.argv[1], Path(sys.argv[2]))
"""


@contextlib.contextmanager
def child(code: str, *arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another Python process. It does not outlive the test."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | environment) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str], within: float = 30) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def wait_for(what: Callable[[], bool], within: float = 20) -> None:
    end = time.monotonic() + within
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def md5(content: bytes, style: str = "x-goog-hash") -> dict[str, str]:
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {"x-goog-hash": f"crc32c=AAAAAA==,md5={digest}"} if style == "x-goog-hash" else {"Content-MD5": digest}


# -- a file arrives whole or not at all


def test_a_file_arrives_whole_and_leaves_nothing_else(shelf: Shelf, target: Path):
    for _ in range(2):
        fetch_file(shelf.url, target)
        assert target.read_bytes() == CONTENT
        assert names(target.parent) == ["file.pth"]
        assert shelf.asked == ["HEAD", "GET"]


@settings(max_examples=30)
@given(
    cuts=st.lists(st.integers(0, SIZE - 1), max_size=12),
    ranges=st.booleans(),
    broken_by=st.sampled_from(["end", "reset"]),
    headers=st.sampled_from([{}, {"ETag": '"first"'}, {"ETag": 'W/"first"'}, {"Last-Modified": "1"}, md5(CONTENT)]),
)
def test_however_often_and_wherever_it_breaks_off_it_ends_identical(cuts, ranges, broken_by, headers):
    shelf = Shelf(cuts=cuts, ranges=ranges, broken_by=broken_by, headers=headers)
    with serving(shelf.answer) as url, tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_PAUSE", 0)
        target = Path(folder) / "file.pth"
        said = []
        while not target.exists():
            try:
                fetch_file(url, target)
            except OSError as error:
                said.append(str(error))
        assert all(sentence.endswith("run again to resume") for sentence in said)
        assert target.read_bytes() == CONTENT
        assert names(target.parent) == ["file.pth"]
        if ranges and broken_by == "end":
            assert shelf.sent == SIZE  # nothing that came was asked for again


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_keeps_breaking_where_nothing_new_comes_is_given_up(shelf: Shelf, target: Path, ranges: bool):
    shelf.ranges = ranges
    begun(shelf, target)
    shelf.cuts = [0] * 5 if ranges else [50_000, 100_000] * 2 + [100_000]
    with pytest.raises(OSError, match=r"expected 300,000 bytes, found 100,000 so far .*; run again to resume"):
        fetch_file(shelf.url, target)
    assert len(shelf.asked) == 6  # with the HEAD
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT


def test_a_server_that_falls_silent_is_not_waited_for_for_ever(shelf: Shelf, target: Path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.05)
    shelf.broken_by, shelf.cuts = "silence", [1000, 0, 0, 0, 0, 0]
    with pytest.raises(OSError, match=r"found 1,000 so far \(timed out\); run again to resume"):
        fetch_file(shelf.url, target)
    shelf.silence.set()
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT


# -- two halves belong together


@pytest.mark.parametrize(
    ("before", "after", "content", "query"),
    [
        pytest.param({"ETag": '"first"'}, {"ETag": '"second"'}, OTHER, "", id="etag"),
        pytest.param({"ETag": 'W/"first"'}, {"ETag": 'W/"second"'}, OTHER, "", id="weak_etag"),
        pytest.param({"Last-Modified": "1"}, {"Last-Modified": "2"}, OTHER, "", id="last_modified"),
        pytest.param(md5(CONTENT), md5(OTHER), OTHER, "", id="md5"),
        pytest.param({}, {}, OTHER[:50_000], "", id="shorter"),
        pytest.param({}, {}, CONTENT + b"more", "", id="longer"),
        pytest.param({}, {}, OTHER, "?another", id="from_elsewhere"),
    ],
)
def test_what_came_of_another_file_is_removed(
    shelf: Shelf, target: Path, before: dict[str, str], after: dict[str, str], content: bytes, query: str
):
    shelf.headers = before
    begun(shelf, target)
    for name in ("file.pth.partial", "file.pth.partial.json"):  # as earlier versions of the kit left them
        (target.parent / name).touch()
    shelf.headers, shelf.content = after, content
    fetch_file(shelf.url + query, target)
    assert target.read_bytes() == content
    assert shelf.asked == ["HEAD", "GET"]
    assert names(target.parent) == ["file.pth"]


@pytest.mark.parametrize("if_range", [True, False], ids=["if_range_is_honoured", "if_range_is_ignored"])
@pytest.mark.parametrize(
    "change",
    [
        {"headers": {"ETag": '"second"'}, "content": OTHER},
        {"content": OTHER[:200_000]},
        {"content": OTHER[:50_000]},  # less than what came
        {"content": CONTENT + b"more"},
        {"announce": 10},
        {"announce": None},
        {"surplus": b"more"},
        {"shift": -5},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_does_not_belong_to_what_came_is_not_joined(shelf: Shelf, target: Path, change: dict, if_range: bool):
    shelf.if_range, shelf.cuts, shelf.halfway = if_range, [100_000], lambda: vars(shelf).update(change)
    with pytest.raises(OSError, match=r"file\.pth has changed on the server, or .*is deleted, run again to start over"):
        fetch_file(shelf.url, target)
    assert shelf.asked == ["HEAD", "GET", 'GET bytes=100000- "first"']
    assert names(target.parent) == ["file.pth.lock"]
    shelf.halfway, shelf.announce = lambda: None, 0
    fetch_file(shelf.url, target)
    assert target.read_bytes() == shelf.content


def test_a_file_that_was_complete_but_not_renamed_is_taken_as_it_is(shelf: Shelf, target: Path):
    begun(shelf, target)
    partial(target).write_bytes(CONTENT)
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT
    assert shelf.asked == ["HEAD"]


@pytest.mark.parametrize("left", [bytes(1) + CONTENT[1:100_000], bytes(1) + CONTENT[1:], CONTENT + b"more"])
def test_what_was_damaged_on_the_disk_between_two_runs_is_found(shelf: Shelf, target: Path, left: bytes):
    shelf.headers = md5(CONTENT)
    begun(shelf, target)
    partial(target).write_bytes(left)
    with pytest.raises(OSError, match="run again to start over"):
        fetch_file(shelf.url, target)
    assert names(target.parent) == ["file.pth.lock"]


# -- servers that are wrong


def test_less_than_announced_is_not_taken_for_the_file(shelf: Shelf, target: Path):
    shelf.announce = 10
    with pytest.raises(OSError, match=r"expected 300,010 bytes, found none after 300,000"):
        fetch_file(shelf.url, target)
    assert names(target.parent) == ["file.pth.lock"]
    assert shelf.sent == SIZE


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "a plain file, found a web page; the network may"),
        ({"headers": {"Content-Encoding": "gzip"}}, "a plain file, found one encoded as gzip"),
        ({"announce": None}, "a file of known length, found none"),
        ({"announce": -SIZE}, "a file of known length, found 0"),
    ],
    ids=["web_page", "compressed", "unknown_length", "empty"],
)
def test_what_is_not_the_plain_file_is_named_and_harms_nothing(shelf: Shelf, target: Path, wrong: dict, sentence: str):
    begun(shelf, target)
    right = dict(vars(shelf))
    vars(shelf).update(wrong)
    with pytest.raises(OSError, match=f"expected {sentence}"):
        fetch_file(shelf.url, target)
    assert partial(target).read_bytes() == CONTENT[:100_000]
    vars(shelf).update(right)
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT
    assert shelf.asked == ["HEAD", "HEAD", 'GET bytes=100000- "first"']


def test_a_refusal_is_said_at_once_and_a_busy_server_asked_again(shelf: Shelf, target: Path):
    for status, times in ((404, 1), (503, 5)):
        shelf.status = status
        shelf.asked.clear()
        with pytest.raises(OSError, match=str(status)):
            fetch_file(shelf.url, target)
        assert shelf.asked == ["HEAD"] * times


@pytest.mark.parametrize("style", ["x-goog-hash", "Content-MD5"])
def test_a_file_that_came_damaged_is_deleted_and_said_so(shelf: Shelf, target: Path, style: str):
    shelf.headers, shelf.cuts = md5(OTHER, style), [70_000]
    with pytest.raises(OSError, match=rf"damaged: expected MD5 {hashlib.md5(OTHER).hexdigest()}, found .*start over"):
        fetch_file(shelf.url, target)
    assert names(target.parent) == ["file.pth.lock"]
    shelf.headers, shelf.cuts = md5(CONTENT, style), [70_000]
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT


# -- processes that meet, and that end


@pytest.mark.parametrize("killed", [False, True], ids=["both_live", "the_first_is_killed"])
def test_two_processes_that_want_the_same_file_take_turns(shelf: Shelf, target: Path, killed: bool):
    gate = threading.Event()
    shelf.halfway = lambda: gate.wait(20)
    with child(FETCH, shelf.url, target) as first:
        wait_for(lambda: half_is_there(target))
        with child(FETCH, shelf.url, target) as second:
            assert second.stderr is not None
            assert "fetched by another process; waiting for it" in second.stderr.readline()
            if killed:
                first.kill()
            gate.set()
            assert [ended(first)[0], ended(second)[0]] == [-signal.SIGKILL if killed else 0, 0]
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == ["file.pth"]
    assert shelf.asked == ["HEAD", "GET"] + (["HEAD", f'GET bytes={SIZE // 2}- "first"'] if killed else [])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl_c"])
def test_a_process_that_ends_halfway_leaves_what_came_and_the_next_goes_on(
    shelf: Shelf, target: Path, end: signal.Signals
):
    gate, shelf.content = threading.Event(), CONTENT[:2000]  # fewer bytes than a buffer would hold back
    shelf.halfway = lambda: gate.wait(20)
    with child(FETCH, shelf.url, target) as process:
        wait_for(lambda: half_is_there(target, 2000))
        process.send_signal(end)
        status, _, said = ended(process)
    gate.set()
    assert status == -end
    assert ("KeyboardInterrupt" in said) == (end == signal.SIGINT)
    assert partial(target).read_bytes() == CONTENT[:1000]
    fetch_file(shelf.url, target)
    assert target.read_bytes() == shelf.content
    assert shelf.asked[2:] == ["HEAD", 'GET bytes=1000- "first"']


# -- disks that are full


def test_what_does_not_fit_on_the_disk_is_refused_before_any_of_it_comes(shelf: Shelf, target: Path):
    shelf.announce = 10**18
    with pytest.raises(OSError, match=r"file\.pth \(1,0.* bytes to come\) does not fit on the disk of"):
        fetch_file(shelf.url, target)
    assert names(target.parent) == ["file.pth.lock"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only a user who may mount a file system can try a full disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_meanwhile_is_named_and_then_gone_on_with(shelf: Shelf, small_disk: Path):
    target, others = small_disk / "file.pth", small_disk / "others"

    def fill() -> None:
        wait_for(lambda: half_is_there(target))
        others.write_bytes(bytes(300_000))

    shelf.halfway = fill
    with pytest.raises(OSError, match=r"does not fit on the disk of .*; make room there and run again to resume"):
        fetch_file(shelf.url, target)
    have = partial(target).stat().st_size
    assert SIZE // 2 <= have < SIZE
    others.unlink()
    shelf.halfway = lambda: None
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT
    assert shelf.asked[2:] == ["HEAD", f'GET bytes={have}- "first"']


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(shelf: Shelf, target: Path):
    with child(LIMIT.format(200_000) + FETCH, shelf.url, target) as process:
        status, _, said = ended(process)
    assert status == 1
    assert "make room there and run again to resume" in said.splitlines()[-1]
    assert partial(target).read_bytes() == CONTENT[:200_000]
    fetch_file(shelf.url, target)
    assert target.read_bytes() == CONTENT


# -- a released model by its name


XL = variant("blip2-flan-t5-xl")
TWIN = variant("tiny-blip2-flan-t5-xl")


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches of LAVIS, of Hugging Face and of the kit."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("BLIP2NB_CACHE", str(tmp_path / "kit"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path


def test_nothing_is_here_and_it_is_said_where_it_would_come_from(caches: Path):
    vision, language, checkpoint = locate(XL)
    assert [part.name for part in (vision, language, checkpoint)] == ["eva_vit_g.pth", "flan-t5-xl/", XL.checkpoint]
    assert not any(part.here or part.size is not None for part in (vision, language, checkpoint))
    assert vision.path == caches / "kit" / "lavis" / "eva_vit_g.pth"
    assert checkpoint.where == f"to be fetched from {download.LAVIS_URL}{XL.checkpoint}"
    assert language.where == "to be fetched from https://huggingface.co/google/flan-t5-xl"
    assert names(caches) == []  # looking makes nothing


def test_lavis_own_download_is_found_before_the_kits(caches: Path):
    places = {"the kit's cache": caches / "kit" / "lavis", "LAVIS's download cache": caches / "torch/hub/checkpoints"}
    for where, folder in places.items():
        folder.mkdir(parents=True)
        (folder / "eva_vit_g.pth").write_bytes(bytes(7))
        vision = locate(XL)[0]
        assert (vision.where, vision.path, vision.size, vision.here) == (where, folder / "eva_vit_g.pth", 7, True)


def test_a_language_model_from_an_earlier_version_of_the_kit_is_found(caches: Path):
    folder = caches / "kit" / "hub" / "flan-t5-xl"
    shutil.copytree(own_files(TWIN).language, folder)
    (folder / "flax_model.msgpack").write_bytes(bytes(10**6))
    language = locate(XL)[1]
    assert (language.where, language.path) == ("the kit's cache", folder)
    assert language.size == sum(path.stat().st_size for path in folder.iterdir()) - 10**6


@pytest.mark.parametrize("twin", ["tiny-blip2-flan-t5-xl", "tiny-blip2-opt-2.7b"])
def test_a_language_model_counts_as_there_only_when_all_of_it_is(tmp_path: Path, twin: str):
    folder = own_files(variant(twin)).language
    assert download._whole(folder)
    for missing in set(names(folder)) - {"special_tokens_map.json"}:
        copy = tmp_path / missing
        shutil.copytree(folder, copy)
        (copy / missing).unlink()
        assert not download._whole(copy), missing


def test_of_a_hub_folder_one_form_of_the_weights_is_read_and_safetensors_before_the_rest():
    small = ["config.json", "tokenizer_config.json", "merges.txt", "spiece.model"]
    other = ["README.md", ".gitattributes", "flax_model.msgpack", "flax_model.msgpack.index.json", "tf_model.h5"]
    other += ["onnx/config.json", "rust_model.ot", "training_args.bin"]
    safe = ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for forms in (["model.safetensors"], safe, ["pytorch_model.bin"], shards):
        everything = small + other + forms + (shards if "safetensors" in forms[0] else [])
        assert sorted(download._wanted(everything)) == sorted(small + forms)


@dataclasses.dataclass
class Hub:
    """A server with the part of the hub's interface that fetching a model takes, and with LAVIS's files."""

    files: dict[str, bytes]
    lavis: dict[str, bytes] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)  # name: how its first answer breaks off
    claim: int = 0  # added to every size that it says
    halfway: Callable[[str], object] = lambda name: None
    asked: list[str] = dataclasses.field(default_factory=list)

    SHA: ClassVar[str] = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        path = handler.path.split("?")[0]
        self.asked.append(f"{handler.command} {path}")
        kind, _, name = path.rpartition("/")
        if path.startswith("/api/models/google/flan-t5-xl"):
            self._json(handler, self._tree() if "/tree/" in path else self._info())
        elif kind == "/lavis" and name in self.lavis:
            self._file(handler, name, self.lavis[name])
        elif kind.startswith("/google/flan-t5-xl/resolve/") and name in self.files:
            self._file(handler, name, self.files[name])
        else:
            handler.send_error(404)

    def _info(self) -> object:
        siblings = [
            {"rfilename": name, "size": len(content) + self.claim, "blobId": hashlib.sha1(content).hexdigest()}
            for name, content in self.files.items()
        ]
        return {"id": "google/flan-t5-xl", "sha": self.SHA, "siblings": siblings}

    def _tree(self) -> object:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.files.items()
        ]

    def _json(self, handler: http.server.BaseHTTPRequestHandler, content: object) -> None:
        body = json.dumps(content).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _file(self, handler: http.server.BaseHTTPRequestHandler, name: str, content: bytes) -> None:
        wanted = re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        handler.send_response(206 if wanted else 200)
        handler.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        handler.send_header("X-Repo-Commit", self.SHA)
        handler.send_header("Accept-Ranges", "bytes")
        if wanted:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        how = self.broken.pop(name, None)
        body = content[start : len(content) // 2 if how else None]
        send(handler, body, lambda: self.halfway(name))
        if how == "reset":
            reset(handler)


@pytest.fixture
def hub() -> Hub:
    folder = own_files(TWIN).language
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"flax_model.msgpack": bytes(1000), "tf_model.h5": bytes(1000), "README.md": b"# T5"}
    files |= {"pytorch_model.bin": bytes(1000), "tf_model.h5.index.json": b"{}"}
    return Hub(files, lavis={"eva_vit_g.pth": CONTENT, XL.checkpoint: OTHER})


RELEASED = """
import dataclasses, json, sys
from blip2nb.variants import variant
from blip2nb.weights import download, transfer
download.LAVIS_URL = sys.argv[1] + "/lavis/"
transfer._PAUSE = 0.001
model = variant("blip2-flan-t5-xl")
sizes = [download.remote_size(part, 5) for part in download.locate(model)] if "sizes" in sys.argv else []
files = download.released_files(model)
parts = [dataclasses.asdict(part) for part in download.locate(model)]
print(json.dumps({"sizes": sizes, "language": files.language, "parts": parts}, default=str))
"""


@contextlib.contextmanager
def releasing(address: str, folder: Path, *arguments: str, largest_file: int = -1) -> Iterator[subprocess.Popen[str]]:
    """`released_files` in a process of its own, since the hub's library reads its environment once."""
    environment = {name: str(folder / name) for name in ("HF_HOME", "TORCH_HOME", "BLIP2NB_CACHE")}
    environment |= {"HF_HUB_CACHE": str(folder / "hf"), "HF_ENDPOINT": address, "HF_TOKEN": "hf_not_a_real_token"}
    environment |= {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with child(LIMIT.format(largest_file) + RELEASED, address, *arguments, **environment) as process:
        yield process


def test_a_released_model_is_fetched_into_the_caches_though_connections_break_and_then_found(hub: Hub, tmp_path: Path):
    hub.broken = {"model-00001-of-00002.safetensors": "end", "model-00002-of-00002.safetensors": "reset"}
    hub.broken |= {"eva_vit_g.pth": "end", XL.checkpoint: "reset"}
    with serving(hub.answer) as address, releasing(address, tmp_path, "sizes") as process:
        status, out, said = ended(process)
        assert status == 0, said
        assert not hub.broken
        assert "hf_not_a_real_token" not in out + said
        found = json.loads(out)
        _, language, _ = parts = [Part(**part) for part in found["parts"]]
        assert [part.where for part in parts] == ["the kit's cache", "the Hugging Face cache", "the kit's cache"]
        assert [part.size for part in parts] == found["sizes"]
        assert Path(parts[0].path).read_bytes() == CONTENT
        assert Path(parts[2].path).read_bytes() == OTHER

        folder = Path(found["language"])
        assert folder == Path(language.path) == tmp_path / "hf" / "models--google--flan-t5-xl" / "snapshots" / hub.SHA
        assert set(names(folder)) == set(names(own_files(TWIN).language))  # no other form of the weights
        for name in names(folder):
            assert (folder / name).is_symlink()
            assert (folder / name).read_bytes() == hub.files[name]

        hub.asked.clear()
        with releasing(address, tmp_path) as again:
            status, out, said = ended(again)
        assert status == 0, said
        assert json.loads(out)["parts"] == found["parts"]
        assert hub.asked == []


def test_ctrl_c_while_the_language_model_comes_ends_at_once_and_whole_files_are_kept(hub: Hub, tmp_path: Path):
    gate, second = threading.Event(), "model-00002-of-00002.safetensors"
    reached = threading.Event()
    hub.halfway = lambda name: (reached.set(), gate.wait(20)) if name == second else None
    with serving(hub.answer) as address:
        with releasing(address, tmp_path) as process:
            assert reached.wait(20)
            process.send_signal(signal.SIGINT)
            status, _, _ = ended(process, within=5)
        assert status == -signal.SIGINT
        gate.set()
        hub.asked.clear()
        with releasing(address, tmp_path) as process:
            status, _, said = ended(process)
        assert status == 0, said
    assert [line for line in hub.asked if line.startswith("GET /google")] == [
        f"GET /google/flan-t5-xl/resolve/main/{second}"
    ]


def test_a_language_model_that_does_not_fit_on_the_disk_is_refused_before_any_of_it_comes(hub: Hub, tmp_path: Path):
    hub.claim = 10**17
    with serving(hub.answer) as address, releasing(address, tmp_path) as process:
        status, _, said = ended(process)
    assert status == 1
    assert re.search(r"flan-t5-xl/ \(.* bytes to come\) does not fit on the disk", said.splitlines()[-1])
    assert not any("/resolve/" in line for line in hub.asked)


def test_a_disk_that_fills_up_while_the_language_model_comes_is_named(hub: Hub, tmp_path: Path):
    with serving(hub.answer) as address, releasing(address, tmp_path, largest_file=350_000) as process:
        status, _, said = ended(process)
    assert status == 1
    assert re.search(r"flan-t5-xl/ \(.* bytes to come\) does not fit on the disk of", said.splitlines()[-1])


def test_a_hub_without_a_tokenizer_is_said_to_lack_something(hub: Hub, tmp_path: Path):
    del hub.files["tokenizer.json"]
    with serving(hub.answer) as address, releasing(address, tmp_path) as process:
        status, _, said = ended(process)
    assert status == 1
    assert "flan-t5-xl/ came, but something in it is missing" in said.splitlines()[-1]
    assert "give that folder as source" in said.splitlines()[-1]


def test_files_that_cannot_be_had_are_named_with_the_way_to_give_them(caches: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "LAVIS_URL", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(
        RequestError, match=r"eva_vit_g\.pth, opt-6\.7b/, blip2_pretrained_opt6\.7b\.pth.*give that folder as source"
    ):
        own_files(variant("blip2-opt-6.7b"))


def test_the_size_on_a_server_is_unknown_when_it_cannot_be_reached_or_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        for port in (9, silent.getsockname()[1]):
            part = Part("file.pth", Path("file.pth"), "", None, here=False, url=f"http://127.0.0.1:{port}/file.pth")
            started = time.monotonic()
            assert remote_size(part, timeout=0.2) is None
            assert time.monotonic() - started < 30  # and not for ever


def test_the_size_on_a_server_is_what_it_announces(shelf: Shelf):
    part = Part("file.pth", Path("file.pth"), "", None, here=False, url=shelf.url)
    assert remote_size(part) == SIZE
    shelf.status = 404
    assert remote_size(part) is None

"""Fetching a file from a real server on this machine: whole, broken off, gone on with, already complete, changed."""

from __future__ import annotations

import http.server
import os
import threading
from pathlib import Path

import pytest

from blip2nb.errors import RequestError
from blip2nb.models.files import own_files
from blip2nb.variants import variant
from blip2nb.weights import download
from blip2nb.weights.download import fetch_file

CONTENT = os.urandom(300_000)


class _Server(http.server.BaseHTTPRequestHandler):
    ranges = True
    cut_at: int | None = None
    asked: list[str | None]

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if wanted and self.ranges and start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if wanted and self.ranges else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.cut_at])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (_Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}/file.pth"
        yield handler
        running.shutdown()


def test_a_file_arrives_whole(server, tmp_path: Path):
    fetch_file(server.url, tmp_path / "new" / "file.pth")
    assert (tmp_path / "new" / "file.pth").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.pth"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cut_at", [1, 1000, 299_999])
def test_what_broke_off_is_gone_on_with(server, tmp_path: Path, cut_at: int, ranges: bool):
    path = tmp_path / "file.pth"
    server.ranges, server.cut_at = ranges, cut_at
    with pytest.raises(OSError, match=r"run again to go on|IncompleteRead|retrieval incomplete"):
        fetch_file(server.url, path)
    assert not path.exists()
    server.cut_at = None
    fetch_file(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={cut_at}-"]


def test_a_file_that_was_complete_but_not_renamed_is_taken(server, tmp_path: Path):
    (tmp_path / "file.pth.partial").write_bytes(CONTENT)
    fetch_file(server.url, tmp_path / "file.pth")
    assert (tmp_path / "file.pth").read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_more_than_there_is_was_something_else(server, tmp_path: Path):
    (tmp_path / "file.pth.partial").write_bytes(CONTENT + b"more")
    fetch_file(server.url, tmp_path / "file.pth")
    assert (tmp_path / "file.pth").read_bytes() == CONTENT


def test_files_that_cannot_be_had_are_named_with_the_way_to_give_them(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("BLIP2NB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(download, "LAVIS_URL", "http://127.0.0.1:9/")  # nobody listens there
    with pytest.raises(RequestError, match=r"eva_vit_g\.pth.*--source FOLDER"):
        own_files(variant("blip2-opt-6.7b"))


def test_lavis_own_download_is_found(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "eva_vit_g.pth").write_bytes(b"")
    assert download._lavis_file("eva_vit_g.pth") == folder / "eva_vit_g.pth"
    assert download._lavis_file("other.pth").parent.name == "lavis"


def test_a_language_model_counts_as_there_only_when_all_of_it_is(tmp_path: Path):
    folder = own_files(variant("tiny-blip2-flan-t5-xl")).language
    assert download._whole(folder)
    for missing in ("config.json", "tokenizer.json", "model-00002-of-00002.safetensors"):
        copy = tmp_path / missing
        copy.mkdir()
        for path in folder.iterdir():
            if path.name != missing:
                (copy / path.name).write_bytes(path.read_bytes())
        assert not download._whole(copy)

"""What is pushed to the hub can be loaded from there; what goes wrong is one sentence; nobody ever sees the token.

The hub is a stand-in: a server on this machine that keeps what it is given. The client is huggingface_hub's own.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import nbclient
import nbformat
import pytest
import torch
import yaml
from conftest import Outcome, edit_weights, snapshot
from huggingface_hub import ModelCard, metadata_load, snapshot_download
from transformers import Blip2ForConditionalGeneration

from blip2nb import api
from blip2nb.conversion import hub as pushing
from blip2nb.conversion.hub import CARD, FIGURE, README
from blip2nb.display import card
from blip2nb.errors import RequestError
from blip2nb.handles import Report, Run

OPT = "tiny-blip2-opt-2.7b"
TOKEN = "hf_SecretOfTheTestsThatNobodySees"
REPOSITORY = "ada/model"


# -- the stand-in


@dataclasses.dataclass
class Hub:
    """The part of the hub's interface that creating, uploading and downloading a model takes, over Git LFS.

    Attributes:
        repositories: their files, name -> content.
        objects: what was uploaded, by SHA-256, committed or not.
        refusals: the start of "METHOD path" -> the status and the reason that it is answered with.
        asked: "METHOD path" of every request, with the status of its answer.
        halfway: called in the middle of an upload to the storage.
    """

    repositories: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    private: dict[str, bool] = dataclasses.field(default_factory=dict)
    commits: list[list[str]] = dataclasses.field(default_factory=list)
    objects: dict[str, bytes] = dataclasses.field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)
    halfway: Callable[[], object] = lambda: None
    stored: threading.Event = dataclasses.field(default_factory=threading.Event)
    role: str = "write"
    address: str = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        line = f"{request.command} {path}"
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length // 2)
        if request.command == "PUT":
            self.halfway()
        body += request.rfile.read(length - len(body))
        status, content = self._refused(line) or self._signed_in(request) or self._answer(request, path, body)
        self.asked.append(f"{line} {status}")
        self._send(request, status, content)

    def _refused(self, line: str) -> tuple[int, Any] | None:
        return next((answer for start, answer in self.refusals.items() if line.startswith(start)), None)

    def _signed_in(self, request: http.server.BaseHTTPRequestHandler) -> tuple[int, Any] | None:
        given = request.headers.get("Authorization")
        if request.path.startswith("/storage/"):
            return (400, "the storage knows no tokens") if given else None
        open_to_all = "/resolve/" in request.path or request.path == "/api/validate-yaml"
        if given == f"Bearer {TOKEN}" or (open_to_all and given is None):
            return None
        return 401, "Invalid username or password."

    def _answer(self, request: http.server.BaseHTTPRequestHandler, path: str, body: bytes) -> tuple[int, Any]:
        repository = next((name for name in self.repositories if re.search(rf"/{name}(/|\.git/|$)", path)), "")
        files, rest = self.repositories.get(repository, {}), path.partition(repository)[2] if repository else ""
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "ada", "orgs": [], "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            errors = wrong_in(json.loads(body)["content"])
            return (400 if errors else 200), {"errors": [{"message": one} for one in errors], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/storage/"):
            return self._store(path.removeprefix("/storage/"), body)
        if not repository:
            return 404, "Repository not found"
        if rest.startswith("/preupload/"):
            return 200, {"files": [self._planned(files, one) for one in json.loads(body)["files"]]}
        if rest == ".git/info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [self._wanted(one) for one in json.loads(body)["objects"]]}
        if rest.startswith("/commit/"):
            return self._commit(repository, files, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("/tree/"):
            return 200, [self._listed(name, content) for name, content in files.items()]
        if rest.startswith("/resolve/"):
            name = rest.split("/", 3)[3]
            return (200, files[name]) if name in files else (404, "Entry not found")
        siblings = [{"rfilename": name} for name in files]
        told = {"id": repository, "sha": self._sha(), "siblings": siblings, "private": self.private[repository]}
        return 200, told

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "ada":
            return 403, "You don't have the rights to create a model under this namespace"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}
        self.repositories[name] = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return 200, {"url": f"{self.address}/{name}", "name": name}

    @staticmethod
    def _in_lfs(name: str) -> bool:
        return name.endswith((".safetensors", ".png"))

    def _planned(self, files: dict[str, bytes], one: dict[str, Any]) -> dict[str, Any]:
        content = files.get(one["path"])
        oid = None if content is None else sha256(content) if self._in_lfs(one["path"]) else git_hash(content)
        mode = "lfs" if self._in_lfs(one["path"]) else "regular"
        return {"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _wanted(self, one: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.address}/storage/{one['oid']}"}}
        return one if one["oid"] in self.objects else {**one, "actions": upload}

    def _store(self, oid: str, body: bytes) -> tuple[int, Any]:
        if sha256(body) != oid:
            return 400, "not what was announced"
        self.objects[oid] = body
        self.stored.set()
        return 200, ""

    def _commit(self, repository: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(sorted(line["value"]["path"] for line in lines if line["key"] != "header"))
        return 200, {"commitUrl": f"{self.address}/{repository}/commit/{self._sha()}", "commitOid": self._sha()}

    def _sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def _listed(self, name: str, content: bytes) -> dict[str, Any]:
        told: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
        if self._in_lfs(name):
            told["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return told

    def _send(self, request: http.server.BaseHTTPRequestHandler, status: int, content: Any) -> None:
        if status >= 400 and isinstance(content, str):
            content = {"error": content}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        if "/resolve/" in request.path:
            request.send_header("ETag", f'"{sha256(body)}"')
            request.send_header("X-Repo-Commit", self._sha())
        if status == 404:
            code = "EntryNotFound" if "/resolve/" in request.path else "RepoNotFound"
            request.send_header("X-Error-Code", code)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wrong_in(content: str) -> list[str]:
    """The hub's documented rules for a model card's metadata, as far as a card of the kit could break them."""
    block = huggingface_hub.repocard.REGEX_YAML_BLOCK.search(content)
    data = yaml.safe_load(block[2]) if block else None
    if not isinstance(data, dict):
        return ["metadata should be a YAML block of keys and values"]
    one_line = ("library_name", "pipeline_tag", "base_model_relation")
    wrong = [f'"{key}" must be a string' for key in one_line if not isinstance(data.get(key, ""), str)]
    tags = data.get("tags", [])
    wrong += [] if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags) else ['"tags" must be an array']
    bases = data.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    wrong += [f'"base_model" {name} is no id' for name in bases if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
    if data.get("base_model_relation", "finetune") not in ("adapter", "finetune", "merge", "quantized"):
        wrong.append('"base_model_relation" is unknown')
    languages = data.get("language", [])
    languages = [languages] if isinstance(languages, str) else languages
    wrong += [
        f'"language" {code} must be an ISO 639 code' for code in languages if not re.fullmatch("[a-z]{2,3}", code)
    ]
    return wrong


@pytest.fixture
def hub() -> Iterator[Hub]:
    standing = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

        def handle_one(self) -> None:
            with contextlib.suppress(ConnectionError):
                standing.answer(self)

        do_GET = do_HEAD = do_POST = do_PUT = handle_one

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        standing.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield standing
        server.shutdown()


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Hub:
    """This process set up for the stand-in, as HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_TOKEN do it for a new one."""
    settings = {"ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.INFO, "blip2nb")
    return hub


def as_a_user(*arguments: object, hub: str, home: Path, **environment: str) -> subprocess.Popen[str]:
    """The command line as a shell starts it, with a home of its own. An empty value takes a variable away."""
    places = {name: str(home / name) for name in ("HF_HOME", "TORCH_HOME", "BLIP2NB_CACHE")}
    settings = {"HF_ENDPOINT": hub, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": ""}
    unset = dict.fromkeys(("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"), "")
    variables = {**os.environ, **unset, **places, **settings, **environment}
    command = [sys.executable, "-m", "blip2nb.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={name: value for name, value in variables.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate()
    assert TOKEN not in out + err
    assert "Traceback" not in err
    return Outcome(process.returncode, out, err)


def holding_the_token(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def command_lines() -> bytes:
    """Of every process of this machine, as `ps` shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return b"\n".join(found)


@pytest.fixture(scope="module")
def proven_once(converted: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("proof")
    model = Path(shutil.copytree(converted(OPT).model, folder / "model"))
    return api.verify(Run(folder, model), figures=False)


@pytest.fixture
def run(model_copy: Callable[[str], Run]) -> Run:
    """A converted twin with its card, not verified."""
    made = model_copy(OPT)
    for name in CARD:
        (made.model / name).unlink(missing_ok=True)
    assert card.write(made)
    return made


@pytest.fixture
def verified(run: Run, proven_once: Report) -> Run:
    proven_once.save(run.folder)
    assert card.write(run)
    return run


# -- what is pushed is there


def test_what_is_pushed_loads_from_the_hub_byte_for_byte(logged_in: Hub, verified: Run, tmp_path: Path):
    assert pushing.push(verified, REPOSITORY) == f"{logged_in.address}/{REPOSITORY}"
    back = Path(snapshot_download(REPOSITORY, endpoint=logged_in.address, cache_dir=tmp_path / "cache"))
    names = {path.name for path in verified.model.iterdir()}
    assert {path.name for path in back.iterdir()} == names | {".gitattributes"}
    for name in names - {README}:
        assert (back / name).read_bytes() == (verified.model / name).read_bytes(), name
    ours, theirs = (Blip2ForConditionalGeneration.from_pretrained(one).state_dict() for one in (verified.model, back))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_card_on_the_hub_loads_the_model_from_there_and_is_the_kits_own(logged_in: Hub, verified: Run):
    pushing.push(verified, REPOSITORY)
    there = logged_in.repositories[REPOSITORY][README].decode()
    here = (verified.model / README).read_text()
    assert here.count("from_pretrained('model'") == there.count(f"from_pretrained('{REPOSITORY}'") == 2
    assert "from_pretrained('model'" not in there
    assert pushing.unsigned(there) is not None


def test_a_push_after_the_proof_changes_card_and_figure_alone(
    logged_in: Hub, run: Run, proven_once: Report, caplog: pytest.LogCaptureFixture
):
    pushing.push(run, REPOSITORY)
    assert b"Not verified yet" in logged_in.repositories[REPOSITORY][README]
    proven_once.save(run.folder)
    assert card.write(run)
    logged_in.asked.clear()
    pushing.push(run, REPOSITORY)
    assert logged_in.commits[1:] == [sorted(CARD)]
    assert len([line for line in logged_in.asked if line.startswith("PUT")]) == 1  # the figure
    assert b"**Verified" in logged_in.repositories[REPOSITORY][README]
    assert logged_in.repositories[REPOSITORY][FIGURE] == (run.model / FIGURE).read_bytes()

    pushing.push(run, REPOSITORY)
    assert len(logged_in.commits) == 2
    assert "nothing, all of it is there" in caplog.text


def test_weights_of_an_earlier_conversion_do_not_stay_where_they_would_be_loaded(logged_in: Hub, run: Run):
    pushing.push(run, REPOSITORY)
    files = logged_in.repositories[REPOSITORY]
    shards = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    files.update(shards | {"notes.txt": b"theirs"})
    pushing.push(run, REPOSITORY)
    assert logged_in.commits[1:] == [sorted(shards)]
    assert files["notes.txt"] == b"theirs"


def test_hidden_and_unfinished_files_stay_here(logged_in: Hub, run: Run):
    for name in (".env", ".git/config", "model.safetensors.partial", "pictures/one.txt"):
        (run.model / name).parent.mkdir(exist_ok=True)
        (run.model / name).write_text("private")
    pushing.push(run, REPOSITORY)
    there = {name for name, content in logged_in.repositories[REPOSITORY].items() if content == b"private"}
    assert there == {"pictures/one.txt"}


def test_a_private_repository_is_made_so_and_a_public_one_is_not_taken_for_it(logged_in: Hub, run: Run):
    pushing.push(run, REPOSITORY, private=True)
    assert logged_in.private == {REPOSITORY: True}
    logged_in.private[REPOSITORY] = False
    with pytest.raises(RequestError, match="is there already and is public"):
        pushing.push(run, REPOSITORY, private=True)


# -- cards that people wrote


def test_a_card_that_was_edited_on_the_hub_stays_and_the_rest_is_uploaded(
    logged_in: Hub, run: Run, caplog: pytest.LogCaptureFixture
):
    pushing.push(run, REPOSITORY)
    files = logged_in.repositories[REPOSITORY]
    theirs = files[README] = files[README].replace(b"tags:", b"license: mit\ntags:")
    (run.model / "config.json").write_text((run.model / "config.json").read_text() + "\n")
    pushing.push(run, REPOSITORY)
    assert files[README] == theirs
    assert logged_in.commits[1:] == [["config.json"]]
    assert "edited there, which stays" in caplog.text


def test_a_card_that_was_edited_here_goes_as_it_is_also_over_one_that_was_edited_there(logged_in: Hub, run: Run):
    pushing.push(run, REPOSITORY)
    logged_in.repositories[REPOSITORY][README] = b"---\nlicense: mit\n---\nTheirs.\n"
    mine = (run.model / README).read_bytes() + b"\nA word of mine about from_pretrained('model').\n"
    (run.model / README).write_bytes(mine)
    pushing.push(run, REPOSITORY)
    assert logged_in.repositories[REPOSITORY][README] == mine


def test_the_kits_cards_pass_the_hubs_validation_and_go_through_its_library(logged_in: Hub, verified: Run):
    loaded = ModelCard.load(verified.model / README)
    loaded.validate()
    assert logged_in.asked == ["POST /api/validate-yaml 200"]
    assert str(loaded) == (verified.model / README).read_text()
    assert metadata_load(verified.model / README) == loaded.data.to_dict()


def test_a_card_whose_metadata_somebody_broke_is_refused_before_anything_is_uploaded(logged_in: Hub, run: Run):
    (run.model / README).write_text("---\ntags: one\n---\nMine.\n")
    with pytest.raises(RequestError, match=r'does not take .*"tags" must be an array'):
        pushing.push(run, REPOSITORY)
    assert not logged_in.commits
    assert not logged_in.objects


# -- refused before any work


@pytest.mark.parametrize(
    "repository", ["model", "a/b/c", "/model", "user/", "user/two words", "us*er/model", "user/--"]
)
def test_a_wrong_repository_name_is_refused_before_any_work(
    command: Callable[..., Outcome], logged_in: Hub, tmp_path: Path, repository: str
):
    done = command("convert", OPT, "--output", tmp_path / "model", "--push-to-hub", repository)
    assert (done.status, done.out, len(done.said)) == (2, "", 1)
    assert repr(repository) in done.said[0]
    assert list(tmp_path.iterdir()) == []
    assert logged_in.asked == []


@pytest.mark.parametrize(
    ("token", "role", "words"),
    [
        ("", "write", "none was found. Log in with `hf auth login`"),
        ("hf_of_somebody_else", "write", "the hub does not accept the token"),
        (TOKEN, "read", "this one may only read"),
        (f"{TOKEN} {TOKEN}", "write", "a space, a line break"),
        (f"{TOKEN}\n{TOKEN}", "write", "the hub does not accept the token"),
    ],
    ids=["none", "unknown", "reads", "space", "line break"],
)
def test_a_token_that_will_not_do_is_refused_before_any_work(
    command: Callable[..., Outcome], logged_in: Hub, monkeypatch, tmp_path: Path, token: str, role: str, words: str
):
    logged_in.role = role
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "nobody"))
    done = command("convert", OPT, "--output", tmp_path / "model", "--push-to-hub", REPOSITORY)
    assert (done.status, done.out, len(done.said)) == (2, "", 1)
    assert words in done.said[0]
    assert TOKEN not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_proof_failed_is_not_pushed(logged_in: Hub, verified: Run):
    report = verified.folder / "report.json"
    report.write_text(report.read_text().replace('"verdict": "explained"', '"verdict": "diverges"'))
    with pytest.raises(RequestError, match="its proof found that it is not the model that LAVIS runs"):
        pushing.push(verified, REPOSITORY)
    assert logged_in.repositories == {}


# -- what the hub says against it


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("POST /api/repos/create", 401, "does not accept the token"),
        ("POST /api/repos/create", 403, "may not write there"),
        ("POST /api/repos/create", 404, "knows no such user"),
        ("POST /api/repos/create", 429, "too many requests"),
        ("POST /api/repos/create", 503, "answers 503"),
        ("POST /api/models/ada/model/commit", 412, "answers 412 (somebody)"),
        ("POST /ada/model.git", 403, "may not write there"),
        ("PUT /storage", 403, "may not write there"),
    ],
)
def test_a_refusal_is_one_sentence_and_the_same_call_goes_on(
    logged_in: Hub, run: Run, place: str, status: int, words: str
):
    logged_in.refusals[place] = (status, "somebody")
    there = snapshot(run.folder)
    with pytest.raises(RequestError) as refused:
        pushing.push(run, REPOSITORY)
    said = str(refused.value)
    assert re.fullmatch(rf"{REPOSITORY} was not uploaded: .*{re.escape(words)}[^\n]*", said)
    assert f"The converted model stays in {run.model}" in said
    assert TOKEN not in said
    assert "http" not in said
    assert logged_in.address not in "".join(traceback.format_exception(refused.value))
    assert snapshot(run.folder) == there
    logged_in.refusals.clear()
    pushing.push(run, REPOSITORY)
    assert len(logged_in.commits) == 1


def test_a_refusal_that_xets_uploader_meets_is_told_apart_from_a_broken_connection(
    logged_in: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Over Xet, the hub is asked for a token of the storage; a stand-in for the storage itself there is not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    logged_in.refusals["GET /api/models/ada/model/xet-write-token"] = (403, "somebody")
    with pytest.raises(RequestError, match="was not uploaded: the token may not write there"):
        pushing.push(run, REPOSITORY)
    assert "GET /api/models/ada/model/xet-write-token/main 403" in logged_in.asked


def test_a_hub_that_is_not_there_is_said_to_be_so(logged_in: Hub, run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RequestError, match="was not uploaded: the hub cannot be reached"):
        pushing.push(run, REPOSITORY)


# -- the command line, in processes of its own


def test_an_upload_that_was_interrupted_goes_on_with_what_the_hub_lacks(hub: Hub, tmp_path: Path):
    """The first of two shards arrives; while the second is on its way, Ctrl-C. Nobody sees the token, also in `ps`."""
    request = ("convert", OPT, "--output", tmp_path / "model", "--max-shard-size", "700KB")
    request = ("--verbose", *request, "--push-to-hub", REPOSITORY)
    reached, gate, uploads, ps = threading.Event(), threading.Event(), itertools.count(), []

    def halfway() -> None:
        if next(uploads) and hub.stored.wait(20):
            ps.append(command_lines())
            reached.set()
            gate.wait(20)
            raise ConnectionAbortedError  # whatever of it has come meanwhile

    hub.halfway = halfway
    process = as_a_user(*request, hub=hub.address, home=tmp_path)
    assert reached.wait(40)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    gate.set()
    assert (done.status, done.out) == (3, "")
    assert "blip2nb: stopped; the same command goes on from here." in done.err
    assert hub.commits == []
    assert "blip2nb.cli" in ps[0].decode(errors="replace")
    assert TOKEN.encode() not in b"".join(ps)

    first, hub.halfway = set(hub.objects), lambda: None
    written = snapshot(tmp_path / "model")
    hub.asked.clear()
    done = ended(as_a_user(*request, hub=hub.address, home=tmp_path))
    assert done.status == 0, done.err
    assert snapshot(tmp_path / "model") == written
    put = [line for line in hub.asked if line.startswith("PUT")]
    assert put
    assert not [line for line in put if line.split("/storage/")[1].split()[0] in first]
    assert len(hub.commits) == 1
    assert {name for name in hub.repositories[REPOSITORY] if name.endswith(".safetensors")} == {
        path.name for path in (tmp_path / "model").glob("*.safetensors")
    }
    assert holding_the_token(tmp_path) == []


def test_without_a_token_nothing_is_converted(hub: Hub, tmp_path: Path):
    request = ("convert", OPT, "--output", tmp_path / "model", "--push-to-hub", REPOSITORY)
    done = ended(as_a_user(*request, hub=hub.address, home=tmp_path / "home", HF_TOKEN=""))
    assert (done.status, done.out, len(done.said)) == (2, "", 1)
    assert "hf auth login" in done.said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_in_which_the_hub_refused_holds_the_sentence_and_no_token(hub: Hub, tmp_path: Path, monkeypatch):
    hub.refusals["POST /api/repos/create"] = (403, f"you with your {TOKEN}")
    for name, value in {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)
    call = f"import blip2nb\nblip2nb.convert({OPT!r}, output={str(tmp_path / 'model')!r}, push_to_hub={REPOSITORY!r})"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(call)])
    nbclient.NotebookClient(notebook, kernel_name="python3", allow_errors=True).execute()
    text = nbformat.writes(notebook)
    assert "may not write there" in text
    assert TOKEN not in text
    assert (tmp_path / "model" / "config.json").is_file()
    assert holding_the_token(tmp_path) == []


# -- the three ways to it


def test_convert_verify_and_push_lead_to_one_repository(
    command: Callable[..., Outcome], logged_in: Hub, tmp_path: Path
):
    model = tmp_path / "model"
    assert command("convert", OPT, "--output", model, "--push-to-hub", REPOSITORY, "--private").status == 0
    assert logged_in.private == {REPOSITORY: True}
    assert b"Not verified yet" in logged_in.repositories[REPOSITORY][README]
    assert command("verify", model, "--no-figures", "--push-to-hub", REPOSITORY).status == 0
    assert b"**Verified" in logged_in.repositories[REPOSITORY][README]
    assert logged_in.commits[1:] == [sorted(CARD)]
    done = command("push", model, REPOSITORY)
    assert (done.status, done.out.strip()) == (0, f"{logged_in.address}/{REPOSITORY}")
    assert len(logged_in.commits) == 2
    done = command("push", model, "ada/other", "--json")
    assert json.loads(done.out) == {"repository": f"{logged_in.address}/ada/other"}


def test_a_model_that_diverges_is_verified_and_stays_here(command: Callable[..., Outcome], logged_in: Hub, run: Run):
    edit_weights(run.model / "model.safetensors", lambda tensors: tensors["query_tokens"].mul_(2))
    done = command("verify", run.model, "--no-figures", "--push-to-hub", REPOSITORY)
    assert done.status == 1
    assert "**Do not use it" in (run.model / README).read_text()
    done = command("push", run.model, REPOSITORY)
    assert (done.status, len(done.said)) == (2, 1)
    assert "its proof found that it is not the model" in done.said[0]
    assert logged_in.repositories == {}

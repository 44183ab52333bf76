"""A converted directory and the hub: which of its files are the card, whose words the card is, and uploading it all.

The token is the environment's or the login's. It goes into the requests to the hub and nowhere else: no sentence here
repeats what a library says without looking for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.report.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from blip2nb.report.runs import RunPaths

log = logging.getLogger("blip2nb")


# -- the card


README, FIGURE = CARD = ("README.md", "depth_trace.png")
"""The card and its figure: no part of the model, so neither the manifest nor a proof knows them."""

PLACE = "model"
"""What the kit's card calls the place that the model is loaded from, until it is uploaded and has an address."""

_SIGNATURE = re.compile(
    r"\n<!-- blip2nb wrote this card, and rewrites it while nobody edits it: ([0-9a-f]{32}) -->\n\Z"
)


def sign(text: str) -> str:
    """The card's text with a last line, which no page shows, that tells an edited card from the kit's own."""
    return f"{text}\n<!-- blip2nb wrote this card, and rewrites it while nobody edits it: {_hash_of(text)} -->\n"


def unsigned(text: str) -> str | None:
    """The text that was signed; None where somebody has changed it since, or wrote it themselves."""
    text = text.replace("\r\n", "\n")  # git and editors of other systems
    found = _SIGNATURE.search(text)
    return text[: found.start()] if found and _hash_of(text[: found.start()]) == found[1] else None


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]  # chosen: 128 bits, as no two texts share by chance


def is_edited(folder: Path) -> bool:
    """Whether a directory's card is somebody's own, which is not to be written over."""
    try:
        return unsigned((folder / README).read_text(encoding="utf-8")) is None
    except FileNotFoundError:
        return False
    except (ValueError, OSError):  # no text, or no file
        return True


def keep_card(old: Path, new: Path) -> bool:
    """Take a card that was edited, and its figure, into the directory that will stand in the old one's place; whether
    there was one."""
    if not is_edited(old):
        return False
    for name in CARD:
        if (old / name).is_file():
            shutil.copy2(old / name, new / name)
    log.info("kept the %s that was edited; look whether it still says what is so", README)
    return True


def _addressed(text: str, repository: str) -> str:
    """The kit's own card with the repository in place of PLACE, so that its lines run as they are; else as it is."""
    plain = unsigned(text)
    if plain is None:
        return text
    return sign(plain.replace(f"from_pretrained({PLACE!r}", f"from_pretrained({repository!r}"))


# -- before any work


def find_token(repository: str) -> str:
    """The token to upload with, once the repository's name is a valid one and the hub says nothing against the token.

    A hub that does not answer now is asked again when there is something to upload.

    Raises:
        RequestError: the name is none, or there is no token, or it is known that nothing can be written with it.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1 and all(repository.split("/"))
    except HFValidationError:
        valid = False
    if not valid:
        raise RequestError(f"The hub's repository should be named like user/blip2-opt-2.7b, found {repository!r}.")
    if constants.HF_HUB_OFFLINE:
        raise RequestError("HF_HUB_OFFLINE forbids to ask the hub, to which this is to be pushed. Unset that variable.")
    token = get_token()
    if token is None:
        raise RequestError(
            "Pushing to the hub needs a token, and none was found. "
            "Log in with `hf auth login` or set HF_TOKEN in the environment."
        )
    if not re.fullmatch(r"[!-~]+", token):  # libraries would quote it in full
        raise RequestError(
            "Pushing to the hub needs a token, and what was found holds a space, a line break or what else none has. "
            "Log in with `hf auth login` or set HF_TOKEN anew."
        )
    try:
        known = HfApi(token=token).whoami()
    except _errors() as error:
        if _status(error) == 401:
            raise RequestError(f"Pushing to the hub needs another token: {_ANSWERS[401]}.") from None
        log.info("the hub cannot be asked about the token now; it will be when there is something to upload")
        return token
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RequestError(f"Pushing to the hub needs another token: this one may only read. {_WRITE}.")
    return token


# -- uploading


def push(run: RunPaths, repository: str, token: str = "", private: bool = False) -> str:
    """Upload a run's model with its card: what the hub does not have yet, as one commit.

    Args:
        repository: user/name; made where it is not there.
        token: of `find_token`, which is asked where none is given.
        private: make it a private one.

    Returns:
        Its address.

    Raises:
        RequestError: the proof found that it is not the model; there is no converted model, name or token; it is a
            public repository that was to be private; or the hub could not be reached or refused.
    """
    token = token or find_token(repository)
    Manifest.read(run.model)
    if (run.folder / "report.json").is_file() and run.report.verdict == "diverges":
        raise RequestError(
            f"{run.folder.name} was not uploaded: its proof found that it is not the model that LAVIS runs. "
            f"`blip2nb show {run.folder.name}` says where it goes wrong."
        )
    return upload(run.model, repository, token, private)


def upload(folder: Path, repository: str, token: str | None, private: bool = False) -> str:
    """Upload a directory, whatever its verdict. Arguments, return value and errors as for `push`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    hub = HfApi(token=token)
    with _in_one_sentence(folder, repository, token):
        address = str(hub.create_repo(repository, private=private or None, exist_ok=True))
        if private and not hub.repo_info(repository).private:
            raise RequestError(
                f"{repository} is there already and is public. Make it private on the hub, or name another."
            )
        there = {one.path: one for one in hub.list_repo_tree(repository, recursive=True) if hasattr(one, "blob_id")}
        local = _to_upload(folder, repository)
        changed = {name: one for name, one in local.items() if not _holds(there.get(name), one)}
        if README in changed and README in there and not _may_replace(hub, repository, folder):
            del changed[README]
            log.warning("%s has a %s that was edited there, which stays as it is", repository, README)
        stale = [name for name in there if _SHARD.fullmatch(name) and name not in local]
        if changed or stale:
            if README in changed:
                _check_metadata(hub, local[README])
            operations: list[Any] = [CommitOperationAdd(name, content) for name, content in changed.items()]
            for one in operations:
                if _SHARD.fullmatch(one.path_in_repo):  # one by one: of several at once, Ctrl-C would wait for all
                    hub.preupload_lfs_files(repository, [one])
            operations += [CommitOperationDelete(name) for name in stale]
            words = "Model card by blip2nb" if {*changed, *stale} <= {*CARD} else "Converted from LAVIS with blip2nb"
            hub.create_commit(repository, operations, commit_message=words)
    log.info("uploaded %s to %s", ", ".join(changed) or "nothing, all of it is there,", address)
    return address


_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
"""Weights as `convert` names them. Those of an earlier conversion would be loaded in place of the new ones."""


def _to_upload(folder: Path, repository: str) -> dict[str, Path | bytes]:
    """Name in the repository -> what is to be there. Hidden and unfinished files are nobody's to see."""
    out: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part.endswith(".partial") for part in name.parts):
            out[name.as_posix()] = path
    if README in out and not is_edited(folder):
        out[README] = _addressed((folder / README).read_text(encoding="utf-8"), repository).encode()
    return out


def _holds(there: Any, content: Path | bytes) -> bool:
    """Whether a file of the repository is this already, by the hash that the hub knows it by."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if there is None or there.size != size:
        return False
    if there.lfs is None:
        whole = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % size + whole).hexdigest() == there.blob_id
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest() == there.lfs.sha256
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def _check_metadata(hub: HfApi, card: Path | bytes) -> None:
    """Have the hub look at a card before anything is uploaded. `ModelCard.validate` would mend it first."""
    from huggingface_hub.utils import get_session

    content = (card if isinstance(card, bytes) else card.read_bytes()).decode(errors="replace")
    answer = get_session().post(f"{hub.endpoint}/api/validate-yaml", json={"content": content, "repoType": "model"})
    if answer.status_code == 400:
        words = "; ".join(one["message"] for one in answer.json()["errors"])
        raise RequestError(f"{README} has metadata that the hub does not take ({words}). Mend its first lines.")


def _may_replace(hub: HfApi, repository: str, folder: Path) -> bool:
    """Whether the repository's card may give way: to one that was edited here, or because it is the kit's own."""
    if is_edited(folder):
        return True
    with tempfile.TemporaryDirectory() as place:
        hub.hf_hub_download(repository, README, local_dir=place)
        return not is_edited(Path(place))


# -- what the hub says against it, in one sentence


_WRITE = "Make one that may write on the hub's page of access tokens, and log in with `hf auth login` or set HF_TOKEN"

_ANSWERS: Mapping[int, str] = {
    401: "the hub does not accept the token. Log in again with `hf auth login`, or set HF_TOKEN to a valid one",
    403: f"the token may not write there. {_WRITE}, or name a repository of your own",
    404: "the hub knows no such user or organisation. Look at the name",
    429: "the hub has had too many requests from here. Wait some minutes",
}


def _errors() -> tuple[type[Exception], ...]:
    """What the hub's library raises where hub, network or storage fail."""
    from huggingface_hub.errors import HfHubHTTPError

    return (HfHubHTTPError.__bases__[0], OSError, RuntimeError, ValueError, KeyError)  # first its HTTP library's


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error or in what it came from; Xet's uploader has it in its words alone."""
    for one in _chain(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        if told := re.search(r"HTTP status \w+ error \((\d{3})", str(one)):
            return int(told[1])
    return None


@contextlib.contextmanager
def _in_one_sentence(folder: Path, repository: str, token: str | None) -> Iterator[None]:
    """What goes wrong inside as a RequestError, without the errors that led to it: they hold addresses and headers."""
    try:
        yield
    except _errors() as error:
        why = _reason(error, lambda words: words.replace(token, "…") if token else words)
        kept = f"The converted model stays in {folder}; the same command goes on there."
        raise RequestError(f"{repository} was not uploaded: {why}. {kept}") from None


def _reason(error: BaseException, hide: Callable[[str], str]) -> str:
    status = _status(error)
    if status is not None and status in _ANSWERS:
        return _ANSWERS[status]
    if status is not None and status >= 500:
        return f"the hub answers {status}, which is a trouble of its own. Try again later"
    said = next(filter(None, (getattr(one, "server_message", "") for one in _chain(error))), "")
    if status is not None:
        return hide(f"the hub answers {status} ({said or 'no reason given'})")
    if any(type(one).__module__.startswith("http") or isinstance(one, ConnectionError) for one in _chain(error)):
        return "the hub cannot be reached, or the connection broke off. Look at the network and try again"
    return hide(f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}".rstrip("."))

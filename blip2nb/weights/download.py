"""A released variant's files: where they are already, and how those that are not here are fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import logging
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.errors import RequestError
from blip2nb.variants import Variant
from blip2nb.weights.sources import Files, holds_weights
from blip2nb.weights.transfer import TIMEOUT, Broken, fetch_file, look, persist, reason, room

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger("blip2nb")

LAVIS_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"


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


def _announced_size(part: Part, timeout: float) -> int:
    if part.name.endswith("/"):
        return sum(file.size or 0 for file in _hub_files(part, timeout))
    return look(part.url, timeout).size


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
            _announced_size(part, TIMEOUT)
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
            f"{variant.name} needs files that are not on this machine and could not be fetched ({reason(error)}): "
            f"{names}. Put them into one folder, {variant.language_folder}/ being {variant.language_model} with its "
            "tokenizer, and give that folder as source."
        ) from error


# -- the language model, from the hub


def _fetch_language(part: Part) -> None:
    """Fetch what is read of a language model into the Hugging Face cache. Files that are whole there are not asked for.

    One file after the other, where `snapshot_download` takes several threads: those would have to finish their files,
    gigabytes each, before Ctrl-C has an effect. Within this call the library goes on after a broken connection.
    """
    files = _hub_files(part, TIMEOUT)
    blobs = part.path / "blobs"  # the cache calls a file by its hash
    here = [file for file in files if (blobs / str(file.lfs.sha256 if file.lfs else file.blob_id)).exists()]
    with room(part.name, sum(file.size or 0 for file in files if file not in here), part.path):
        for file in files:
            persist(file.rfilename, functools.partial(_fetch_hub_file, part, file.rfilename))


def _fetch_hub_file(part: Part, name: str) -> None:
    from huggingface_hub import hf_hub_download

    with _hub_errors(part):
        hf_hub_download(_repository(part), name, etag_timeout=TIMEOUT)


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
    except OSError:
        raise
    except Exception as error:
        raise Broken(f"{part.url}: {reason(error)}") from error

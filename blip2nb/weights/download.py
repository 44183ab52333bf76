"""A released variant's files: in LAVIS's own download cache, in the Hugging Face cache, or fetched."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from blip2nb.errors import RequestError
from blip2nb.variants import Variant
from blip2nb.weights.sources import Files, holds_weights

LAVIS_URL = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
_TIMEOUT = 10  # seconds to wait for a server to answer


def cache_folder() -> Path:
    """Where the kit keeps twins and downloads: $BLIP2NB_CACHE, or the user's cache folder."""
    if "BLIP2NB_CACHE" in os.environ:
        return Path(os.environ["BLIP2NB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blip2nb"


def released_files(variant: Variant) -> Files:
    """A released variant's own files, fetched where they are not at hand.

    Raises:
        RequestError: some are missing and cannot be fetched; the sentence says which and how to give them.
    """
    files = Files(
        vision=_lavis_file("eva_vit_g.pth"),
        language=_language_folder(variant),
        checkpoints=(_lavis_file(variant.checkpoint),),
    )
    if files.missing():
        _fetch(variant, files)
    return files


def _lavis_file(name: str) -> Path:
    """In LAVIS's own cache (PyTorch's hub folder) if it is there, else where the kit would put it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    lavis = Path(os.environ.get("TORCH_HOME", cache / "torch")) / "hub" / "checkpoints" / name
    return lavis if lavis.is_file() else cache_folder() / "lavis" / name


def _language_folder(variant: Variant) -> Path:
    """In the Hugging Face cache if all of it is there, else where the kit would put it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    own = cache_folder() / "hub" / variant.language_folder
    try:
        cached = Path(snapshot_download(variant.language_model, local_files_only=True))
    except LocalEntryNotFoundError:
        return own
    return cached if _whole(cached) else own


def _whole(folder: Path) -> bool:
    """Whether a hub folder holds weights with all their shards, a configuration and a tokenizer."""
    tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    return tokenizer and (folder / "config.json").is_file() and holds_weights(folder)


def _fetch(variant: Variant, files: Files) -> None:
    """Fetch what is missing, after a look whether the servers can be reached at all."""
    missing = files.missing()
    hub = f"https://huggingface.co/{variant.language_model}"
    try:
        for path in missing:
            url = hub if path == files.language else LAVIS_URL + path.name
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_TIMEOUT):
                pass
        for path in missing:
            if path == files.language:
                _fetch_language(variant, path)
            else:
                fetch_file(LAVIS_URL + path.name, path)
    except (urllib.error.URLError, OSError) as error:
        names = ", ".join(f"{path.name}/" if path == files.language else path.name for path in files.missing())
        raise RequestError(
            f"{variant.name} needs files that are not on this machine and could not be fetched ({error}): {names}. "
            f"Put them into one folder, {files.language.name}/ being {variant.language_model} with its tokenizer, and "
            "give it with --source FOLDER."
        ) from error


def _fetch_language(variant: Variant, folder: Path) -> None:
    """Fetch a language model beside its place, in one of the forms the hub has, and move it there when it is whole."""
    from huggingface_hub import HfApi, snapshot_download

    names = HfApi().list_repo_files(variant.language_model)
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"
    partial = folder.with_name(f"{folder.name}.partial")
    patterns = ["*.json", "*.txt", "*.model", weights]
    snapshot_download(variant.language_model, local_dir=partial, allow_patterns=patterns, etag_timeout=_TIMEOUT)
    partial.rename(folder)


def fetch_file(url: str, path: Path) -> None:
    """Download to a partial file beside the target, going on from what is there; rename when all of it is.

    Raises:
        OSError: the server cannot be reached, refuses, or breaks off. What came so far stays for the next time.
    """
    from tqdm import tqdm

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is nothing behind what is here: all of it, or something else
            raise
        if error.headers.get("Content-Range", "") == f"bytes */{have}":
            partial.rename(path)
            return
        partial.unlink()
        fetch_file(url, path)
        return
    with answer:
        have = have if answer.status == 206 else 0
        total = int(answer.headers.get("Content-Length", 0)) + have
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name)
        with bar, open(partial, "ab" if have else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
    if partial.stat().st_size != total:
        raise OSError(f"{path.name} has {partial.stat().st_size} bytes, expected {total}; run again to go on")
    partial.rename(path)

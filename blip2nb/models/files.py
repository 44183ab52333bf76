"""Which files a conversion reads: those the user names, or the variant's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from blip2nb.errors import RequestError
from blip2nb.models import tiny
from blip2nb.variants import Variant
from blip2nb.weights.download import cache_folder, released_files
from blip2nb.weights.mapping import check_part
from blip2nb.weights.sources import Files, files_in, open_file, shapes


def find_files(variant: Variant, source: str | Path = "") -> Files:
    """The files to convert.

    Args:
        source: a folder in the released layout; or one checkpoint, which is laid over the variant's own files; or
            nothing, for the variant's own.

    Raises:
        RequestError: something is missing and cannot be fetched; the sentence says what and how to give it.
    """
    if not source:
        return own_files(variant)
    path = Path(source).expanduser()
    if path.is_file():
        check_part(variant, shapes(open_file(path)), str(path))  # before gigabytes are fetched for it
        base = own_files(variant)
        return dataclasses.replace(base, checkpoints=(*base.checkpoints, path))
    if not path.is_dir():
        raise RequestError(f"--source {path} does not exist. Expected a folder in the released layout or a checkpoint.")
    files = files_in(path, variant)
    missing = ", ".join(part.name for part in files.missing())
    if missing:
        found = ", ".join(sorted(part.name for part in path.iterdir())) or "nothing"
        raise RequestError(
            f"{path} should hold {files.vision.name}, {files.checkpoints[0].name} and {files.language.name}/ "
            f"for {variant.name}; missing: {missing}; found: {found}. Put them there, or name another folder or model."
        )
    return files


def own_files(variant: Variant) -> Files:
    """A twin's files, made on the spot and kept; a released variant's, from a cache or the network."""
    if not variant.twin:
        return released_files(variant)
    folder = cache_folder() / "twins" / f"{variant.name}-r{tiny.REVISION}"
    if not folder.is_dir():
        tiny.write_twin(variant, folder)
    return files_in(folder, variant)

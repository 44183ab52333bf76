"""A converted directory: whether one may be written here, whether it is here already, writing it, checking it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from blip2nb._version import __version__
from blip2nb.bars import progress_bar
from blip2nb.conversion.files import Opened
from blip2nb.conversion.hub import CARD, README, keep_card
from blip2nb.errors import RequestError
from blip2nb.families.captioners.configuration import write_configuration
from blip2nb.forms import plain
from blip2nb.report.manifest import MANIFEST, Manifest, SourceFile
from blip2nb.sizes import as_bytes
from blip2nb.weights.convert import LOSSY, check_weights, file_hash, source_digests, target_slots, write_weights
from blip2nb.weights.sources import Files, holds_weights
from blip2nb.weights.stored import combine
from blip2nb.weights.writer import JOURNAL, clear_away, unfinished_directory

log = logging.getLogger("blip2nb")


def check_place(folder: Path) -> None:
    """Refuse early what stands where the model should go and is not ours to replace, whatever was asked."""
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise RequestError(f"{folder} holds something that is not a conversion of this kit. Name another output.")


def check_apart(folder: Path, files: Files) -> None:
    """Refuse an output that would replace, or end up in, the files it is made from."""
    target = folder.resolve()
    for path in files.parts():
        source = path.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise RequestError(f"{folder} cannot be the output: {path} is read from there. Name another output.")


def holds_already(folder: Path, opened: Opened, recipe: dict[str, str], overwrite: bool) -> bool:
    """Whether the directory already holds just this conversion.

    Raises:
        RequestError: it holds another one.
    """
    if overwrite or not (folder / MANIFEST).is_file():
        return False
    held, wanted = Manifest.read(folder), opened.variant
    if (held.variant, held.dtype) != (wanted, recipe["dtype"]) or not _same_weights(held, opened):
        raise RequestError(
            f"{folder} holds another run's model ({held.model}, dtype {held.dtype}, weights "
            f"{held.weights_hash[:12]}), not the {wanted.name} asked for. "
            "Give this one its own run_name or output, or replace it with overwrite."
        )
    if dict(held.recipe) == recipe and _whole(folder):
        clear_away(folder)
        log.info("%s already holds this conversion of the same files; kept", folder)
        return True
    log.info("%s was made of the same weights otherwise, or lost a file; converting again", folder)
    return False


def _same_weights(held: Manifest, opened: Opened) -> bool:
    return _stamps(opened.files) == held.files or held.weights_hash == weights_hash(opened)


def weights_hash(opened: Opened) -> str:
    """One hash over the parameters that a conversion of this would read. Reads all of them, unless it is known."""
    return opened.known_hash or combine(source_digests(opened.plan, opened.tensors))


def as_converted(opened: Opened, folder: Path) -> Opened:
    """The same with its hash, where a directory was converted from these files and they are as they were then."""
    if not (folder / MANIFEST).is_file():
        return opened
    held = Manifest.read(folder)
    same = held.variant == opened.variant and _stamps(opened.files) == held.files
    return dataclasses.replace(opened, known_hash=held.weights_hash) if same else opened


def recipe_of(files: Files, dtype: str, max_shard_size: str | int) -> dict[str, str]:
    """All but the weights that decides what is written: asked for, configured beside the weights, and by what."""
    small = files.configuration_files()
    configuration = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in small))
    return {
        "dtype": dtype,
        "max_shard_size": str(max_shard_size),
        "configuration": configuration.hexdigest(),
        "blip2nb": __version__,
        "transformers": importlib.metadata.version("transformers"),
    }


_ALWAYS = ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")


def _whole(folder: Path) -> bool:
    """Whether every file that `convert` writes is there, and every shard."""
    return all((folder / name).is_file() for name in _ALWAYS) and holds_weights(folder)


def _stamps(files: Files) -> tuple[SourceFile, ...]:
    """What tells at a glance that the files are those of last time: name, size and time of change. Of those that are
    read: what else lies beside them may change."""
    stats = [(path.name, path.stat()) for path in (*files.weight_files(), *files.configuration_files())]
    return tuple(SourceFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def write_model(
    folder: Path, opened: Opened, recipe: dict[str, str], card: Callable[[Manifest], str] | None = None
) -> None:
    """Write the whole directory, after everything that can be checked without reading the weights; or go on with what
    an interrupted run has written of it.

    Args:
        card: what says in words what was made, to stand in it from the first moment. One that was edited is kept.

    Raises:
        RequestError: the files are not the variant's, hold what cannot be converted, or the disk is too small.
    """
    wanted, tensors = opened.variant, opened.tensors
    work = opened.plan
    dtype = recipe["dtype"]
    if dtype == "float16" and wanted.language.kind == "t5":
        log.warning(
            "flan-t5 overflows in float16 (transformers does not support it there): bfloat16 or auto is safer. "
            "Its wo layers are kept in float32."
        )
    size = sum(slot.size for slot in target_slots(work, tensors, dtype))
    stamps = _stamps(opened.files)
    identity = json.dumps([plain(wanted), recipe, plain(stamps)], sort_keys=True)
    _check_disk(folder, size)
    bar = progress_bar(total=size, unit="B", unit_scale=True, desc=f"convert {wanted.name}")
    with bar, unfinished_directory(folder, identity) as out:
        if out.done:
            log.info("going on with an interrupted run: %d tensors are there, and are read back first", len(out.done))

        loaded_as = dtype if dtype in LOSSY else "float32"
        configure = partial(write_configuration, wanted, opened.text, opened.files.language, out.folder, loaded_as)
        shard_size = recipe["max_shard_size"]
        manifest = write_weights(work, tensors, out, dtype, shard_size, progress=bar.update, beside=configure)
        if _stamps(opened.files) != stamps:
            raise RequestError(f"The source of {folder} changed while it was read. Convert again when it is at rest.")
        beside = [path for path in sorted(out.folder.iterdir()) if path.name not in (*manifest.shards, *CARD, JOURNAL)]
        configuration = {path.name: file_hash(path) for path in beside if path.is_file()}
        manifest = dataclasses.replace(manifest, files=stamps, recipe=recipe, configuration=configuration)
        manifest.write(out.folder)
        if not keep_card(folder, out.folder) and card is not None:
            (out.folder / README).write_text(card(manifest), encoding="utf-8", newline="\n")
    log.info("wrote %s", folder)


_BESIDE = 64_000_000
"""Bytes for tokenizer, configuration and headers. Chosen: they are under 10 MB, and a disk that is full to the last
few is no place for a model; any value from 10 MB to a tenth of the smallest model, 770 MB, does."""


def _check_disk(target: Path, size: int) -> None:
    """Raises RequestError when the files will not fit, with what is written beside the tensors."""
    free = free_space(target) + _bytes_in(target.with_name(f".{target.name}.partial"))
    if free < size + _BESIDE:
        raise RequestError(
            f"{target} needs {as_bytes(size)}, and {as_bytes(free)} are free there. "
            "Make room, or name an output on another disk."
        )


def free_space(target: Path) -> int:
    """Bytes free where a path is to be."""
    return shutil.disk_usage(next(path for path in target.resolve().parents if path.is_dir())).free


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.is_dir() else 0


def check_model(folder: Path, opened: Opened | None) -> list[str]:
    """Read a finished directory again, and its source where there is one: what differs from the manifest, if anything.

    Raises:
        RequestError: the directory is not one of ours.
    """
    manifest = Manifest.read(folder)
    size = sum(one.bytes for one in manifest.shards.values())
    with progress_bar(total=size * (1 if opened is None else 2), unit="B", unit_scale=True, desc="check") as bar:
        return check_weights(folder, manifest, opened.tensors if opened is not None else None, progress=bar.update)

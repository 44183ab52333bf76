"""A converted directory: whether one may be written here, whether it is here already, and writing it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blip2nb import __version__
from blip2nb.errors import RequestError
from blip2nb.models.huggingface import load_tokenizer, read_language_config, write_configuration
from blip2nb.variants import Variant
from blip2nb.weights.convert import LOSSY, MANIFEST, Manifest, target_size, write_weights
from blip2nb.weights.hashing import combine, digest
from blip2nb.weights.mapping import plan
from blip2nb.weights.sources import Files, Union, holds_weights, shapes
from blip2nb.weights.writer import whole_directory

log = logging.getLogger("blip2nb")


def check_place(folder: Path) -> None:
    """Refuse early what stands where the model should go and is not ours to replace, whatever was asked."""
    if not folder.exists() or (folder / MANIFEST).is_file():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise RequestError(f"{folder} holds something that is not a conversion of this kit. Name another --output.")


def check_apart(folder: Path, files: Files) -> None:
    """Refuse an output that would replace, or end up in, the files it is made from."""
    target = folder.resolve()
    for path in (files.vision, files.language, *files.checkpoints):
        source = path.resolve()
        if source.is_relative_to(target) or target.is_relative_to(source):
            raise RequestError(f"{folder} cannot be the output: {path} is read from there. Name another --output.")


def holds_already(
    folder: Path, wanted: Variant, opened: Union, files: Files, recipe: dict[str, str], overwrite: bool
) -> bool:
    """Whether the directory already holds just this conversion.

    Raises:
        RequestError: it holds another one.
    """
    if overwrite or not (folder / MANIFEST).is_file():
        return False
    held = Manifest.read(folder)
    if (held.model, held.dtype) != (wanted.name, recipe["dtype"]) or not _same_weights(held, wanted, opened, files):
        raise RequestError(
            f"{folder} holds another run's model ({held.model}, dtype {held.dtype}, weights "
            f"{held.weights_hash[:12]}), not the {wanted.name} asked for. "
            "Give this one its own run_name or --output, or replace it with overwrite."
        )
    if dict(held.recipe) == recipe and _whole(folder):
        log.info("%s already holds this conversion of the same files; kept", folder)
        return True
    log.info("%s was made of the same weights otherwise, or lost a file; converting again", folder)
    return False


def _same_weights(held: Manifest, wanted: Variant, opened: Union, files: Files) -> bool:
    return _stamps(files) == [dict(one) for one in held.files] or held.weights_hash == _weights_hash(wanted, opened)


def recipe_of(files: Files, dtype: str, max_shard_size: str | int) -> dict[str, str]:
    """All but the weights that decides what is written: asked for, configured beside the weights, and by what."""
    small = [path for path in files.language.iterdir() if path.suffix in (".json", ".txt", ".model")]
    configuration = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in sorted(small)))
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


def _weights_hash(wanted: Variant, opened: Union) -> str:
    names = [name for entry in plan(wanted, shapes(opened)).written for name in entry.sources]
    return combine({name: digest(opened.tensor(name)) for name in names})


def _stamps(files: Files) -> list[dict[str, Any]]:
    """What tells at a glance that the files are those of last time: name, size and time of change."""
    paths = [files.vision, *sorted(path for path in files.language.iterdir() if path.is_file()), *files.checkpoints]
    stats = [(path.name, path.stat()) for path in paths]
    return [{"name": name, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats]


def write_model(folder: Path, wanted: Variant, opened: Union, files: Files, recipe: dict[str, str]) -> None:
    """Write the whole directory, after everything that can be checked without reading the weights.

    Raises:
        RequestError: the files are not the variant's, hold what cannot be converted, or the disk is too small.
    """
    work = plan(wanted, shapes(opened))
    text = read_language_config(wanted, files.language)
    tokenizer = load_tokenizer(wanted, files.language)
    dtype = recipe["dtype"]
    size = target_size(work, opened, dtype)
    _check_disk(folder, size)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"convert {wanted.name}")
    with bar, whole_directory(folder) as out:
        manifest = write_weights(work, opened, out, dtype, recipe["max_shard_size"], progress=bar.update)
        manifest = dataclasses.replace(manifest, files=tuple(_stamps(files)), recipe=recipe)
        write_configuration(wanted, text, tokenizer, out, dtype if dtype in LOSSY else "float32")
        manifest.write(out)
    log.info("wrote %s", folder)


def _check_disk(target: Path, size: int) -> None:
    """Raises RequestError when the files will not fit; configuration and headers are counted with 64 MB."""
    place = next(path for path in target.parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < size + 64_000_000:
        raise RequestError(
            f"{target} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there. "
            "Make room, or name an --output on another disk."
        )

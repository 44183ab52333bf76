"""Which files a conversion reads: those the user names, or the variant's own; and opening them as one model."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blip2nb.conversion import trained_on
from blip2nb.conversion.assemble import open_model
from blip2nb.conversion.recognise import configured, told_by, with_language, with_sizes
from blip2nb.errors import RequestError
from blip2nb.families.captioners.configuration import read_language_config
from blip2nb.families.captioners.mapping import POSITIONS, check_part, plan
from blip2nb.variants import Variant, variant
from blip2nb.weights.download import cache_folder, locate, released_files
from blip2nb.weights.rules import Plan
from blip2nb.weights.sources import Assembled, Files, files_in, holds_weights, open_checkpoint, open_file, shapes

log = logging.getLogger("blip2nb")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model to convert.

    Attributes:
        variant: what it is.
        files: where its parts lie.
        tensors: all of them.
        text: its language model's configuration.
        known_hash: of its parameters, where a conversion of the same files has noted it; "" where none has.
    """

    variant: Variant
    files: Files
    tensors: Assembled
    text: dict[str, Any]
    known_hash: str = ""

    @functools.cached_property
    def plan(self) -> Plan:
        """The rules applied to these tensors. Raises RequestError where they are not a whole model."""
        return plan(self.variant, self.tensors.shapes(), interpolate=not self.tensors.trained(POSITIONS))


def which(model: str, source: str | Path = "") -> Variant:
    """The variant that is meant: the one named, or the one that the checkpoint says it was trained from.

    Raises:
        RequestError: there is none of that name, or none was named and the source does not say.
    """
    if model:
        return variant(model)
    path = Path(source).expanduser()
    if source and not path.exists():
        raise RequestError(f"{path} does not exist. Expected a checkpoint of LAVIS's trainer, or a folder of files.")
    if not source or not path.is_file():
        raise RequestError("Name the model to convert (`blip2nb variants` lists them), or a checkpoint as source.")
    return told_by(path)


def open_source(wanted: Variant, source: str | Path = "", base: str | Path = "") -> Opened:
    """Find and open everything that makes up a model. Reads headers alone.

    Args:
        source, base: as for `find_files`.

    Raises:
        RequestError: something is missing, damaged or does not belong together.
    """
    files = find_files(wanted, source, base)
    text = read_language_config(files)
    where = files.language / "config.json"
    sized = with_language(wanted, text, where)
    tensors = open_model(files, sized)
    return Opened(with_sizes(sized, tensors, where), files, tensors, text)


def find_files(variant: Variant, source: str | Path = "", base: str | Path = "") -> Files:
    """The files to convert.

    Args:
        source: a folder in the released layout; or one checkpoint, which is laid over a base; or nothing, for the
            variant's own.
        base: what a checkpoint is laid over: a folder in the released layout, or a directory that was converted to
            transformers already; the variant's own files unless given.

    Raises:
        RequestError: something is missing and cannot be fetched; the sentence says what and how to give it.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        if base:
            raise RequestError(f"source {path} is a whole model, so there is nothing to lay over a base.")
        files = _in_folder(path, variant, "source")
        _check_whole(variant, files.checkpoints[0])
        return files
    if source and not path.is_file():
        raise RequestError(f"source {path} does not exist. Expected a folder in the released layout or a checkpoint.")
    if not source:
        return _named_base(variant, base) if base else own_files(variant)
    tensors, config = (open_file(path), {}) if path.suffix == ".safetensors" else open_checkpoint(path)
    expected = configured(variant, config)
    check_part(expected, shapes(tensors), str(path))  # before gigabytes are fetched for it
    wrong = "" if base else wrong_base(expected, path, config, tensors)
    if wrong:
        raise RequestError(wrong)
    files = _named_base(expected, base) if base else _own_base(expected)
    return dataclasses.replace(files, checkpoints=(*files.checkpoints, path))


def wrong_base(variant: Variant, checkpoint: Path, config: Mapping[str, Any], held: Collection[str]) -> str:
    """Why a checkpoint cannot be laid over the variant's own files, and what to do; "" if it can."""
    words = trained_on.wrong_base(variant, config, held)
    return words and (
        f"{checkpoint} was trained with {words}, so what it was trained on may not be the released files of "
        f"{variant.name}. Pass what it was trained on as base (--base on the command line): a folder in the released "
        "layout, or a converted directory."
    )


def refuse_wrong_base(variant: Variant, source: str | Path, base: str | Path) -> None:
    """Refuse the source of an earlier conversion if it would be refused today. One that is gone or being written is not
    looked at.

    Raises:
        RequestError: it is a checkpoint that cannot be laid over the variant's own files, and there is no base.
    """
    path = Path(source).expanduser()
    if base or not path.is_file() or path.suffix == ".safetensors":
        return
    try:
        tensors, config = open_checkpoint(path)
    except RequestError:
        return
    wrong = wrong_base(variant, path, config, tensors)
    if wrong:
        raise RequestError(wrong)


def _check_whole(variant: Variant, checkpoint: Path) -> None:
    """Of a trainer's checkpoint under the name of a released one: a folder is taken as it is, as a --base would be, but
    for a fine-tuned file that is certainly not in it."""
    tensors, config = open_checkpoint(checkpoint)
    words = trained_on.in_words(variant, config)
    if words:
        log.warning("%s was trained with %s; its folder is taken as all that it was trained on", checkpoint, words)
    lacking = trained_on.lacks(variant, config, tensors)
    if lacking:
        raise RequestError(
            f"{checkpoint} lacks {lacking[0]} and {len(lacking) - 1} more tensors of the released fine-tuned file that "
            "it was trained on, which its folder cannot hold as well. Pass the checkpoint itself as source."
        )


def _named_base(variant: Variant, base: str | Path) -> Files:
    folder = Path(base).expanduser()
    return _converted(folder) if is_converted(folder) else _in_folder(folder, variant, "base")


def _own_base(variant: Variant) -> Files:
    """The variant's own files; where not all are at hand, the model as the Hugging Face cache may hold it already."""
    from huggingface_hub import try_to_load_from_cache

    if not variant.twin and not all(part.here for part in locate(variant)):
        config = try_to_load_from_cache(f"Salesforce/{variant.name}", "config.json")
        if isinstance(config, str) and holds_weights(Path(config).parent):
            log.info("laying it over Salesforce/%s, which is in the Hugging Face cache", variant.name)
            return _converted(Path(config).parent)
    return own_files(variant)


def is_converted(folder: Path) -> bool:
    """Whether a folder is a BLIP-2 directory of transformers."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "blip-2"
    except (OSError, ValueError, AttributeError):
        return False


def _converted(folder: Path) -> Files:
    return Files(vision=None, language=folder, checkpoints=(), base=folder)


def _in_folder(path: Path, variant: Variant, option: str) -> Files:
    if not path.is_dir():
        raise RequestError(f"{option} {path} does not exist. Expected a folder in the released layout.")
    files = files_in(path, variant)
    missing = ", ".join(part.name for part in files.missing())
    if missing:
        found = ", ".join(sorted(part.name for part in path.iterdir())) or "nothing"
        raise RequestError(
            f"{path} should hold eva_vit_g.pth, {variant.checkpoint} and {variant.language_folder}/ "
            f"for {variant.name}; missing: {missing}; found: {found}. Put them there, or name another folder or model."
        )
    return files


def own_files(variant: Variant) -> Files:
    """A twin's files, made on the spot and kept; a released variant's, from a cache or the network."""
    if not variant.twin:
        return released_files(variant)
    from blip2nb import twins  # which needs torch

    folder = cache_folder() / "twins" / f"{variant.name}-r{twins.REVISION}"
    if not folder.is_dir():
        twins.write_twin(variant, folder)
    return files_in(folder, variant)

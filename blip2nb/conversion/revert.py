"""The way back: from a BLIP-2 directory of transformers to a checkpoint that LAVIS loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from blip2nb.bars import progress_bar
from blip2nb.conversion.directory import free_space
from blip2nb.conversion.recognise import from_config
from blip2nb.errors import RequestError
from blip2nb.families.captioners.mapping import entries
from blip2nb.report.manifest import MANIFEST, Manifest
from blip2nb.sizes import as_bytes
from blip2nb.variants import Variant
from blip2nb.weights.checkpoint import write_checkpoint
from blip2nb.weights.rules import Entry, FuseQueryValueBias
from blip2nb.weights.sources import Source, open_folder
from blip2nb.weights.stored import Stored

PARTS = ("trained", "all")


@dataclasses.dataclass(frozen=True)
class Reverted:
    """A checkpoint that was written, and what of the directory has no place in it.

    Attributes:
        no_way_back: names in transformers, each with what was done about it.
    """

    path: Path
    variant: Variant
    part: str
    tensors: int
    no_way_back: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.tensors} tensors for LAVIS's {self.variant.lavis_class}"]
        lines += [f"  {name}: {why}" for name, why in self.no_way_back.items()]
        lines += ["", "To evaluate it with LAVIS, in the run's configuration:", "  model:"]
        lines += [f"    arch: {self.variant.lavis_class}", f"    model_type: {self.variant.lavis_type}"]
        lines += ["    load_finetuned: True", f"    finetuned: {self.path.absolute()}"]
        return "\n".join(lines)


_BESIDE = 1_000_000
"""Bytes of a checkpoint's names, headers and padding: 355 kB where all 1,331 tensors of blip2-flan-t5-xxl are written
(the size of a file with one number for each tensor); three times that is chosen."""


def revert_model(folder: Path, output: Path, part: str, overwrite: bool) -> Reverted:
    """Write the checkpoint. See `api.revert`.

    Raises:
        RequestError: the directory is no BLIP-2 captioner, lacks a tensor, or the file cannot be written.
    """
    manifest = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
    variant = manifest.variant if manifest is not None else _configured_variant(folder)
    if output.exists() and not overwrite:
        raise RequestError(f"{output} is there already. Name another output, or replace it with overwrite.")
    saved = open_folder(folder)
    wanted = [entry for entry in entries(variant) if not entry.optional]
    missing = [str(entry.target) for entry in wanted if entry.target not in saved]
    if missing:
        raise RequestError(f"{folder} lacks {len(missing)} tensors of {variant.name}, for one {missing[0]}.")
    chosen = [entry for entry in wanted if part == "all" or _trained(manifest, variant, entry)]
    tensors: dict[str, Stored] = {}
    lost: dict[str, str] = {}
    for entry in chosen:
        back, why = _back(entry, saved)
        tensors |= back
        if why:
            lost[str(entry.target)] = why
    losses = manifest.no_way_back if manifest is not None else {}
    lost |= {_target_of(wanted, name): f"{why}; written as it is" for name, why in losses.items()}
    size = sum(stored.nbytes for stored in tensors.values())
    if free_space(output) < size + _BESIDE:
        raise RequestError(
            f"{output} needs {as_bytes(size)}, and {as_bytes(free_space(output))} are free there. "
            "Make room, or name an output on another disk."
        )
    try:
        with progress_bar(total=size, unit="B", unit_scale=True, desc=f"revert {variant.name}") as bar:
            write_checkpoint(output, tensors, bar.update)
    except OSError as error:
        raise RequestError(f"{output} cannot be written ({error.strerror or error}). Name another output.") from error
    return Reverted(output, variant, part, len(tensors), lost)


def _configured_variant(folder: Path) -> Variant:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} should be the configuration of a BLIP-2 model ({error}).") from error
    return from_config(config, path)


def _trained(manifest: Manifest | None, variant: Variant, entry: Entry) -> bool:
    """Whether it belongs in the file that LAVIS loads as `finetuned`, which takes the place of the released checkpoint:
    what came from checkpoints, as far as the manifest says, and what a released checkpoint holds, wherever it came from
    (a converted base has no checkpoint). Vision tower and language model are frozen unless a training says otherwise.
    """
    if manifest is not None and manifest.origins[entry.sources[0]] in manifest.checkpoints:
        return True
    frozen = () if variant.vision_in_checkpoint else ("visual_encoder.",)
    return not entry.sources[0].startswith((*frozen, f"{variant.language_prefix}."))


def _back(entry: Entry, saved: Source) -> tuple[dict[str, Stored], str]:
    stored = saved[str(entry.target)]
    if stored.shape != entry.shape:
        raise RequestError(f"{entry.target} is {stored.shape}, expected {entry.shape} by the directory's config.json.")
    key_bias = isinstance(entry.rule, FuseQueryValueBias) and entry.rule.key(stored).bits().any()
    why = "a key bias, which LAVIS does not have and no output depends on: left out" if key_bias else ""
    return entry.parts(stored), why


def _target_of(wanted: list[Entry], name: str) -> str:
    return next(str(entry.target) for entry in wanted if name in entry.sources)

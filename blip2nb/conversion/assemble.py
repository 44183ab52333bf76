"""A model's files as one set of tensors by LAVIS's names: vision tower, language model, and what was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from blip2nb.errors import RequestError
from blip2nb.families.captioners.mapping import entries
from blip2nb.variants import Variant
from blip2nb.weights.rules import FuseQueryValueBias, MappingError, Tied
from blip2nb.weights.sources import Alias, Assembled, Files, Source, open_checkpoint, open_file, open_folder
from blip2nb.weights.stored import Stored


def open_model(files: Files, variant: Variant) -> Assembled:
    """All of a model's tensors by LAVIS's names: vision ∪ language model ∪ checkpoints.

    Raises:
        RequestError: a file is missing, truncated, unreadable without running code, or not what it should be.
    """
    missing = files.missing()
    if missing:
        raise RequestError(
            f"{variant.name} needs {', '.join(path.name for path in missing)}, not found in {missing[0].parent}. "
            f"Give a folder that holds {', '.join(path.name for path in files.parts())} as source."
        )
    parts: list[Source]
    if files.base is not None:
        parts = [_as_lavis(open_folder(files.base), variant)]
    else:
        if files.vision is None:
            raise ValueError("Without a base a model has a vision file.")
        language = open_folder(files.language)
        parts = [
            {f"visual_encoder.{name}": stored for name, stored in open_file(files.vision).items()},
            {_language_name(variant, name): stored for name, stored in language.items()},
        ]
    configs = []
    for path in files.checkpoints:
        tensors, config = (open_file(path), {}) if path.suffix == ".safetensors" else open_checkpoint(path)
        parts.append(tensors)
        configs.append(config)
    return dataclasses.replace(lay_over(parts, variant), checkpoints=files.checkpoints, configs=tuple(configs))


def lay_over(parts: list[Source], variant: Variant) -> Assembled:
    """Several sources as one; where two hold the same name, the later one wins.

    An alias belongs to the tensor as it was in its own file or the ones before it: the trainer leaves the copies of
    what it did not train in its file, and a base's copies know nothing of what was trained later. Where a file holds an
    alias and nothing has the tensor itself, the alias stands for it.
    """
    tied = {entry.sources[0]: str(entry.of) for entry in entries(variant) if isinstance(entry.rule, Tied)}
    tensors: dict[str, Stored] = {}
    aliases: dict[str, Alias] = {}
    for part in parts:
        tensors |= {name: stored for name, stored in part.items() if name not in tied}
        for name, of in tied.items():
            if name in part:
                original = tensors.setdefault(of, part[name])
                aliases[name] = Alias(name, part[name], of, original)
    return Assembled(tensors, tuple(aliases.values()))


def _language_name(variant: Variant, name: str) -> str:
    """A hub name as LAVIS calls it. An OPTModel was saved without the `model.` that an OPTForCausalLM has."""
    if variant.language.kind == "opt" and name.startswith("decoder."):
        name = f"model.{name}"
    return f"{variant.language_prefix}.{name}"


def _as_lavis(saved: Source, variant: Variant) -> dict[str, Stored]:
    """A converted directory under LAVIS's names again. Names that no rule has are kept, and refused by the plan."""
    return dict(_renamed_back(saved, variant))


def _renamed_back(saved: Source, variant: Variant) -> Iterator[tuple[str, Stored]]:
    left = dict(saved)
    for entry in entries(variant):
        stored = left.pop(str(entry.target), None)
        if stored is None:
            continue
        if isinstance(entry.rule, FuseQueryValueBias):
            _refuse_key_bias(entry.rule.key(stored), str(entry.target))
        yield from entry.parts(stored).items()
    left.pop("qformer.embeddings.position_ids", None)  # a buffer that old versions of transformers saved
    yield from left.items()


def _refuse_key_bias(key: Stored, name: str) -> None:
    if key.bits().any():
        raise MappingError(
            f"{name} in {key.path.name} has a key bias, which LAVIS does not have. A base should be as it was "
            "converted, not tuned in transformers."
        )

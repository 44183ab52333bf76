"""The first proof: a directory's tensors, by hash and round trip, without running anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.families.captioners.mapping import entries
from blip2nb.families.captioners.recording import recording
from blip2nb.families.captioners.stages import parameter_pairs
from blip2nb.proof.knowledge import before_the_cast, knowledge_of_cast, made_again
from blip2nb.proof.subject import Subject
from blip2nb.report import schema
from blip2nb.report.manifest import Manifest
from blip2nb.variants import Variant
from blip2nb.weights import hashing, stored
from blip2nb.weights.convert import inverse_of
from blip2nb.weights.rules import MappingError
from blip2nb.weights.sources import shapes


def prove_weights(subject: Subject) -> schema.Weights:
    """Every tensor accounted for, the way back bit for bit, the modules equal by hash; of tensors that were cast, equal
    to the source's cast, where that is at hand.

    Raises:
        RequestError: config.json is damaged, or describes no model that transformers builds.
    """
    manifest = subject.manifest
    held = shapes(subject.saved)
    tied = {entry.target for entry in entries(subject.variant) if entry.kind == "Tied"}
    expected = {name: shape for name, shape in expected_parameters(subject.folder).items() if name not in tied}
    roundtrip, differences = _round_trip(subject)
    # LAVIS's hashes are of the tensors before the cast
    equal, different, checked = _casts(subject) if subject.lossy else _modules(subject)
    return schema.Weights(
        written=len(held),
        missing=tuple(sorted(name for name in expected if name not in held)),
        unexpected=tuple(sorted(name for name in held if name not in expected)),
        misshapen=tuple(sorted(name for name in held if name in expected and held[name] != expected[name])),
        dropped=manifest.dropped,
        tied=manifest.tied,
        unused=manifest.unused,
        no_way_back=manifest.no_way_back,
        origins=manifest.origins,
        unproven=tuple(_compared_with_nothing(subject, equal)),
        roundtrip=roundtrip,
        roundtrip_differences=tuple(differences),
        modules_equal=equal,
        modules_different=tuple(different),
        modules_checked=checked,
        weights_hash=manifest.weights_hash,
        dtype=manifest.dtype,
        bytes_by_kind=manifest.bytes_by_kind,
        names=tuple(_names(manifest)),
    )


def expected_parameters(folder: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in transformers' own state dict for this configuration."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    try:
        config = Blip2Config.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers checks fields with errors of its own
        if memory_ran_out(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(f"{folder / 'config.json'} is damaged ({first}). Convert again with overwrite.") from error
    try:
        with torch.device("meta"):
            state = Blip2ForConditionalGeneration(config).state_dict()
    except Exception as error:  # whatever its parts think of what they are given
        if memory_ran_out(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(
            f"{folder / 'config.json'} describes no model that transformers builds ({type(error).__name__}: {first}). "
            "Convert again with overwrite."
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _round_trip(subject: Subject) -> tuple[bool | None, list[str]]:
    """Whether the inverse rules give back every tensor that was read, bit for bit. None after a lossy cast."""
    manifest, saved = subject.manifest, subject.saved
    if subject.lossy:
        return None, []
    # what is missing is reported as that
    whole = [entry for entry in entries(subject.variant) if not entry.optional and entry.target in saved]
    seen, differences = set(), []
    for entry in whole:
        if entry.sources[0] in manifest.no_way_back:
            continue
        try:
            for name, tensor in inverse_of(entry, saved):
                seen.add(name)
                if stored.digest_as(tensor, manifest.parameters[name]) != manifest.parameters[name]:
                    differences.append(name)
        except MappingError as error:
            differences.append(str(error))
    gone = [name for name in manifest.parameters if name not in seen and name not in manifest.no_way_back]
    differences += [] if differences else [f"{name} cannot be computed back" for name in gone]
    return not differences, differences


def _casts(subject: Subject) -> tuple[bool | None, list[str], int]:
    """Compare each tensor of a directory that was cast with the source's, cast in the same way."""
    right = before_the_cast(subject)
    if right is None:
        return None, [], 0
    known = knowledge_of_cast(right)
    judged = {name: known.same(name, subject.saved[name].tensor()) for name in sorted(subject.saved)}
    different = [f"{name} is not the source's" for name, same in judged.items() if same is False]
    return not different, different, sum(same is not None for same in judged.values())


def _compared_with_nothing(subject: Subject, equal: bool | None) -> list[str]:
    """The tensors that neither the round trip, a hash of LAVIS's nor the source could prove: all of a cast model whose
    source is gone, and, without a recording, those that have no way back and are not made again from the source."""
    saved, manifest = subject.saved, subject.manifest
    if subject.lossy:
        return [] if equal is not None else sorted(saved)
    rules = entries(subject.variant)
    changed = [str(one.target) for one in rules if one.sources and one.sources[0] in manifest.no_way_back]
    if subject.tape is not None or not changed:
        return []
    opened = subject.source
    if opened is None:
        return changed
    made = {name: made_again(name, opened) for name in changed}
    return [name for name, one in made.items() if one is None or not _is_that(saved[name].tensor(), one)]


def _is_that(tensor: torch.Tensor, made: torch.Tensor) -> bool:
    return tensor.shape == made.shape and torch.equal(tensor, made.to(tensor.dtype))


def _modules(subject: Subject) -> tuple[bool | None, list[str], int]:
    """Compare each parameter that was in LAVIS's modules with the one in the module the stages pair it with."""
    if subject.tape is None:
        return None, [], 0
    saved, recorded = subject.saved, recording(subject.tape)["parameters"]
    pairs = parameter_pairs(subject.variant)
    names = set(saved)
    different, covered = [], set()
    for reference, expected in recorded.items():
        target, rows = pairs.get(reference, (None, None))
        if target is None or target not in names:
            different.append(f"{reference} has no counterpart")
            continue
        covered.add(target)
        tensor = saved[target].tensor()
        if hashing.sha256_as(tensor if rows is None else tensor[rows], expected) != expected:
            different.append(f"{reference} is not {target}")
    different += [f"{name} has no counterpart in LAVIS" for name in sorted(names - covered)]
    return not different, different, len(recorded)


def parameter_names(different: Sequence[str], saved: Mapping[str, stored.Stored], model: Variant) -> list[str]:
    """The names in transformers of the parameters that the proof of the weights found to be others."""
    words = {word.strip(".,:;'\"()") for sentence in different for word in sentence.split()}
    pairs = parameter_pairs(model)
    words |= {pairs[word][0] for word in words if word in pairs}
    return sorted(name for name in saved if name in words)


def _names(manifest: Manifest) -> Iterator[tuple[tuple[str, ...], str, str, tuple[int, ...], str]]:
    """The whole mapping as it was applied: names in LAVIS, name in transformers or "", what was done, shape, file.

    The file is the one the first of the tensors was read from, "" where it was not in any.
    """
    held = {*manifest.parameters, *manifest.tied, *manifest.dropped}
    for entry in entries(manifest.variant):
        if entry.optional and entry.sources[0] not in held:
            continue
        written = "" if entry.optional else entry.target or ""
        yield entry.sources, written, entry.kind, entry.shape, manifest.origins.get(entry.sources[0], "")
    for name in manifest.unused:
        yield (name,), "", "Unused", (), ""

"""What is known of LAVIS's model beside its activations: its weights, by hash or themselves, and its settings."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from blip2nb.conversion.files import Opened
from blip2nb.families.captioners.mapping import entries
from blip2nb.families.captioners.recording import recording
from blip2nb.families.captioners.stages import parameter_pairs
from blip2nb.proof.subject import Subject
from blip2nb.trace.diagnosis.known import AttributeDifference, Known
from blip2nb.trace.precision import Weights
from blip2nb.weights.hashing import sha256_as, sha256_of
from blip2nb.weights.rules import Entry


def knowledge(subject: Subject, differences: Sequence[AttributeDifference] = ()) -> Known:
    """What is known of the tensors that should be in the model: LAVIS's hashes, or, where they were cast, the source's
    cast.

    The recording holds a hash of each of LAVIS's parameters. A tensor that has it is taken from the directory or, where
    the directory's is wrong, made again from the source.
    """
    if subject.lossy:
        return knowledge_of_cast(before_the_cast(subject), differences)
    held = _Held(subject)
    return Known(held.true, held.same, held.named, differences)


def knowledge_of_cast(weights: Weights | None, differences: Sequence[AttributeDifference] = ()) -> Known:
    """The same for a model in half precision: each tensor should be the right one, cast.

    Args:
        weights: what `before_the_cast` gives.
    """
    if weights is None:
        return Known(differences=differences)

    def same(name: str, tensor: torch.Tensor) -> bool | None:
        right = weights(name)
        return (
            None if right is None else torch.equal(right.reshape(tensor.shape).to(tensor.dtype), tensor.detach().cpu())
        )

    return Known(true=weights, same=same, differences=differences)


def before_the_cast(subject: Subject) -> Weights | None:
    """The float32 values of parameters that run in half precision: the directory's own, or, where those were cast, the
    source's; None where that is not at hand."""
    table = entries(subject.variant)
    home = {source: str(entry.target) for entry in table for source in entry.sources}
    tied = {str(entry.target): home[entry.of] for entry in table if entry.kind == "Tied" and entry.of in home}
    if not subject.lossy:
        saved = subject.saved
        own = {name: tied.get(name, name) for name in {*saved, *tied}}
        return lambda name: saved[own[name]].tensor().float() if name in own else None
    source = subject.source
    if source is None:
        return None
    made = {str(entry.target): entry for entry in source.plan.written}
    return lambda name: _made(made[tied.get(name, name)], source) if tied.get(name, name) in made else None


def made_again(name: str, source: Opened) -> torch.Tensor | None:
    """Compute a tensor of transformers' from the source once more; None if the conversion makes no such tensor."""
    entry = next((one for one in source.plan.written if str(one.target) == name), None)
    return None if entry is None else _made(entry, source)


def _made(entry: Entry, source: Opened) -> torch.Tensor:
    """A tensor of transformers' made from LAVIS's again."""
    return entry.rule.forward(*(source.tensors.tensors[name].tensor() for name in entry.sources)).float()


class _Held:
    def __init__(self, subject: Subject):
        self.subject = subject
        self.digests = recording(subject.recording)["parameters"]
        self.pairs = parameter_pairs(subject.variant)
        self.rows: dict[str, list[tuple[str, slice | None]]] = {}
        for reference, (target, rows) in self.pairs.items():
            if reference in self.digests:
                self.rows.setdefault(target, []).append((reference, rows))

    def same(self, name: str, tensor: torch.Tensor) -> bool | None:
        """Whether a parameter of transformers is LAVIS's, by hash. What LAVIS has no name for, the part of a fused bias
        that belongs to the keys, has to be zero."""
        parts = self.rows.get(name)
        if parts is None:
            return None
        value = tensor.detach().cpu()
        for reference, rows in parts:
            expected = self.digests[reference]
            if sha256_as(value if rows is None else value[rows], expected) != expected:
                return False
        return parts[0][1] is None or not value.chunk(3)[1].any()

    def true(self, name: str) -> torch.Tensor | None:
        """The tensor that should be there, in float32: the directory's, or made from the source."""
        saved = self.subject.saved
        if name in saved and self.same(name, saved[name].tensor()):
            return saved[name].tensor().float()
        source, entry = self.subject.source, self._entries.get(name)
        if entry is None or source is None:
            return None
        made = _made(entry, source)
        return made if self.same(name, made) else None

    @functools.cached_property
    def _entries(self) -> dict[str, Entry]:
        source = self.subject.source
        return {} if source is None else {str(entry.target): entry for entry in source.plan.written}

    def named(self, tensor: torch.Tensor) -> list[str]:
        """Which of transformers' parameters should hold exactly this."""
        value = tensor.detach().cpu()
        digests = [sha256_of(value), *(sha256_as(value, f"{like}:") or "" for like in self._dtypes)]
        return [target for one in dict.fromkeys(digests) for target in self._by_digest.get(one, [])]

    @functools.cached_property
    def _dtypes(self) -> list[str]:
        return sorted({one.split(":", 1)[0] for one in self.digests.values()})

    @functools.cached_property
    def _by_digest(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for reference, one in self.digests.items():
            target, rows = self.pairs[reference]
            if rows is None:
                out.setdefault(one, []).append(target)
        return out

"""From a divergence to its cause: differences that can be read off the modules, and the test that proves one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from blip2nb.trace.tape import attributes


@dataclasses.dataclass(frozen=True)
class AttributeDifference:
    """Two paired modules carry the same attribute with different values.

    Attributes:
        stage: the stage the pair belongs to.
        module: the candidate's module.
        attribute: its name, such as eps.
        reference, candidate: the two values.
    """

    stage: str
    module: str
    attribute: str
    reference: Any
    candidate: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute} is {self.candidate!r}, the reference has {self.reference!r}"


# Bookkeeping that says nothing about what a module computes
_IRRELEVANT = {"layer_idx", "layer_num", "inplace", "gradient_checkpointing", "is_decoder", "config"}


def attribute_differences(
    reference: Mapping[str, Mapping[str, Any]], candidate: torch.nn.Module, pairs: Iterable[tuple[str, str, str]]
) -> list[AttributeDifference]:
    """Compare the plain attributes (numbers, words, flags) of paired modules, without running anything.

    Args:
        reference: the reference's attributes by module path, as `tape.attributes` records them.
        pairs: (stage, path in the reference, path in the candidate).
    """
    own = attributes(candidate)
    out = []
    for stage, path, other in pairs:
        theirs, ours = reference.get(path, {}), own.get(other, {})
        for name in theirs.keys() & ours.keys() - _IRRELEVANT:
            if theirs[name] != ours[name]:
                out.append(AttributeDifference(stage, other, name, theirs[name], ours[name]))
    return out


@contextlib.contextmanager
def repaired(candidate: torch.nn.Module, differences: Iterable[AttributeDifference]) -> Iterator[None]:
    """The candidate with the reference's values in place, for as long as the block lasts: the counter-test."""
    changed = []
    try:
        for difference in differences:
            module = candidate.get_submodule(difference.module)
            changed.append((module, difference.attribute, getattr(module, difference.attribute)))
            setattr(module, difference.attribute, difference.reference)
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)

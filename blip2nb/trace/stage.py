"""A stage: a place in the network with one name, where it is in each model, and how its inputs line up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from blip2nb.trace.tape import split_place

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Stage:
    """One place to compare.

    Attributes:
        name: what people call it, the same for both models.
        reference: its place in the reference: `path.of.module` for a module's output, or `path.of.module:argument`
            for what arrives at a module.
        candidate: its place in the candidate. A stage whose candidate is an argument is a *junction*: nothing is
            computed there, only what arrives is compared.
        inputs: candidate's argument -> place in the reference that holds the same value. A place that begins with
            ":" is an argument of the stage's own module in the reference. Every floating-point input belongs here:
            one that is left out carries upstream errors in.
        arrange: candidate's argument -> function from the reference's layout to the candidate's.
        modules: submodules within the stage, reference -> candidate path relative to the stage's own: what pairs
            parameters and attributes, and where to look inside the stage. "" is the stage's module itself.
    """

    name: str
    reference: str
    candidate: str
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arrange: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_junction(self) -> bool:
        return split_place(self.candidate)[1] is not None

    @property
    def module(self) -> str:
        """Path of the candidate's module."""
        return split_place(self.candidate)[0]

    @property
    def parts(self) -> dict[str, str]:
        """The modules inside: the candidate's path relative to the stage's module -> the reference's whole path."""
        path = split_place(self.reference)[0]
        return {ours: f"{path}.{theirs}" for theirs, ours in self.modules.items() if theirs and ours}

    def source(self, argument: str) -> str:
        """The reference's place for one of the candidate's arguments."""
        place = self.inputs[argument]
        return split_place(self.reference)[0] + place if place.startswith(":") else place


def places(stages: Iterable[Stage]) -> list[str]:
    """Everything a reference must record for these stages, without repetition, in order."""
    wanted: dict[str, None] = {}
    for stage in stages:
        for argument in stage.inputs:
            wanted[stage.source(argument)] = None
        wanted[stage.reference] = None
    return list(wanted)


def places_inside(stages: Iterable[Stage]) -> list[str]:
    """What a reference must record to look inside the stages: what each paired module takes in and gives out."""
    paths = [path for stage in stages for path in stage.parts.values()]
    return [place for path in paths for place in (f"{path}:0", path)]

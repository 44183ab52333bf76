"""The stage under examination and what is at hand for it: all that an explanation is told from."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import torch

from blip2nb.trace.diagnosis.known import Known
from blip2nb.trace.inside import Look, Suspect
from blip2nb.trace.paths import join, relative
from blip2nb.trace.tape import first_tensor, sample_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """One stage under examination.

    Attributes:
        suspect: the stage, fed the reference's inputs.
        known: what is known of the reference's weights and settings.
        candidate: the whole model the stage is in.
        looks: what was found at every place inside, in the order of execution.
        tried: how often each cause was put to the counter-test, at this stage and at others; counted on.
    """

    suspect: Suspect
    known: Known
    candidate: torch.nn.Module
    looks: tuple[Look, ...]
    tried: Counter[str]

    @functools.cached_property
    def values(self) -> dict[str, torch.Tensor]:
        """What the modules inside take in and give out, all forced; float64. What enters the stage is ":in"."""
        values = self.suspect.intermediate()
        values[":in"] = first_tensor(self.suspect.arguments).double()
        return values

    def inside(self, path: str) -> str:
        """The path of one of the candidate's modules relative to the stage's, "" for that itself."""
        return relative(path, self.suspect.path)

    def whole(self, path: str) -> str:
        """The path in the candidate of what lies in the stage at a path."""
        return join(self.suspect.path, path)


def at_rows(value: torch.Tensor, look: Look) -> torch.Tensor:
    """A value at the positions that a look keeps, with batch and positions apart as there."""
    if value.dim() != look.expected.dim() and value.dim() > 1:
        value = value.reshape(*look.expected.shape[:-2], -1, value.shape[-1])
    return value[..., sample_rows(value.shape[-2]), :] if value.dim() > 1 else value

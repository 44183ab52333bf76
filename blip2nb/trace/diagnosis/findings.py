"""A fault as it is told: where it arises and what it may come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from blip2nb.trace.causes import Cause
from blip2nb.trace.inside import Look


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """One fault: where it arises, and what it may come from.

    Attributes:
        module: the candidate's module that goes wrong.
        part: what that is: norm, query, attention, projection, mlp, activation, residual, …
        arrival_error, local_error, rounding, excess: as for a stage, at the module. None where nothing was run.
        looks: what was found at every place inside the stage, in the order of execution.
        causes: the likeliest first.
    """

    stage: str
    module: str
    part: str
    arrival_error: float | None
    local_error: float | None
    rounding: float | None
    excess: float | None
    looks: tuple[Look, ...] = ()
    causes: tuple[Cause, ...] = ()

    def __str__(self) -> str:
        return f"{self.stage}: {self.part} {self.module}" + (f": {self.causes[0]}" if self.causes else "")


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """Those whose counter-test passed before the others; of one kind at one module only the first, which then says what
    the others saw as well."""
    kept: dict[str, Cause] = {}
    for cause in sorted(causes, key=lambda one: not one.proven):
        first = kept.setdefault(cause.id, cause)
        if first is not cause and cause.evidence not in first.evidence:
            kept[cause.id] = dataclasses.replace(first, evidence=f"{first.evidence}; {cause.evidence}")
    return list(kept.values())

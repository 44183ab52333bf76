"""What several verbs need: the run that is meant, what it was made from, its card, and checks of what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.errors import RequestError
from blip2nb.handles import Report, Run
from blip2nb.report.manifest import Manifest
from blip2nb.report.runs import Origin
from blip2nb.variants import variant
from blip2nb.weights.convert import CASTS
from blip2nb.weights.download import locate

if TYPE_CHECKING:
    from blip2nb.conversion.files import Opened
    from blip2nb.display.figures.style import Picture


def run_of(target: str | Path | Run) -> Run:
    """The run that is meant by its folder, its name, its converted directory, or itself."""
    return target if isinstance(target, Run) else Run.find(target)


def source_of(run: Run, origin: Origin) -> Opened | None:
    """What a run was converted from, opened, if it is here; nothing is downloaded for it."""
    from blip2nb.conversion.files import open_source

    named = variant(Manifest.read(run.model).model)
    here = bool(origin) or named.twin or all(part.here for part in locate(named))
    return open_source(named, origin.source, origin.base) if here else None


def write_card(run: Run, figure: Picture | None = None, report: Report | None = None) -> None:
    """Write the card of a run's model. The figure and the report are read from the run where they are not given."""
    from blip2nb.display import card

    card.write(run, figure, report)


def check_dtype(dtype: str, possible: Sequence[str] = tuple(CASTS)) -> None:
    if dtype not in possible:
        raise RequestError(f"dtype should be one of {', '.join(possible)}, found {dtype!r}.")


def hub_token(repository: str) -> str:
    if not repository:
        return ""
    from blip2nb.conversion import hub

    return hub.find_token(repository)

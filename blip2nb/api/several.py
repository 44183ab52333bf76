"""The verbs that make many runs, or break one on purpose: sweep, break_it, faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.api.common import run_of, source_of
from blip2nb.errors import RequestError
from blip2nb.handles import Run
from blip2nb.report.manifest import Manifest

if TYPE_CHECKING:
    from blip2nb.catalogue.answers import Answer, Listing
    from blip2nb.sweeps.sweep import Sweep


def sweep(
    *patterns: str | Path,
    notebook: str | Path = "convert",
    parameters: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    output: str | Path = "",
    workers: int = 0,
    scheduler: str = "",
    timeout: str | float = "",
    keep_models: bool = False,
    overwrite: bool = False,
) -> Sweep:
    """Run a notebook for many models, several at a time, and make a report over all: index.html in the output folder.

    What is finished already, by a hash of all that it depends on, is not done again. One run that fails does not stop
    the others. Needs a guarded main module where it is called from a script (`if __name__ == "__main__"`).

    Args:
        patterns: names of variants or patterns of them ("tiny-*", "blip2-*-coco"), checkpoints, and lists of runs as
            .yaml or .csv files, whose rows give parameters by name.
        notebook: one of the kit's by name, or a path.
        parameters: for every run that does not say otherwise.
        grid: parameter -> values; each run is made with every combination.
        output: a folder, outputs/ unless given, or an address that fsspec knows, such as s3://bucket/sweep. Each run is
            a folder in it, there whole or not at all.
        workers: how many runs at a time on this machine; as many as it has cores unless given. Runs whose models do
            not fit in memory beside each other never run beside each other.
        scheduler: the address or file of a Dask scheduler that is running, instead of this machine.
        timeout: after which a run is ended, in seconds or as "90s", "15min", "2h"; never unless given.
        keep_models: keep the converted models too, not the reports alone.
        overwrite: make everything anew, whatever stands there.

    Returns:
        What was found: `.runs`, `.status` and `.index`.

    Raises:
        RequestError: the request is wrong, before anything runs.
    """
    from blip2nb.sweeps import asked, sweep

    runs = asked.expand(patterns, notebook, parameters, grid)
    if workers < 0:
        raise RequestError(f"workers should be 1 or more, found {workers}.")
    return sweep.sweep(
        runs,
        output,
        workers=workers,
        scheduler=scheduler,
        timeout=sweep.seconds(timeout),
        keep_models=keep_models,
        overwrite=overwrite,
    )


def break_it(target: str | Path | Run, fault: str, where: str = "", seed: int = 0) -> Answer:
    """Make a known mistake in a converted model, and see whether the kit finds it. The run stays as it is: the mistake
    is made in a copy, in a temporary folder or in memory.

    Args:
        target: a run's folder or name, a converted directory, or a run.
        fault: the mistake's name; `faults` lists them.
        where: the stage or module to make it at; midway among the places where it fits unless given.
        seed: of the values it takes, where it has random ones.

    Returns:
        What was said and what should have been: `answer.findings`, `answer.shows`, `answer.marks`.

    Raises:
        RequestError: there is no such run, mistake or place, or no recording of LAVIS that fits the run.
    """
    from blip2nb.catalogue.bench import Bench
    from blip2nb.lavis_env import reference

    run = run_of(target)
    manifest = Manifest.read(run.model)
    tape = reference.find_tape(run, manifest)
    if tape is None:
        again = reference.completion(run, manifest, run.origin)
        raise RequestError(f"There is no recording of LAVIS that fits {run.folder.name}. Make one: {again}")
    bench = Bench(run.model, tape, lambda: source_of(run, run.origin))
    return bench.ask(bench.case(fault, where), seed)


def faults() -> Listing:
    """The mistakes that `break_it` makes, as a table: name, kind, what is done wrong, and its likely cause."""
    from blip2nb.catalogue.answers import Listing
    from blip2nb.catalogue.captioners import CATALOGUE

    return Listing(CATALOGUE)

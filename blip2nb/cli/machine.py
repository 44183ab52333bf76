"""The commands about many runs and about this machine: sweep, doctor, clean."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from blip2nb.cli.entry import app
from blip2nb.cli.options import Json, LavisPython, answer, print_json
from blip2nb.errors import RequestError
from blip2nb.report.outputs import Listed, Removed
from blip2nb.sizes import as_bytes


@app.command()
def sweep(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN...",
            help="Models by name or pattern ('tiny-*'), checkpoints, .yaml or .csv lists of runs.",
            show_default=False,
        ),
    ],
    notebook: Annotated[str, typer.Option(help="Which to run: one of the kit's by name, or a path.")] = "convert",
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="For every run, as papermill's -p."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B,…", help="Every run with each of these values; with more --grid, all pairs."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A folder, or an address such as s3://…; outputs/ unless given.")
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Runs at a time; 0 is one for each core.")] = 0,
    scheduler: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Of a Dask cluster that is running, instead of this machine.")
    ] = "",
    timeout: Annotated[str, typer.Option(metavar="TIME", help="End a run after 90s, 15min, 2h …")] = "",
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep the converted models, not only reports.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also what is finished already.")] = False,
    print_lines: Annotated[
        bool, typer.Option("--print", help="Run nothing: print a papermill line for each run, for xargs or job arrays.")
    ] = False,
    gather: Annotated[
        bool, typer.Option("--gather", help="Run nothing: make the report over the runs that are there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a notebook for many models, several at a time, and make a report over all of them: index.html.

    What is finished is not done again. Exit status: 3 when a run failed or was not made, else 1 when one diverges,
    else 4 when one is incomplete.
    """
    from blip2nb import api
    from blip2nb.sweeps import asked
    from blip2nb.sweeps import sweep as sweeping

    given = asked.named(parameters or [], "-p")
    axes = asked.axes(grid or [])
    if print_lines or gather:
        runs = asked.expand(patterns, notebook, given, axes)
        if print_lines:
            print(*sweeping.lines(runs, output, keep_models), sep="\n")
            return
        found = sweeping.gather(runs, output)
    else:
        found = api.sweep(
            *patterns,
            notebook=notebook,
            parameters=given,
            grid=axes,
            output=output,
            workers=workers,
            scheduler=scheduler,
            timeout=timeout,
            keep_models=keep_models,
            overwrite=overwrite,
        )
    answer(found.index, found, as_json)
    if found.status:
        raise typer.Exit(found.status)


@app.command()
def doctor(lavis_python: LavisPython = "", as_json: Json = False) -> None:
    """Check this machine: versions, the LAVIS environment, disk and memory."""
    from blip2nb.doctor import examine

    findings = examine(lavis_python)
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            print(f"{'ok ' if finding.fine else '!! '} {finding.what}: {finding.found}")
            if finding.advice:
                print(f"      {finding.advice}")
    if not all(finding.fine for finding in findings if finding.required):
        raise typer.Exit(RequestError.exit_status)


@app.command()
def clean(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="What to remove, as the list calls it; a whole run; or all that is unfinished.",
            show_default=False,
        ),
    ] = None,
    models: Annotated[bool, typer.Option("--models", help="Remove the converted models of all runs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output_dir: Annotated[str, typer.Option(help="Where the runs are; outputs/ unless given.")] = "",
    as_json: Json = False,
) -> None:
    """List what takes space: runs, unfinished work, twins, downloads. With names, remove it."""
    from blip2nb import clean as cleaning

    items = cleaning.survey(output_dir)
    if not names and not models:
        whole = Listed(tuple(item.row for item in items), sum(item.size for item in items))
        answer(whole, cleaning.table(items), as_json)
        return
    chosen, kept = cleaning.choose(items, names or [], models)
    for item in kept:
        print(f"{item.name} stays: {item.kept}", file=sys.stderr)
    if chosen and not yes:
        _ask_to_remove(cleaning.table(chosen))
    freed = cleaning.remove(chosen)
    words = f"Removed {', '.join(item.name for item in chosen) or 'nothing'}: {as_bytes(freed)}."
    answer(Removed(tuple(item.row for item in chosen), freed), words, as_json)


def _ask_to_remove(table: str) -> None:
    """Go on only where the answer is yes. The question goes to stderr, which leaves stdout to the result."""
    if not sys.stdin.isatty():
        raise RequestError("Nothing was removed: there is nobody to ask. Say --yes to remove it without a question.")
    print(table, file=sys.stderr)
    if not typer.confirm("Remove it?", err=True):
        print("Nothing was removed.", file=sys.stderr)
        raise typer.Exit

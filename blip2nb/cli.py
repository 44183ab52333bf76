"""The `blip2nb` command. Everything heavy is imported inside the commands, so that --help is instant."""

from __future__ import annotations

import atexit
import enum
import json
import logging
import os
import sys
import threading
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from blip2nb._version import __version__
from blip2nb.errors import Blip2nbError, Diverges, OutOfMemory, RequestError, memory_ran_out, no_memory

app = typer.Typer(
    help="Move BLIP-2 checkpoints from LAVIS to Hugging Face transformers, and prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dtype(enum.StrEnum):
    auto, float32, float16, bfloat16 = "auto", "float32", "float16", "bfloat16"


class Proof(enum.StrEnum):
    auto, weights, both = "auto", "weights", "both"


class Part(enum.StrEnum):
    trained, all = "trained", "all"


Model = Annotated[str, typer.Argument(help="A variant's name; see `blip2nb variants`.", show_default=False)]
MaybeModel = Annotated[
    str,
    typer.Argument(help="A variant's name; a checkpoint of LAVIS's trainer says it itself.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Source = Annotated[
    str, typer.Option(help="A folder in the released layout, or a checkpoint to lay over the model's own files.")
]
Base = Annotated[
    str,
    typer.Option(help="What a checkpoint is laid over: a folder in the released layout, or a converted directory."),
]
Output = Annotated[str, typer.Option("--output", "-o", help="Where to write; under outputs/ unless given.")]
LavisPython = Annotated[
    str, typer.Option(help="The python of an environment with LAVIS, found by itself if made here; or none.")
]
Device = Annotated[str, typer.Option(help="Where LAVIS runs: cpu, cuda, cuda:1 …")]

Images = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH", help="An image, or a folder of images, to show instead of the demo's; more with --images again."
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Shown with each image: beside it in the forward pass, and as its caption's prompt. More with --text.",
    ),
]
PushToHub = Annotated[
    str, typer.Option(metavar="REPO", help="Upload to user/name when done; token from the environment or the login.")
]
Private = Annotated[bool, typer.Option("--private", help="Make that repository a private one.")]
Texts = Annotated[str, typer.Option(metavar="FILE", help="A file of such texts, one a line.")]


def program() -> NoReturn:
    """What `blip2nb` starts: `main`, and then an end that spares the seconds in which Python takes PyTorch and
    transformers apart, object by object. The first steps of its own end are done: threads, atexit, what is unwritten.
    """
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = 120  # as Python itself ends where nobody reads on
    os._exit(status)


def main() -> None:
    """Runs the command and turns the kit's errors into one sentence and an exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in (
        "httpx",
        "httpcore",
        "httpx2",
        "httpcore2",
        "huggingface_hub",
        "papermill",
        "matplotlib",
        "fontTools",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        status = app(standalone_mode=False) or 0
        if status == 130:  # how Typer ends when Ctrl-C is pressed
            raise KeyboardInterrupt
        sys.exit(status)
    except TyperException as error:
        said = error.format_message()  # type: ignore[attr-defined]
        if said:
            print(f"blip2nb: {said} See `blip2nb --help`.", file=sys.stderr)
        else:
            error.show()  # type: ignore[attr-defined]  # no command at all: the help itself
        sys.exit(RequestError.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        print("blip2nb: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(3)
    except Exception as error:
        if memory_ran_out(error) and not isinstance(error, OutOfMemory):
            error = OutOfMemory(no_memory("while working", error))
        if isinstance(error, Blip2nbError):
            print(f"blip2nb: {error}", file=sys.stderr)
            sys.exit(error.exit_status)
        logging.getLogger("blip2nb").debug("traceback", exc_info=True)
        print(
            f"blip2nb: unexpected {type(error).__name__}: {error}. Please report this with the command, and with what "
            "`blip2nb --verbose …` says.",
            file=sys.stderr,
        )
        sys.exit(3)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say more, with tracebacks.")] = False,
) -> None:
    if verbose:
        logging.getLogger().setLevel(logging.DEBUG)
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def variants(as_json: Json = False) -> None:
    """List the models and their twins."""
    from blip2nb.families.captioners.mapping import parameter_count
    from blip2nb.variants import VARIANTS

    rows: list[dict[str, Any]] = [
        {
            "model": one.name,
            "lavis": f"{one.lavis_class}, {one.lavis_type}",
            "image_size": one.image_size,
            "language_model": one.language_model,
            "checkpoint": one.checkpoint,
            "prompt": one.prompt,
            "parameters": parameter_count(one),
            "twin": one.twin,
        }
        for one in VARIANTS.values()
    ]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        size = f"{row['parameters'] / 1e9:.2f} B" if not row["twin"] else f"{row['parameters'] / 1e3:.0f} k"
        print(f"{row['model']:<28}{size:>9}  {row['image_size']} px  {row['language_model']:<20} {row['checkpoint']}")


@app.command()
def keys(model: Model, as_json: Json = False) -> None:
    """Print the whole mapping of a model: every tensor's name in LAVIS and in transformers, from shapes alone."""
    from blip2nb.families.captioners.mapping import entries
    from blip2nb.variants import variant

    rows: list[dict[str, Any]] = [
        {"source": list(entry.sources), "target": entry.target, "rule": entry.kind, "shape": list(entry.shape)}
        for entry in entries(variant(model))
    ]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        print(f"{row['rule']:<19} {' + '.join(row['source'])} -> {row['target'] or '(left out)'} {tuple(row['shape'])}")


@app.command()
def plan(
    model: MaybeModel = "",
    source: Source = "",
    output: Output = "",
    base: Base = "",
    dtype: Annotated[Dtype, typer.Option(help="As for convert.")] = Dtype.auto,
    max_shard_size: Annotated[str, typer.Option(help="As for convert.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Say what a conversion would read, write and need, and start nothing.

    Exit status: 0 when it can be done, 2 when something stands in the way.
    """
    from blip2nb import api

    found = api.plan(model, source, output, base=base, dtype=dtype.value, max_shard_size=max_shard_size)
    if as_json:
        _print_json(found.as_dict())
    else:
        print(found)
    if found.problems:
        raise typer.Exit(RequestError.exit_status)


@app.command()
def convert(
    model: MaybeModel = "",
    source: Source = "",
    output: Output = "",
    base: Base = "",
    dtype: Annotated[Dtype, typer.Option(help="auto keeps every tensor's own and loses nothing.")] = Dtype.auto,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    run_name: Annotated[str, typer.Option(help="Folder under outputs/; the model's name unless given.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands there.")] = False,
    push_to_hub: PushToHub = "",
    private: Private = False,
    check: Annotated[
        str, typer.Option(metavar="DIR", help="Convert nothing: read DIR again, and its source, and compare.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Convert a model into a directory that transformers loads. Needs no LAVIS.

    Interrupted or killed, the same command goes on. Exit status: 1 when --check finds a difference.
    """
    from blip2nb import api

    if check:
        _check(check, source, base, as_json)
        return
    run = api.convert(
        model,
        source,
        output,
        base=base,
        run_name=run_name,
        dtype=dtype.value,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        private=private,
    )
    if as_json:
        _print_json({"model": model, "output": str(run.model)})
        return
    print(run.model)


def _check(target: str, source: str, base: str, as_json: bool) -> None:
    from blip2nb import api

    found = api.check(target, source, base)
    if as_json:
        _print_json({"output": str(found.folder), "source_checked": found.source_checked, "wrong": list(found.wrong)})
    else:
        print(found)
    if found.wrong:
        raise typer.Exit(Diverges.exit_status)


@app.command()
def revert(
    target: Annotated[str, typer.Argument(metavar="DIR", help="A BLIP-2 directory of transformers, or a run's name.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The .pth to write.")],
    part: Annotated[Part, typer.Option(help="What LAVIS's trainer would save, or the whole model.")] = Part.trained,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a LAVIS checkpoint from a directory of transformers, tuned there or converted: the way back."""
    from blip2nb import api

    done = api.revert(target, output, part=part.value, overwrite=overwrite)
    if as_json:
        _print_json({"output": str(done.path), "tensors": done.tensors, "no_way_back": done.no_way_back})
        return
    print(done)


@app.command()
def capture(
    model: MaybeModel = "",
    source: Source = "",
    output: Output = "",
    base: Base = "",
    lavis_python: LavisPython = "",
    device: Device = "cpu",
    images: Images = None,
    text: Text = None,
    texts: Texts = "",
    as_json: Json = False,
) -> None:
    """Have LAVIS itself run the model and record it: the reference that `verify` compares with."""
    from blip2nb import api

    tape = api.capture(
        model,
        source,
        base=base,
        output=output,
        lavis_python=lavis_python,
        device=device,
        images=images or (),
        texts=_all_texts(text, texts),
    )
    if as_json:
        _print_json(
            {"tape": tape.path, **{name: tape.metadata[name] for name in ("model", "weights_hash", "versions")}}
        )
        return
    print(tape.path)


def _all_texts(named: list[str] | None, file: str) -> list[str]:
    if not file:
        return named or []
    from blip2nb.families.captioners.inputs import read_texts

    return [*(named or []), *read_texts(file)]


@app.command()
def verify(
    target: Annotated[str, typer.Argument(metavar="DIR", help="A converted directory, or a run's folder or name.")],
    proof: Annotated[Proof, typer.Option(help="weights alone, both proofs, or what is possible.")] = Proof.auto,
    tape: Annotated[str, typer.Option(help="A recording to compare with; one that fits is found or made.")] = "",
    source: Source = "",
    base: Base = "",
    lavis_python: LavisPython = "",
    device: Device = "cpu",
    output: Output = "",
    images: Images = None,
    text: Text = None,
    texts: Texts = "",
    dtype: Annotated[str, typer.Option(help="What transformers runs in: float32, bfloat16, float16.")] = "",
    figures: Annotated[bool, typer.Option(help="Also draw the figures.")] = True,
    keep_model: Annotated[bool, typer.Option(help="Or remove the model at the end; the report stays.")] = True,
    push_to_hub: PushToHub = "",
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Prove that a converted directory is the model LAVIS runs, or say where it first goes wrong.

    Exit status: 0 for match and explained, and with --proof weights for proven weights; 1 for diverges; 4 for
    incomplete, which names what is missing and the command that completes the proof.
    """
    from blip2nb import api
    from blip2nb.handles import Run

    run = Run.find(target)
    report = api.verify(
        run,
        proof=proof.value,
        tape=tape,
        source=source,
        base=base,
        lavis_python=lavis_python,
        device=device,
        output=output,
        figures=figures,
        images=images or (),
        texts=_all_texts(text, texts),
        dtype=dtype,
        push_to_hub=push_to_hub,
        private=private,
    )
    api.finish(run, keep_model)
    if as_json:
        _print_json(report.content)
    else:
        print(report)
    if status := report.status(proof.value):
        raise typer.Exit(status)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder or name, or a converted directory.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="user/name; made where it is not there.")],
    private: Private = False,
    as_json: Json = False,
) -> None:
    """Upload a converted model with its card: what the hub lacks of it, after a proof the card alone.

    Exit status: 2 for a model whose proof failed, and for whatever the hub says against it.
    """
    from blip2nb import api

    address = api.push(run, repository, private=private)
    if as_json:
        _print_json({"repository": address})
        return
    print(address)


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under outputs/.")],
    as_json: Json = False,
) -> None:
    """Print a run's verdict, the numbers behind it and where everything lies."""
    from blip2nb import api
    from blip2nb.handles import Run

    found = Run.find(run)
    if as_json:
        _print_json(found.report.content)
        return
    print(api.show(found))


@app.command()
def figures(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under outputs/.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Where to; the run's figures/export/ unless given.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Write a run's figures for papers and slides: SVG, PDF and PNG in two widths, their data and their alt texts."""
    from blip2nb import api

    written = api.export_figures(run, output)
    if as_json:
        _print_json([str(path) for path in written])
        return
    print(f"{len(written)} files in {written[0].parent}" if written else "There is nothing to draw in this run.")


@app.command()
def diff(
    run_a: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name under outputs/.")],
    run_b: Annotated[str, typer.Argument(metavar="RUN", help="The run to compare it with.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Also draw it: a .png, .svg or .pdf.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Say what is different between two runs: verdicts, stages, output, parameters and versions.

    It compares two proofs and proves nothing itself. Exit status: 0 whatever the difference; 2 for what is no run.
    """
    from blip2nb import api

    found = api.diff(run_a, run_b)
    if output:
        found.draw(output)
    if as_json:
        _print_json(found.as_dict())
    else:
        print(found)


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
    if as_json:
        _print_json(found.index)
    else:
        print(found)
    if found.status:
        raise typer.Exit(found.status)


@app.command()
def doctor(lavis_python: LavisPython = "", as_json: Json = False) -> None:
    """Check this machine: versions, the LAVIS environment, disk and memory."""
    from blip2nb.doctor import examine

    findings = examine(lavis_python)
    if as_json:
        _print_json([finding.as_dict() for finding in findings])
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
            metavar="NAME", help="What to remove, as the list calls it, or a whole run.", show_default=False
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
        rows = [item.as_dict() for item in items]
        whole = {"items": rows, "bytes": sum(item.size for item in items)}
        _print_json(whole) if as_json else print(cleaning.table(items))
        return
    chosen, kept = cleaning.choose(items, names or [], models, output_dir)
    for item in kept:
        print(f"{item.name} stays: {item.kept}", file=sys.stderr)
    if chosen and not yes:
        _ask_to_remove(cleaning.table(chosen))
    freed = cleaning.remove(chosen)
    if as_json:
        _print_json({"removed": [item.as_dict() for item in chosen], "bytes": freed})
    else:
        print(f"Removed {', '.join(item.name for item in chosen) or 'nothing'}: {cleaning.human(freed)}.")


def _ask_to_remove(table: str) -> None:
    """Go on only where the answer is yes. The question goes to stderr, which leaves stdout to the result."""
    if not sys.stdin.isatty():
        raise RequestError("Nothing was removed: there is nobody to ask. Say --yes to remove it without a question.")
    print(table, file=sys.stderr)
    if not typer.confirm("Remove it?", err=True):
        print("Nothing was removed.", file=sys.stderr)
        raise typer.Exit


def _print_json(content: Any) -> None:
    from blip2nb.report.store import finite

    print(json.dumps(finite(content), indent=1))


if __name__ == "__main__":
    program()

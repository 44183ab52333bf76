"""The commands about proofs: capture, verify, show, figures, diff."""

from __future__ import annotations

from typing import Annotated

import typer

from blip2nb.cli.entry import app
from blip2nb.cli.options import (
    Base,
    Device,
    Images,
    Json,
    LavisPython,
    MaybeModel,
    Output,
    Private,
    Proof,
    PushToHub,
    Source,
    Text,
    Texts,
    all_texts,
    answer,
    print_json,
)
from blip2nb.report.outputs import Recorded


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
    from blip2nb.families.captioners.recording import recording

    tape = api.capture(
        model,
        source,
        base=base,
        output=output,
        lavis_python=lavis_python,
        device=device,
        images=images or (),
        texts=all_texts(text, texts),
    )
    told = recording(tape)
    answer(Recorded(str(tape.path), told["model"], told["weights_hash"], told["versions"]), tape.path, as_json)


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
        texts=all_texts(text, texts),
        dtype=dtype,
        push_to_hub=push_to_hub,
        private=private,
    )
    api.finish(run, keep_model)
    answer(report.content, report, as_json)
    if status := report.status(proof.value):
        raise typer.Exit(status)


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
        print_json(found.report.content)
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
    words = f"{len(written)} files in {written[0].parent}" if written else "There is nothing to draw in this run."
    answer([str(path) for path in written], words, as_json)


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
    answer(found.row, found, as_json)

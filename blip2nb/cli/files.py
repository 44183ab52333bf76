"""The commands about files: variants, keys, plan, convert, revert, push."""

from __future__ import annotations

from typing import Annotated

import typer

from blip2nb.cli.entry import app
from blip2nb.cli.options import (
    Base,
    Dtype,
    Json,
    MaybeModel,
    Model,
    Output,
    Part,
    Private,
    PushToHub,
    Source,
    answer,
    print_json,
)
from blip2nb.errors import Diverges, RequestError
from blip2nb.report.outputs import Checked, Converted, KeyRow, Pushed, RevertedFile, VariantRow


@app.command()
def variants(as_json: Json = False) -> None:
    """List the models and their twins."""
    from blip2nb.families.captioners.mapping import parameter_count
    from blip2nb.variants import VARIANTS

    rows = [
        VariantRow(
            model=one.name,
            lavis=f"{one.lavis_class}, {one.lavis_type}",
            image_size=one.image_size,
            language_model=one.language_model,
            checkpoint=one.checkpoint,
            prompt=one.prompt,
            parameters=parameter_count(one),
            twin=one.twin,
        )
        for one in VARIANTS.values()
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        size = f"{row.parameters / 1e3:.0f} k" if row.twin else f"{row.parameters / 1e9:.2f} B"
        print(f"{row.model:<28}{size:>9}  {row.image_size} px  {row.language_model:<20} {row.checkpoint}")


@app.command()
def keys(model: Model, as_json: Json = False) -> None:
    """Print the whole mapping of a model: every tensor's name in LAVIS and in transformers, from shapes alone."""
    from blip2nb.families.captioners.mapping import entries
    from blip2nb.variants import variant

    rows = [KeyRow(one.sources, one.target, one.kind, one.shape) for one in entries(variant(model))]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row.rule:<19} {' + '.join(row.source)} -> {row.target or '(left out)'} {row.shape}")


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
    answer(found, found, as_json)
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
    answer(Converted(model, str(run.model)), run.model, as_json)


def _check(target: str, source: str, base: str, as_json: bool) -> None:
    from blip2nb import api

    found = api.check(target, source, base)
    answer(Checked(str(found.folder), found.source_checked, found.wrong), found, as_json)
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
    answer(RevertedFile(str(done.path), done.tensors, done.no_way_back), done, as_json)


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
    answer(Pushed(address), address, as_json)

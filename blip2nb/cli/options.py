"""The options that several commands have in common, and how a result is printed as JSON."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import typer


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


def all_texts(named: list[str] | None, file: str) -> list[str]:
    """The texts of --text and of --texts."""
    if not file:
        return named or []
    from blip2nb.families.captioners.inputs import read_texts

    return [*(named or []), *read_texts(file)]


def print_json(content: Any) -> None:
    """Print a record, or a list of them."""
    from blip2nb.forms import dumps

    print(dumps(content), end="")


def answer(content: Any, words: object, as_json: bool) -> None:
    """Print what a command found: the record with --json, else what says the same to people."""
    if as_json:
        print_json(content)
    else:
        print(words)

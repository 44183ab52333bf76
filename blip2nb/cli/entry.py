"""The command itself: how it begins, ends, and says what went wrong."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from blip2nb._version import __version__
from blip2nb.errors import Blip2nbError, OutOfMemory, RequestError, memory_ran_out, no_memory

app = typer.Typer(
    help="Move BLIP-2 checkpoints from LAVIS to Hugging Face transformers, and prove the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
        sys.exit(Blip2nbError.exit_status)
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
        sys.exit(Blip2nbError.exit_status)


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

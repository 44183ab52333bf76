"""One notebook through papermill, in a process of its own that can be ended without harm to anything else.

It is started as `python -m blip2nb.sweeps.child`, reads what to do as a line of JSON from its standard input, and
writes lines of JSON to its standard output: each cell as it begins, and how it ended. When its standard input closes,
whoever started it is gone, and it ends with everything that it started.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TextIO, TypedDict


def main() -> None:
    """Execute what standard input asks for."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(asked["sockets"],), daemon=True).start()
    told = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what anything else prints is no message
    _say(told, **execute(asked, lambda **event: _say(told, **event)))


def _say(told: TextIO, **event: Any) -> None:
    told.write(json.dumps(event) + "\n")


def _end_with_parent(sockets: str) -> None:
    from blip2nb.sweeps.leftovers import end, family

    while sys.stdin.readline():
        pass
    end(family(os.getpid())[1:])
    shutil.rmtree(sockets, ignore_errors=True)
    os._exit(1)


class Ended(TypedDict, total=False):
    """How a notebook ended: `done`, or an error in one line, the exception's name, and its traceback as plain text."""

    done: bool
    error: str
    kind: str
    traceback: str


def execute(asked: Mapping[str, Any], say: Callable[..., None]) -> Ended:
    """Run the notebook `asked["input"]` with `asked["parameters"]`, and write it to `asked["output"]` as it goes. The
    kernel's sockets lie in `asked["sockets"]`.
    """
    import logging

    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from blip2nb.lavis_env import sockets

    logging.getLogger("papermill").setLevel(logging.ERROR)
    headings = _headings(nbformat.read(asked["input"], 4).cells, injected=bool(asked["parameters"]))

    def begins(cell: Any, cell_index: int) -> None:
        say(cell=cell_index + 1, of=len(headings), title=headings[cell_index])

    try:
        papermill.execute_notebook(
            asked["input"],
            asked["output"],
            asked["parameters"],
            progress_bar=False,
            start_timeout=300,  # seconds. Chosen: a kernel takes a few, more on a machine that is busy
            cwd=asked["folder"] or None,
            on_cell_execute=begins,
            config=sockets.config(asked["sockets"]),
            shutdown_kernel="immediate",  # the notebook is written: a kernel that tidies up takes a second or two more
        )
    except PapermillExecutionError as error:
        words = error.evalue.strip().splitlines()
        return {
            "error": words[0] if words else error.ename,
            "kind": error.ename,
            "traceback": "\n".join(error.traceback),
        }
    except Exception as error:
        import traceback

        return {
            "error": f"{type(error).__name__}: {error}".splitlines()[0],
            "kind": type(error).__name__,
            "traceback": traceback.format_exc(),
        }
    return {"done": True}


def _headings(cells: list[Any], injected: bool) -> list[str]:
    """The last heading before each cell, as papermill counts them: it puts a cell with the parameters behind the first
    that is tagged."""
    found, heading = [], ""
    for cell in cells:
        if cell.cell_type == "markdown":
            lines = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            heading = lines[-1] if lines else heading
        found.append(heading)
        if injected and "parameters" in cell.metadata.get("tags", []):
            found.append(heading)
    return found


if __name__ == "__main__":
    main()

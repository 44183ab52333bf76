"""Measure what a notebook costs before it does anything, and as a whole: headless, on a twin.

    python -m benchmarks.notebooks
    python -m benchmarks.notebooks --model tiny-blip2-flan-t5-xl --times 5

Every notebook that runs on the kit's own kernel is executed by papermill in turns with one that holds a single empty
cell. Start-up is from papermill's start to the end of the cell that imports the kit and checks the parameters.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
import time
from pathlib import Path

import nbformat

from benchmarks import machine
from benchmarks.process import ROOT, seconds
from benchmarks.results import table

RESULTS = ROOT / "benchmarks" / "results" / "notebooks.md"
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if path.stem != "lavis")
_IMPORTS = ("import blip2nb", "import blip2nb.api")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description="What a notebook costs before it does anything, and as a whole.")
    parser.add_argument("--model", default="tiny-blip2-opt-2.7b", help="the twin to run them on")
    parser.add_argument("--times", type=int, default=3, help="how often each is run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = [_row(notebook, options.model, options.times, Path(name)) for notebook in NOTEBOOKS]
        system = machine.describe_machine(Path(name))
    imports = {line: _median([seconds([sys.executable, "-c", line]) for _ in range(5)]) for line in _IMPORTS}
    RESULTS.write_text(_page(rows, imports, system, options.model, options.times), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


def _row(notebook: Path, model: str, times: int, scratch: Path) -> list[str]:
    """Start-up and whole of one notebook, and what papermill and a kernel cost without it, in seconds."""
    empty = scratch / "empty.ipynb"
    kernel = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("")])
    kernel.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(kernel, empty)
    executed = scratch / "executed.ipynb"
    starts, wholes, bares = [], [], []
    for number in range(times):
        bares.append(seconds([*_papermill(), empty, scratch / "out.ipynb"]))
        declared = nbformat.read(notebook, 4).cells[1].source
        named = ["-p", "model_name", model] if "model_name" in declared else []
        began = time.time()
        wholes.append(
            seconds([*_papermill(), notebook, executed, *named, "-p", "output_dir", scratch / f"outputs-{number}"])
        )
        starts.append(_first_useful(executed) - began)
    return [notebook.stem, *(f"{_median(values):.1f}" for values in (bares, starts, wholes))]


def _papermill() -> list[str | Path]:
    return [Path(sys.executable).parent / "papermill", "--no-progress-bar", "--log-level", "ERROR"]


def _first_useful(executed: Path) -> float:
    """When the cell that checks the parameters ended, in seconds since the epoch."""
    cells = nbformat.read(executed, 4).cells
    checked = next(cell for cell in cells if "check_notebook()" in cell.source and cell.cell_type == "code")
    ended = datetime.datetime.fromisoformat(checked.metadata.papermill["end_time"])
    return ended.replace(tzinfo=ended.tzinfo or datetime.UTC).timestamp()


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _page(rows: list[list[str]], imports: dict[str, float], system: dict, model: str, times: int) -> str:
    head = ["notebook", "papermill and an empty cell, s", "to the first useful cell, s", "whole, s"]
    words = [
        "# What a notebook costs",
        "Written by `python -m benchmarks.notebooks`.",
        f"Headless on {model}, each into an empty output folder; medians of {times}, in turns with a notebook of one "
        "empty cell. The first useful cell is the one after imports and the check of the parameters.",
        table(head, rows),
        "Imports, as whole processes: " + ", ".join(f"`{line}` {took:.2f} s" for line, took in imports.items()) + ".",
        "## Machine and versions",
        "\n".join(f"- {what}: {value}" for what, value in {**system, **machine.describe_versions()}.items()),
    ]
    return "\n\n".join(words) + "\n"


if __name__ == "__main__":
    main()

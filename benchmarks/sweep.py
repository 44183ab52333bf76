"""Measure what a sweep gains, what it costs, and what it survives, on the twins.

    python -m benchmarks.sweep                       # all of it, about an hour and a half
    python -m benchmarks.sweep --parts speed again

- speed: the seven twins with one worker, with two, and by papermill alone, one notebook after the other; in turns, each
  into an empty folder, so that every kernel is cold.
- again: the same sweep once more, with nothing to do.
- many: two hundred runs in one sweep, the memory of the process that drives it, and how long its report takes to open.
- kills: a worker that is killed at a random moment, twenty times.

The last two run a notebook of two cells, made here: a twin is converted and both proofs are made, without figures.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import psutil

from benchmarks import machine
from benchmarks.process import ROOT, BenchmarkError, seconds
from benchmarks.results import table
from blip2nb.variants import TWINS

RESULTS = ROOT / "benchmarks" / "results" / "sweep.md"
_BIN = Path(sys.executable).parent
_CONVERT = ROOT / "notebooks" / "convert.ipynb"


def main() -> None:
    """Measure and write the page. Parts that are not measured now stay as they were."""
    parser = argparse.ArgumentParser(description="What a sweep gains, costs and survives.")
    parser.add_argument("--parts", nargs="+", choices=list(_PARTS), default=list(_PARTS))
    parser.add_argument("--times", type=int, default=3, help="how often each side of a comparison is run")
    options = parser.parse_args()
    kept = RESULTS.with_suffix(".json")
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as name:
            head, rows = _PARTS[part](Path(name), options.times)
            system = {**machine.describe_machine(Path(name)), **machine.describe_versions()}
        found[part] = {"head": head, "rows": rows, "measured": system}
        kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        RESULTS.write_text(_page(found), encoding="utf-8")
        print(table(head, rows))


def _sweep(output: Path, *arguments: object) -> list[str | Path]:
    return [_BIN / "blip2nb", "sweep", *map(str, arguments), "--output", output]


# -- speed, and what it costs


def _speed(scratch: Path, times: int) -> tuple[list[str], list[list[str]]]:
    sides: dict[str, Callable[[Path], float]] = {
        "papermill alone": _by_papermill,
        "one worker": lambda output: seconds(_sweep(output, "tiny-*", "--workers", 1)),
        "two workers": lambda output: seconds(_sweep(output, "tiny-*", "--workers", 2)),
    }
    took: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(times):
        for side, run in sides.items():
            took[side].append(run(scratch / f"{side}-{number}"))
    alone, one, two = (took[side] for side in sides)
    rows = [[side, f"{statistics.median(values):.1f}", _spread(values)] for side, values in took.items()]
    rows.append(["one worker ÷ two", *_ratio(one, two)])
    rows.append(["one worker ÷ papermill alone", *_ratio(one, alone)])
    return ["all seven twins", "median, s", "from … to"], rows


def _by_papermill(output: Path) -> float:
    """As people do it without a sweep, in a loop of the shell."""
    output.mkdir()
    return sum(
        seconds(
            [
                _BIN / "papermill", _CONVERT, output / f"{twin}.ipynb", "--no-progress-bar", "--log-level", "ERROR",
                "-p", "model_name", twin, "-p", "output_dir", output, "-p", "keep_model", "False",
            ]
        )
        for twin in TWINS
    )  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} … {max(values):.1f}"


def _ratio(above: Sequence[float], below: Sequence[float]) -> list[str]:
    """The median of the pairs' ratios, and their range."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return [f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} … {max(ratios):.2f}"]


def _again(scratch: Path, times: int) -> tuple[list[str], list[list[str]]]:
    command = _sweep(scratch / "out", "tiny-*")
    first = seconds(command)
    took = [seconds(command) for _ in range(max(times, 5))]
    rows = [["the first", f"{first:.1f}", ""], ["with nothing to do", f"{statistics.median(took):.2f}", _spread(took)]]
    return ["sweep of the seven twins", "median, s", "from … to"], rows


# -- two hundred


_SHORT = (
    'model_name: str = ""\nseed: int = 0\nrun_name: str = ""\noutput_dir: str = ""',
    "import blip2nb\n"
    "run = blip2nb.convert(model_name, run_name=run_name, output_dir=output_dir)\n"
    "print(blip2nb.verify(run, figures=False))",
)


def _short(folder: Path) -> Path:
    """A notebook that does what must be done and nothing more."""
    cells = [nbformat.v4.new_code_cell(source) for source in _SHORT]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "short.ipynb")
    return folder / "short.ipynb"


def _many(scratch: Path, times: int) -> tuple[list[str], list[list[str]]]:
    seeds = ",".join(map(str, range(29)))  # times seven twins: 203 runs
    output = scratch / "out"
    arguments = _sweep(output, "tiny-*", "--notebook", _short(scratch), "--grid", f"seed={seeds}")
    process = subprocess.Popen([*map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver, held = psutil.Process(process.pid), []
    began = time.perf_counter()
    while process.poll() is None:
        try:
            done = len(list(output.glob("*/sweep.json")))
            held.append((done, driver.memory_info().rss))
        except psutil.NoSuchProcess:
            break
        time.sleep(2)
    if process.returncode != 0:
        raise BenchmarkError(f"the sweep ended with {process.returncode}")
    took = time.perf_counter() - began
    index = json.loads((output / "index.json").read_text(encoding="utf-8"))
    early = statistics.median(rss for done, rss in held if 10 <= done < 40)
    late = statistics.median(rss for done, rss in held if done >= 170)
    rows = [
        ["runs", f"{len(index['runs'])}"],
        ["finished", f"{sum(run['state'] == 'finished' for run in index['runs'])}"],
        ["took, min", f"{took / 60:.1f}"],
        ["the driver's memory after 10 to 40 runs, MB", f"{early / 1e6:.0f}"],
        ["the driver's memory after 170 runs and more, MB", f"{late / 1e6:.0f}"],
        ["index.html, MB", f"{(output / 'index.html').stat().st_size / 1e6:.2f}"],
        ["index.html opens in Chromium, s", " … ".join(f"{one:.2f}" for one in _opening(output / "index.html", times))],
    ]
    return ["two hundred runs", ""], rows


def _opening(page: Path, times: int) -> tuple[float, float]:
    """The shortest and the longest time from the address to a page that is loaded and painted, in seconds."""
    from playwright.sync_api import sync_playwright

    took = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for _ in range(max(times, 3)):
            tab = browser.new_page()
            began = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="load")
            tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            took.append(time.perf_counter() - began)
            tab.close()
        browser.close()
    return min(took), max(took)


# -- killed


def _kills(scratch: Path, times: int, wanted: int = 20) -> tuple[list[str], list[list[str]]]:
    """Sweeps of the seven twins whose Dask worker is killed after a random time, again and again."""
    notebook = _short(scratch)
    chance, killed, sweeps, reported, failed = random.Random(0), 0, 0, 0, 0
    while killed < wanted:
        output = scratch / f"out-{sweeps}"
        process = subprocess.Popen(
            [*map(str, _sweep(output, "tiny-*", "--notebook", notebook))],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        sweeps += 1
        here = 0
        while process.poll() is None and here < 4 and killed < wanted:
            until = time.monotonic() + chance.uniform(2, 12)
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.1)
            victims = _workers(process.pid)
            if victims:
                chance.choice(victims).send_signal(signal.SIGKILL)
                killed, here = killed + 1, here + 1
        process.wait()
        found = _looked_over(output)
        reported, failed = reported + found["reported"], failed + found["failed"]
    rows = [
        ["sweeps of seven runs", str(sweeps)],
        ["workers killed", str(killed)],
        ["runs finished and whole", str(reported - failed)],
        ["runs reported as failed", str(failed)],
        ["runs missing, twice in the report, or half-written", "0"],
    ]
    return ["a worker killed at random", ""], rows


def _workers(pid: int) -> list[psutil.Process]:
    try:
        return [one for one in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(one.cmdline())]
    except psutil.Error:
        return []


def _looked_over(output: Path) -> dict[str, int]:
    """Raises BenchmarkError where the report and the folders are not what they should be."""
    runs = json.loads((output / "index.json").read_text(encoding="utf-8"))["runs"]
    if sorted(run["run_name"] for run in runs) != sorted(f"short--{twin}" for twin in TWINS):
        raise BenchmarkError(f"{output}: not each run is in the report once")
    for run in runs:
        folder = output / run["folder"]
        if run["state"] == "finished":
            report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            cells = nbformat.read(folder / run["executed"], 4).cells
            whole = report["verdict"] == run["verdict"] and all(
                cell.execution_count for cell in cells if cell.cell_type == "code"
            )
            if not whole:
                raise BenchmarkError(f"{folder} is half-written")
    left = [path.name for path in output.iterdir() if path.name.startswith(".")]
    if left:
        raise BenchmarkError(f"{output}: left behind: {left}")
    return {"reported": len(runs), "failed": sum(run["state"] == "failed" for run in runs)}


def _page(found: dict) -> str:
    words = ["# What a sweep gains, costs and survives", "Written by `python -m benchmarks.sweep`."]
    for part, measured in found.items():
        words += [f"## {part.capitalize()}", table(measured["head"], measured["rows"])]
        words.append("; ".join(f"{what}: {value}" for what, value in measured["measured"].items()) + ".")
    return "\n\n".join(words) + "\n"


_PARTS = {"speed": _speed, "again": _again, "many": _many, "kills": _kills}


if __name__ == "__main__":
    main()

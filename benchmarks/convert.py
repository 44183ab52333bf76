"""Measure `blip2nb convert` against `cp` of the same files, its memory, and the plain way in memory.

    python -m benchmarks.convert --size twin --in-memory --costs
    python -m benchmarks.convert --size blip2-opt-2.7b --pairs 7 --cast bfloat16
    python -m benchmarks.convert --table

The source is written first (`benchmarks.synthetic`), one size at a time, and removed when that size is done. Results
are saved after every pair: a run that was stopped is gone on with by the same command, as long as machine, versions and
the kit's code are the same; else the size is measured anew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import costs, in_memory, machine
from benchmarks.process import ROOT, BenchmarkError, Command, peak_memory, seconds
from benchmarks.results import Entry, Results, markdown
from benchmarks.synthetic import SIZES, Size, source_bytes, write_source
from blip2nb.families.captioners.mapping import parameter_count
from blip2nb.weights.convert import CASTS

RESULTS = ROOT / "benchmarks" / "results" / "convert.json"
SPARE_BYTES = 1_000_000_000  # disk left free beside source and output. Chosen: a file system that is full is slow

# what a conversion imports into the process that copies, so that its memory can be told from theirs
IMPORTS = "import blip2nb.cli, blip2nb.api, blip2nb.conversion.directory, blip2nb.conversion.files"


@dataclasses.dataclass(frozen=True)
class Bench:
    """One size being measured. `outputs` is where everything that is timed writes; it is emptied before each run."""

    size: Size
    source: Path
    outputs: Path
    drop_caches: bool

    def convert(self, dtype: str) -> float:
        """Seconds of a conversion."""
        self._prepare()
        return seconds(self.command(dtype))

    def copy(self) -> float:
        """Seconds of `cp -r` and `sync`."""
        self._prepare()
        return seconds(["cp", "-r", self.source, self.outputs / "copy"], sync=True)

    def in_memory(self) -> float:
        """Seconds of the plain way and `sync`."""
        self._prepare()
        return seconds(self.in_memory_command(), sync=True)

    def peak(self, command: Command) -> int:
        """Bytes of anonymous memory."""
        self._prepare()
        return peak_memory(command)

    def command(self, dtype: str = "auto") -> Command:
        return _convert(self.size.model, self.source, self.outputs / "model", dtype)

    def in_memory_command(self) -> Command:
        script = [sys.executable, "-m", "benchmarks.in_memory", self.size.name]
        return [*script, "--source", self.source, "--output", self.outputs / "model"]

    def output_bytes(self) -> int:
        """Bytes of what the last conversion wrote."""
        return _bytes_in(self.outputs / "model")

    def _prepare(self) -> None:
        """The same start for every run: no old output, no dirty pages, and the page cache in one state."""
        shutil.rmtree(self.outputs, ignore_errors=True)
        self.outputs.mkdir()
        os.sync()
        if self.drop_caches:
            Path("/proc/sys/vm/drop_caches").write_text("3", encoding="utf-8")
        else:
            _read_through(self.source)


def _convert(model: str, source: Path, output: Path, dtype: str = "auto") -> Command:
    program = Path(sys.executable).with_name("blip2nb")
    start = [program] if program.is_file() else [sys.executable, "-m", "blip2nb.cli"]
    return [*start, "convert", model, "--source", source, "--output", output, "--dtype", dtype]


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_through(folder: Path) -> None:
    room = bytearray(4 << 20)  # any size reads the file into the page cache
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(room):
                pass


def measure(size: Size, options: argparse.Namespace, work: Path, results: Results) -> None:
    """Measure what is not in the results yet of one size.

    Raises:
        BenchmarkError: the disk is too small, or a command failed.
    """
    entry = results.size(size, _stamp(work, options.drop_caches), fresh=options.fresh)
    if options.in_memory:
        _start_in_memory(size, entry)
        results.save()
    if not _left(entry, options):
        _say(f"{size.name}: measured already; --fresh measures it again")
        return
    plainly = options.in_memory and not entry["in_memory"]["refused"]
    _require_disk(size, work, in_float32=plainly or "float32" in options.cast)
    with _source(size, work, options.keep) as source, _folder(work / "outputs") as outputs:
        entry["source_bytes"] = _bytes_in(source)
        bench = Bench(size, source, outputs, options.drop_caches)
        _measure_memory(bench, entry, results)
        for dtype in _dtypes(options):
            _measure_pairs(bench, entry, dtype, options.pairs, results)
        if plainly:
            _measure_in_memory(bench, entry, options.pairs, results)


def _dtypes(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(["auto", *options.cast]))


def _left(entry: Entry, options: argparse.Namespace) -> bool:
    series = [entry["series"].get(dtype, {"pairs": []})["pairs"] for dtype in _dtypes(options)]
    if options.in_memory and not entry["in_memory"]["refused"]:
        series.append(entry["in_memory"]["pairs"])
    return "memory" not in entry or any(len(pairs) < options.pairs for pairs in series)


def _measure_memory(bench: Bench, entry: Entry, results: Results) -> None:
    """Three peaks. Also what warms this machine up for the runs that are timed."""
    with _folder(bench.outputs.with_name("twin")) as twin:
        write_source(bench.size.twin, twin / "source")
        peaks = {
            "imports": bench.peak([sys.executable, "-c", IMPORTS]),
            "twin": bench.peak(_convert(bench.size.twin.model, twin / "source", twin / "model")),
        }
    if "memory" in entry:
        return
    peaks["convert"] = bench.peak(bench.command())
    _say(f"{bench.size.name}: peak memory " + ", ".join(f"{what} {peak / 1e6:.0f} MB" for what, peak in peaks.items()))
    entry["memory"] = peaks
    results.save()


def _measure_pairs(bench: Bench, entry: Entry, dtype: str, wanted: int, results: Results) -> None:
    series = entry["series"].setdefault(dtype, {"output_bytes": 0, "pairs": []})
    pairs = series["pairs"]
    while len(pairs) < wanted:
        took = bench.convert(dtype)
        series["output_bytes"] = bench.output_bytes()
        pairs.append({"convert": round(took, 3), "copy": round(bench.copy(), 3)})
        results.save()
        _say_pair(f"{bench.size.name}, {dtype}", pairs, wanted)


def _start_in_memory(size: Size, entry: Entry) -> None:
    """Ask anew whether the plain way fits, unless it did already."""
    kept = entry.setdefault("in_memory", {"refused": "", "pairs": []})
    if not kept["pairs"]:
        kept["refused"] = in_memory.refusal(size)
    if kept["refused"]:
        _say(f"{size.name}: the plain way {kept['refused']}")


def _measure_in_memory(bench: Bench, entry: Entry, wanted: int, results: Results) -> None:
    kept = entry["in_memory"]
    if "peak" not in kept and wanted:
        kept["peak"] = bench.peak(bench.in_memory_command())
    pairs = kept["pairs"]
    while len(pairs) < wanted:
        took = bench.in_memory()
        pairs.append({"in_memory": round(took, 3), "convert": round(bench.convert("auto"), 3)})
        results.save()
        _say_pair(f"{bench.size.name}, in memory", pairs, wanted)


def _say_pair(what: str, pairs: list[dict[str, float]], wanted: int) -> None:
    (left, one), (right, other) = pairs[-1].items()
    _say(f"{what}, pair {len(pairs)} of {wanted}: {left} {one:.2f} s, {right} {other:.2f} s, ratio {one / other:.2f}")


def _require_disk(size: Size, work: Path, in_float32: bool) -> None:
    source = source_bytes(size)
    output = max(source, 4 * parameter_count(size.variant)) if in_float32 else source
    needed = output + SPARE_BYTES + (0 if _source_path(size, work).is_dir() else source)
    free = machine.disk_free(work)
    if free < needed:
        raise BenchmarkError(
            f"needs {needed / 1e9:.1f} GB of disk for its source and one output, and {free / 1e9:.1f} GB "
            "are free. Make room, or name a --work folder on another disk."
        )


def _source_path(size: Size, work: Path) -> Path:
    return work / f"source-{size.name}"


@contextlib.contextmanager
def _source(size: Size, work: Path, keep: bool) -> Iterator[Path]:
    """A size's files: written unless an earlier run kept them, removed on leaving unless they are to be kept."""
    folder = _source_path(size, work)
    try:
        if not folder.is_dir():
            _say(f"{size.name}: writing {source_bytes(size) / 1e9:.2f} GB of synthetic weights")
            write_source(size, folder)
        yield folder
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A new, empty folder that is gone on leaving, whatever happens."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _work_folder(named: Path | None) -> Iterator[Path]:
    """Where everything is written: the folder that was named, or a fresh one under outputs/. Removed if left empty."""
    if named is None:
        (ROOT / "outputs").mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="benchmark-", dir=ROOT / "outputs"))
    else:
        work = named.expanduser().resolve()
        work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    finally:
        with contextlib.suppress(OSError):  # kept sources, or what was there before
            work.rmdir()
        if named is None and work.exists():
            _say(f"sources kept; reuse them with --work {work}")


def _stamp(work: Path, drop_caches: bool) -> dict[str, Any]:
    return {
        "machine": machine.describe_machine(work),
        "versions": machine.describe_versions(),
        "drop_caches": drop_caches,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", action="append", choices=[*SIZES, "all"], default=[], help="can be given often")
    parser.add_argument("--pairs", type=int, default=7, help="conversions and copies, in turns (7)")
    parser.add_argument(
        "--cast", action="append", choices=sorted({*CASTS} - {"auto"}), default=[], help="also with --dtype this"
    )
    parser.add_argument("--in-memory", action="store_true", help="also the plain way, where it fits")
    parser.add_argument("--costs", action="store_true", help="also what one thread does of each step")
    parser.add_argument("--fresh", action="store_true", help="forget what the results hold of these sizes")
    parser.add_argument("--work", type=Path, help="where sources and outputs are written; a new folder in outputs/")
    parser.add_argument("--keep", action="store_true", help="leave the sources in the work folder for another run")
    parser.add_argument("--drop-caches", action="store_true", help="start each run with an empty page cache (root)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the JSON file; its Markdown lies beside it")
    parser.add_argument("--table", action="store_true", help="print the Markdown and do nothing else")
    options = parser.parse_args(arguments)
    if not (options.size or options.costs or options.table):
        parser.error("name a --size, or --costs, or --table")
    if options.drop_caches and os.geteuid() != 0:
        parser.error("--drop-caches needs root; without it, both sides find the source in the page cache")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when all was measured, 2 when something could not be."""
    options = _options(arguments)
    results = Results(options.results)
    if options.table:
        print(markdown(results.content), end="")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up, as on Ctrl-C
    names = SIZES if "all" in options.size else dict.fromkeys(options.size)
    failed = False
    try:
        with _work_folder(options.work) as work:
            if options.costs:
                results.costs(costs.measure(work), _stamp(work, options.drop_caches))
                results.save()
            for name in names:
                try:
                    measure(SIZES[name], options, work, results)
                except BenchmarkError as error:
                    _say(f"{name}: {error}")
                    failed = True
    except KeyboardInterrupt:
        _say("benchmark: stopped; what was measured is kept, and everything else removed")
        return 130
    print(markdown(results.content), end="")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

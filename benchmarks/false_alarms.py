"""How far apart two right models are: LAVIS and transformers on the same weights, for many weights and inputs.

    python -m benchmarks.false_alarms                    # goes on where it was interrupted
    python -m benchmarks.false_alarms --fresh --minutes 20

Every pair is unbroken: the only known difference, the eps of one layer norm, is repaired first. So whatever
`trace.compare` calls a fault here is a false alarm. *Calibration* runs are what thresholds are chosen from, *held-out*
runs, of other seeds, only count alarms. A run is one pair on one set of weights, one input and one number of threads:
a whole twin, or one of the released models' blocks at its full size. Needs LAVIS's environment (`make lavis`), and
10 GB of memory. Where the machine has other things to do, set OMP_WAIT_POLICY=passive: some runs have more threads than
it has cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import machine
from benchmarks.alarm_blocks import SHAPES, BlockJob
from benchmarks.alarm_faults import FaultJob
from benchmarks.alarm_lavis import lavis_side
from benchmarks.alarm_rates import OTHER, Row, page
from benchmarks.alarm_twins import TwinJob
from benchmarks.process import ROOT
from blip2nb.variants import TWINS

RESULTS = ROOT / "benchmarks" / "results" / "false_alarms.md"
TWIN_SEEDS = {"calibration": range(1, 6), "held-out": range(101, 114)}
BLOCK_SEEDS = {"calibration": range(1, 3), "held-out": range(101, 103)}
FAULT_SEED, OTHER_SEED = 301, 401
"""No set has a seed of another's. What the number of held-out ones is worth: 8,628 stages are judged with them, and no
alarm among so many is a rate below 3 / 8,628, 348 in a million, with 95 % confidence."""


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description="How far apart two right models are.")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop measuring after this long")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--only", default="", help="only runs whose name begins so, such as twin or block/vision")
    parser.add_argument("--rows", type=Path, default=ROOT / "outputs" / ".false_alarms.jsonl", help="what was measured")
    options = parser.parse_args()
    if options.fresh:
        options.rows.unlink(missing_ok=True)
    ends = time.monotonic() + options.minutes * 60
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="false-alarms-", dir=_fast_folder()))
        ask = stack.enter_context(lavis_side(Path(name) / "lavis"))
        ask_old = stack.enter_context(lavis_side(Path(name) / "old", old=True))
        ours = machine.describe_versions()
        theirs = ask(job="versions", threads=1)["versions"]
        kept = Kept(options.rows, {"LAVIS": theirs, **{what: ours[what] for what in ("torch", "transformers")}})
        for job in jobs():
            if job.name.startswith(options.only) and not kept.has(job.name):
                if time.monotonic() > ends:
                    break
                took = time.monotonic()
                kept.add(job.name, job.measure(ask_old if job.part == OTHER else ask, Path(name) / "job"))
                print(f"{job.name}: {time.monotonic() - took:.1f} s", flush=True)
        system = machine.describe_machine(Path(name))
    beside = {"LAVIS's side": ", ".join(f"{what} {version}" for what, version in theirs.items())}
    RESULTS.write_text(page(kept.rows, {**system, **ours, **beside}), encoding="utf-8")


def _fast_folder() -> str | None:
    """Where weights pass from one process to the other: in memory, where there is such a folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Kept:
    """What was measured, a line of JSON a job, so that an interrupted benchmark goes on. What was measured with other
    versions of the libraries does not count."""

    def __init__(self, path: Path, versions: Mapping[str, Any]):
        self._path, self._versions = path, versions
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        whole = [entry for entry in whole if entry["versions"] == versions]
        self._names = {entry["job"] for entry in whole}
        self.rows: list[Row] = [row for entry in whole for row in entry["rows"]]

    def has(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str, rows: list[Row]) -> None:
        self.rows += rows
        self._names.add(name)
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": name, "versions": self._versions, "rows": rows}) + "\n")


Job: TypeAlias = "TwinJob | BlockJob | FaultJob"


def jobs() -> list[Job]:
    """All of them, in an order in which an early end leaves something of everything."""
    single = ("float32",)
    found: list[tuple[float, Job]] = [(0, FaultJob(name, FAULT_SEED)) for name in TWINS if not name.endswith("coco")]
    found += [(0, TwinJob(OTHER, name, OTHER_SEED, dtypes=single)) for name in TWINS]
    found += [(0, BlockJob(OTHER, one, OTHER_SEED, dtypes=single)) for one in SHAPES]
    for part in ("calibration", "held-out"):
        twins = [TwinJob(part, name, seed) for seed in TWIN_SEEDS[part] for name in TWINS]
        blocks = [BlockJob(part, shape, seed) for seed in BLOCK_SEEDS[part] for shape in SHAPES]
        found += [(number / len(twins), job) for number, job in enumerate(twins)]
        found += [(number / len(blocks), job) for number, job in enumerate(blocks)]
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


if __name__ == "__main__":
    main()

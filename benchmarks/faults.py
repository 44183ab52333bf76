"""How often the kit finds a fault, and what it calls it: every fault of the catalogue, planted in the twins.

    python -m benchmarks.faults
    python -m benchmarks.faults --twins tiny-blip2-opt-2.7b --faults eps,qkv_swapped --output /tmp/faults.md

Each fault is planted at the first, a middle and the last of the places that differ only in depth, in a model that is
otherwise right, and the kit is asked (`blip2nb.catalogue.bench.Bench.ask`). What right answers are is said in the page
that is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.process import ROOT
from benchmarks.results import table
from blip2nb import api
from blip2nb.catalogue.answers import Answer
from blip2nb.catalogue.bench import Bench
from blip2nb.catalogue.captioners import CATALOGUE
from blip2nb.catalogue.cases import Case
from blip2nb.catalogue.marks import VISIBLE, Marks
from blip2nb.catalogue.planting import Fault, first_middle_last
from blip2nb.conversion.files import open_source
from blip2nb.lavis_env.reference import shipped_tape
from blip2nb.trace.tape import Tape
from blip2nb.variants import TWINS, variant

RESULTS = ROOT / "benchmarks" / "results" / "faults.md"
PAIRS = "two at once"
FEW_STAGES = 4  # of a pair, together. Chosen: what is in every stage, as a rounded model, leaves no room for another


@dataclasses.dataclass(frozen=True)
class Result:
    """What is kept of an answer: words and marks, no tensors.

    Attributes:
        row: the line of the table that it counts in.
        marks: None where the case cannot be seen.
        wanted, said: in words.
    """

    twin: str
    row: str
    case: str
    marks: Marks | None
    wanted: str
    said: str
    seconds: float


def main() -> None:
    """Plant, ask, judge, and write the page."""
    parser = argparse.ArgumentParser(description="How often the kit finds a fault, and what it calls it.")
    parser.add_argument("--twins", nargs="+", default=list(TWINS), help="models to plant them in")
    parser.add_argument("--faults", default="", help="only these, separated by commas")
    parser.add_argument("--kinds", default="", help="only of these kinds, separated by commas")
    parser.add_argument(
        "--per-fault", type=int, default=6, help="places per fault and twin, drawn by chance; 0 for all"
    )
    parser.add_argument("--all-depths", action="store_true", help="every depth, not the first, a middle and the last")
    parser.add_argument("--seeds", type=int, default=1, help="how often each is planted, with other random choices")
    parser.add_argument("--pairs", type=int, default=12, help="per twin, how often two faults are planted at once")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the page to write")
    options = parser.parse_args()
    torch.set_num_threads(1)  # twins are small
    names = [name for name in options.faults.split(",") if name] or list(CATALOGUE)
    kinds = [kind for kind in options.kinds.split(",") if kind]
    chosen = [fault for fault in map(CATALOGUE.__getitem__, names) if not kinds or fault.kind in kinds]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:
        system = machine.describe_machine(Path(scratch))
        for twin in options.twins:
            results += _of_twin(twin, chosen, options, Path(scratch))
            options.output.write_text(page(results, system, options), encoding="utf-8")
    print(options.output.read_text(encoding="utf-8").split("## Answers that are not all right")[0])


def _of_twin(twin: str, chosen: Sequence[Fault], options: argparse.Namespace, scratch: Path) -> Iterator[Result]:
    began = time.monotonic()
    tape = Tape(shutil.copy(shipped_tape(variant(twin)), scratch))  # one that is recorded anew meanwhile is another
    run = api.convert(twin, output=scratch / twin / "model")
    bench = Bench(run.model, tape, lambda: open_source(run.variant))
    singles: list[Case] = []
    for fault in chosen:
        cases = drawn(bench.cases(fault), options.per_fault, options.all_depths, f"{twin}/{fault.name}")
        singles += cases
        for case, seed in itertools.product(cases, range(options.seeds)):
            yield result(bench, case, fault.name, seed)
    for case in pairs(singles, options.pairs, twin):
        yield result(bench, case, PAIRS, 0)
    print(f"{twin}: {time.monotonic() - began:.0f} s", flush=True)


def drawn(cases: Sequence[Case], most: int, all_depths: bool, seed: str) -> list[Case]:
    """Some of a fault's cases, in the order of the network: at three depths, at most so many."""
    targets = [case.faults[0].target for case in cases]
    kept = set(targets if all_depths else first_middle_last(targets))
    some = [case for case, target in zip(cases, targets, strict=True) if target in kept]
    if most and len(some) > most:
        numbers = sorted(random.Random(seed).sample(range(len(some)), most))
        some = [some[number] for number in numbers]
    return some


def pairs(singles: Sequence[Case], count: int, seed: str) -> list[Case]:
    """Two faults at once, at different stages, that do not touch the same; the earlier one first."""
    chance = random.Random(seed)
    found: list[Case] = []
    while len(found) < count and len(singles) > 1 and len({case.stages for case in singles}) > 1:
        one, other = chance.sample(list(singles), 2)
        inputs = sum(case.faults[0].fault.kind == "inputs" for case in (one, other))
        apart = not set(one.stages) & set(other.stages)
        if apart and inputs < 2 and len(one.stages) + len(other.stages) <= FEW_STAGES:
            found.append(one + other)
    return found


def result(bench: Bench, case: Case, row: str, seed: int) -> Result:
    """Plant a case and ask, with the time that this takes in seconds."""
    began = time.monotonic()
    answer = bench.ask(case, seed)
    seconds = time.monotonic() - began
    return Result(bench.right.variant.name, row, str(case), answer.marks, _wanted(answer), _said(answer), seconds)


def _wanted(answer: Answer) -> str:
    return "; ".join(
        ", ".join([*one.must[:1], one.target.modules[0], "/".join(sorted(one.causes))]) for one in answer.expected
    )


def _said(answer: Answer, most: int = 4) -> str:
    found = answer.findings
    said = [f"{one.stage}, {one.module}, {'/'.join(cause.id for cause in one.causes[:3])}" for one in found[:most]]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return answer.error or "; ".join(said) + more or "nothing"


# -- the page


def page(results: Sequence[Result], system: dict[str, Any], options: argparse.Namespace) -> str:
    """The table, the totals, and every answer that is not all right."""
    rows = dict.fromkeys(one.row for one in results)
    of_row = {row: [one for one in results if one.row == row] for row in rows}
    head = ["fault", "kind", "cases", "detected", "stage", "module", "cause first", "in three", "extra", "aside"]
    kinds = {name: fault.kind for name, fault in CATALOGUE.items()}
    marked = [one for one in results if one.marks]
    wrong = [one for one in marked if one.marks and not one.marks.right]
    seconds = sorted(one.seconds for one in results) or [0.0]
    twins = list(dict.fromkeys(one.twin for one in results))
    drawn_by_chance = (
        f", {options.per_fault} of these drawn by chance for a fault and a twin" if options.per_fault else ""
    )
    words = [
        "# How often a fault is found",
        "Written by `python -m benchmarks.faults`.",
        f"Each fault of the catalogues (`blip2nb.catalogue`) in {', '.join(twins)}, at "
        f"the first, a middle and the last of the places that differ only in depth{drawn_by_chance}. Random choices: "
        f"{options.seeds} for each place. Of {PAIRS}, both must be right.",
        _RULES,
        table(
            ["kind", *head[2:]], [_kind_row(kind, results) for kind in (*dict.fromkeys(kinds.values()), PAIRS, "all")]
        ),
        table(head, [*(_row(row, kinds.get(row, ""), of_row[row]) for row in rows), _row("all", "", results)]),
        f"Planting, looking where it shows, and `findings` took {seconds[len(seconds) // 2]:.1f} s (median; "
        f"{seconds[-1]:.1f} s at most).",
        "## What the faults are",
        table(["fault", "what was done wrong", "right answer"], [_meaning(name) for name in rows if name in CATALOGUE]),
        "## Machine and versions",
        "\n".join(f"- {what}: {value}" for what, value in {**system, **machine.describe_versions()}.items()),
        f"## Answers that are not all right ({len(wrong)} of {len(marked)})",
        "\n".join(map(_complaint, wrong)),
        "## Put aside",
        f"They change no weight, and no stage's output by more than {VISIBLE:g} times its rounding.",
        "\n".join(f"- {one.twin}: {one.case}" for one in results if not one.marks),
    ]
    return "\n\n".join(word for word in words if word) + "\n"


_RULES = f"""\
- detected: something is found at a stage where the fault arises.
- stage: it is found at the first of these that shows it, or before, and nothing that is right is blamed earlier.
- module: the module named there is one at fault, the one that directly holds it, or, where all of a layer is at fault,
  one in the layer.
- cause: the first cause that is named, or one of the first three, is right.
- extra: stages that are blamed and have no fault, in all cases together.
- aside: cases that need not be found. A fault has to be found if it changes a bit of a weight, or, fed LAVIS's values,
  a stage's output by more than {VISIBLE:g} times its rounding, or what arrives there by more than rounding. That is
  measured on the model before and after, without the kit's diagnosis.
- The known difference (the eps of the post layer norm) is put right beforehand, and is no fault here."""


def _row(name: str, kind: str, results: Sequence[Result]) -> list[str]:
    marks = [one.marks for one in results if one.marks]
    counts = [sum(getattr(one, what) for one in marks) for what in ("detected", "stage", "module", "first", "three")]
    extra = sum(one.extra for one in marks)
    return [name, kind, *map(str, (len(marks), *counts, extra, len(results) - len(marks)))]


def _kind_row(kind: str, results: Sequence[Result]) -> list[str]:
    """The totals of one kind of fault; the table that the README shows."""
    of_kind = {name for name, fault in CATALOGUE.items() if fault.kind == kind} if kind in _KINDS else {kind}
    return [kind, *_row(kind, "", [one for one in results if kind == "all" or one.row in of_kind])[2:]]


_KINDS = {fault.kind for fault in CATALOGUE.values()}


def _meaning(name: str) -> list[str]:
    fault = CATALOGUE[name]
    return [name, fault.words, ", or ".join([fault.cause, *sorted(fault.also)])]


def _complaint(one: Result) -> str:
    marks = one.marks
    assert marks is not None
    missed = [what for what in ("detected", "stage", "module", "first") if not getattr(marks, what)]
    missed += [f"{marks.extra} extra"] if marks.extra else []
    return f"- **{', '.join(missed)}** {one.twin}: {one.case}. Wanted: {one.wanted}. Said: {one.said}."


if __name__ == "__main__":
    main()

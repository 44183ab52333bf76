"""How often the kit finds a fault, and what it calls it: every fault of the catalogue, planted in the twins.

    python -m benchmarks.faults
    python -m benchmarks.faults --twins tiny-blip2-opt-2.7b --faults eps,qkv_swapped --output /tmp/faults.md

Each fault is planted at the first, a middle and the last of the places that differ only in depth, in a model that is
otherwise right, and `blip2nb.models.verify.findings` is asked. What right answers are is said in the page that is
written, and in `judge`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.process import ROOT
from benchmarks.results import table
from blip2nb import api
from blip2nb.models import verify
from blip2nb.models.break_it import CATALOGUE, Bench, Broken, Case, Placed
from blip2nb.models.files import open_source
from blip2nb.run.reference import shipped_tape
from blip2nb.trace.comparison import ARRIVAL_TOLERANCE, THRESHOLD, Comparison, compare, exceeds
from blip2nb.trace.faults import Fault, Target, first_middle_last
from blip2nb.trace.metrics import distance
from blip2nb.trace.tape import Tape
from blip2nb.variants import TWINS, variant

RESULTS = ROOT / "benchmarks" / "results" / "faults.md"
PAIRS = "two at once"


@dataclasses.dataclass(frozen=True)
class Said:
    """One finding: its stage, its module, and the ids of its causes, the likeliest first."""

    stage: str
    module: str
    causes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a right answer says of one fault: its stages, the first first, its place, and what it may be called."""

    stages: tuple[str, ...]
    target: Target
    causes: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Marks:
    """Which questions about a case were answered right, and how many stages without a fault were blamed."""

    detected: bool
    stage: bool
    module: bool
    first: bool
    three: bool
    extra: int

    @property
    def right(self) -> bool:
        return self.detected and self.stage and self.module and self.first and not self.extra


@dataclasses.dataclass(frozen=True)
class Answer:
    """A case, what was said of it, and the marks; without marks it cannot be detected by definition."""

    twin: str
    row: str
    case: str
    expected: tuple[Expected, ...]
    said: tuple[Said, ...] = ()
    error: str = ""
    marks: Marks | None = None
    seconds: float = 0.0


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
    answers: list[Answer] = []
    with tempfile.TemporaryDirectory() as scratch:
        system = machine.describe_machine(Path(scratch))
        for twin in options.twins:
            answers += _of_twin(twin, chosen, options, Path(scratch))
            options.output.write_text(page(answers, system, options))
    print(options.output.read_text().split("## Answers that are not all right")[0])


def _of_twin(twin: str, chosen: Sequence[Fault], options: argparse.Namespace, scratch: Path) -> Iterator[Answer]:
    began = time.monotonic()
    tape = Tape(shutil.copy(shipped_tape(variant(twin)), scratch))  # one that is recorded anew meanwhile is another
    bench = Bench(api.convert(twin, output=scratch / twin / "model").model, tape)
    clean = compare(bench.tape, bench.loaded.model, bench.stages, bench.inputs)
    opened = functools.cache(lambda: open_source(bench.variant))
    singles: list[Case] = []
    for fault in chosen:
        cases = drawn(bench.cases(fault), options.per_fault, options.all_depths, f"{twin}/{fault.name}")
        singles += cases
        for case, seed in itertools.product(cases, range(options.seeds)):
            yield ask(bench, clean, case, fault.name, seed, scratch / "copy", opened)
    for case in pairs(singles, options.pairs, twin):
        yield ask(bench, clean, case, PAIRS, 0, scratch / "copy", opened)
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
        if apart and inputs < 2 and len(one.stages) + len(other.stages) <= 4:
            found.append(one + other)
    return found


def ask(
    bench: Bench,
    clean: Comparison,
    case: Case,
    row: str,
    seed: int,
    copy: Path,
    opened: Callable[[], Any],
) -> Answer:
    """Plant a case, look where it shows, and ask what the kit finds."""
    began = time.monotonic()
    torch.manual_seed(seed)  # dropout
    with case.planted(bench, copy, seed) as broken:
        plain = all(one.fault.kind == "files" and len(one.stages) == 1 for one in case.faults)
        effects = {} if plain else shows(bench, clean, broken)
        wanted = tuple(_expected(one, effects) for one in case.faults)
        blank = Answer(bench.variant.name, row, str(case), wanted)
        if not all(one.stages for one in wanted):
            return blank
        kinds = {one.fault.kind for one in case.faults}
        loaded = broken.loaded if "code" in kinds else None
        inputs = broken.inputs if "inputs" in kinds else None
        said: tuple[Said, ...] = ()
        text = ""
        try:
            found = verify.findings(broken.folder, bench.tape, loaded=loaded, inputs=inputs, source=opened)
            said = tuple(Said(one.stage, one.module, tuple(c.id for c in one.causes)) for one in found)
        except Exception as error:  # no answer is a wrong one, and says why
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    order = [stage.name for stage in bench.stages]
    marks = judge(wanted, said, order)
    return dataclasses.replace(blank, said=said, error=text, marks=marks, seconds=time.monotonic() - began)


def shows(bench: Bench, clean: Comparison, broken: Broken) -> dict[str, bool]:
    """At which stages what was planted can be seen, fed LAVIS's values: in the output, by more than three times the
    stage's rounding, or in what arrives, by more than rounding. Asked of the model itself, before and after."""
    try:
        found = compare(bench.tape, broken.loaded.model, bench.stages, broken.inputs)
    except Exception:  # a text of another length can do that: then all of it shows
        return {}
    effects = {}
    for before, after in zip(clean.stages, found.stages, strict=True):
        arrives = exceeds(after.arrival_error, ARRIVAL_TOLERANCE)
        changed = False
        if before.rounding is not None:
            apart = distance(found.local_outputs[before.name], clean.local_outputs[before.name])
            changed = not apart <= THRESHOLD * before.rounding
        effects[before.name] = arrives or changed
    return effects


def _expected(placed: Placed, effects: dict[str, bool]) -> Expected:
    fault, stages = placed.fault, placed.stages
    shown = tuple(stage for stage in stages if effects.get(stage, True))
    if fault.kind != "files":
        stages = shown
    elif len(placed.target.names) == 1:  # a table that serves two stages: a row of it may be used at one of them
        stages = shown or stages  # a changed bit is there to be found, whatever it does
    return Expected(stages, placed.target, fault.also | {fault.cause})


def judge(expected: Sequence[Expected], said: Sequence[Said], order: Sequence[str]) -> Marks:
    """Mark what was said of one fault, or of several at once: then all must be right.

    Detected: something is found at one of its stages. Stage: at the first of them, and nothing is blamed before the
    first of all. Module: what is found at the first of its stages that is found is a module at fault, the one that
    holds it, or, where all of it is at fault, one in it. First, three: that finding's first cause, or one of its first
    three, is right. Extra: stages that are found and have no fault.
    """
    at_fault = {stage for one in expected for stage in one.stages}
    blamed = [stage for stage in order if any(one.stage == stage for one in said)]
    found = {
        one: next((each for stage in one.stages for each in said if each.stage == stage), None) for one in expected
    }
    earliest = min((stage for one in expected for stage in one.stages), key=order.index)
    first_of = all(each is not None and each.stage == one.stages[0] for one, each in found.items())
    return Marks(
        detected=all(each is not None for each in found.values()),
        stage=first_of and blamed[:1] == [earliest],
        module=all(each is not None and one.target.names_module(each.module) for one, each in found.items()),
        first=all(each is not None and bool(one.causes & set(each.causes[:1])) for one, each in found.items()),
        three=all(each is not None and bool(one.causes & set(each.causes[:3])) for one, each in found.items()),
        extra=len([stage for stage in blamed if stage not in at_fault]),
    )


# -- the page


def page(answers: Sequence[Answer], system: dict[str, Any], options: argparse.Namespace) -> str:
    """The table, the totals, and every answer that is not all right."""
    rows = dict.fromkeys(answer.row for answer in answers)
    of_row = {row: [answer for answer in answers if answer.row == row] for row in rows}
    head = ["fault", "kind", "cases", "detected", "stage", "module", "cause first", "in three", "extra", "aside"]
    kinds = {name: fault.kind for name, fault in CATALOGUE.items()}
    marked = [answer for answer in answers if answer.marks]
    wrong = [answer for answer in marked if answer.marks and not answer.marks.right]
    seconds = sorted(answer.seconds for answer in marked) or [0.0]
    twins = list(dict.fromkeys(answer.twin for answer in answers))
    drawn_by_chance = (
        f", {options.per_fault} of these drawn by chance for a fault and a twin" if options.per_fault else ""
    )
    words = [
        "# How often a fault is found",
        "Written by `python -m benchmarks.faults`.",
        f"Each fault of the catalogues (`blip2nb.trace.faults`, `blip2nb.models.break_it`) in {', '.join(twins)}, at "
        f"the first, a middle and the last of the places that differ only in depth{drawn_by_chance}. Random choices: "
        f"{options.seeds} for each place. Of {PAIRS}, both must be right.",
        _RULES,
        table(head, [*(_row(row, kinds.get(row, ""), of_row[row]) for row in rows), _row("all", "", answers)]),
        f"Planting, looking where it shows, and `findings` took {seconds[len(seconds) // 2]:.1f} s (median; "
        f"{seconds[-1]:.1f} s at most).",
        "## What the faults are",
        table(["fault", "what was done wrong", "right answer"], [_meaning(name) for name in rows if name in CATALOGUE]),
        "## Machine and versions",
        "\n".join(f"- {what}: {value}" for what, value in {**system, **machine.describe_versions()}.items()),
        f"## Answers that are not all right ({len(wrong)} of {len(marked)})",
        "\n".join(map(_complaint, wrong)),
        "## Put aside",
        "They change no weight, and no stage's output by more than three times its rounding.",
        "\n".join(f"- {answer.twin}: {answer.case}" for answer in answers if not answer.marks),
    ]
    return "\n\n".join(word for word in words if word) + "\n"


_RULES = """\
- detected: something is found at a stage where the fault arises.
- stage: it is found at the first of these, and nothing before it is blamed.
- module: the module named there is one at fault, the one that directly holds it, or, where all of a layer is at fault,
  one in the layer.
- cause: the first cause that is named, or one of the first three, is right.
- extra: stages that are blamed and have no fault, in all cases together.
- aside: cases that cannot be found by definition. A fault can be found if it changes a bit of a weight, or, fed LAVIS's
  values, a stage's output by more than three times its rounding, or what arrives there by more than rounding. That is
  measured on the model before and after, without the kit's diagnosis.
- The known difference (the eps of the post layer norm) is no fault here, and counts for nothing where it is named."""


def _row(name: str, kind: str, answers: Sequence[Answer]) -> list[str]:
    marks = [answer.marks for answer in answers if answer.marks]
    counts = [sum(getattr(one, what) for one in marks) for what in ("detected", "stage", "module", "first", "three")]
    extra = sum(one.extra for one in marks)
    return [name, kind, *map(str, (len(marks), *counts, extra, len(answers) - len(marks)))]


def _meaning(name: str) -> list[str]:
    fault = CATALOGUE[name]
    return [name, fault.words, ", or ".join([fault.cause, *sorted(fault.also)])]


def _complaint(answer: Answer) -> str:
    marks = answer.marks
    assert marks is not None
    missed = [what for what in ("detected", "stage", "module", "first") if not getattr(marks, what)]
    missed += [f"{marks.extra} extra"] if marks.extra else []
    wanted = "; ".join(
        f"{one.stages[0]}, {one.target.modules[0]}, {'/'.join(sorted(one.causes))}" for one in answer.expected
    )
    said = "; ".join(f"{one.stage}, {one.module}, {'/'.join(one.causes[:3])}" for one in answer.said[:4])
    more = f" and {len(answer.said) - 4} more" if len(answer.said) > 4 else ""
    return (
        f"- **{', '.join(missed)}** {answer.twin}: {answer.case}. Wanted: {wanted}. "
        f"Said: {answer.error or said or 'nothing'}{more}."
    )


if __name__ == "__main__":
    main()

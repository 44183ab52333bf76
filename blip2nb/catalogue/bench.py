"""A right model and LAVIS's recording of it: faults of the catalogue are planted, measured, asked for and marked.

    from blip2nb.catalogue.bench import Bench

    bench = Bench(run.model, tape)
    case = bench.case("head_count", "vision.block.02")
    answer = bench.ask(case)                                      # planted, measured, asked for, taken back
    answer.findings, answer.shows, answer.marks                   # what was said, where it shows, what of it is right

    with case.planted(bench.right, scratch, seed=0) as broken:    # by hand: broken.folder, broken.loaded, broken.inputs
        trace.compare(tape, broken.loaded.model, bench.stages, broken.inputs)

The converted directory itself is never touched: faults of files and configuration are put into a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blip2nb.catalogue.answers import Answer, Listing
from blip2nb.catalogue.arising import stages_of
from blip2nb.catalogue.captioners import CATALOGUE
from blip2nb.catalogue.cases import Broken, Case, Placed
from blip2nb.catalogue.marks import expected_of, judge, shows
from blip2nb.catalogue.planting import Fault
from blip2nb.catalogue.right import RightModel
from blip2nb.errors import RequestError, did_you_mean, memory_ran_out
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.stages import module_pairs, stages
from blip2nb.proof.findings import findings
from blip2nb.proof.subject import Subject
from blip2nb.trace.comparison import compare
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.known import attribute_differences
from blip2nb.trace.diagnosis.repairs import repaired
from blip2nb.trace.results import Comparison
from blip2nb.trace.tape import Tape

if TYPE_CHECKING:
    from blip2nb.conversion.files import Opened

log = logging.getLogger("blip2nb")


class Bench:
    """A converted directory and LAVIS's recording of it: what faults are put into.

    Attributes:
        right: the directory, the model as it is, and what it is called with.
        tape: as given.
        source: opens what the directory was converted from, once, or gives None; asked for the right weights.
        stages: the places to compare.
        known: where the modules of today's transformers differ from LAVIS's; put right wherever something is measured.
    """

    def __init__(self, folder: Path, tape: Tape, source: Callable[[], Opened | None] = lambda: None):
        self.right, self.tape, self.source = RightModel(folder, tape), tape, functools.cache(source)
        self.stages = stages(self.right.variant)
        pairs = [(pair.stage, pair.reference, pair.candidate) for pair in module_pairs(self.right.variant)]
        self.known = attribute_differences(tape.metadata["attributes"], self.right.loaded.model, pairs)

    @functools.cached_property
    def healthy(self) -> Comparison:
        """Every stage of the model as it is."""
        return self.measure(self.right.loaded, self.right.inputs)

    def measure(self, loaded: huggingface.Loaded, inputs: Mapping[str, Any]) -> Comparison:
        """Every stage fed LAVIS's values, with the known differences put right, and no diagnosis."""
        with repaired(loaded.model, self.known):
            try:
                return compare(self.tape, loaded.model, self.stages, inputs, explain=False)
            except Exception as error:  # as it may for a text of another length: keep what was seen before it stopped
                if memory_ran_out(error):
                    raise
                log.debug("the comparison stopped; once more, with what was seen before", exc_info=True)
                return compare(self.tape, loaded.model, self.stages, inputs)

    def ask(self, case: Case, seed: int = 0) -> Answer:
        """Plant a case, measure where it shows, ask the kit what is wrong, take it back, and mark what was said.

        Args:
            seed: of the random values that the case takes, and of dropout.

        Raises:
            ValueError: a fault changes nothing there.
        """
        healthy = self.healthy  # measured before anything is planted
        with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with case.planted(self.right, Path(scratch) / "model", seed) as broken:
                seen = self.measure(broken.loaded, broken.inputs)
                found, error = self.findings(broken)
        shown = tuple(stage for stage in case.stages if shows(stage, healthy, seen))
        expected = tuple(expected_of(one, shown) for one in case.faults)
        visible = all(one.must for one in expected)
        marks = judge(expected, found, [stage.name for stage in self.stages]) if visible else None
        return Answer(case, found, shown, expected, marks, dataclasses.replace(seen, findings=found), error)

    def findings(self, broken: Broken) -> tuple[tuple[Finding, ...], str]:
        """What the kit says, and what it raised instead."""
        live: dict[str, Any] = {"loaded": broken.loaded, "inputs": broken.inputs}
        try:
            return tuple(findings(Subject(broken.folder, self.tape, self.source), **live)), ""
        except Exception as error:  # no answer is a wrong one, and says why
            if memory_ran_out(error):
                raise
            log.debug("no answer", exc_info=True)
            return (), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def case(self, fault: str, where: str = "") -> Case:
        """A fault of the catalogue, by name, midway among the places where it fits.

        Args:
            where: only at this stage, or in this module.

        Raises:
            RequestError: there is no such fault, it cannot be made in this model, or does not fit there. The message
                names what is nearest.
        """
        if fault not in CATALOGUE:
            near = did_you_mean(fault, CATALOGUE)
            raise RequestError(f"There is no fault {fault!r}.{near} `blip2nb.faults()` lists all {len(CATALOGUE)}.")
        cases = self.cases(CATALOGUE[fault])
        if not cases:
            raise RequestError(f"{fault} cannot be made in {self.right.variant.name}: it fits nowhere there.")
        found = [case for case in cases if where in ("", *case.stages, *case.faults[0].target.modules)]
        if not found:
            at = list(dict.fromkeys(stage for case in cases for stage in case.stages))
            some = ", ".join(at if len(at) < 7 else [*at[:3], "…", *at[-2:]])
            raise RequestError(f"{fault} does not fit at {where!r}.{did_you_mean(where, at)} It fits at {some}.")
        return found[len(found) // 2]

    def catalogue(self) -> Listing:
        """The catalogue, with the number of places where each fault fits."""
        return Listing(CATALOGUE, {name: len(self.cases(fault)) for name, fault in CATALOGUE.items()})

    def cases(self, fault: Fault) -> list[Case]:
        """Everywhere the fault fits, at every depth."""
        kind = self.right.variant.language.kind
        targets = fault.targets(self.right if fault.kind == "inputs" else self.right.loaded.model)  # type: ignore[arg-type]
        found = [Case((Placed(fault, target, stages_of(fault, target, kind, self.stages)),)) for target in targets]
        return [case for case in found if case.stages]  # a whole stack in training mode leaves nothing out itself

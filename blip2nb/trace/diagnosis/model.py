"""Every fault of a whole model: inside its stages, on the way to them, and where it stops."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from blip2nb.trace import arrivals
from blip2nb.trace.calling import Inputs, call
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.findings import Finding, ranked
from blip2nb.trace.diagnosis.known import Known
from blip2nb.trace.diagnosis.repairs import still
from blip2nb.trace.diagnosis.stage import diagnose
from blip2nb.trace.diagnosis.stands_there import arriving_weights
from blip2nb.trace.forced import ForcedPass, StageState
from blip2nb.trace.inside import part_of
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE, exceeds
from blip2nb.trace.stage import Stage
from blip2nb.trace.vocabulary import SETTINGS

ROWS = 8
"""So many rows that arrive wrong are looked for in what a table gave: enough that none is there by chance. Chosen:
one row of floats would do, unless it is of zeros or padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """How the candidate ran, undisturbed and forced.

    Attributes:
        inputs: what it was called with.
        outputs: of the undisturbed run, by place; of the stages and of the tables.
        tables: the paths of its embeddings.
        forced: the pass in which every stage was fed the reference's inputs.
        known: what is known of the reference's weights and settings.
    """

    candidate: torch.nn.Module
    inputs: Inputs
    outputs: Mapping[str, torch.Tensor]
    tables: Sequence[str]
    forced: ForcedPass
    known: Known


def all_findings(runs: Runs) -> list[Finding]:
    """Each fault with its module and causes. A module that is never called is the fault of the one that holds it."""
    found: list[Finding] = []
    tried: Counter[str] = Counter()
    forced, stages = runs.forced, runs.forced.stages
    for stage in stages:
        state = forced.states[stage.name]
        if exceeds(state.arrival, ARRIVAL_TOLERANCE):
            found.append(_arrival(stage, state, runs))
        if state.suspect is not None:
            found += diagnose(state.suspect, runs.known, runs.candidate, tried)
        elif forced.stopped is not None and stage.name == forced.at and state.local is None:
            found.append(_stopped(stage, state, forced.stopped, runs.known))
        elif not (stage.is_junction or forced.stopped or state.local is not None):
            found.append(_never_called(stage, runs))
    if forced.stopped is not None and not found:  # else it is an effect of what was found
        last = next((stage for stage in stages if stage.name == forced.at), stages[0])
        words = f"the model stops after it: {type(forced.stopped).__name__}: {forced.stopped}".splitlines()[0]
        cause = Cause("unknown", words, last.module, "the model's own error")
        found.append(Finding(last.name, last.module, "stage", None, math.inf, None, math.inf, (), (cause,)))
    return _without_its_effects(found, {stage.name: stage for stage in stages})


def _without_its_effects(found: list[Finding], stages: Mapping[str, Stage]) -> list[Finding]:
    """A look-up that is never called is felt where it should have been called, and wherever its result is handed on."""
    for never in [one for one in found if one.part == "position bias" and one.local_error == math.inf]:
        place = stages[never.stage].reference
        around = [one for one in found if one is not never and never.module.startswith(f"{one.module}.")]
        around = [one for one in around if one.causes[0].id == "position_bias_missing"]
        handed = [
            one
            for one in found
            if one.part == "input" and place in map(stages[one.stage].source, stages[one.stage].inputs)
        ]
        found = [one for one in found if one not in (*around, *handed)]
        if around:
            found[found.index(never)] = dataclasses.replace(never, causes=around[0].causes)
    return found


def _stopped(stage: Stage, state: StageState, error: Exception, known: Known) -> Finding:
    """A model that does not run goes wrong where it stops."""
    differ = [one for one in known.differences if one.module.startswith(stage.module)]
    words = f"it stops there: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    causes = [Cause(SETTINGS.get(one.attribute, "attribute"), f"{one}; {words}", one.module, "read off both modules")
              for one in differ]  # fmt: skip
    causes += [] if causes else [Cause("unknown", words, stage.module, "the model's own error")]
    return Finding(stage.name, stage.module, "stage", state.arrival, math.inf, None, math.inf, (), tuple(causes))


def _never_called(stage: Stage, runs: Runs) -> Finding:
    part = part_of(stage.module, runs.candidate.get_submodule(stage.module))
    id = "position_bias_missing" if part == "position bias" else "unknown"
    differ = [str(one) for one in runs.known.differences if stage.module.startswith(one.module)]
    words = "; ".join([f"{stage.module} is never called", *differ])
    cause = Cause(id, words, stage.module, "no call was seen in a whole forward pass")
    return Finding(stage.name, stage.module, part, None, math.inf, None, math.inf, (), (cause,))


def _arrival(stage: Stage, state: StageState, runs: Runs) -> Finding:
    assert state.arrived is not None, "what arrives wrong is kept"
    name, arrived, expected = state.arrived
    module, part = stage.module, "input"
    weights = arriving_weights(arrived, expected, runs.candidate, runs.known)
    random = None if weights else _random_on_the_way(stage, state, runs)
    if weights:  # not what happens on the way, but where it begins
        name = weights[0].module
        module, part, causes = name.rpartition(".")[0] or name, "embedding", ranked(weights)
    elif random is not None:
        module, causes = random.module, [random]
    else:
        references = [one.reference for one in runs.forced.stages if not one.is_junction]
        others = {place: runs.forced.recorded[place] for place in references}
        causes = [arrivals.explain(module, name, arrived, expected, others)]
        table = next((path for path in runs.tables if _comes_from(runs.outputs.get(path), arrived, expected)), "")
        if table and causes[0].id in ("embedding_scale", "unknown"):  # what the table gives is wrong, not where it goes
            module, part = table, "embedding"
            causes = [dataclasses.replace(causes[0], module=table)]
    return Finding(stage.name, module, part, state.arrival, None, None, None, (), tuple(causes))


def _comes_from(output: torch.Tensor | None, arrived: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the rows that arrive wrong are rows that a table gave out."""
    if output is None or arrived.dim() != 3 or output.dim() != 3 or arrived.shape[-1] != output.shape[-1]:
        return False
    rows = arrived.reshape(-1, arrived.shape[-1])
    if arrived.shape == expected.shape:
        rows = rows[(rows != expected.reshape(rows.shape)).any(-1)]
    table = output.reshape(-1, output.shape[-1])
    return len(rows) > 0 and all(bool((table == row).all(-1).any()) for row in rows[:ROWS])


def _random_on_the_way(stage: Stage, state: StageState, runs: Runs) -> Cause | None:
    """Whether something between the stages that is in training mode makes what arrives another each time."""
    stages = runs.forced.stages
    live = [path for path, one in runs.candidate.named_modules() if one.training]
    inside = [path for path in live if any(path.startswith(f"{one.module}.") for one in stages if not one.is_junction)]
    between = [path for path in live if path not in inside]
    if not between:
        return None
    calm = ForcedPass(runs.candidate, stages, runs.forced.recorded, measure=False)
    with torch.no_grad(), still(runs.candidate), calm.hooks():
        call(runs.candidate, runs.inputs)
    before, after = state.arrival or 0.0, calm.states[stage.name].arrival or 0.0
    passed = not exceeds(after, ARRIVAL_TOLERANCE)
    excess = (math.inf, 1.0 if passed else math.inf)
    test = CounterTest("with every module in eval mode", (before, after), excess, passed)
    words = f"{', '.join(between[:3])} is in training mode" + (" and more" if len(between) > 3 else "")
    return Cause("dropout", words, between[-1], "read off the modules", test) if passed else None

"""Where do two models part? Every stage judged on what reaches it, what it adds, and what float64 says of both.

A stage's *drift* is its output's distance to the reference's as the model runs: the errors of earlier stages are in
it. Its *local error* is the same distance when it is fed the reference's recorded inputs: an error shows where it
arises. Whether a local error is rounding is not a matter of taste: the same stage is computed on the same inputs in
float64, and the reference's distance to that is divided by the candidate's. Two float32 computations of one function
are about equally far from the exact value, so this *excess* is about 1 whatever the layer or scale; a different
function or weight makes it larger. All distances are ‖a − b‖ / ‖reference‖.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from blip2nb.trace.calling import Inputs, Recorded, call, check_places, record
from blip2nb.trace.diagnosis.known import Known
from blip2nb.trace.diagnosis.model import Runs, all_findings
from blip2nb.trace.forced import ForcedPass, StageState
from blip2nb.trace.judging import NOT_COMPARABLE
from blip2nb.trace.metrics import THRESHOLD, distance
from blip2nb.trace.precision import Weights
from blip2nb.trace.results import Comparison, StageResult
from blip2nb.trace.stage import Stage
from blip2nb.trace.tape import recording


def compare(
    reference: torch.nn.Module | Recorded,
    candidate: torch.nn.Module,
    stages: Sequence[Stage],
    inputs: Inputs,
    *,
    reference_inputs: Inputs | None = None,
    known: Known | None = None,
    weights: Weights | None = None,
    explain: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare a candidate with a reference, stage by stage, in two forward passes of the candidate.

    Each stage that is at fault is then looked into: which of its modules goes wrong, and why.

    Not for several threads at once, nor beside another use of the models: for as long as it runs, their modules'
    `forward`, parameters (widened to float64) and settings are replaced. All is as before when it returns or raises.

    Args:
        reference: a tape, or any mapping from places to tensors, or a module, which is then run and recorded.
        candidate: the module under test, in eval mode.
        stages: the places to compare, in the order of the network.
        inputs: what to call the candidate with: keyword arguments, positional ones, or one tensor.
        reference_inputs: what to call the reference with, where that differs. Unused with a tape.
        known: what is known of the reference's weights and settings; of a live module everything is.
        weights: of a candidate that runs in half precision, its parameters from before the cast, by name: they make the
            judgement a hundred times sharper.
        explain: whether to look into the stages that are at fault.
        progress: called with each stage's name as it is measured.

    Raises:
        ValueError: the reference lacks a place, a module has no such argument, or a model is in training mode.
        AttributeError: a model has no such module. Both name the stage.
    """
    for model in (reference, candidate):
        if isinstance(model, torch.nn.Module) and model.training:
            raise ValueError("The models should be in eval mode, found one in training mode. Call .eval() on it.")
    if next((one.dtype for one in candidate.parameters()), None) == torch.float64:
        raise ValueError("The candidate runs in float64, which has no rounding to compare with. Call .float() on it.")
    for stage in stages:
        check_places(candidate, stage, [stage.candidate, *(f"{stage.module}:{name}" for name in stage.inputs)])
        check_places(candidate, stage, [f"{stage.module}.{path}" for path in stage.parts])
    recorded = record(reference, stages, inputs if reference_inputs is None else reference_inputs)
    forced = ForcedPass(candidate, stages, recorded, progress, weights)
    with torch.no_grad():
        tables = [path for path, one in candidate.named_modules() if isinstance(one, torch.nn.Embedding)]
        wanted = [*(stage.candidate for stage in stages), *(tables if explain else [])]
        with recording(candidate, wanted) as outputs, forced.surviving(explain):
            call(candidate, inputs)
        with forced.hooks(), forced.surviving(explain):
            call(candidate, inputs)
    due = [stage.name for stage in stages if not (stage.is_junction or forced.stopped)]
    found = _comparison(forced, stages, outputs, due)
    if not explain:
        return found
    if known is None:
        known = Known.of(reference, candidate, stages) if isinstance(reference, torch.nn.Module) else Known()
    findings = all_findings(Runs(candidate, inputs, outputs, tables, forced, known))
    return dataclasses.replace(found, findings=tuple(findings))


def compare_in_passing(
    reference: Recorded,
    candidate: torch.nn.Module,
    stages: Sequence[Stage],
    inputs: Inputs,
    fed: Collection[str],
) -> Comparison:
    """The drift of every stage, and what a few of them compute when fed the reference's inputs, in one forward pass:
    each of these is called once more, on those inputs, when the pass has gone through it. Arrivals are not measured.

    Args:
        reference, candidate, stages, inputs: as for `compare`.
        fed: the names of those few.
    """
    forced = ForcedPass(candidate, [stage for stage in stages if stage.name in fed], reference)
    places = [stage.candidate for stage in stages]
    with torch.no_grad(), recording(candidate, places) as outputs, forced.in_passing(), forced.surviving(False):
        call(candidate, inputs)
    found = _comparison(forced, stages, outputs, fed)
    return dataclasses.replace(
        found, stages=tuple(dataclasses.replace(one, arrival_error=None) for one in found.stages)
    )


def _comparison(
    forced: ForcedPass, stages: Sequence[Stage], outputs: Mapping[str, torch.Tensor], due: Collection[str]
) -> Comparison:
    """What was measured, put together.

    Args:
        outputs: the candidate's in an undisturbed run, by place.
        due: the stages whose output should have been measured: one that was not is at fault.
    """
    results, states = [], forced.states
    for stage in stages:
        state = states.get(stage.name, StageState())
        found = outputs.get(stage.candidate)
        drift = None if found is None else distance(found, forced.recorded[stage.reference])
        local = state.local or (NOT_COMPARABLE if stage.name in due else {})
        results.append(StageResult(stage.name, stage.module, stage.is_junction, state.arrival, drift, **local))
    return Comparison(
        tuple(results),
        {stage.name: outputs[stage.candidate] for stage in stages if stage.candidate in outputs},
        {name: state.output for name, state in states.items() if state.output is not None},
        {name: state.token_error for name, state in states.items() if state.token_error is not None},
        THRESHOLD,
        stopped="" if forced.stopped is None else repr(forced.stopped),
    )

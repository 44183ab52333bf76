"""Where do two models part? Every stage judged on what reaches it, what it adds, and what float64 says of both.

A stage's *drift* is its output's distance to the reference's as the model runs: the errors of earlier stages are in
it. Its *local error* is the same distance when it is fed the reference's recorded inputs: an error shows where it
arises. Whether a local error is rounding is not a matter of taste: the same stage is computed on the same inputs in
float64, and the reference's distance to that is divided by the candidate's. Two float32 computations of one function
are about equally far from the exact value, so this *excess* is about 1 whatever the layer or scale; a different
function or weight makes it larger. All distances are ‖a − b‖ / ‖reference‖.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from blip2nb.errors import memory_ran_out
from blip2nb.trace import arrivals
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.findings import Finding, ranked
from blip2nb.trace.diagnosis.known import Known
from blip2nb.trace.diagnosis.repairs import still
from blip2nb.trace.diagnosis.stage import diagnose
from blip2nb.trace.diagnosis.stands_there import arriving_weights
from blip2nb.trace.inside import Suspect, parameters_of, part_of
from blip2nb.trace.metrics import CEILING, FEW, THRESHOLD, distance, exceeds, judged, unit
from blip2nb.trace.precision import HALF, Weights, in_float64, one_by_one, only_sums
from blip2nb.trace.repeats import REPEATS, repeated
from blip2nb.trace.stage import Stage, places, places_inside
from blip2nb.trace.tape import Tape, first_tensor, recording, split_place, with_first
from blip2nb.trace.vocabulary import SETTINGS

ARRIVAL_TOLERANCE = FEW
"""Between stages a few additions happen at most, which round alike on every processor; an arrival error above this is a
fault."""

Inputs: TypeAlias = Mapping[str, Any] | Sequence[Any] | torch.Tensor


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What was measured at one stage. All errors are relative to the norm of the reference's value.

    Attributes:
        arrival_error: the largest distance of its inputs, as they arrived, to the reference's; of whole numbers and
            masks, the share that differs. None for a stage without recorded inputs. In half precision, what a cast
            alone can do counts as 0.
        drift: distance of its output in an undisturbed run.
        local_error: distance of its output when fed the reference's inputs. None at a junction.
        rounding: distance of the candidate's output to the same stage in float64, on those inputs.
        excess: the reference's distance to float64 over the candidate's. 1 where both are bit-equal, infinite where
            the candidate is exact and the reference differs. None where the float64 run failed and the outputs are
            neither equal nor so far apart that no rounding explains it: then the stage is not judged.
        refereed: whether the float64 run came to its end.
        referee_error: what ended it, on one line; "" where nothing did.
    """

    name: str
    module: str
    junction: bool
    arrival_error: float | None
    drift: float | None
    local_error: float | None = None
    rounding: float | None = None
    excess: float | None = None
    bit_equal: bool | None = None
    refereed: bool = True
    referee_error: str = ""

    @property
    def judged(self) -> bool:
        """Whether it is known that only rounding happens here, or that more does."""
        return self.refereed or self.excess is not None

    def faulty(self, threshold: float = THRESHOLD) -> bool:
        """Whether more than rounding happens here or on the way here. NaN is a fault."""
        return faulty(self.arrival_error, self.excess, threshold) or self.local_error == math.inf


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All stages of one pair of models on one input.

    Attributes:
        outputs: the candidate's undisturbed output per stage.
        local_outputs: its output per stage when fed the reference's inputs.
        token_errors: stage -> local error per position, for outputs of shape (batch, positions, channels).
        findings: for each fault the module it is in and its likely causes, in the order of the network.
        stopped: what the candidate raised, "" where it ran to its end.
    """

    stages: tuple[StageResult, ...]
    outputs: Mapping[str, torch.Tensor]
    local_outputs: Mapping[str, torch.Tensor]
    token_errors: Mapping[str, torch.Tensor]
    threshold: float = THRESHOLD
    findings: tuple[Finding, ...] = ()
    stopped: str = ""

    @property
    def faults(self) -> list[StageResult]:
        """The stages where an error arises, in the order of the network."""
        return [stage for stage in self.stages if stage.faulty(self.threshold)]

    @property
    def unjudged(self) -> list[StageResult]:
        """The stages that could not be judged, since their float64 run failed."""
        return [stage for stage in self.stages if not stage.judged]

    @property
    def first_divergence(self) -> StageResult | None:
        return next(iter(self.faults), None)

    def __getitem__(self, name: str) -> StageResult:
        return next(stage for stage in self.stages if stage.name == name)

    def report(self) -> dict[str, Any]:
        """What the figures over depth draw: `plots.FIGURES["depth_trace"](found.report(), {})`."""
        first = self.first_divergence
        return {
            "threshold": self.threshold,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "first_divergence": None if first is None else self._first(first),
            "faults": [finding.report() for finding in self.findings],
        }

    def _first(self, stage: StageResult) -> dict[str, Any]:
        found = next((one for one in self.findings if one.stage == stage.name), None)
        cause = {} if found is None else {"module": found.module, "part": found.part, "cause": str(found.causes[0])}
        return {**dataclasses.asdict(stage), "stage": stage.name, **cause}

    def _repr_html_(self) -> str:
        words = ("stage", "arrival error", "error alone", "÷ its own rounding", "drift", "")
        head = "".join(f"<th>{word}</th>" for word in words)
        rows = "".join(
            f"<tr><td align='left'>{html.escape(stage.name)}</td>"
            + "".join(
                f"<td>{'–' if value is None else format(value, '.2g')}</td>"
                for value in (stage.arrival_error, stage.local_error, stage.excess, stage.drift)
            )
            + f"<td align='left'>{self._word(stage)}</td></tr>"
            for stage in self.stages
        )
        found = "".join(f"<li>{html.escape(str(finding))}</li>" for finding in self.findings)
        return f"<p>{html.escape(repr(self))}</p><ul>{found}</ul><table><tr>{head}</tr>{rows}</table>"

    def _word(self, stage: StageResult) -> str:
        if stage.faulty(self.threshold):
            return "<b>wrong</b>"
        return "" if stage.judged else f"not judged: its float64 run failed ({html.escape(stage.referee_error)})"

    def __repr__(self) -> str:
        first, count = self.first_divergence, len(self.unjudged)
        rest = f", {count} not judged" if count else ""
        if first is None:
            return f"Comparison({len(self.stages)} stages, no error above rounding{rest})"
        return f"Comparison({len(self.stages)} stages, first wrong at {first.name}, {len(self.faults)} in all{rest})"

    def __str__(self) -> str:
        unjudged = (f"{one.name}: not judged, its float64 run failed ({one.referee_error})" for one in self.unjudged)
        return "\n".join([repr(self), *(f"  {line}" for line in (*self.findings, *unjudged))])


def compare(
    reference: torch.nn.Module | Tape | Mapping[str, torch.Tensor],
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
        _check_places(candidate, stage, [stage.candidate, *(f"{stage.module}:{name}" for name in stage.inputs)])
        _check_places(candidate, stage, [f"{stage.module}.{path}" for path in stage.parts])
    recorded = record(reference, stages, inputs if reference_inputs is None else reference_inputs)
    forcing = _Forcing(candidate, stages, recorded, progress, weights)
    with torch.no_grad():
        tables = [path for path, one in candidate.named_modules() if isinstance(one, torch.nn.Embedding)]
        wanted = [*(stage.candidate for stage in stages), *(tables if explain else [])]
        with recording(candidate, wanted) as outputs, forcing.surviving(explain):
            call(candidate, inputs)
        with forcing.hooks(), forcing.surviving(explain):
            call(candidate, inputs)
    results = []
    for stage in stages:
        found = outputs.get(stage.candidate)
        drift = None if found is None else distance(found, recorded[stage.reference])
        local = forcing.local.get(stage.name, {} if stage.is_junction or forcing.stopped else _NEVER_CALLED)
        arrival = forcing.arrival.get(stage.name)
        results.append(StageResult(stage.name, stage.module, stage.is_junction, arrival, drift, **local))
    findings: list[Finding] = []
    if explain:
        if known is None and isinstance(reference, torch.nn.Module):
            known = Known.of(reference, candidate, stages)
        run = _Run(candidate, inputs, outputs, tables)
        findings = _findings(run, stages, results, forcing, known or Known())
    by_name = {stage.name: outputs[stage.candidate] for stage in stages if stage.candidate in outputs}
    return Comparison(
        tuple(results),
        by_name,
        forcing.local_outputs,
        forcing.token_errors,
        THRESHOLD,
        tuple(findings),
        "" if forcing.stopped is None else repr(forcing.stopped),
    )


def compare_in_passing(
    reference: Tape | Mapping[str, torch.Tensor],
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
    forcing = _Forcing(candidate, [stage for stage in stages if stage.name in fed], reference)
    places = [stage.candidate for stage in stages]
    with torch.no_grad(), recording(candidate, places) as outputs, forcing.in_passing(), forcing.surviving(False):
        call(candidate, inputs)
    found = {stage.name: outputs[stage.candidate] for stage in stages if stage.candidate in outputs}
    drift = {stage.name: distance(found[stage.name], reference[stage.reference]) for stage in stages
             if stage.name in found}  # fmt: skip
    results = []
    for one in stages:
        local = forcing.local.get(one.name, _NEVER_CALLED if one.name in fed else {})
        results.append(StageResult(one.name, one.module, one.is_junction, None, drift.get(one.name), **local))
    return Comparison(tuple(results), found, forcing.local_outputs, forcing.token_errors)


_NEVER_CALLED: dict[str, Any] = {"local_error": math.inf, "rounding": math.nan, "excess": math.inf, "bit_equal": False}


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The candidate as it ran undisturbed.

    Attributes:
        outputs: by place; of the stages and of the tables.
        tables: the paths of its embeddings.
    """

    candidate: torch.nn.Module
    inputs: Inputs
    outputs: Mapping[str, torch.Tensor]
    tables: Sequence[str]


def _findings(
    run: _Run, stages: Sequence[Stage], results: Sequence[StageResult], forcing: _Forcing, known: Known
) -> list[Finding]:
    """Each fault with its module and causes. A module that is never called is the fault of the one that holds it."""
    found: list[Finding] = []
    tried: Counter[str] = Counter()
    for stage, result in zip(stages, results, strict=True):
        if exceeds(result.arrival_error, ARRIVAL_TOLERANCE):
            found.append(_arrival(stage, stages, result, forcing, run, known))
        if stage.name in forcing.suspects:
            found += diagnose(forcing.suspects[stage.name], known, run.candidate, tried)
        elif forcing.stopped is not None and stage.name == forcing.at and stage.name not in forcing.local:
            found.append(_stopped(stage, result, forcing.stopped, known))
        elif not (stage.is_junction or forcing.stopped or stage.name in forcing.local):
            found.append(_never_called(stage, run.candidate, known))
    if forcing.stopped is not None and not found:  # else it is an effect of what was found
        last = next((stage for stage in stages if stage.name == forcing.at), stages[0])
        words = f"the model stops after it: {type(forcing.stopped).__name__}: {forcing.stopped}".splitlines()[0]
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


def _stopped(stage: Stage, result: StageResult, error: Exception, known: Known) -> Finding:
    """A model that does not run goes wrong where it stops."""
    differ = [one for one in known.differences if one.module.startswith(stage.module)]
    words = f"it stops there: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    causes = [Cause(SETTINGS.get(one.attribute, "attribute"), f"{one}; {words}", one.module, "read off both modules")
              for one in differ]  # fmt: skip
    causes += [] if causes else [Cause("unknown", words, stage.module, "the model's own error")]
    return Finding(stage.name, stage.module, "stage", result.arrival_error, math.inf, None, math.inf, (), tuple(causes))


def _arrival(
    stage: Stage, stages: Sequence[Stage], result: StageResult, forcing: _Forcing, run: _Run, known: Known
) -> Finding:
    name, arrived, expected = forcing.arrived[stage.name]
    module, part = stage.module, "input"
    weights = arriving_weights(arrived, expected, run.candidate, known)
    random = None if weights else _random_on_the_way(stage, stages, result, forcing, run)
    if weights:  # not what happens on the way, but where it begins
        name = weights[0].module
        module, part, causes = name.rpartition(".")[0] or name, "embedding", ranked(weights)
    elif random is not None:
        module, causes = random.module, [random]
    else:
        others = {place: forcing.recorded[place] for place in forcing.outputs_of_reference()}
        causes = [arrivals.explain(module, name, arrived, expected, others)]
        table = next((path for path in run.tables if _comes_from(run.outputs.get(path), arrived, expected)), "")
        if table and causes[0].id in ("embedding_scale", "unknown"):  # what the table gives is wrong, not where it goes
            module, part = table, "embedding"
            causes = [dataclasses.replace(causes[0], module=table)]
    return Finding(stage.name, module, part, result.arrival_error, None, None, None, (), tuple(causes))


def _comes_from(output: torch.Tensor | None, arrived: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the rows that arrive wrong are rows that a table gave out."""
    if output is None or arrived.dim() != 3 or output.dim() != 3 or arrived.shape[-1] != output.shape[-1]:
        return False
    rows = arrived.reshape(-1, arrived.shape[-1])
    if arrived.shape == expected.shape:
        rows = rows[(rows != expected.reshape(rows.shape)).any(-1)]
    table = output.reshape(-1, output.shape[-1])
    return len(rows) > 0 and all(bool((table == row).all(-1).any()) for row in rows[:8])


def _random_on_the_way(
    stage: Stage, stages: Sequence[Stage], result: StageResult, forcing: _Forcing, run: _Run
) -> Cause | None:
    """Whether something between the stages that is in training mode makes what arrives another each time."""
    live = [path for path, one in run.candidate.named_modules() if one.training]
    inside = [path for path in live if any(path.startswith(f"{one.module}.") for one in stages if not one.is_junction)]
    between = [path for path in live if path not in inside]
    if not between:
        return None
    calm = _Forcing(run.candidate, stages, forcing.recorded, measure=False)
    with torch.no_grad(), still(run.candidate), calm.hooks():
        call(run.candidate, run.inputs)
    before, after = result.arrival_error or 0.0, calm.arrival.get(stage.name, 0.0)
    passed = not exceeds(after, ARRIVAL_TOLERANCE)
    test = CounterTest(
        "with every module in eval mode", (before, after), (math.inf, 1.0 if passed else math.inf), passed
    )
    words = f"{', '.join(between[:3])} is in training mode" + (" and more" if len(between) > 3 else "")
    return Cause("dropout", words, between[-1], "read off the modules", test) if passed else None


def _never_called(stage: Stage, candidate: torch.nn.Module, known: Known) -> Finding:
    part = part_of(stage.module, candidate.get_submodule(stage.module))
    id = "position_bias_missing" if part == "position bias" else "unknown"
    differ = [str(one) for one in known.differences if stage.module.startswith(one.module)]
    words = "; ".join([f"{stage.module} is never called", *differ])
    cause = Cause(id, words, stage.module, "no call was seen in a whole forward pass")
    return Finding(stage.name, stage.module, part, None, math.inf, None, math.inf, (), (cause,))


def faulty(arrival_error: float | None, excess: float | None, threshold: float = THRESHOLD) -> bool:
    """Whether more than rounding happens at a stage or on the way to it."""
    return exceeds(arrival_error, ARRIVAL_TOLERANCE) or exceeds(excess, threshold)


def _check_places(model: torch.nn.Module, stage: Stage, wanted: Sequence[str]) -> None:
    """Raises AttributeError for a path the model does not have, ValueError for an argument; both name the stage."""
    for place in wanted:
        path, argument = split_place(place)
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            words = f"{stage.name}: {type(model).__name__} has no {path!r}: {error}."
            raise NoModuleError(words, stage.name, path) from error
        takes = parameters_of(module)
        free = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        if argument and argument not in takes and not free:
            names = ", ".join(takes) or "nothing"
            raise TableError(f"{stage.name}: {path} is called with {names}, not with {argument!r}.", stage.name, path)


def call(model: torch.nn.Module, inputs: Inputs) -> Any:
    """Call a model with keyword arguments, positional ones, or one tensor."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def record(
    reference: torch.nn.Module | Tape | Mapping[str, torch.Tensor], stages: Sequence[Stage], inputs: Inputs
) -> Tape | Mapping[str, torch.Tensor]:
    """The reference's values at every place that the stages name: a recording as it is, a module's by running it.

    Raises:
        ValueError: it holds nothing for a place.
    """
    if isinstance(reference, torch.nn.Module):
        for stage in stages:
            _check_places(reference, stage, [*places([stage]), *stage.parts.values()])
        with torch.no_grad(), recording(reference, places(stages), places_inside(stages)) as recorded:
            call(reference, inputs)
    else:
        recorded = reference
    missing = [place for place in places(stages) if place not in recorded]
    if missing:
        raise ValueError(f"The reference holds nothing for {missing[0]} ({len(missing)} places in all).")
    return recorded


_CAST = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Twice the rounding unit: what an addition on the way can be off in half precision. It counts as nothing."""


class TableError(ValueError):
    """A line of the table of stages does not fit a model."""

    def __init__(self, words: str, stage: str, module: str):
        super().__init__(words)
        self.stage, self.module = stage, module


class NoModuleError(TableError, AttributeError):
    """A model has no such module."""


class _Forcing:
    """One pass of the candidate in which every stage gets the reference's inputs and hands on the reference's output.

    Attributes:
        at: the stage that was reached last.
        arrival: stage -> the largest distance of what arrived to what the reference got.
        arrived: of a stage whose arrival error is above the tolerance: the argument, what arrived, what should have.
        local: stage -> what was measured of its output.
        suspects: stage -> what is needed to look into it, where it is at fault.
        stopped: what ended the pass, if something did.
        measure: whether the stages' outputs are judged, or only what arrives.
    """

    def __init__(
        self,
        candidate: torch.nn.Module,
        stages: Sequence[Stage],
        recorded: Tape | Mapping[str, torch.Tensor],
        progress: Callable[[str], None] | None = None,
        weights: Weights | None = None,
        measure: bool = True,
    ):
        self.candidate, self.stages, self.recorded, self.progress = candidate, stages, recorded, progress
        self.weights, self.measure = weights, measure
        self.cast = max((_CAST.get(one.dtype, 0.0) for one in candidate.parameters()), default=0.0)
        self.at = ""
        self.arrival: dict[str, float] = {}
        self.arrived: dict[str, tuple[str, torch.Tensor, torch.Tensor]] = {}
        self.local: dict[str, dict[str, Any]] = {}
        self.local_outputs: dict[str, torch.Tensor] = {}
        self.token_errors: dict[str, torch.Tensor] = {}
        self.suspects: dict[str, Suspect] = {}
        self.stopped: Exception | None = None
        self._fed: dict[str, dict[str, torch.Tensor]] = {}  # stage -> its inputs as they were recorded
        self._seen: set[str] = set()
        self._seen_by_referee: set[str] | None = None  # a set while the referee runs

    @contextlib.contextmanager
    def surviving(self, explain: bool) -> Iterator[None]:
        """Keep what ends a pass as something to be explained."""
        try:
            yield
        except TableError:
            raise
        except Exception as error:
            if memory_ran_out(error):
                raise  # which says nothing about the model
            if not explain:
                error.add_note(f"Raised at the stage {self.at}, which was fed the reference's inputs.")
                raise
            self.stopped = error

    def outputs_of_reference(self) -> list[str]:
        return [stage.reference for stage in self.stages if not stage.is_junction]

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for stage in self.stages:
                module = self.candidate.get_submodule(stage.module)
                handles.append(module.register_forward_pre_hook(self._before(stage, module), with_kwargs=True))
                if not stage.is_junction:
                    handles.append(module.register_forward_hook(self._after(stage), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def in_passing(self) -> Iterator[None]:
        """Measure the stages without disturbing the pass."""
        modules = [self.candidate.get_submodule(stage.module) for stage in self.stages]
        handles = [
            module.register_forward_hook(self._once_more(stage, module), with_kwargs=True)
            for stage, module in zip(self.stages, modules, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _once_more(self, stage: Stage, module: torch.nn.Module) -> Callable:
        """Call the module a second time, on the recorded inputs, and measure that output."""
        feed = self._before(stage, module)

        def hook(_module: torch.nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
            if stage.name not in self._seen:
                given, named = feed(module, args, kwargs)
                self._seen.add(stage.name)
                found = first_tensor(module(*given, **named))
                self._measure(stage, module, given, named, found, self.recorded[stage.reference])

        return hook

    def _before(self, stage: Stage, module: torch.nn.Module) -> Callable:
        """Measure what arrives, then put the recorded inputs in its place."""
        order = list(parameters_of(module))
        argument = split_place(stage.candidate)[1]
        wanted = {argument: stage.reference} if argument else {name: stage.source(name) for name in stage.inputs}

        def hook(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            seen = self._seen if self._seen_by_referee is None else self._seen_by_referee
            if stage.name in seen:
                return None
            if argument:
                seen.add(stage.name)
            self.at = stage.name
            given, named = list(args), dict(kwargs)
            for name, place in wanted.items():
                if name not in order and name not in named:
                    names = ", ".join([*order, *named])
                    words = f"{stage.name}: {stage.module} is called with {names}, not with {name!r}."
                    raise TableError(words, stage.name, stage.module)
                at = order.index(name) if name in order else len(order)
                by_position = name not in named and at < len(given)
                arrived = given[at] if by_position else named.get(name)
                value = self.recorded[place]
                if name in stage.arrange:
                    value = stage.arrange[name](value)
                if isinstance(arrived, torch.Tensor):
                    if self._seen_by_referee is None:
                        self._arrives(stage, name, arrived, value)
                        self._fed.setdefault(stage.name, {})[name] = value
                    value = value.to(arrived.device, arrived.dtype)
                if by_position:
                    given[at] = value
                else:
                    named[name] = value
            return tuple(given), named

        return hook

    def _arrives(self, stage: Stage, name: str, arrived: torch.Tensor, expected: torch.Tensor) -> None:
        error = distance(arrived, expected.to(arrived.dtype))  # what runs in half precision is fed that
        if error <= self.cast:
            error = 0.0
        before = self.arrival.get(stage.name, 0.0)
        if exceeds(error, max(before, ARRIVAL_TOLERANCE)):
            self.arrived[stage.name] = (name, arrived.detach().clone(), expected)
        self.arrival[stage.name] = error if exceeds(error, before) else before

    def _after(self, stage: Stage) -> Callable:
        """Measure the output on the recorded inputs, then hand on the recorded output."""

        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            seen = self._seen if self._seen_by_referee is None else self._seen_by_referee
            if stage.name in seen:
                return None
            seen.add(stage.name)
            expected = self.recorded[stage.reference]
            if self._seen_by_referee is None and self.measure:
                self._measure(stage, module, args, kwargs, first_tensor(output), expected)
                if self.progress is not None:
                    self.progress(stage.name)
            return with_first(output, expected)

        return hook

    def _measure(
        self,
        stage: Stage,
        module: torch.nn.Module,
        args: tuple,
        kwargs: dict,
        found: torch.Tensor,
        expected: torch.Tensor,
    ) -> None:
        self.local_outputs[stage.name] = found.detach()
        if found.shape != expected.shape:
            self.local[stage.name] = _NEVER_CALLED
        else:
            exactly = functools.partial(self._referee, stage, module, args, kwargs)
            least = functools.partial(self._least, stage, module, args, kwargs)
            self.local[stage.name] = judged(found, expected, exactly, self._unit(module), self.cast == 0, least)
        excess = self.local[stage.name]["excess"]
        if self._not_repeatable(stage, module, args, kwargs, found) or exceeds(excess, THRESHOLD):
            self.suspects[stage.name] = Suspect(
                stage.name, stage.module, module, args, dict(kwargs), expected, stage.parts, self.recorded,
                lambda: self._referee(stage, module, args, kwargs), self._unit(module), self.cast == 0,
            )  # fmt: skip
        if expected.dim() == 3 and found.shape == expected.shape:
            error = (found.cpu().double() - expected.double()).norm(dim=-1)
            self.token_errors[stage.name] = (error / expected.double().norm(dim=-1).clamp_min(1e-300)).float()

    def _least(self, stage: Stage, module: torch.nn.Module, args: tuple, kwargs: dict, exact: torch.Tensor) -> float:
        """How near any correct computation must come to the exact one, where the candidate's own rounding does not say
        it: a stage without weights is a function, of which libraries are allowed a few roundings; where a stage only
        adds up products, the order of adding decides, and the least exact one is tried."""
        if not list(module.parameters()):
            return FEW / THRESHOLD
        if not only_sums(module):
            return 0.0
        with self._aside(stage), one_by_one():
            return distance(first_tensor(module(*args, **kwargs)), exact)

    def _not_repeatable(
        self, stage: Stage, module: torch.nn.Module, args: tuple, kwargs: dict, found: torch.Tensor
    ) -> bool:
        """Whether a stage whose rounding is far too large gives something else the second time. Dropout would else pass
        for rounding: its float64 is as far from it as the reference is."""
        result = self.local[stage.name]
        coarse = exceeds(result["rounding"], COARSE[found.dtype]) or exceeds(result["excess"], THRESHOLD)
        if result["bit_equal"] or not (coarse or result["excess"] is None):
            return False
        if not found.isfinite().all():
            return False
        with self._aside(stage):
            again = (first_tensor(module(*args, **kwargs)) for _ in range(REPEATS))
            if all(repeated(found, one) for one in again):
                return False
        self.local[stage.name] = {**result, "excess": math.inf}
        return True

    def _unit(self, module: torch.nn.Module) -> float:
        half = [one.dtype for one in module.parameters() if one.dtype in HALF]
        return unit(half[0] if half else torch.float32, self.weights is not None)

    def _referee(self, stage: Stage, module: torch.nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
        """The module's output on the same inputs, computed in float64; with the weights and inputs from before the cast
        where it runs in half precision and they are known."""
        weights, path = self.weights, stage.module
        if weights is None:
            with self._aside(stage):
                return in_float64(module, args, kwargs)
        names, given, named = list(parameters_of(module)), list(args), dict(kwargs)
        for name, value in self._fed.get(stage.name, {}).items():
            if name in names[: len(given)]:
                given[names.index(name)] = value
            else:
                named[name] = value
        with self._aside(stage):
            return in_float64(module, tuple(given), named, lambda name: weights(f"{path}.{name}"))

    @contextlib.contextmanager
    def _aside(self, stage: Stage) -> Iterator[None]:
        """A run of a stage beside the pass: stages inside it are fed the reference's inputs, nothing is measured."""
        self._seen_by_referee = {stage.name}
        try:
            yield
        finally:
            self._seen_by_referee = None


COARSE = {torch.float64: 1e-10, torch.float32: CEILING, torch.float16: 0.1, torch.bfloat16: 0.3}
"""A rounding error above this is looked at twice: is it rounding at all?"""

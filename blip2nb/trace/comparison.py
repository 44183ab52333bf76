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
import copy
import dataclasses
import html
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from blip2nb.trace.metrics import distance, judge
from blip2nb.trace.stage import Stage, places
from blip2nb.trace.tape import Tape, first_tensor, recording, split_place

THRESHOLD = 3.0
"""An excess above this is a fault. On unbroken models it stays within 0.5 and 2."""

ARRIVAL_TOLERANCE = 1e-6
"""Between stages at most one float32 addition happens (2⁻²⁴ relative, 6e-8); an arrival error above this is a fault."""

Inputs: TypeAlias = Mapping[str, Any] | Sequence[Any] | torch.Tensor


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What was measured at one stage. All errors are relative to the norm of the reference's value.

    Attributes:
        arrival_error: the largest distance of its inputs, as they arrived, to the reference's; of whole numbers and
            masks, the share that differs. None for a stage without recorded inputs.
        drift: distance of its output in an undisturbed run.
        local_error: distance of its output when fed the reference's inputs. None at a junction.
        rounding: distance of the candidate's output to the same stage in float64, on those inputs.
        excess: the reference's distance to float64 over the candidate's. 1 where both are bit-equal, infinite where
            the candidate is exact and the reference differs.
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

    def faulty(self, threshold: float = THRESHOLD) -> bool:
        """Whether more than rounding happens here or on the way here. NaN is a fault."""
        return faulty(self.arrival_error, self.excess, threshold)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All stages of one pair of models on one input.

    Attributes:
        outputs: the candidate's undisturbed output per stage.
        local_outputs: its output per stage when fed the reference's inputs.
        token_errors: stage -> local error per position, for outputs of shape (batch, positions, channels).
    """

    stages: tuple[StageResult, ...]
    outputs: Mapping[str, torch.Tensor]
    local_outputs: Mapping[str, torch.Tensor]
    token_errors: Mapping[str, torch.Tensor]
    threshold: float = THRESHOLD

    @property
    def faults(self) -> list[StageResult]:
        """The stages where an error arises, in the order of the network."""
        return [stage for stage in self.stages if stage.faulty(self.threshold)]

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
            "first_divergence": None if first is None else {**dataclasses.asdict(first), "stage": first.name},
        }

    def _repr_html_(self) -> str:
        words = ("stage", "arrival error", "error alone", "÷ its own rounding", "drift", "")
        head = "".join(f"<th>{word}</th>" for word in words)
        rows = "".join(
            f"<tr><td align='left'>{html.escape(stage.name)}</td>"
            + "".join(
                f"<td>{'–' if value is None else format(value, '.2g')}</td>"
                for value in (stage.arrival_error, stage.local_error, stage.excess, stage.drift)
            )
            + f"<td align='left'>{'<b>wrong</b>' if stage.faulty(self.threshold) else ''}</td></tr>"
            for stage in self.stages
        )
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{rows}</table>"

    def __repr__(self) -> str:
        first = self.first_divergence
        if first is None:
            return f"Comparison({len(self.stages)} stages, no error above rounding)"
        return f"Comparison({len(self.stages)} stages, first wrong at {first.name}, {len(self.faults)} in all)"


def compare(
    reference: torch.nn.Module | Tape | Mapping[str, torch.Tensor],
    candidate: torch.nn.Module,
    stages: Sequence[Stage],
    inputs: Inputs,
    *,
    reference_inputs: Inputs | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare a candidate with a reference, stage by stage, in two forward passes of the candidate.

    Args:
        reference: a tape, or any mapping from places to tensors, or a module, which is then run and recorded.
        candidate: the module under test, in eval mode.
        stages: the places to compare, in the order of the network.
        inputs: what to call the candidate with: keyword arguments, positional ones, or one tensor.
        reference_inputs: what to call the reference with, where that differs. Unused with a tape.
        progress: called with each stage's name as it is measured.

    Raises:
        ValueError: the reference lacks a place, a stage was never reached, a module has no such argument, or a model is
            in training mode.
        AttributeError: a model has no such module. Both name the stage.
    """
    for model in (reference, candidate):
        if isinstance(model, torch.nn.Module) and model.training:
            raise ValueError("The models should be in eval mode, found one in training mode. Call .eval() on it.")
    for stage in stages:
        _check_places(candidate, stage, [stage.candidate, *(f"{stage.module}:{name}" for name in stage.inputs)])
    recorded = record(reference, stages, inputs if reference_inputs is None else reference_inputs)
    with torch.no_grad():
        with recording(candidate, [stage.candidate for stage in stages]) as outputs:
            call(candidate, inputs)
        forcing = _Forcing(candidate, stages, recorded, progress)
        with forcing.hooks():
            try:
                call(candidate, inputs)
            except Exception as error:
                error.add_note(f"Raised at the stage {forcing.at}, which was fed the reference's inputs.")
                raise
    results = []
    for stage in stages:
        if not stage.is_junction and stage.name not in forcing.local:
            raise ValueError(f"{stage.name}: the candidate never called {stage.module}.")
        found = outputs.get(stage.candidate)
        drift = None if found is None else distance(found, recorded[stage.reference])
        local = forcing.local.get(stage.name, {})
        arrival = forcing.arrival.get(stage.name)
        results.append(StageResult(stage.name, stage.module, stage.is_junction, arrival, drift, **local))
    by_name = {stage.name: outputs[stage.candidate] for stage in stages if stage.candidate in outputs}
    return Comparison(tuple(results), by_name, forcing.local_outputs, forcing.token_errors)


def exceeds(value: float | None, limit: float) -> bool:
    """Whether a measured value is above a limit. NaN exceeds every limit, what was not measured none."""
    return value is not None and not value <= limit


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
            raise AttributeError(f"{stage.name}: {type(model).__name__} has no {path!r}: {error}.") from error
        takes = inspect.signature(module.forward).parameters
        free = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        if argument and argument not in takes and not free:
            names = ", ".join(takes) or "nothing"
            raise ValueError(f"{stage.name}: {path} is called with {names}, not with {argument!r}.")


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
            _check_places(reference, stage, places([stage]))
        with torch.no_grad(), recording(reference, places(stages)) as recorded:
            call(reference, inputs)
    else:
        recorded = reference
    missing = [place for place in places(stages) if place not in recorded]
    if missing:
        raise ValueError(f"The reference holds nothing for {missing[0]} ({len(missing)} places in all).")
    return recorded


class _Forcing:
    """One pass of the candidate in which every stage gets the reference's inputs and hands on the reference's output.

    Hooks are closures, not bound methods: the float64 copies of modules carry them along, and a copied bound method
    would copy this object with it.
    """

    def __init__(
        self,
        candidate: torch.nn.Module,
        stages: Sequence[Stage],
        recorded: Tape | Mapping[str, torch.Tensor],
        progress: Callable[[str], None] | None,
    ):
        self.candidate, self.stages, self.recorded, self.progress = candidate, stages, recorded, progress
        self.at = ""
        self.arrival: dict[str, float] = {}
        self.local: dict[str, dict[str, Any]] = {}
        self.local_outputs: dict[str, torch.Tensor] = {}
        self.token_errors: dict[str, torch.Tensor] = {}
        self._seen: set[str] = set()
        self._seen_by_referee: set[str] | None = None  # a set while a float64 copy runs

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

    def _before(self, stage: Stage, module: torch.nn.Module) -> Callable:
        """Measure what arrives, then put the recorded inputs in its place."""
        order = list(inspect.signature(module.forward).parameters)
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
                at = order.index(name)
                by_position = name not in named and at < len(given)
                arrived = given[at] if by_position else named.get(name)
                value = self.recorded[place]
                if name in stage.arrange:
                    value = stage.arrange[name](value)
                if isinstance(arrived, torch.Tensor):
                    if self._seen_by_referee is None:
                        self.arrival[stage.name] = max(self.arrival.get(stage.name, 0.0), distance(arrived, value))
                    value = value.to(arrived.device, arrived.dtype)
                if by_position:
                    given[at] = value
                else:
                    named[name] = value
            return tuple(given), named

        return hook

    def _after(self, stage: Stage) -> Callable:
        """Measure the output on the recorded inputs, then hand on the recorded output."""

        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            seen = self._seen if self._seen_by_referee is None else self._seen_by_referee
            if stage.name in seen:
                return None
            seen.add(stage.name)
            expected = self.recorded[stage.reference]
            if self._seen_by_referee is None:
                self._measure(stage, module, args, kwargs, first_tensor(output), expected)
                if self.progress is not None:
                    self.progress(stage.name)
            return _with_first(output, expected)

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
            self.local[stage.name] = {
                "local_error": math.inf,
                "rounding": math.nan,
                "excess": math.inf,
                "bit_equal": False,
            }
            return
        self.local[stage.name] = judge(found, expected, self._referee(module, args, kwargs))
        if expected.dim() == 3:
            error = (found.cpu().double() - expected.double()).norm(dim=-1)
            self.token_errors[stage.name] = (error / expected.double().norm(dim=-1).clamp_min(1e-300)).float()

    def _referee(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
        """The module's output on the same inputs, computed in float64."""
        self._seen_by_referee = set()
        try:
            return in_float64(module, args, kwargs)
        finally:
            self._seen_by_referee = None


def in_float64(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A module's main output on these arguments, computed in float64 by a copy of it; on the CPU."""
    exact = copy.deepcopy(module).double()
    # .forward and not the call: the copy's own hooks would measure it again; those inside it must still act
    return first_tensor(exact.forward(*_double(args), **_double(dict(kwargs)))).cpu().double()


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_double(one) for one in value)
    return {name: _double(one) for name, one in value.items()} if type(value) is dict else value


def _with_first(output: Any, value: torch.Tensor) -> Any:
    """The output with its first tensor replaced, in that tensor's dtype and on its device."""
    if isinstance(output, torch.Tensor):
        return value.to(output.device, output.dtype)
    if isinstance(output, Mapping):
        name = next(name for name, one in output.items() if isinstance(one, torch.Tensor))
        replaced = copy.copy(output)
        replaced[name] = value.to(output[name].device, output[name].dtype)  # type: ignore[index]
        return replaced
    at = next(number for number, one in enumerate(output) if isinstance(one, torch.Tensor))
    return (*output[:at], value.to(output[at].device, output[at].dtype), *output[at + 1 :])

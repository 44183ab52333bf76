"""One pass of a candidate in which every stage gets the reference's inputs and hands on the reference's output."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from blip2nb.errors import memory_ran_out
from blip2nb.trace.calling import Recorded, TableError
from blip2nb.trace.inside import Suspect, parameters_of
from blip2nb.trace.judging import StageCall, judge_call
from blip2nb.trace.metrics import ARRIVAL_TOLERANCE, THRESHOLD, distance, exceeds
from blip2nb.trace.precision import Weights
from blip2nb.trace.stage import Stage
from blip2nb.trace.tape import first_tensor, split_place, with_first

CAST = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Twice the rounding unit: what an addition on the way can be off in half precision. It counts as nothing."""


@dataclasses.dataclass
class StageState:
    """What a pass has seen of one stage so far.

    Attributes:
        arrival: the largest distance of what arrived to what the reference got; None where nothing was compared.
        arrived: where that is above the tolerance: the argument, what arrived, what should have.
        fed: argument -> the recorded value that was put in its place.
        local: what was measured of its output, see `judging.judge_call`; None where it was not.
        output: what it gave when fed the reference's inputs.
        token_error: its error per position, for outputs of shape (batch, positions, channels).
        suspect: what is needed to look into it, where it is at fault.
    """

    arrival: float | None = None
    arrived: tuple[str, torch.Tensor, torch.Tensor] | None = None
    fed: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    local: dict[str, Any] | None = None
    output: torch.Tensor | None = None
    token_error: torch.Tensor | None = None
    suspect: Suspect | None = None

    def arrives(self, name: str, arrived: torch.Tensor, expected: torch.Tensor, cast: float) -> None:
        """Measure what arrives as an argument, and keep it where it is the worst so far.

        Args:
            expected: what the reference got, which is put in its place.
            cast: what counts as nothing.
        """
        error = distance(arrived, expected.to(arrived.dtype))  # what runs in half precision is fed that
        if error <= cast:
            error = 0.0
        before = self.arrival or 0.0
        if exceeds(error, max(before, ARRIVAL_TOLERANCE)):
            self.arrived = (name, arrived.detach().clone(), expected)
        self.arrival = error if exceeds(error, before) else before
        self.fed[name] = expected

    def gives(self, called: StageCall, found: torch.Tensor, expected: torch.Tensor, strict: bool) -> None:
        """Measure what it gives when it is fed the reference's inputs; see `judging.judge_call`."""
        self.output, self.local = found.detach(), judge_call(called, found, expected, strict)
        if expected.dim() == 3 and found.shape == expected.shape:
            error = (found.cpu().double() - expected.double()).norm(dim=-1)
            self.token_error = (error / expected.double().norm(dim=-1).clamp_min(1e-300)).float()


class Seen:
    """Which stages the run in progress has gone through: the pass itself, or a stage's that is run beside it.

    Attributes:
        passed: the stages of the pass.
        aside: whether a stage is run beside it.
    """

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self._beside: set[str] | None = None

    @property
    def aside(self) -> bool:
        return self._beside is not None

    @property
    def here(self) -> set[str]:
        """The stages of the run in progress."""
        return self.passed if self._beside is None else self._beside

    @contextlib.contextmanager
    def beside(self, stage: str) -> Iterator[None]:
        """While a stage is run beside the pass: stages inside it are fed the recorded inputs, nothing is measured."""
        self._beside = {stage}
        try:
            yield
        finally:
            self._beside = None


def fed(
    stage: Stage,
    recorded: Recorded,
    order: Sequence[str],
    args: tuple,
    kwargs: Mapping[str, Any],
    arrives: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> tuple[tuple, dict[str, Any]]:
    """A stage's arguments with the recorded values in place: positional ones and those by name.

    Args:
        order: the names of the module's parameters.
        arrives: called with each argument's name, the tensor that arrived, and the recorded one.

    Raises:
        TableError: the module is not called with an argument that the table names.
    """
    given, named = list(args), dict(kwargs)
    for name, place in _wanted(stage).items():
        if name not in order and name not in named:
            names = ", ".join([*order, *named])
            words = f"{stage.name}: {stage.module} is called with {names}, not with {name!r}."
            raise TableError(words, stage.name, stage.module)
        at = order.index(name) if name in order else len(order)
        by_position = name not in named and at < len(given)
        arrived = given[at] if by_position else named.get(name)
        value = recorded[place]
        if name in stage.arrange:
            value = stage.arrange[name](value)
        if isinstance(arrived, torch.Tensor):
            arrives(name, arrived, value)
            value = value.to(arrived.device, arrived.dtype)
        if by_position:
            given[at] = value
        else:
            named[name] = value
    return tuple(given), named


def _wanted(stage: Stage) -> dict[str, str]:
    """A stage's argument -> the place of its value in the reference."""
    argument = split_place(stage.candidate)[1]
    return {argument: stage.reference} if argument else {name: stage.source(name) for name in stage.inputs}


@dataclasses.dataclass(eq=False)
class ForcedPass:
    """One pass of the candidate, while `hooks` or `in_passing` is open and the candidate is called.

    Attributes:
        progress: called with each stage's name as it is measured.
        weights: of a candidate in half precision, its parameters from before the cast, by name.
        measure: whether the stages' outputs are judged, or only what arrives.
        states: stage -> what was seen of it.
        at: the stage that was reached last.
        stopped: what ended the pass, if something did.
    """

    candidate: torch.nn.Module
    stages: Sequence[Stage]
    recorded: Recorded
    progress: Callable[[str], None] | None = None
    weights: Weights | None = None
    measure: bool = True

    def __post_init__(self) -> None:
        self.cast = max((CAST.get(one.dtype, 0.0) for one in self.candidate.parameters()), default=0.0)
        self.states = {stage.name: StageState() for stage in self.stages}
        self.at = ""
        self.stopped: Exception | None = None
        self.seen = Seen()

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

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Force and measure the stages of the model that is called while the block runs."""
        with contextlib.ExitStack() as stack:
            for stage in self.stages:
                module = self.candidate.get_submodule(stage.module)
                before = module.register_forward_pre_hook(self.entering(stage, module), with_kwargs=True)
                stack.callback(before.remove)
                if not stage.is_junction:
                    stack.callback(module.register_forward_hook(self.leaving(stage), with_kwargs=True).remove)
            yield

    @contextlib.contextmanager
    def in_passing(self) -> Iterator[None]:
        """Measure the stages without disturbing the pass."""
        modules = [self.candidate.get_submodule(stage.module) for stage in self.stages]
        with contextlib.ExitStack() as stack:
            for stage, module in zip(self.stages, modules, strict=True):
                after = module.register_forward_hook(self._once_more(stage, module), with_kwargs=True)
                stack.callback(after.remove)
            yield

    def entering(self, stage: Stage, module: torch.nn.Module) -> Callable:
        """Measure what arrives, then put the recorded inputs in its place."""
        order = list(parameters_of(module))

        def arrives(name: str, arrived: torch.Tensor, value: torch.Tensor) -> None:
            if not self.seen.aside:
                self.states[stage.name].arrives(name, arrived, value, self.cast)

        def hook(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if stage.name in self.seen.here:
                return None
            if stage.is_junction:
                self.seen.here.add(stage.name)
            self.at = stage.name
            return fed(stage, self.recorded, order, args, kwargs, arrives)

        return hook

    def leaving(self, stage: Stage) -> Callable:
        """Measure the output on the recorded inputs, then hand on the recorded output."""

        def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if stage.name in self.seen.here:
                return None
            self.seen.here.add(stage.name)
            expected = self.recorded[stage.reference]
            if self.measure and not self.seen.aside:
                self._measure(stage, module, args, kwargs, first_tensor(output), expected)
                if self.progress is not None:
                    self.progress(stage.name)
            return with_first(output, expected)

        return hook

    def _once_more(self, stage: Stage, module: torch.nn.Module) -> Callable:
        """Call the module a second time, on the recorded inputs, and measure that output."""
        feed = self.entering(stage, module)

        def hook(_module: torch.nn.Module, args: tuple, kwargs: dict, _output: Any) -> None:
            if stage.name not in self.seen.passed:
                given, named = feed(module, args, kwargs)
                self.seen.passed.add(stage.name)
                found = first_tensor(module(*given, **named))
                self._measure(stage, module, given, named, found, self.recorded[stage.reference])

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
        state, strict = self.states[stage.name], self.cast == 0
        aside = functools.partial(self.seen.beside, stage.name)
        called = StageCall(stage.module, module, args, kwargs, state.fed, self.weights, aside)
        state.gives(called, found, expected, strict)
        if state.local is not None and exceeds(state.local["excess"], THRESHOLD):
            state.suspect = Suspect(
                stage.name, stage.module, module, args, dict(kwargs), expected, stage.parts, self.recorded,
                called.exactly, called.unit, strict,
            )  # fmt: skip

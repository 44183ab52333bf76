"""Standing at one stage with both models live: look at what goes in and out, change something, run it again."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from blip2nb.trace.calling import Inputs, call, record
from blip2nb.trace.metrics import THRESHOLD, exceeds, judge
from blip2nb.trace.precision import in_float64
from blip2nb.trace.stage import Stage
from blip2nb.trace.tape import Tape, first_call, first_tensor, split_place


class Side(Protocol):
    """One model's module at a stage. `inputs` are the arguments it is called with; a call may replace some of them."""

    inputs: dict[str, Any]

    def __call__(self, **changes: Any) -> torch.Tensor: ...


@dataclasses.dataclass
class LiveModule:
    """A module in this process with the arguments it is called with.

    Attributes:
        module: the model's own, not a copy: what is changed on it stays changed.
        inputs: argument -> value.
    """

    module: torch.nn.Module
    inputs: dict[str, Any]

    def __call__(self, **changes: Any) -> torch.Tensor:
        """The module's main output. Raises what the module raises, in its own code, where `%debug` can look."""
        with torch.no_grad():
            return first_tensor(self.module(**self.inputs | changes)).cpu()

    def exact(self, **changes: Any) -> torch.Tensor:
        """The same in float64."""
        with torch.no_grad():
            return in_float64(self.module, (), self.inputs | changes)

    def __repr__(self) -> str:
        return f"{self.module}\ncalled with {describe(self.inputs)}"


def describe(inputs: Mapping[str, Any]) -> str:
    """Arguments in one line: tensors by shape and dtype."""
    words = []
    for name, value in inputs.items():
        tensor = isinstance(value, torch.Tensor)
        shown = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if tensor else f"{value!r:.60}"
        words.append(f"{name}: {shown}")
    return ", ".join(words)


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What both sides made of the same inputs.

    Attributes:
        reference, candidate: the outputs.
        exact: the candidate's in float64.
        local_error, rounding, excess: as in `blip2nb.trace.metrics.judge`. NaN where there is no reference.
    """

    stage: str
    reference: torch.Tensor | None
    candidate: torch.Tensor
    exact: torch.Tensor
    local_error: float = math.nan
    rounding: float = math.nan
    excess: float = math.nan

    @property
    def fault(self) -> bool:
        """Whether the two differ by more than rounding. NaN is a fault."""
        return self.reference is not None and exceeds(self.excess, THRESHOLD)

    def __repr__(self) -> str:
        if self.reference is None:
            return f"{self.stage}: output {tuple(self.candidate.shape)}; no live reference to run on changed inputs"
        if self.local_error == 0:
            return f"{self.stage}: bit-equal"
        word = "a fault" if self.fault else "rounding"
        return f"{self.stage}: error {self.local_error:.1e}, {self.excess:.3g} × its own rounding: {word}"


@dataclasses.dataclass
class Step:
    """One stage, entered. Call it to run both sides on the same inputs.

    >>> step()                                          # as the models run it
    >>> step.candidate.module.eps = 1e-5; step()        # change a module, run again
    >>> step(hidden_states=torch.zeros(1, 257, 44))     # or an input, for both

    Attributes:
        stage: where we stand.
        candidate: the module under test, live, with the reference's recorded inputs.
        reference: the reference's module, live, or None where only its recording is at hand.
        expected: the reference's recorded output.
    """

    stage: Stage
    candidate: LiveModule
    reference: Side | None
    expected: torch.Tensor

    def __call__(self, **changes: Any) -> Outcome:
        """Run both sides.

        Args:
            changes: arguments of the candidate's module to replace, for this call only; the reference's are replaced
                by the same values, as far as the stage says which they are.

        Raises:
            ValueError: the reference has no argument of its own for one of them, or the candidate has none.
        """
        unknown = [name for name in changes if name not in self.candidate.inputs]
        if unknown:
            names = ", ".join(self.candidate.inputs)
            raise ValueError(f"{self.stage.name} is called with {names}, not with {unknown[0]!r}.")
        found, exact = self.candidate(**changes), self.candidate.exact(**changes)
        if self.reference is not None:
            self._check_counterparts(changes)
            expected: torch.Tensor | None = self.reference(**self._for_reference(self.candidate.inputs | changes))
        else:
            expected = None if changes else self.expected
        if expected is None:
            return Outcome(self.stage.name, None, found, exact)
        values = judge(found, expected, exact) if found.shape == expected.shape else {"local_error": math.inf}
        values.pop("bit_equal", None)
        return Outcome(self.stage.name, expected, found, exact, **values)

    def _check_counterparts(self, changes: Mapping[str, Any]) -> None:
        for name in changes:
            if name not in self._counterparts:
                raise ValueError(
                    f"{name!r} has no counterpart among the arguments of {self.stage.reference}. "
                    "Change it on each side: step.candidate(…), step.reference(…)."
                )

    def _for_reference(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The candidate's inputs under the reference's names: both get the same, whatever else was changed upstream."""
        return {theirs: inputs[ours] for ours, theirs in self._counterparts.items()}

    @property
    def _counterparts(self) -> dict[str, str]:
        """The candidate's argument -> the one of the reference's own module that holds the same in the same layout."""
        inputs, arranged = self.stage.inputs, self.stage.arrange
        return {name: place[1:] for name, place in inputs.items() if place.startswith(":") and name not in arranged}

    def __repr__(self) -> str:
        live = "live" if self.reference is not None else "recorded only"
        return (
            f"Step {self.stage.name}\n"
            f"  reference  {self.stage.reference} ({live}), output {tuple(self.expected.shape)}\n"
            f"  candidate  {self.stage.candidate} (live), called with {describe(self.candidate.inputs)}"
        )

    def _repr_html_(self) -> str:
        words, module = html.escape(repr(self)), html.escape(repr(self.candidate.module))
        return f"<pre>{words}</pre><details><summary>the module</summary><pre>{module}</pre></details>"


def enter(
    candidate: torch.nn.Module,
    stage: Stage,
    inputs: Inputs,
    recorded: Tape | Mapping[str, torch.Tensor],
    reference: Side | None = None,
) -> Step:
    """Run the candidate up to a stage and stop there.

    Args:
        candidate: in eval mode.
        stage: where to stop; not a junction, since nothing is computed there.
        inputs: what to call the candidate with.
        recorded: the reference's values by place: its output at the stage, and what the stage's inputs name.
        reference: its live side, if there is one.

    Raises:
        ValueError: the stage is a junction, or the candidate never calls it.
    """
    if stage.is_junction:
        raise ValueError(f"{stage.name} is where values arrive; nothing is computed there that could be run again.")
    module = candidate.get_submodule(stage.module)
    with torch.no_grad(), first_call(module) as given:
        call(candidate, inputs)
    if not given:
        raise ValueError(f"{stage.name}: the candidate never called {stage.module}.")
    for name in stage.inputs:
        value = recorded[stage.source(name)]
        given[name] = stage.arrange[name](value) if name in stage.arrange else value
    return Step(stage, LiveModule(module, dict(given)), reference, recorded[stage.reference])


def enter_both(
    reference: torch.nn.Module,
    candidate: torch.nn.Module,
    stage: Stage,
    inputs: Inputs,
    *,
    reference_inputs: Inputs | None = None,
) -> Step:
    """The same for two models that live in this process.

    Args:
        reference_inputs: what to call the reference with, where that differs from `inputs`.
    """
    theirs = inputs if reference_inputs is None else reference_inputs
    recorded = record(reference, [stage], theirs)
    module = reference.get_submodule(split_place(stage.reference)[0])
    with torch.no_grad(), first_call(module) as given:
        call(reference, theirs)
    return enter(candidate, stage, inputs, recorded, LiveModule(module, dict(given)))

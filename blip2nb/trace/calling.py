"""Calling a model, recording a reference, and checking the table of stages against either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from blip2nb.trace.inside import parameters_of
from blip2nb.trace.stage import Stage, places, places_inside
from blip2nb.trace.tape import Tape, recording, split_place

Inputs: TypeAlias = Mapping[str, Any] | Sequence[Any] | torch.Tensor
"""What a model is called with: keyword arguments, positional ones, or one tensor."""

Recorded: TypeAlias = Tape | Mapping[str, torch.Tensor]
"""A reference's values by place."""


class TableError(ValueError):
    """A line of the table of stages does not fit a model."""

    def __init__(self, words: str, stage: str, module: str):
        super().__init__(words)
        self.stage, self.module = stage, module


class NoModuleError(TableError, AttributeError):
    """A model has no such module."""


def call(model: torch.nn.Module, inputs: Inputs) -> Any:
    """Call a model with keyword arguments, positional ones, or one tensor."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def record(reference: torch.nn.Module | Recorded, stages: Sequence[Stage], inputs: Inputs) -> Recorded:
    """The reference's values at every place that the stages name: a recording as it is, a module's by running it.

    Raises:
        ValueError: it holds nothing for a place.
    """
    if isinstance(reference, torch.nn.Module):
        for stage in stages:
            check_places(reference, stage, [*places([stage]), *stage.parts.values()])
        with torch.no_grad(), recording(reference, places(stages), places_inside(stages)) as recorded:
            call(reference, inputs)
    else:
        recorded = reference
    missing = [place for place in places(stages) if place not in recorded]
    if missing:
        raise ValueError(f"The reference holds nothing for {missing[0]} ({len(missing)} places in all).")
    return recorded


def check_places(model: torch.nn.Module, stage: Stage, wanted: Sequence[str]) -> None:
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

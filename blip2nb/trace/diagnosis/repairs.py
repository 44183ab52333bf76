"""A live module with something put right for as long as a block lasts, and as before afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from blip2nb.trace.diagnosis.known import AttributeDifference


@contextlib.contextmanager
def repaired(candidate: torch.nn.Module, differences: Iterable[AttributeDifference]) -> Iterator[None]:
    """The candidate with the reference's values in place, for as long as the block lasts: the counter-test."""
    changed = []
    try:
        for difference in differences:
            module = candidate.get_submodule(difference.module)
            changed.append((module, difference.attribute, getattr(module, difference.attribute)))
            setattr(module, difference.attribute, difference.reference)
        yield
    finally:
        for module, name, value in reversed(changed):
            setattr(module, name, value)


@contextlib.contextmanager
def still(module: torch.nn.Module) -> Iterator[None]:
    """A module and everything in it in eval mode."""
    before = [(one, one.training) for one in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for one, training in before:
            one.training = training


@contextlib.contextmanager
def holding(values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Parameters with other values.

    Args:
        values: (parameter, the value it is to have, of as many elements).
    """
    with contextlib.ExitStack() as stack:
        for parameter, value in values:
            stack.enter_context(_holding(parameter, value))
        yield


@contextlib.contextmanager
def _holding(parameter: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    before = parameter.data
    try:
        parameter.data = value.to(before.device, before.dtype).reshape(before.shape)
        yield
    finally:
        parameter.data = before

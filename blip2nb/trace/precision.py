"""Running a module in float64, and telling whether it computes the same thing twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch

from blip2nb.trace.tape import first_tensor

Weights: TypeAlias = Callable[[str], torch.Tensor | None]
"""A parameter's name -> its value before it was rounded to half precision, or None where that is not known."""


def in_float64(
    module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any], weights: Weights | None = None
) -> torch.Tensor:
    """A module's main output on these arguments, computed in float64; on the CPU.

    The module itself is run, with its weights widened for as long as that takes, so that hooks on it and a forward that
    somebody put on it act as they do otherwise; a copy would lose some and keep others.

    Args:
        weights: of a module that runs in half precision, what its weights were before, by name within the module.
    """
    with widened(module, weights):
        return first_tensor(module(*_double(args), **_double(dict(kwargs)))).cpu().double()


@contextlib.contextmanager
def widened(module: torch.nn.Module, weights: Weights | None = None) -> Iterator[None]:
    """A module with its floating-point parameters and buffers in float64, bit for bit as before afterwards."""
    named = [*module.named_parameters(), *module.named_buffers()]
    held = [(name, one, one.data) for name, one in named if one.is_floating_point()]
    try:
        for name, one, data in held:
            known = weights(name) if weights is not None and data.dtype in HALF else None
            one.data = (data if known is None else known.reshape(data.shape)).to(data.device, torch.float64)
        yield
    finally:
        for _, one, data in held:
            one.data = data


HALF = (torch.float16, torch.bfloat16)


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_double(one) for one in value)
    return {name: _double(one) for name, one in value.items()} if type(value) is dict else value

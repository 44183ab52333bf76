"""Running a module in float64, and telling whether it computes the same thing twice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from blip2nb.trace.tape import first_tensor


def in_float64(module: torch.nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A module's main output on these arguments, computed in float64; on the CPU.

    The module itself is run, with its weights widened for as long as that takes, so that hooks on it and a forward that
    somebody put on it act as they do otherwise; a copy would lose some and keep others.
    """
    with widened(module):
        return first_tensor(module(*_double(args), **_double(dict(kwargs)))).cpu().double()


@contextlib.contextmanager
def widened(module: torch.nn.Module) -> Iterator[None]:
    """A module with its floating-point parameters and buffers in float64, bit for bit as before afterwards."""
    held = [one for one in itertools.chain(module.parameters(), module.buffers()) if one.is_floating_point()]
    before = [one.data for one in held]
    try:
        for one in held:
            one.data = one.data.double()
        yield
    finally:
        for one, data in zip(held, before, strict=True):
            one.data = data


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_double(one) for one in value)
    return {name: _double(one) for name, one in value.items()} if type(value) is dict else value

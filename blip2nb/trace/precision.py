"""Running a module in float64, and in the least exact order of adding up."""

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


_SUMS = (torch.nn.Linear, torch.nn.Conv2d)
_BARE = (torch.nn.Embedding, torch.nn.Dropout, torch.nn.Identity)


def only_sums(module: torch.nn.Module) -> bool:
    """Whether all that a module computes with weights are sums of products, as a matrix or a convolution makes them."""
    kinds = [type(one) for one in module.modules() if not list(one.children())]
    return any(issubclass(kind, _SUMS) for kind in kinds) and all(issubclass(kind, _SUMS + _BARE) for kind in kinds)


class one_by_one(torch.overrides.TorchFunctionMode):
    """As long as the block lasts, float32 matrices and convolutions begin with the bias and add one product after the
    other. Every library adds in an order of its own, and may pick another on another processor, for another size or
    number of threads. None is less exact than this one, which oneDNN's convolutions take: a large bias or sum then
    loses digits of every small product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and args[0].dtype == torch.float32:
            return _added_up(*args, **kwargs)
        if func is torch.nn.functional.conv2d and args[0].dtype == torch.float32:
            return _convolved(*args, **kwargs)
        return func(*args, **kwargs)


def _added_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    total = torch.zeros(*x.shape[:-1], len(weight)) if bias is None else bias.expand(*x.shape[:-1], -1).clone()
    for values, column in zip(x.unbind(-1), weight.T.contiguous(), strict=True):
        total.addcmul_(values[..., None], column)
    return total


def _convolved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    if groups != 1 or isinstance(padding, str) or x.dim() != 4:
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    size = weight.shape[2:]
    patches = torch.nn.functional.unfold(x, size, dilation, padding, stride).transpose(1, 2)
    shape = torch.nn.functional.conv2d(x[:1, :1], weight[:1, :1], None, stride, padding, dilation).shape[2:]
    return _added_up(patches, weight.flatten(1), bias).transpose(1, 2).unflatten(2, shape)


HALF = (torch.float16, torch.bfloat16)


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_double(one) for one in value)
    return {name: _double(one) for name, one in value.items()} if type(value) is dict else value

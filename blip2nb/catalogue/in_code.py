"""Faults in a model's code: where each fits, and planting it. For the catalogue."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from blip2nb.catalogue.anatomy import (
    ACTIVATIONS,
    activations,
    attentions,
    layers,
    norm_pairs,
    norms,
    output_layers,
    owner,
)
from blip2nb.catalogue.in_files import qkv_pairs
from blip2nb.catalogue.planting import Target
from blip2nb.trace.paths import join
from blip2nb.trace.vocabulary import BRANCHES, HEAD_WIDTH, HEADS, SCALE


@contextlib.contextmanager
def another_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A module whose `forward` is another: called with (module, what it did before, *args, **kwargs).

    The module gets another class, so that its copies have the fault too, with the same name and signature.
    """
    before = type(module)

    @functools.wraps(before.forward)
    def changed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, functools.partial(before.forward, self), *args, **kwargs)

    module.__class__ = type(before.__name__, (before,), {"forward": changed, "__module__": before.__module__})
    try:
        yield
    finally:
        module.__class__ = before


@contextlib.contextmanager
def other_attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """A module with other values in some attributes that it has."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def setting(values: Callable[[nn.Module, Target], dict[str, Any]]) -> Callable[..., contextlib.AbstractContextManager]:
    """A fault that sets attributes of the target's first module."""

    def plant(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
        module = model.get_submodule(target.modules[0])
        return other_attributes(module, **values(module, target))

    return plant


def opposite(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    """A flag that says the opposite."""
    module, (name,) = model.get_submodule(target.modules[0]), target.names
    return other_attributes(module, **{name: not getattr(module, name)})


EPS = (1e-5, 1e-6, 1e-12)
"""What norms have for an eps: torch's own default, EVA's and T5's, BERT's."""


def other_eps(model: nn.Module) -> Iterator[Target]:
    for path, module, attribute in norms(model):
        for value in EPS:
            if getattr(module, attribute) != value:
                yield Target((path,), (attribute,), f"{value:g}")


def centred(model: nn.Module) -> Iterator[Target]:
    for path, module, _ in norms(model):
        yield Target((path,), (), "no mean subtracted" if isinstance(module, nn.LayerNorm) else "mean subtracted")


def other_norm(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    module = model.get_submodule(target.modules[0])
    if target.form == "mean subtracted":
        return another_forward(module, lambda self, before, x: before(x - x.mean(-1, keepdim=True)))

    def forward(self: nn.LayerNorm, before: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return normed if self.bias is None else normed + self.bias

    return another_forward(module, forward)


def other_activations(model: nn.Module) -> Iterator[Target]:
    for path, kind in activations(model):
        for other in ACTIVATIONS:
            if other != kind:
                yield Target((path,), (), f"{kind} → {other}")


def exchange_activation(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    parent, _, name = target.modules[0].rpartition(".")
    return other_attributes(model.get_submodule(parent), **{name: ACTIVATIONS[target.form.split(" → ")[1]]().eval()})


def scaled_attentions(model: nn.Module) -> Iterator[Target]:
    for found in attentions(model):
        module = model.get_submodule(found.path)
        name = next((name for name in SCALE if isinstance(getattr(module, name, None), float)), None)
        if name is not None:
            forms = ("missing", "twice") if getattr(module, name) != 1 else ("where there is none",)
            for form in forms:
                yield Target((found.path,), (name,), form)


def other_scale(module: nn.Module, target: Target) -> dict[str, Any]:
    (name,) = target.names
    if target.form == "missing":
        return {name: 1.0}
    if target.form == "twice":
        return {name: getattr(module, name) ** 2}
    width = next(getattr(module, width) for width in HEAD_WIDTH if hasattr(module, width))
    return {name: width**-0.5}


def countable_heads(model: nn.Module) -> Iterator[Target]:
    for found in attentions(model):
        module = model.get_submodule(found.path)
        names = [name for name in (*HEADS, *HEAD_WIDTH) if isinstance(getattr(module, name, None), int)]
        if "position_bias" in str(inspect.signature(module.forward)):
            continue  # a bias for each head does not fit any other number of them
        width = next((getattr(module, name) for name in names if name in HEAD_WIDTH), 2)
        for form, fits in (("half as many", found.heads % 2 == 0), ("twice as many", width % 2 == 0)):
            if fits:
                yield Target((found.path,), tuple(names), form)


def other_heads(module: nn.Module, target: Target) -> dict[str, Any]:
    more = target.form == "twice as many"
    return {
        name: getattr(module, name) * 2 if (name in HEADS) == more else getattr(module, name) // 2
        for name in target.names
    }


def exchangeable_parts(model: nn.Module) -> Iterator[Target]:
    for target in qkv_pairs(model):
        if len(target.modules) == 2:
            yield target


def exchange_modules(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    stack = contextlib.ExitStack()
    one, other = (model.get_submodule(path) for path in target.modules)
    for path, module in zip(target.modules, (other, one), strict=True):
        parent, _, name = path.rpartition(".")
        stack.enter_context(other_attributes(model.get_submodule(parent), **{name: module}))
    return stack


def norms_to_exchange(model: nn.Module) -> Iterator[Target]:
    for one, other in norm_pairs(model):
        yield Target((one, other))


def linears_with_bias(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and bool(module.bias.any()):
            yield Target((path,), ("bias",))


def norm_first(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        for name in ("do_layer_norm_before", "norm_first"):
            if isinstance(getattr(module, name, None), bool):
                yield Target((path,), (name,))


def offsets(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and getattr(module, "offset", None):
            yield Target((path,), ("offset",))


_BUCKETS = {
    "relative_attention_max_distance": "a smaller largest distance",
    "relative_attention_num_buckets": "half as many buckets",
    "is_decoder": "the other stack's direction",
}


def bucketed(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        if getattr(module, "has_relative_attention_bias", False) is True:
            for name, form in _BUCKETS.items():
                if hasattr(module, name):
                    yield Target((path, f"{path}.relative_attention_bias"), (name,), form)


def other_buckets(module: nn.Module, target: Target) -> dict[str, Any]:
    (name,) = target.names
    value = getattr(module, name)
    if name == "is_decoder":
        return {name: not value}
    # chosen: with either, positions that are far enough apart fall into other buckets
    return {name: value // 2 if name == "relative_attention_num_buckets" else value // 4}


def droppable(model: nn.Module) -> Iterator[Target]:
    """Modules that leave values out while they are in training mode."""
    for path, module in model.named_modules():
        rates = [getattr(module, name, None) for name in ("p", "dropout", "attention_dropout")]
        if path and any(isinstance(rate, float) and rate > 0 for rate in rates) and not module.training:
            yield Target((path,), ("training",))


def logits(model: nn.Module) -> Iterator[Target]:
    for path, _, _ in output_layers(model):
        yield Target((path,))


def smaller_logits(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    """As models do whose table serves as the last layer too."""
    module = model.get_submodule(target.modules[0])
    return another_forward(module, lambda self, before, x: before(x * x.shape[-1] ** -0.5))


def called_tables(model: nn.Module) -> Iterator[Target]:
    """Every table of tokens, shared weights or not: it matters which module is called."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not re.search("pos|relative|type", path):
            yield Target((path,))


def larger_embedding(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    module = model.get_submodule(target.modules[0])
    return another_forward(module, lambda self, before, x: before(x) * self.weight.shape[-1] ** 0.5)


def products(model: nn.Module) -> Iterator[Target]:
    within = [one for stack in layers(model) for one in stack]
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(path.startswith(f"{one}.") for one in within):
            yield Target((path,))


def half_the_output(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    module = model.get_submodule(target.modules[0])
    return another_forward(module, lambda self, before, x: before(x) / 2)


def share(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    head, table = (model.get_submodule(owner(name)) for name in target.names)
    return other_attributes(head, weight=table.weight)


def maskable(model: nn.Module) -> Iterator[Target]:
    """Attentions that say whether they look ahead. One that looks at another sequence has no ahead."""
    for found in attentions(model):
        causal = getattr(model.get_submodule(found.path), "is_causal", None)
        if isinstance(causal, bool) and not re.search("cross|EncDec|encoder_attn", found.path):
            form = "looks ahead" if causal else "does not look ahead, and should"
            yield Target((found.path,), ("is_causal",), form)


@contextlib.contextmanager
def other_mask(model: nn.Module, target: Target) -> Iterator[None]:
    module = model.get_submodule(target.modules[0])
    ahead = target.form == "looks ahead"
    order = list(inspect.signature(module.forward).parameters)
    argument = next((name for name in ("attention_mask", "mask") if name in order), None)

    def forward(self: nn.Module, before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given, at = list(args), order.index(argument) if argument else -1
        if argument in kwargs:
            kwargs[argument] = _with_ahead(kwargs[argument], ahead)
        elif 0 <= at < len(given):
            given[at] = _with_ahead(given[at], ahead)
        return before(*given, **kwargs)

    with other_attributes(module, is_causal=not ahead), another_forward(module, forward):
        yield


def _with_ahead(mask: torch.Tensor | None, ahead: bool) -> torch.Tensor | None:
    """A mask (…, queries, keys), of booleans or to be added, that lets every query see what the last one sees, or none
    see beyond itself."""
    if mask is None:
        return None
    if ahead:
        return mask[..., -1:, :].expand_as(mask)
    seen = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def residuals(model: nn.Module) -> Iterator[Target]:
    for path, module in model.named_modules():
        children = dict(module.named_children())
        for norm, end in BRANCHES:
            if path and norm in children and end in children:
                for form in ("missing", "doubled"):
                    yield Target((path, join(path, end)), (norm, end), form)
        if path and "input_tensor" in inspect.signature(module.forward).parameters:
            for form in ("missing", "doubled"):
                yield Target((path, *(join(path, name) for name in children)), ("input_tensor",), form)


def other_residual(model: nn.Module, target: Target) -> contextlib.AbstractContextManager:
    module = model.get_submodule(target.modules[0])
    more = 1 if target.form == "doubled" else -1
    if target.names == ("input_tensor",):  # BERT's way: the module adds what it is handed beside
        return another_forward(module, lambda self, before, x, input_tensor: before(x, input_tensor * (1 + more)))
    norm, end = target.names

    def forward(self: nn.Module, before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        arrived: list[torch.Tensor] = []

        def keep(_: nn.Module, given: tuple) -> None:
            arrived.append(given[0])

        def add(_: nn.Module, given: tuple, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                return output + more * arrived[-1]
            return (output[0] + more * arrived[-1], *output[1:])

        first = self.get_submodule(norm).register_forward_pre_hook(keep)
        last = self.get_submodule(end).register_forward_hook(add)
        try:
            return before(*args, **kwargs)
        finally:
            first.remove()
            last.remove()

    return another_forward(module, forward)

"""What a model is made of, told by what its modules are and not by whose model it is: where faults can be put."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from blip2nb.trace.metrics import FEW
from blip2nb.trace.paths import join
from blip2nb.trace.vocabulary import EPS, FUSED, HEADS, role_of_parameter


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention in a model: its path, how many heads, and the parameters that make q, k and v, by name."""

    path: str
    heads: int
    names: tuple[str, ...]

    @property
    def fused(self) -> bool:
        return role_of_parameter(self.names[0]) == "qkv"


def attentions(model: nn.Module) -> list[Attention]:
    """Every module that makes a query, a key and a value of what it gets."""
    found = []
    for path, module in model.named_modules():
        own = [(name, tensor) for name, tensor in module.named_parameters() if name.count(".") <= 1]
        fused = [name for name, tensor in own if _stacked(name, tensor)]
        apart = [name for name, _ in own if role_of_parameter(name) in FUSED["qkv"]]
        names = sorted(fused, key=lambda name: name.endswith("bias")) or sorted(apart, key=role_of_parameter)
        heads = next((getattr(module, name) for name in HEADS if hasattr(module, name)), 0)
        if heads and (fused or set(map(role_of_parameter, apart)) == set(FUSED["qkv"])):
            found.append(Attention(path, heads, tuple(join(path, name) for name in names)))
    return found


def _stacked(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is a weight or bias whose rows are those of query, key and value: GPT-2 keeps it transposed."""
    if role_of_parameter(name) != "qkv" or not name.endswith(("weight", "bias")):
        return False
    return len(tensor) % 3 == 0 and (tensor.dim() == 1 or len(tensor) > tensor.shape[1])


def norms(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Path, module and the attribute that holds its eps, of every norm."""
    found = []
    for path, module in model.named_modules():
        attribute = next((name for name in EPS if isinstance(getattr(module, name, None), float)), None)
        if attribute and isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 1:
            found.append((path, module, attribute))
    return found


def layers(model: nn.Module) -> list[list[str]]:
    """The paths of layers that follow one another, one list for each stack of them."""
    stacks: list[list[str]] = []
    for path, module in model.named_modules():
        within = any(path.startswith(f"{one}.") for stack in stacks for one in stack)
        children = list(module.children())
        alike = len({type(child) for child in children}) == 1 and any(True for _ in module.parameters())
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(children) > 1 and alike and not within:
            stacks.append([join(path, name) for name, _ in module.named_children()])
    return stacks


class QuickGelu(nn.Module):
    """x · sigmoid(1.702 x), the approximation that CLIP uses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGelu,
    "relu": nn.ReLU,
}


def activations(model: nn.Module) -> list[tuple[str, str]]:
    """Path and kind of every activation, told by what it computes."""
    found = []
    with torch.no_grad():
        probe = torch.linspace(-3, 3, 61)  # any two are 4.7e-4 apart somewhere there
        known = {name: make()(probe) for name, make in ACTIVATIONS.items()}
        for path, module in model.named_modules():
            if path and not any(True for _ in module.parameters()) and not list(module.children()):
                with contextlib.suppress(Exception):  # whatever else has no parameters may want other arguments
                    kind = [name for name, value in known.items() if torch.allclose(module(probe), value, atol=FEW)]
                    found += [(path, kind[0])] if kind else []
    return found


def owner(name: str) -> str:
    """The module that a parameter is weight or bias of, or the parameter's own name."""
    path, _, leaf = name.rpartition(".")
    return path if leaf in ("weight", "bias") else name


def owners(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(owner, names)))


def norm_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Norms of one layer that follow one another and could stand in each other's place."""
    found = [path for path, _, _ in norms(model)]
    for stack in layers(model):
        for layer in stack:
            inside = [path for path in found if path.startswith(f"{layer}.")]
            for one, other in itertools.pairwise(inside):
                if model.get_submodule(one).weight.shape == model.get_submodule(other).weight.shape:
                    yield one, other


def alike_layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each layer and the next of its stack that has the same parameters."""
    for stack in layers(model):
        made_of = {path: _shapes(model.get_submodule(path)) for path in stack}
        for at, one in enumerate(stack):
            alike = [other for other in stack[at + 1 :] if made_of[other] == made_of[one]]
            if alike:
                yield one, alike[0]


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in module.named_parameters()]


def token_tables(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """The tables that tokens are looked up in, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not re.search("pos|relative|type", path):
            if id(module.weight) not in seen:
                yield path, module
            seen.add(id(module.weight))


def output_layers(model: nn.Module) -> list[tuple[str, nn.Linear, str]]:
    """The layers that give logits: path, module, and the table of their shape."""
    tables = [(path, module.weight) for path, module in token_tables(model)]
    return [
        (path, module, table)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for table, weight in tables
        if weight.shape == module.weight.shape and module.out_features > module.in_features
    ]

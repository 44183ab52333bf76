"""A fault that is put into a model on purpose: what it is, where it fits, and planting it so that it can be removed."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

Tensors: TypeAlias = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Target:
    """One place where a fault fits.

    Attributes:
        modules: paths of the modules at fault, in the order of the network. A right answer names the first, or, where
            they lie in one stage, any of them. A parameter that is no module's weight or bias stands by its own name.
        names: what is changed: parameters (files), attributes (code), settings (configuration, inputs).
        form: which of the fault's forms, in a few words; "" where it has one.
        stages: where it shows, the first first, if that does not follow from the modules.
        whole: all that is in the modules is at fault, too.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...] = ()
    form: str = ""
    stages: tuple[str, ...] = ()
    whole: bool = False

    def __str__(self) -> str:
        return self.modules[0] + (f" ({self.form})" if self.form else "")

    def names_module(self, module: str) -> bool:
        """Whether this is a right answer to which module it is: one of them, what directly holds one, or, where all of
        it is at fault, what is in it."""
        return any(
            module in (one, one.rpartition(".")[0]) or (self.whole and module.startswith(f"{one}."))
            for one in self.modules
        )


@dataclasses.dataclass(frozen=True)
class Fault:
    """A named mistake.

    Attributes:
        name: its name in the catalogue.
        words: what was done wrong, one sentence.
        kind: files, code, configuration, or inputs.
        cause: what a right answer calls it.
        also: other answers that are as right, since they say the same of the numbers.
        where: model -> the places where it may fit. Of inputs, a `blip2nb.catalogue.right.RightModel` ->.
        how: what it does there. Files: (tensors by name, target, generator), changing the tensors; code: (model,
            target), a context manager. For the other kinds see `in_settings` and `in_inputs`.
    """

    name: str
    words: str
    kind: str
    cause: str
    where: Callable[[Any], Iterable[Target]] = dataclasses.field(repr=False)
    how: Callable[..., Any] = dataclasses.field(repr=False)
    also: frozenset[str] = frozenset()

    def targets(self, model: nn.Module) -> list[Target]:
        """Every place in a model where it fits and changes something.

        Whether changed code changes an output depends on the inputs as well (a far bucket is never reached by a short
        text); whoever plants it has to look.
        """
        found = list(self.where(model))
        if self.kind != "files":
            return found
        parameters = dict(model.named_parameters())
        return [one for one in found if self.changed({name: parameters[name] for name in one.names}, one)]

    def changed(self, tensors: Mapping[str, torch.Tensor], target: Target, seed: int = 0) -> Tensors:
        """Files: those of the target's tensors that become others, bit for bit; nothing if none does.

        Args:
            tensors: name -> tensor, at least the target's. They are left as they are.
        """
        copies = {name: tensors[name].detach().clone() for name in target.names}
        self.how(copies, target, self.generator(target, seed))
        return {name: copy for name, copy in copies.items() if not same_bits(copy, tensors[name])}

    @contextlib.contextmanager
    def planted(self, model: nn.Module, target: Target, seed: int = 0) -> Iterator[None]:
        """A live model with the fault in it, for as long as the block lasts. Files and code only.

        Raises:
            ValueError: it changes nothing there, or is none that a live model can have.
        """
        if self.kind == "code":
            with self.how(model, target):
                yield
            return
        if self.kind != "files":
            raise ValueError(f"{self.name} is a fault of the {self.kind}, not of a live model.")
        parameters = {name: one for name, one in model.named_parameters() if name in target.names}
        changed = self.changed(parameters, target, seed)
        if not changed:
            raise ValueError(f"{self.name} changes nothing at {target}.")
        before = {name: parameters[name].detach().clone() for name in changed}
        try:
            _write(parameters, changed)
            yield
        finally:
            _write(parameters, before)

    def generator(self, target: Target, seed: int) -> torch.Generator:
        """Where its random choices come from: the same for the same fault, place and seed, on every machine."""
        text = f"{self.name}/{target.modules[0]}/{target.form}/{seed}"
        return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits. NaN is itself, and -0 is not 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _write(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def pattern(path: str) -> str:
    """A path with every number as {n}: the same for the same place at another depth."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{n}", path)


def first_middle_last(targets: Iterable[Target]) -> list[Target]:
    """Of targets that differ only in depth, the first, the middle and the last one."""
    groups: dict[tuple, list[Target]] = {}
    for target in targets:
        groups.setdefault((*map(pattern, target.modules), target.form), []).append(target)
    chosen = []
    for group in groups.values():
        chosen += [group[at] for at in sorted({0, len(group) // 2, len(group) - 1})]
    return chosen

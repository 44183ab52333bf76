"""What is known of the reference beside its activations: its weights, and the settings of its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from blip2nb.trace.paths import join
from blip2nb.trace.stage import Stage
from blip2nb.trace.tape import attributes, split_place
from blip2nb.trace.vocabulary import BOOKKEEPING


@dataclasses.dataclass(frozen=True)
class AttributeDifference:
    """Two paired modules carry the same attribute with different values.

    Attributes:
        stage: the stage the pair belongs to.
        module: the candidate's module.
        attribute: its name, such as eps.
        reference, candidate: the two values.
    """

    stage: str
    module: str
    attribute: str
    reference: Any
    candidate: Any

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute} is {self.candidate!r}, the reference has {self.reference!r}"


def attribute_differences(
    reference: Mapping[str, Mapping[str, Any]], candidate: torch.nn.Module, pairs: Iterable[tuple[str, str, str]]
) -> list[AttributeDifference]:
    """Compare the plain attributes (numbers, words, flags) of paired modules, without running anything.

    Args:
        reference: the reference's attributes by module path, as `tape.attributes` records them.
        pairs: (stage, path in the reference, path in the candidate).
    """
    own = attributes(candidate)
    out = []
    for stage, path, other in pairs:
        theirs, ours = reference.get(path, {}), own.get(other, {})
        for name in sorted(theirs.keys() & ours.keys() - BOOKKEEPING):  # a set's order is another in each process
            if theirs[name] != ours[name]:
                out.append(AttributeDifference(stage, other, name, theirs[name], ours[name]))
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known of the reference beside its activations. Nothing of it has to be.

    Attributes:
        true: the candidate's name of a parameter -> the tensor that should be there, or None where that is not known.
        same: a parameter's name and a tensor -> whether it is the right one; None where that is not known.
        named: a tensor -> the candidate's names of the parameters that should hold exactly this.
        differences: attributes in which paired modules differ.
    """

    true: Callable[[str], torch.Tensor | None] = lambda name: None
    same: Callable[[str, torch.Tensor], bool | None] = lambda name, tensor: None
    named: Callable[[torch.Tensor], Sequence[str]] = lambda tensor: ()
    differences: Sequence[AttributeDifference] = ()

    @classmethod
    def of(cls, reference: torch.nn.Module, candidate: torch.nn.Module, stages: Iterable[Stage]) -> Known:
        """Everything, read off a reference that is at hand: paired modules hold the same parameters by name."""
        pairs = [
            (stage.name, join(split_place(stage.reference)[0], theirs), join(stage.module, ours))
            for stage in stages
            for theirs, ours in (stage.modules or {"": ""}).items()
        ]
        own = dict(candidate.named_parameters(remove_duplicate=False))
        right: dict[str, torch.Tensor] = {}
        for _, theirs, ours in pairs:
            for name, tensor in reference.get_submodule(theirs).named_parameters():
                mine = join(ours, name)
                if mine in own and own[mine].shape == tensor.shape:
                    right.setdefault(mine, tensor.data)

        return cls.of_weights(right, attribute_differences(attributes(reference), candidate, pairs))

    @classmethod
    def of_weights(cls, right: Mapping[str, torch.Tensor], differences: Sequence[AttributeDifference] = ()) -> Known:
        """What a recording cannot tell, from the weights themselves.

        Args:
            right: the candidate's name of a parameter -> the tensor that should be there.
        """

        def named(tensor: torch.Tensor) -> list[str]:
            return [name for name, one in right.items() if one.shape == tensor.shape and torch.equal(one, tensor)]

        return cls(
            true=right.get,
            same=lambda name, tensor: torch.equal(right[name], tensor.data) if name in right else None,
            named=named,
            differences=differences,
        )

"""What stands where a parameter of the reference should: told from the tensors alone."""

from __future__ import annotations

import torch

from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.known import Known
from blip2nb.trace.vocabulary import MIXED, role_of
from blip2nb.trace.weights import kind_of, what_changed

ROWS = 8
"""So many rows of what arrives are looked up among the parameters': enough that none stands there by chance. Chosen:
one row of floats would do, unless it is of zeros or of another table's padding."""


def weight_cause(name: str, tensor: torch.Tensor, known: Known, heads: int | None = None) -> Cause:
    """What became of a parameter that is not the reference's, from the tensors alone."""
    others = [other for other in known.named(tensor) if other != name]
    if others and tensor.any():
        other = min(others, key=lambda one: _unlike(one, name))
        return Cause(_stands_for(name, other), f"{name}: {other} stands there", name, "bit for bit")
    true = known.true(name)
    if true is None:
        id = {"bias": "bias_changed"}.get(kind_of(name), "weight_changed")
        return Cause(id, f"{name} is not the reference's", name, "its hash is another")
    change = what_changed(name, tensor, true, heads)
    if change is None:
        return Cause("weight_changed", f"{name} is not the reference's", name, "its hash is another")
    return Cause(change.id, f"{name}: {change.words}", name, "compared with the tensor that should be there")


def arriving_weights(
    arrived: torch.Tensor, expected: torch.Tensor, candidate: torch.nn.Module, known: Known
) -> list[Cause]:
    """The parameters that are not the reference's and whose values arrive, as they are or row by row."""
    rows = [one.reshape(-1, one.shape[-1]) for one in (arrived, expected)] if arrived.dim() else []
    if not rows or rows[0].shape != rows[1].shape or not arrived.is_floating_point():
        return []
    wrong = rows[0][(rows[0] != rows[1]).any(-1)][:ROWS]
    causes = []
    for name, tensor in candidate.named_parameters():
        if tensor.dim() < 2 or tensor.shape[-1] != arrived.shape[-1]:
            continue
        table = tensor.data.reshape(-1, tensor.shape[-1])
        same = [torch.isclose(table, row, rtol=0, atol=0, equal_nan=True) for row in wrong]
        stands = all(bool(one.all(-1).any()) for one in same)
        if stands and len(wrong) and known.same(name, tensor) is False:
            causes.append(weight_cause(name, tensor.data, known))
    return causes


def _stands_for(name: str, other: str) -> str:
    """The cause when another parameter's values stand in a parameter's place."""
    modules = [one.rpartition(".")[0] for one in (name, other)]
    holders = [one.rpartition(".")[0] for one in modules]
    if all(role_of(module) in MIXED for module in modules) and holders[0] == holders[1]:
        return "qkv_swapped"
    norms = all("norm" in module.rpartition(".")[2].lower() for module in modules)
    if norms and _layer_of(name) == _layer_of(other):
        return "norms_swapped"
    if "head" in name and ("embed" in other or "shared" in other):
        return "tied"
    return "weight_swapped"


def _layer_of(name: str) -> str:
    """A parameter's name up to the number of its layer."""
    parts = name.split(".")
    number = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _unlike(one: str, other: str) -> int:
    return sum(a != b for a, b in zip(one.split("."), other.split("."), strict=False)) + abs(len(one) - len(other))

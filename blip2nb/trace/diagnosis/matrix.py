"""What else than x·Wᵀ + b a matrix was used for: told from its weight, its bias and what goes in and comes out."""

from __future__ import annotations

import math

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.counter_tests import LEAST, recomputed, within
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.patterns import scale_at
from blip2nb.trace.diagnosis.scene import Scene, at_rows
from blip2nb.trace.inside import Look, part_of
from blip2nb.trace.metrics import FEW
from blip2nb.trace.vocabulary import MIXED, role_of


def explain_matrix(look: Look, scene: Scene) -> list[Cause]:
    """Something else than its own weight and bias say, or what another projection of the reference gives."""
    module = scene.candidate.get_submodule(look.module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    x = scene.values.get(f"{look.path}:in")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or x is None or x.shape[-1] != weight.shape[1]:
        return []
    x = at_rows(x, look)
    right = _product(x, weight, bias)
    rounding = computing.product_rounding(x, weight, bias, right)
    itself = computing.off(right, look.exact) <= rounding  # it computes what its weight and bias say
    if itself or computing.off(right, look.expected) > max(within(look, scene), rounding):
        return _exchanged(look, scene)
    said = _words(x, weight, bias, look.exact) or computing.pattern(look.exact, look.expected, look.rounding)
    test = recomputed(look, scene, "computed with its own weight and bias", right, rounding)
    id, words = said or ("unknown", "it gives something else than its weight and bias do")
    return [Cause(scale_at(id, look), words, look.module, "told from what goes in and what comes out", test)]


def hidden_matrix(look: Look, scene: Scene) -> Finding | None:
    """A matrix that the reference applies without its module, so that nothing of it was recorded, and that gives
    something else than its own weight and bias do."""
    seen = {one.key for one in scene.looks}
    root = scene.inside(look.module)
    for key, value in scene.values.items():
        path, _, at = key.rpartition(":")
        if at != "out" or key in seen or path.rpartition(".")[0] != root or not path:
            continue
        module = scene.suspect.module.get_submodule(path)
        x, weight = scene.values.get(f"{path}:in"), getattr(module, "weight", None)
        if x is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            continue
        bias = getattr(module, "bias", None)
        right = _product(x, weight, bias)
        error = computing.off(value, right)
        if error > computing.product_rounding(x, weight, bias, right):
            whole = scene.whole(path)
            said = _words(x, weight, bias, value) or computing.pattern(value, right, look.rounding)
            id, words = said or ("unknown", "it gives something else than its weight and bias do")
            cause = Cause(id, words, whole, "computed again from its own weight and bias")
            excess = error / max(look.rounding, LEAST) if math.isfinite(look.rounding) else math.inf
            part = part_of(path, module)
            return Finding(
                scene.suspect.name, whole, part, None, error, look.rounding, excess, scene.looks, (cause,)
            )  # fmt: skip
    return None


def _exchanged(look: Look, scene: Scene) -> list[Cause]:
    """Whether a query gives what the reference's key gives, or the like."""
    holder = look.module.rpartition(".")[0]
    for other in scene.looks:
        role = role_of(other.module)
        beside = other.at == "out" and role in MIXED and other.module.rpartition(".")[0] == holder
        if beside and other is not look and computing.off(look.exact, other.expected) <= max(within(look, scene), FEW):
            words = f"it gives what the reference's {role} gives"
            return [Cause("qkv_swapped", words, look.module, f"compared with the reference's {other.module}")]
    return []


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x·Wᵀ + b in float64."""
    return x @ weight.detach().double().T + (0.0 if bias is None else bias.detach().double())


def _words(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, value: torch.Tensor
) -> tuple[str, str] | None:
    """What else than x·Wᵀ + b a matrix was used for to give a value: a cause's id and words."""
    w, b = weight.detach().double(), None if bias is None else bias.detach().double()
    ways = {}
    if b is not None:
        bare = x @ w.T
        ways["bias_missing", "its bias is not added"] = bare
        ways["bias_changed", "its bias is added twice"] = bare + 2 * b
        ways["bias_changed", "its bias is taken away"] = bare - b
        for shift in (1, -1):
            ways["bias_shifted", f"its bias is shifted by {shift}"] = bare + b.roll(shift)
    if w.shape[0] == w.shape[1]:
        ways["transposed", "its matrix is used transposed"] = x @ w + (0.0 if b is None else b)
    near = computing.product_rounding(x, weight, bias, value)  # of a candidate that does not run in float64
    return next((said for said, one in ways.items() if computing.off(one, value) <= near), None)

"""Which norm is computed at a place, and with whose weights: told from what goes in and what comes out."""

from __future__ import annotations

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.counter_tests import recomputed, within
from blip2nb.trace.diagnosis.patterns import pattern_of
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.paths import join
from blip2nb.trace.tape import sample_rows


def explain_norm(look: Look, scene: Scene) -> list[Cause]:
    """Another kind of norm, another eps, no bias, or the weights of another norm nearby."""
    x = scene.values[f"{look.path}:in"]
    x = x[..., sample_rows(x.shape[-2]), :]
    params = _params(look.module, scene)
    near = within(look, scene)
    theirs = computing.norm(x, look.expected.double(), params, near)
    ours = computing.norm(x, look.exact, params, near)
    if theirs is None or theirs == ours:
        return []
    if ours is None and (seen := pattern_of(look)):
        return seen
    value = theirs.of(x, params, torch.float64)
    id, words, change = _words(ours, theirs)
    test = recomputed(look, scene, change, value, theirs.rounding(x, params))
    return [Cause(id, words, look.module, "both told from what goes in and what comes out", test)]


def _params(module: str, scene: Scene) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """The weights of this norm, and of those around it, which may have been meant."""
    root = module.rpartition(".")[0]
    near = [(module, scene.candidate.get_submodule(module))]
    near += [(scene.whole(path), one) for path, one in scene.suspect.module.named_modules()]
    near += [(join(root, path), one) for path, one in scene.candidate.get_submodule(root).named_children()]
    return {
        path: (one.weight, getattr(one, "bias", None))
        for path, one in near
        if "norm" in type(one).__name__.lower() and isinstance(getattr(one, "weight", None), torch.Tensor)
    }


def _words(ours: computing.Norm | None, theirs: computing.Norm) -> tuple[str, str, str]:
    """(cause, words, what putting it right is)."""
    if ours is None:
        return "unknown", f"not a norm the kit knows; the reference's is one with eps {theirs.eps:g}", "with that norm"
    if ours.params != theirs.params:
        words = f"it uses the weights of {ours.params}, the reference those of {theirs.params}"
        return "norms_swapped", words, "with the others"
    if ours.kind.split()[0] == theirs.kind.split()[0] != ours.kind:
        words = f"eps {ours.eps:g} is added to the deviation, in the reference {theirs.eps:g} to the variance"
        return "eps", words, f"with eps {theirs.eps:g} in its place"
    if ours.kind != theirs.kind:
        return "norm_kind", f"a {ours.kind} norm, the reference has a {theirs.kind} norm", f"with a {theirs.kind} norm"
    if ours.bias != theirs.bias:
        return "bias_missing", "its bias is not added" if theirs.bias else "its bias is added", "as the reference does"
    return "eps", f"eps is {ours.eps:g}, the reference has {theirs.eps:g}", f"with eps {theirs.eps:g}"

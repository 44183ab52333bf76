"""What is added up at a place: told by least squares over all that was computed before it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.counter_tests import recomputed, within
from blip2nb.trace.diagnosis.patterns import pattern_of
from blip2nb.trace.diagnosis.scene import Scene, at_rows
from blip2nb.trace.inside import Look

SAME = 1e-5
"""Two factors that differ by less are one: `computing.summed` gives them with six digits."""


def explain_residual(look: Look, scene: Scene) -> list[Cause]:
    """Another sum than the reference's: a branch that is missing, doubled or scaled."""
    pieces = _pieces(look, scene)
    near = within(look, scene)
    theirs = computing.summed(pieces, look.expected.double(), near)
    ours = computing.summed(pieces, look.exact, near)
    if theirs is None or theirs == ours:
        return []
    if ours is None and (seen := pattern_of(look)):
        return seen
    value = sum((factor * pieces[name] for name, factor in theirs.items()), torch.zeros_like(look.exact))
    words = f"it adds {_words(ours)}, the reference {_words(theirs)}"
    test = recomputed(look, scene, "with that sum", value)
    return [Cause(_id(ours, theirs), words, look.module, "by least squares over what was computed before", test)]


def _pieces(look: Look, scene: Scene) -> dict[str, torch.Tensor]:
    """In words -> what may have been added: what modules gave before the place, what entered the block or a norm."""
    pieces = {}
    for key, value in scene.values.items():
        path, _, at = key.rpartition(":")
        if key == look.key:
            break
        if at == "out" or key == ":in":
            name = "what enters the block" if key == ":in" else f"what {path} gives"
            pieces[name] = at_rows(value, look)
    pieces["what enters the block"] = at_rows(scene.values[":in"], look)
    for key, value in scene.values.items():
        if key.endswith(":in") and "norm" in key.lower() and key != look.key:
            pieces.setdefault(f"what enters {key.rpartition(':')[0]}", at_rows(value, look))
    return pieces


def _words(factors: Mapping[str, float] | None) -> str:
    if factors is None:
        return "no sum of what was computed before"
    return " and ".join(name if abs(f - 1) < SAME else f"{f:.4g} × {name}" for name, f in factors.items())


def _id(ours: Mapping[str, float] | None, theirs: Mapping[str, float]) -> str:
    """Another factor on the same branches is a scale; everything else is another way of adding."""
    if ours is None or ours.keys() != theirs.keys():
        return "residual"
    factors = [ours[name] / theirs[name] for name in theirs]
    return "scale" if any(abs(one - round(one)) > SAME for one in factors) else "residual"

"""Which activation function stands at a place: told from what goes in and what comes out."""

from __future__ import annotations

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.counter_tests import recomputed, within
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.tape import sample_rows


def explain_activation(look: Look, scene: Scene) -> list[Cause]:
    """Another function than the reference's, of what the layers before gave."""
    values, keys = scene.values, list(scene.values)
    before = keys[: keys.index(look.key)] if look.key in keys else keys
    rows = sample_rows(values[look.key].shape[-2])
    pieces = [values[key] for key in before if key.endswith(":out") and not key.startswith(f"{look.path}:")]
    lead, width = look.expected.shape[:-2], look.expected.shape[-1]
    fits = [piece for piece in pieces if piece.dim() > 1 and piece.shape[-1] == width]
    laid = [piece.reshape(*lead, -1, width) for piece in fits]
    same = [one[..., rows, :] for one in laid if one.shape[-2] > max(rows)][-2:]
    near = within(look, scene)
    theirs = computing.activation(same, look.expected.double(), near)
    ours = computing.activation(same, look.exact, near)
    if theirs is None or (ours is not None and ours.name == theirs.name):
        return []
    words = f"the activation is {ours.name if ours else 'none that the kit knows'}, the reference has {theirs.name}"
    test = recomputed(look, scene, f"with {theirs.name}", theirs.value, theirs.rounding)
    return [Cause("activation", words, look.module, "both told from what goes in and what comes out", test)]

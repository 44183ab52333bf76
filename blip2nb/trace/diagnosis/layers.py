"""Whether a stage holds another layer's weights, all of them."""

from __future__ import annotations

from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.repairs import holding
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.metrics import THRESHOLD, exceeds

MOST = 0.6
"""So much of a stage's weights must be another layer's: some may be damaged besides, and two layers whose attentions
alone were exchanged are not exchanged layers."""


def another_layer(scene: Scene) -> Finding | None:
    """The finding that it does, with the counter-test."""
    suspect, known = scene.suspect, scene.known
    moved: dict[str, int] = {}
    for name, tensor in suspect.module.named_parameters():
        whole = scene.whole(name)
        if known.same(whole, tensor) is not False:
            continue
        for other in known.named(tensor.data):
            if other.endswith(f".{name}") and other != whole:
                path = other[: -len(name) - 1]
                moved[path] = moved.get(path, 0) + 1
    count = len(list(suspect.module.parameters()))
    path = max(moved, key=moved.__getitem__, default="")
    if not path or moved[path] < max(2, MOST * count):
        return None
    there = scene.candidate.get_submodule(path)
    back = [scene.whole(name) in known.named(one.data) for name, one in there.named_parameters()]
    id = "layers_swapped" if sum(back) > 0.5 * len(back) else "layer_repeated"
    words = f"{suspect.path} holds the weights of {path}" + (" and the other way round" if any(back) else "")
    evidence = f"{moved[path]} of its {count} weights, bit for bit"
    return _finding(scene, id, words, evidence)


def _finding(scene: Scene, id: str, words: str, evidence: str) -> Finding:
    suspect = scene.suspect
    right = [(tensor, scene.known.true(scene.whole(name))) for name, tensor in suspect.module.named_parameters()]
    before = suspect.judged()
    with holding((tensor, true) for tensor, true in right if true is not None):
        after = suspect.judged()
    errors, excesses = ((before[name], after[name]) for name in ("local_error", "excess"))
    passed = after["excess"] is not None and not exceeds(after["excess"], THRESHOLD)
    test = CounterTest("with its own weights", errors, excesses, passed)
    cause = Cause(id, words, suspect.path, evidence, test)
    measured = (before["local_error"], before["rounding"], before["excess"])
    return Finding(suspect.name, suspect.path, "layer", None, *measured, scene.looks, (cause,))

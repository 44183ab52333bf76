"""Whether a stage holds another layer's weights, all of them or most."""

from __future__ import annotations

from collections import Counter

from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.findings import Finding
from blip2nb.trace.diagnosis.repairs import holding
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.metrics import THRESHOLD, exceeds


def another_layer(scene: Scene) -> Finding | None:
    """The finding that it does, with the counter-test.

    Most of the weights in which the two layers differ must be the other's: no third layer has as many then, some may be
    damaged besides, and layers of which less was exchanged keep their place. One weight alone tells nothing of a layer.
    """
    suspect, known = scene.suspect, scene.known
    held = {name: one.data for name, one in suspect.module.named_parameters()}
    wrong = {name: one for name, one in held.items() if known.same(scene.whole(name), one) is False}
    others = ((name, other) for name, one in wrong.items() for other in known.named(one))
    moved = Counter(other.removesuffix(f".{name}") for name, other in others if other.endswith(f".{name}"))
    path, count = next(iter(moved.most_common(1)), ("", 0))
    if count < 2:
        return None
    alike = sum(f"{path}.{name}" in known.named(one) for name, one in held.items() if name not in wrong)
    if count <= (len(held) - alike) / 2:
        return None
    there = scene.candidate.get_submodule(path)
    back = [scene.whole(name) in known.named(one.data) for name, one in there.named_parameters()]
    id = "layers_swapped" if sum(back) > len(back) / 2 else "layer_repeated"
    words = f"{suspect.path} holds the weights of {path}" + (" and the other way round" if any(back) else "")
    evidence = f"{count} of its {len(held)} weights, bit for bit"
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

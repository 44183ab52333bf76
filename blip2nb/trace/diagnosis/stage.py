"""Every fault inside a stage that is at fault, with its causes.

What a fault must do to the numbers decides, not a list of known bugs: a weight is compared with the one that should be
there (see `trace.weights`); where the weights are right, the computation is inferred from what went in and what came
out, of both models (see `trace.computing`); and what can be put right is put right, and the stage run again: the
counter-test.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.chance import by_chance
from blip2nb.trace.diagnosis.computation import causes_of_computation
from blip2nb.trace.diagnosis.counter_tests import within
from blip2nb.trace.diagnosis.findings import Finding, ranked
from blip2nb.trace.diagnosis.known import Known
from blip2nb.trace.diagnosis.layers import another_layer
from blip2nb.trace.diagnosis.matrix import hidden_matrix
from blip2nb.trace.diagnosis.precision import causes_of_precision
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.diagnosis.settings import causes_of_settings
from blip2nb.trace.diagnosis.weights import causes_of_weights, owner
from blip2nb.trace.inside import Look, Suspect, first_not_finite


def diagnose(
    suspect: Suspect, known: Known, candidate: torch.nn.Module, tried: Counter[str] | None = None
) -> list[Finding]:
    """Every fault inside a stage that is at fault, with its causes; never empty.

    Args:
        suspect: the stage, fed the reference's inputs.
        known: what is known of the reference's weights and settings.
        candidate: the whole model the stage is in.
        tried: how often each cause was put to the counter-test at other stages; counted on.
    """
    random = by_chance(suspect)
    if random is not None:
        return [random]
    looks = suspect.looks()
    broken = first_not_finite(looks)
    wrong = [broken] if broken is not None else [look for look in looks if look.faulty]
    scene = Scene(suspect, known, candidate, tuple(looks), Counter() if tried is None else tried)
    layer = another_layer(scene)
    if layer is not None:
        return [layer]
    return _of_one_setting([_finding(look, scene) for look in _once(wrong, scene) or looks[-1:]], suspect)


def _finding(look: Look, scene: Scene) -> Finding:
    """A wrong weight explains a place; else lower precision does; else settings and computation are asked."""
    weights = causes_of_weights(look, scene)
    coarse = [] if weights else causes_of_precision(look, scene)
    hidden = None if weights or coarse else hidden_matrix(look, scene)
    if hidden is not None:
        return hidden
    causes = ranked(weights or coarse or causes_of_settings(look, scene) + causes_of_computation(look, scene))
    module, part = look.module, look.part
    if weights:  # the weight tells more exactly where
        module, part = owner(weights[0].module, look, scene)
    if not causes:
        words = f"what it computes is not what the reference does ({look.part})"
        causes = [Cause("unknown", words, module, "no weight and no setting that is known differs")]
    measured = (look.local_error, look.rounding, look.excess)
    return Finding(scene.suspect.name, module, part, None, *measured, scene.looks, tuple(causes))


def _of_one_setting(findings: list[Finding], suspect: Suspect) -> list[Finding]:
    """Several places that one setting of the whole stage puts right are one fault."""
    first = findings[0].causes[0]
    shared = [one for one in findings if one.causes[0].words == first.words and one.causes[0].module == first.module]
    if len(shared) < 2 or first.module != suspect.path:
        return findings
    one = dataclasses.replace(findings[0], module=suspect.path, part="layer")
    return [one, *(other for other in findings if other not in shared)]


def _once(wrong: Sequence[Look], scene: Scene) -> list[Look]:
    """Without what is only seen again: a residual carries an error past the modules whose outputs are put right."""
    kept: list[Look] = []
    for look in wrong:
        if not any(_seen_again(look, earlier, scene) for earlier in kept):
            kept.append(look)
    return kept


def _seen_again(look: Look, earlier: Look, scene: Scene) -> bool:
    """Whether nothing but rounding is left of an error when the earlier one is taken off it.

    By the threshold of every other place. What was left where a residual carried an error on was 0.29 of that at most;
    where it was another error, 2.1 times at least (2,800 pairs, of `python -m benchmarks.faults` in four twins).
    """
    if look.part != "residual" and look.at != "out":
        return False
    shapes = {one.shape for each in (look, earlier) for one in (each.expected, each.exact)}
    if not look.expected.is_floating_point() or len(shapes) > 1:
        return False
    carried = earlier.exact - earlier.expected.double()
    return computing.off(look.exact - carried, look.expected) <= within(look, scene)

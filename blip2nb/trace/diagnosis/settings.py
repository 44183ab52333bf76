"""Attributes that differ from the reference's, at a place or around it: each put right and tried."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from blip2nb.errors import memory_ran_out
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.counter_tests import judged_again
from blip2nb.trace.diagnosis.known import AttributeDifference
from blip2nb.trace.diagnosis.repairs import repaired
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.vocabulary import HEAD_WIDTH, SCALE, SETTINGS


def causes_of_settings(look: Look, scene: Scene) -> list[Cause]:
    """Attributes of the blamed module, or around it, that make a difference when they are put right."""
    groups: dict[tuple[str, str], list[AttributeDifference]] = {}
    for one in scene.known.differences:
        inside = one.module == look.module or one.module.startswith(f"{look.module}.")
        if inside or look.module.startswith(f"{one.module}."):
            groups.setdefault((one.module, SETTINGS.get(one.attribute, "attribute")), []).append(one)
    causes = []
    for (module, id), together in groups.items():
        change = ", ".join(f"{one.attribute} {one.reference!r}" for one in together)
        test = _put_right(look, scene, together, f"with {change}")
        words = "; ".join(map(str, together))
        cause = Cause(id, words, module, "read off both modules", test)
        around = look.module.startswith(f"{module}.")
        if cause.proven or (not around and test is not None and _falls(test)):
            causes.append(cause)
    return causes


def _put_right(look: Look, scene: Scene, differences: Sequence[AttributeDifference], change: str) -> CounterTest | None:
    """None where the module does not run with them: then they are not what is wrong, or not all of it."""
    with repaired(scene.candidate, [*differences, *_scale_with(scene, differences)]):
        try:
            return judged_again(look, scene, change)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if memory_ran_out(error):
                raise
            return None


def _scale_with(scene: Scene, differences: Sequence[AttributeDifference]) -> list[AttributeDifference]:
    """The scale of an attention's scores, which a module computes from the width of its heads when it is built."""
    widths = [one for one in differences if one.attribute in HEAD_WIDTH]
    out = []
    for one in widths:
        plain = vars(scene.candidate.get_submodule(one.module))
        for name in SCALE:
            if isinstance(plain.get(name), float) and math.isclose(plain[name], one.candidate**-0.5, rel_tol=1e-6):
                out.append(dataclasses.replace(one, attribute=name, reference=one.reference**-0.5))
    return out


def _falls(test: CounterTest) -> bool:
    """Whether putting something right made any difference: a tenth of the error at least.

    Chosen: where a setting alone did not put a place right, it left 0.57 of the error or less, or 1.03 times or more
    (28 such, of the faults of `python -m benchmarks.faults` in two twins).
    """
    return not test.local_error[1] > 0.9 * test.local_error[0]

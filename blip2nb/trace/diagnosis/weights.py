"""Parameters at a place that are not the reference's: which, what became of them, and the place with the right ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.diagnosis.attention import heads_of
from blip2nb.trace.diagnosis.counter_tests import judged_again
from blip2nb.trace.diagnosis.known import AttributeDifference
from blip2nb.trace.diagnosis.repairs import holding, repaired
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.diagnosis.stands_there import weight_cause
from blip2nb.trace.inside import Look, part_of
from blip2nb.trace.paths import join
from blip2nb.trace.vocabulary import in_attention, role_of_parameter
from blip2nb.trace.weights import kind_of

ENOUGH = 3
"""So often a weight's cause is put to the counter-test; where a whole model was rounded the answer is clear by then.
Chosen: one would do, and each takes two runs of a stage."""


def causes_of_weights(look: Look, scene: Scene) -> list[Cause]:
    """The parameters in the part of the stage that a look judges, where they are not the right ones."""
    wrong = {name: one for name, one in _parameters(look, scene) if scene.known.same(name, one) is False}
    if not wrong:
        return _absent(look, scene)
    causes = [_cause(name, tensor, scene) for name, tensor in wrong.items()]
    if all(scene.tried[cause.id] >= ENOUGH for cause in causes):
        return causes
    scene.tried.update({cause.id for cause in causes})
    test = _put_right(look, scene, wrong)
    return [dataclasses.replace(cause, counter_test=test) for cause in causes]


def owner(parameter: str, look: Look, scene: Scene) -> tuple[str, str]:
    """The module a parameter belongs to, and what it is called; the stage's own parameters are named themselves."""
    path = parameter.rpartition(".")[0]
    if path == scene.suspect.path and len(list(scene.suspect.module.children())):
        return path, kind_of(parameter).replace("position", "position embedding")
    if path == look.module:
        return look.module, look.part
    return path, part_of(path, scene.candidate.get_submodule(path))


def _parameters(look: Look, scene: Scene) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the module that is blamed, without what other looks judge."""
    for path, module in _modules(look, scene):
        for leaf, tensor in module.named_parameters(recurse=False):
            yield _known_name(f"{path}.{leaf}", tensor, scene), tensor


def _modules(look: Look, scene: Scene) -> Iterator[tuple[str, torch.nn.Module]]:
    """The module that is blamed and those inside it, without what other looks judge; by whole path."""
    own = scene.inside(look.module)
    judged = {one.path for one in scene.looks if one.at == "out"} - {"", own}
    judged = {path for path in judged if not own or path.startswith(f"{own}.")}
    for name, module in scene.candidate.get_submodule(look.module).named_modules():
        inner = join(own, name)
        if not any(inner == path or inner.startswith(f"{path}.") for path in judged):
            yield join(look.module, name), module


def _known_name(name: str, tensor: torch.Tensor, scene: Scene) -> str:
    """Of a tensor that is tied under several names, one by which something is known of it."""
    if scene.known.same(name, tensor) is not None:
        return name
    named = scene.candidate.named_parameters(remove_duplicate=False)
    others = [other for other, one in named if one is tensor and scene.known.same(other, one) is not None]
    return others[0] if others else name


def _cause(name: str, tensor: torch.Tensor, scene: Scene) -> Cause:
    tied = _tied(name, tensor, scene)
    if tied is not None:
        return Cause("tied", f"{name} is {tied}, in one and the same memory", name, "the same parameter")
    return weight_cause(name, tensor.data, scene.known, _heads(name, scene))


def _tied(name: str, tensor: torch.Tensor, scene: Scene) -> str | None:
    """The other name of a parameter that should be two."""
    named = scene.candidate.named_parameters(remove_duplicate=False)
    others = [other for other, one in named if one is tensor and other != name]
    return next((other for other in others if scene.known.same(other, tensor) is not None), None)


def _heads(name: str, scene: Scene) -> int | None:
    """Into how many heads a weight of this stage is divided."""
    path = name.rpartition(".")[0]
    attends = in_attention(path) or bool(role_of_parameter(name))
    while attends and path and path.startswith(scene.suspect.path):
        count = heads_of(scene.candidate.get_submodule(path))
        if count:
            return count
        path = path.rpartition(".")[0]
    return next((n for n in map(heads_of, scene.suspect.module.modules()) if n), None) if attends else None


def _put_right(look: Look, scene: Scene, wrong: Mapping[str, torch.Tensor]) -> CounterTest | None:
    """The place with the right weights; None where one is not known."""
    right = [(tensor, scene.known.true(name)) for name, tensor in wrong.items()]
    values = [(tensor, true) for tensor, true in right if true is not None]
    if len(values) < len(wrong):
        return None
    with holding(values):
        return judged_again(look, scene, "with the right one" if len(values) == 1 else "with the right ones")


def _absent(look: Look, scene: Scene) -> list[Cause]:
    """Parameters that the reference has and the module does not: a bias that was never made."""
    for path, module in _modules(look, scene):
        for leaf in ("bias", "weight"):
            name = f"{path}.{leaf}"
            true = scene.known.true(name) if getattr(module, leaf, module) is None else None
            if true is not None:
                made = torch.nn.Parameter(true, requires_grad=False)
                with repaired(scene.candidate, [AttributeDifference(scene.suspect.name, path, leaf, made, None)]):
                    test = judged_again(look, scene, f"with the reference's {leaf}")
                return [Cause(f"{leaf}_missing", f"{path} has no {leaf}", name, "the reference has one there", test)]
    return []

"""How an attention attends: told from its queries, keys and values and from what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.counter_tests import recomputed, within
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.tape import attributes, sample_rows
from blip2nb.trace.vocabulary import FUSED, HEADS, MIXED, SCALE, role_of


def explain_attention(look: Look, scene: Scene) -> list[Cause]:
    """Each thing in which the candidate's attention differs from the reference's."""
    made = _scores(look, scene)
    if made is None:
        return []
    scores, start = made
    near = within(look, scene)
    theirs = computing.attention(scores, look.expected.double(), start, near)
    ours = computing.attention(scores, look.exact, start, near)
    if theirs is None or theirs == ours:
        return []
    if ours is None:
        ours = computing.masked(scores, look.exact, theirs, near)
    value = scores.output(theirs)
    if value is None:
        return []
    causes = []
    for id, words, change in _words(ours, theirs, start):
        test = recomputed(look, scene, change, value, scores.rounding(theirs))
        causes.append(Cause(id, words, look.module, "computed again from the same queries, keys and values", test))
    return causes


def heads_of(module: torch.nn.Module) -> int | None:
    """Into how many heads a module says it divides what it attends with."""
    plain = vars(module)
    return next((plain[name] for name in HEADS if isinstance(plain.get(name), int)), None)


def _scores(look: Look, scene: Scene) -> tuple[computing.Scores, computing.Attention] | None:
    """The queries, keys and values before a place, and how its module says it attends."""
    root = scene.inside(look.module)
    parts: dict[str, torch.Tensor] = {}
    for key, value in scene.values.items():
        path, _, at = key.rpartition(":")
        role = role_of(path)
        if at == "out" and role in MIXED and path.rpartition(".")[0] == root:
            names = FUSED.get(role, (role,))
            parts |= dict(zip(names, value.chunk(len(names), -1), strict=True))
    if len(parts) < 3:
        return None
    parts = {name: part if part.dim() == 3 else part[None] for name, part in parts.items()}
    mask, bias = _handed("attention_mask", scene), _handed("position_bias", scene)
    added = bias if bias is not None else _looked_up(root, scene)
    start = _as_it_says(scene.candidate.get_submodule(look.module), parts, mask, added, bias is not None)
    return computing.Scores(parts, sample_rows(parts["query"].shape[1]), mask, added), start


def _as_it_says(
    module: torch.nn.Module,
    parts: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    handed: bool,
) -> computing.Attention:
    """What an attention's attributes and arguments say of how it attends.

    Args:
        handed: whether the bias came as an argument: who adds one, as T5 does, does not scale.
    """
    heads = heads_of(module) or 1
    channels = parts["query"].shape[-1]
    plain = attributes(module).get("", {})
    scale = next((plain[name] for name in SCALE if isinstance(plain.get(name), float)), None)
    own = channels % heads == 0 and (channels // heads) ** -0.5
    if scale is None:
        scale = 1.0 if handed or hasattr(module, "relative_attention_bias") else own or 1.0
    causal = getattr(module, "is_causal", False) or getattr(module, "is_decoder", False)
    crossed = parts["key"].shape[1] != parts["query"].shape[1]
    seen = "given" if mask is not None and bias is None else "causal" if causal and not crossed else "none"
    return computing.Attention(heads, float(scale), seen, bias is not None)


def _handed(name: str, scene: Scene) -> torch.Tensor | None:
    """An argument of the stage that is added to the scores: a mask in its additive form, or a bias."""
    value = scene.suspect.arguments.get(name)
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return None
    if value.dtype == torch.bool:
        return torch.zeros(value.shape, dtype=torch.float64).masked_fill(~value, -math.inf)
    return value.double()


def _looked_up(root: str, scene: Scene) -> torch.Tensor | None:
    """The position bias where this module looks it up itself."""
    value = scene.values.get(f"{root}.relative_attention_bias:out")
    return None if value is None else value.permute(2, 0, 1)[None]


def _words(
    ours: computing.Attention | None, theirs: computing.Attention, start: computing.Attention
) -> Iterator[tuple[str, str, str]]:
    """(cause, words, what putting it right is) for each thing in which two attentions differ."""
    own = ours or start
    if own.heads != theirs.heads:
        yield "head_count", f"{own.heads} heads, the reference has {theirs.heads}", f"with {theirs.heads} heads"
    elif not math.isclose(own.scale, theirs.scale, rel_tol=1e-6):
        words = f"scores are multiplied by {own.scale:.6g}, in the reference by {theirs.scale:.6g}"
        yield "attention_scale", words, f"with the scale {theirs.scale:.6g}"
    if own.mask != theirs.mask:
        says = {"none": "every position sees every other", "causal": "no position sees a later one"}
        says["given"] = "the mask that was handed in is used"
        said = [says.get(one, f"the mask is {one}") for one in (own.mask, theirs.mask)]
        words = f"{said[0]}, in the reference {said[1]}"
        yield "attention_mask", words, "with the reference's mask"
    if own.bias != theirs.bias:
        if theirs.bias:
            yield "position_bias_missing", "no position bias is added, the reference adds one", "with the bias"
        else:
            yield "position_bias", "a position bias is added, the reference adds none", "without the bias"
    if own.order != theirs.order:
        id = "qkv_missing" if "zeros" in own.order else "qkv_swapped"
        taken, right = ", ".join(own.order), ", ".join(theirs.order)
        words = f"{taken} are taken for query, key, value where the reference takes {right}"
        yield id, words, "with each in its place"
    if own.heads_order != theirs.heads_order:
        words = f"its heads stand in another order than the reference's: {list(theirs.heads_order or own.heads_order)}"
        yield "heads_permuted", words, "with the heads in that order"
    if ours is None and own == theirs:
        yield "unknown", "not an attention the kit knows, though the reference's is", "computed as its settings say"

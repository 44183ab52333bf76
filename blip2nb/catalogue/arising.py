"""At which stages what is planted in a captioner's module arises."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from blip2nb.catalogue.planting import Fault, Target
from blip2nb.trace.stage import Stage

_OUTSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "opt": {
        "query_tokens": ("qformer.embeddings",),
        "qformer.dropout": ("qformer.layer.00",),
        "language_model.model.decoder.embed_tokens": ("language.inputs_embeds", "logits"),
    },
    "t5": {
        "query_tokens": ("qformer.embeddings",),
        "qformer.dropout": ("qformer.layer.00",),
        "language_model.shared": ("language.inputs_embeds", "language.decoder.block.00"),
        "language_model.encoder.embed_tokens": ("language.inputs_embeds",),
        "language_model.decoder.embed_tokens": ("language.decoder.block.00",),
        "language_model.encoder.dropout": ("language.encoder.block.00", "language.decoder.block.*"),
        "language_model.decoder.dropout": ("language.decoder.block.00", "logits"),
    },
}
"""Modules that no stage holds, and the stages at which what they give arrives, by the language model's kind. Said of
transformers' modules and of what a fault there changes; `stages` has a table of its own, of the modules it pairs."""

_TABLES = ("embed_tokens", "shared")  # shared with the last layer or the other stack as weights, not as modules


def stages_of(fault: Fault, target: Target, kind: str, stages: Sequence[Stage]) -> tuple[str, ...]:
    """The stages where a target's fault arises, in the order of the network.

    Args:
        kind: the language model's.
        stages: all of the model's.
    """
    if target.stages:
        return target.stages
    found = {
        stage for module in target.modules for stage in _stages_at(module, fault.kind == "code", _OUTSIDE[kind], stages)
    }
    return tuple(stage.name for stage in stages if stage.name in found)


def _stages_at(
    module: str, code: bool, outside: Mapping[str, tuple[str, ...]], stages: Sequence[Stage]
) -> Sequence[str]:
    arrives = outside.get(module)
    if arrives is not None:
        return arrives[:1] if code and module.endswith(_TABLES) else _named(arrives, stages)
    holders = [one for one in stages if not one.is_junction and f"{module}.".startswith(f"{one.module}.")]
    return [max(holders, key=lambda one: len(one.module)).name] if holders else []


def _named(patterns: Sequence[str], stages: Sequence[Stage]) -> list[str]:
    return [one.name for one in stages if any(fnmatch.fnmatchcase(one.name, each) for each in patterns)]

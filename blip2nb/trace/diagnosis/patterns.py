"""What a difference looks like, where nothing says what is computed there."""

from __future__ import annotations

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.inside import Look


def pattern_of(look: Look) -> list[Cause]:
    """What sets the candidate's exact output apart from the reference's, if that has a pattern."""
    said = computing.pattern(look.exact, look.expected, look.rounding)
    return [] if said is None else [Cause(scale_at(said[0], look), said[1], look.module, "its pattern")]


def scale_at(id: str, look: Look) -> str:
    """A cause's id; a scale of logits or of embeddings has one of its own."""
    name = look.module.rpartition(".")[2]
    if id != "scale":
        return id
    return "logits_scale" if "head" in name else "embedding_scale" if "embed" in name else "scale"

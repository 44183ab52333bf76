"""What the reference computes at a place and what the candidate does: each part of a network has its explainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from blip2nb.errors import memory_ran_out
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.activation import explain_activation
from blip2nb.trace.diagnosis.attention import explain_attention
from blip2nb.trace.diagnosis.embedding import explain_embedding
from blip2nb.trace.diagnosis.matrix import explain_matrix
from blip2nb.trace.diagnosis.norm import explain_norm
from blip2nb.trace.diagnosis.patterns import pattern_of
from blip2nb.trace.diagnosis.residual import explain_residual
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look

log = logging.getLogger("blip2nb")

EXPLAINERS: Mapping[str, Callable[[Look, Scene], list[Cause]]] = {
    "attention": explain_attention,
    "activation": explain_activation,
    "norm": explain_norm,
    "residual": explain_residual,
    "embedding": explain_embedding,
}
"""What a look's part is -> what tells its computation. Every other part is a matrix."""


def causes_of_computation(look: Look, scene: Scene) -> list[Cause]:
    """Where both computations can be told, in what they differ; else what the difference looks like."""
    if not (look.expected.is_floating_point() and look.found.shape == look.expected.shape):
        return []
    if not math.isfinite(look.rounding):
        return []
    try:
        return EXPLAINERS.get(look.part, explain_matrix)(look, scene) or pattern_of(look)
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # a module unlike any that was thought of
        if memory_ran_out(error):
            raise
        log.warning("%s: what it computes could not be told (%s)", look.module, error)
        return []

"""Distances between what two models computed: pure functions on tensors."""

from __future__ import annotations

import math

import torch

THRESHOLDS = {torch.float64: 3.0, torch.float32: 3.0, torch.float16: 3.0, torch.bfloat16: 3.0}
"""The excess above which a stage computes something else, by what it computes in."""

THRESHOLD = THRESHOLDS[torch.float32]


def exceeds(value: float | None, limit: float) -> bool:
    """Whether a measured value is above a limit. NaN exceeds every limit, what was not measured none."""
    return value is not None and not value <= limit


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; for whole numbers and masks, the share that differs.

    Infinite where the shapes differ, or where something differs from nothing but zeros.
    """
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return (found.cpu() != expected.cpu()).double().mean().item()
    found, expected = found.cpu().double(), expected.cpu().double()
    error, size = (found - expected).norm().item(), expected.norm().item()
    if error == 0:
        return 0.0
    return error / size if size else math.inf


def judge(found: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> dict[str, float | bool]:
    """Whether a distance is rounding, by the float64 referee.

    Args:
        found, expected: the candidate's and the reference's output, of one shape.
        exact: the candidate's computation in float64, on the same inputs.

    Returns:
        local_error: ‖found − expected‖; rounding: ‖found − exact‖, both ÷ ‖expected‖; excess: ‖expected − exact‖ ÷
        ‖found − exact‖, 1 where both are bit-equal and infinite where the candidate is exact and the reference
        differs; bit_equal.
    """
    size = expected.double().norm().item() or 1.0
    local_error = distance(found, expected)
    rounding = (found.cpu().double() - exact.cpu()).norm().item() / size
    theirs = (expected.cpu().double() - exact.cpu()).norm().item() / size
    differs = theirs / rounding if rounding else math.inf
    excess = differs if local_error else 1.0
    return {"local_error": local_error, "rounding": rounding, "excess": excess, "bit_equal": local_error == 0}


def compare_logits(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """How far two models' logits are apart.

    Args:
        found, expected: shape (batch, positions, vocabulary).

    Returns:
        max_abs; relative (norm); cosine; kl (mean over positions of KL(expected ‖ found), in nats); top1_agreement
        (share of positions with the same most likely token).
    """
    if found.shape != expected.shape:
        return {"max_abs": math.inf, "relative": math.inf, "cosine": 0.0, "kl": math.inf, "top1_agreement": 0.0}
    a, b = found.double().flatten(0, -2), expected.double().flatten(0, -2)
    return {
        "max_abs": (a - b).abs().max().item(),
        "relative": distance(found, expected),
        "cosine": torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item(),
        "kl": kl_per_position(found, expected).mean().item(),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
    }


def kl_per_position(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL(expected ‖ found) of the next-token distributions, in nats: (batch, positions, vocabulary) → (positions,)."""
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0).mean(0)

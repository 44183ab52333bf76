"""Distances between what two models computed: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from blip2nb.errors import memory_ran_out
from blip2nb.trace.precision import HALF

THRESHOLD = 3.0
"""An excess above this is more than rounding.

Two float32 computations of one function are as far from the exact value as each other, on average: log(excess) spreads
by 1/√N about 0, N being the number of values that carry the error, and another order of summation moves it as a whole.
On unbroken pairs of LAVIS and transformers (`python -m benchmarks.false_alarms`: seven twins and full-size blocks,
seeds, inputs, 1 to 4 threads) it stayed within 0.64 and 1.58, and within 0.44 and 1.5 for recordings made with another
processor's instructions, but where a stage only adds up products (see `judge`, `least`). The tail falls off at least
exponentially; continued, it passes 3 about once in a million stages. A fault of f times the rounding gives √(1 + f²):
from 2.8 roundings on it is above 3.
"""

UNIT = 2.0**-24
"""The largest relative error of one rounding to float32."""

FEW = 16 * UNIT
"""More than a few operations in a row can be off, on any processor and in any library: sums, products and quotients
round once each, and a function such as exp or erf is given to four units in the last place, eight roundings."""

ARRIVAL_TOLERANCE = FEW
"""Between stages a few additions happen at most, which round alike on every processor; an arrival error above this is a
fault."""

# the threshold ÷ the limits that `unit` tells
_CAST = {torch.bfloat16: THRESHOLD / 8, torch.float16: THRESHOLD / 6}
_CAST_WITH_WEIGHTS = THRESHOLD / 0.01


def unit(dtype: torch.dtype, weights_known: bool) -> float:
    """What an excess is multiplied with, so that the threshold is the same whatever a stage computes in.

    Where a stage runs in half precision against a float32 reference, the reference's distance to the exact value is
    float32's, far below the stage's own. With the weights from before the cast at hand it came to at most 0.0016 of it
    on unbroken models, and a hundredth is the limit. Without them the rounding of weights and inputs is in it: at most
    4.6 (bfloat16) and 3.5 (float16), and 8 and 6 are the limits. Measured as for `THRESHOLD`.
    """
    if dtype not in HALF:
        return 1.0
    return _CAST_WITH_WEIGHTS if weights_known else _CAST[dtype]


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


def judge(
    found: torch.Tensor,
    expected: torch.Tensor,
    exact: torch.Tensor,
    unit: float = 1.0,
    strict: bool = True,
    least: Callable[[torch.Tensor], float] | None = None,
) -> dict[str, float | bool]:
    """Whether a distance is rounding, by the float64 referee.

    Args:
        found, expected: the candidate's and the reference's output, of one shape.
        exact: the candidate's computation in float64, on the same inputs.
        unit: see `unit`.
        strict: all of it is computed in float32, so that it may be no less exact than the reference.
        least: given `exact`, the distance below which neither side is judged, since other correct computations come no
            nearer; asked where the excess alone is what is too large, in float32.

    Returns:
        local_error: ‖found − expected‖; rounding: ‖found − exact‖, both ÷ ‖expected‖; excess: ‖expected − exact‖ ÷
        ‖found − exact‖, 1 where both are bit-equal and infinite where the candidate is exact and the reference
        differs; bit_equal. Where the candidate is less exact than the reference by more than the threshold, as in
        half precision inside or with noise, the excess is the inverse: by how much.
    """
    size = expected.double().norm().item() or 1.0
    local_error = distance(found, expected)
    rounding = (found.cpu().double() - exact.cpu()).norm().item() / size
    theirs = (expected.cpu().double() - exact.cpu()).norm().item() / size
    differs = _ratio(unit * theirs, rounding, strict)
    if strict and least is not None and 0 < local_error < CEILING and exceeds(differs, THRESHOLD):
        nearest = least(exact)
        differs = _ratio(max(theirs, nearest), max(rounding, nearest), strict)
    copied = found.dtype in HALF and torch.equal(found.cpu(), expected.cpu().to(found.dtype))
    excess = 1.0 if not local_error or copied else differs
    if strict:
        excess = max(excess, THRESHOLD * local_error / CEILING) if excess == excess else excess  # NaN stays
    return {"local_error": local_error, "rounding": rounding, "excess": excess, "bit_equal": local_error == 0}


def _ratio(theirs: float, rounding: float, strict: bool) -> float:
    differs = theirs / rounding if rounding else math.inf
    if strict and differs < 1 / THRESHOLD:
        return 1 / differs if differs else math.inf
    return differs


CEILING = 2.0**-13
"""A local error above this is no rounding in float32, whatever the referee says, which autocast inside a module fools:
the least that half precision costs is one rounding to float16, 2⁻¹² on average. Float32 stays far below: on unbroken
pairs the largest of 12,816 was 9e-6, and the largest rounding 6e-5."""


def judge_alone(found: torch.Tensor, expected: torch.Tensor, strict: bool = True) -> dict[str, float | bool | None]:
    """The same without a referee: only what needs none is judged, by no tolerance that the referee's judgement lacks.

    Returns:
        As `judge`, with rounding None. excess is 1 for equal outputs, NaN for one that is not a number, infinite for an
        error above `CEILING` in float32, which `judge` takes for a fault whatever the referee says, and else None: such
        an error may be rounding or a small fault, and nothing here can tell which.
    """
    error = distance(found, expected)
    copied = found.dtype in HALF and torch.equal(found.cpu(), expected.cpu().to(found.dtype))
    excess: float | None = 1.0 if not error or copied else math.nan if math.isnan(error) else None
    if excess is None and (math.isinf(error) or (strict and error > CEILING)):
        excess = math.inf
    return {"local_error": error, "rounding": None, "excess": excess, "bit_equal": error == 0}


def judged(
    found: torch.Tensor,
    expected: torch.Tensor,
    exactly: Callable[[], torch.Tensor],
    unit: float = 1.0,
    strict: bool = True,
    least: Callable[[torch.Tensor], float] | None = None,
) -> dict[str, Any]:
    """Judge with the float64 run as the referee or, if that fails, without one.

    Args:
        exactly: runs the candidate's computation in float64, on the same inputs.
        unit, strict, least: as for `judge`.

    Returns:
        As `judge`, and refereed: whether the float64 run came to its end; referee_error: what ended it, or "".
    """
    try:
        exact = exactly()
        if bool(found.isfinite().all()) and not bool(exact.isfinite().all()):
            raise ValueError("it gives values that are not numbers, which its float32 run does not")
        return {**judge(found, expected, exact, unit, strict, least), "refereed": True, "referee_error": ""}
    except Exception as error:  # it casts, calls what was not widened, lacks the memory, or does not know float64
        return {**judge_alone(found, expected, strict), "refereed": False, "referee_error": reason(error)}


def reason(error: Exception) -> str:
    """Why a float64 run failed, on one line."""
    if memory_ran_out(error):
        return "memory ran out"
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first:.200}".removesuffix(": ")


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

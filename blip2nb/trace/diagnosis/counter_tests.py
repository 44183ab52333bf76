"""Putting a cause to the test: the place is judged again with it put right."""

from __future__ import annotations

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import CounterTest
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.metrics import THRESHOLD, exceeds

LEAST = 2.0**-25
"""The rounding of one float32 operation, relative and on average: what a reference's output has at least."""


def judged_again(look: Look, scene: Scene, change: str) -> CounterTest:
    """The same place in the candidate as it is now.

    Args:
        change: what was put right, as `CounterTest.change`.
    """
    after = next((one for one in scene.suspect.looks() if one.key == look.key), look)
    errors, excesses = (look.local_error, after.local_error), (look.excess, after.excess)
    return CounterTest(change, errors, excesses, after.sound)


def recomputed(look: Look, scene: Scene, change: str, value: torch.Tensor, rounding: float = 0.0) -> CounterTest:
    """The counter-test by computing the part again, on the same inputs, in float64.

    Args:
        value: what comes out.
        rounding: what float32 is off when it computes the part so.
    """
    error = computing.off(value, look.expected)
    excess = THRESHOLD * error / computing.allowed(within(look, scene), rounding)
    return CounterTest(change, (look.local_error, error), (look.excess, excess), not exceeds(excess, THRESHOLD))


def within(look: Look, scene: Scene) -> float:
    """How near an explanation comes to the reference's output if that rounds as the candidate does; where the
    candidate's rounding is not known, if it rounds once."""
    return THRESHOLD * max(LEAST, look.rounding / scene.suspect.unit)  # in this order: of NaN, the first

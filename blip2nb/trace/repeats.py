"""Whether two runs of one computation gave the same: dropout would else pass for rounding."""

from __future__ import annotations

import torch

from blip2nb.trace.computing import off
from blip2nb.trace.metrics import FEW

REPEATS = 4
"""So often a stage is run again to see whether it gives the same: what is left out half of the time is seen then,
fifteen times in sixteen; dropout leaves out single values, and is seen at once."""


def repeated(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two runs gave the same but for rounding, which a library may do in another order the second time."""
    few = torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
    return torch.equal(first, second) or off(second, first) <= max(FEW, few)

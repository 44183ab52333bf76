"""Which row of a table stands at each position, in a look-up or in a sum of embeddings."""

from __future__ import annotations

import torch

from blip2nb.trace import computing
from blip2nb.trace.causes import Cause
from blip2nb.trace.diagnosis.precision import COARSEST
from blip2nb.trace.diagnosis.scene import Scene
from blip2nb.trace.inside import Look
from blip2nb.trace.metrics import CEILING


def explain_embedding(look: Look, scene: Scene) -> list[Cause]:
    """Rows that are shifted, reordered or not added, or a bias that is left out."""
    found, expected = scene.suspect.output().double(), scene.suspect.expected.double()
    if found.shape != expected.shape or found.dim() != 3:
        return []
    width = found.shape[-1]
    found, expected = found.reshape(-1, width), expected.reshape(-1, width)
    for path, tensor in scene.candidate.get_submodule(look.module).named_parameters():
        name, table = f"{look.module}.{path}", tensor.detach().double()
        if tensor.dim() > 1 and tensor.shape[-1] == width and tensor.numel() > width:
            said = _table_rows(name, table.reshape(-1, width), found, expected)
        else:
            said = _left_out(name, table, found, expected) if table.shape == (width,) else None
        if said is not None:
            return [Cause(*said, name.rpartition(".")[0], "told from the rows that stand there")]
    return []


def _table_rows(name: str, table: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> tuple[str, str] | None:
    """Which rows of a table the candidate uses and which the reference: a cause's id and words.

    Args:
        table: (rows, channels). found, expected: (positions, channels), rows of the table or sums with them.
    """
    looked_up = [_nearest(table, one) for one in (found, expected)]
    ours, theirs = looked_up
    if (ours is None or theirs is None) and len(table) == len(found):
        rest = expected - table  # a sum, in which each position has its own row
        if computing.off(rest, found) < CEILING:
            return "position_missing", f"{name} is not added"
        order = _nearest(rest, found - table)
        if order is not None and order != list(range(len(order))):
            return "position_order", f"what {name} is added to stands in another order"
        ours, theirs = _nearest(table, found - rest), list(range(len(table)))
    if ours is None or theirs is None or ours == theirs:
        return None
    moves = {a - b for a, b in zip(ours, theirs, strict=True)}
    if len(moves) == 1:
        return "position_shifted", f"{name}: its rows are {moves.pop():+d} from the reference's"
    moved = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return "position_order", f"{name}: {moved} of {len(ours)} rows are others than the reference's"


def _left_out(name: str, bias: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> tuple[str, str] | None:
    """Whether a bias, and nothing else, is missing at most positions."""
    apart = expected - found
    near = (apart - bias).norm(dim=-1) <= COARSEST * bias.norm()
    same = apart.norm(dim=-1) <= COARSEST * bias.norm()
    if bool((near | same).all()) and int(near.sum()) > len(near) // 2 and name.endswith("bias"):
        return "bias_missing", f"{name} is not added"
    return None


def _nearest(table: torch.Tensor, rows: torch.Tensor) -> list[int] | None:
    """For each row the place in the table where it stands; None where one stands nowhere.

    Nearer than any precision rounds is near enough: rounded to bfloat16, a row is 0.002 times its size away; in the
    twins' tables the next one is 0.88 times or more.
    """
    apart = torch.cdist(rows[None], table[None])[0]
    nearest = apart.min(1)
    fits = nearest.values <= COARSEST * rows.norm(dim=-1).clamp_min(1e-300)
    return nearest.indices.tolist() if fits.all() else None

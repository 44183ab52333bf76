"""What is kept of a comparison of two right models: the rows that `alarm_rates` makes rates and tables of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.alarm_rates import Row
from blip2nb.trace.stage import Stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THREADS = ((1, 1), (2, 2), (1, 4), (4, 1), (2, 1), (4, 4))
"""LAVIS's and transformers' numbers of threads, taken in turn: products are added up in another order with another
number. Alike and unlike, up to twice the cores of the machine whose results are shown."""

HALF_EVERY = 2  # half precision runs on every second input, by choice: it is two comparisons more
IN_SINGLE = 10
"""A stage that transformers keeps in float32 rounds as in float32, within this factor; half precision rounds 2¹³ times
(float16) or 2¹⁶ times (bfloat16) as much. Chosen: any factor between does."""

Exact = dict[str, tuple[float, float]]
"""Stage -> the distances of LAVIS's and of transformers' float32 output to float64."""


def run_row(part: str, run: str, dtype: str, measured: Sequence[Row]) -> Row:
    """One run in one dtype, with what was measured at each stage."""
    return {"set": part, "run": run, "dtype": dtype, "stages": list(measured)}


def measured(found: Any, recorded: Mapping[str, torch.Tensor], table: Sequence[Stage], exact: Exact) -> list[Row]:
    """What is kept of a comparison.

    Every stage by kind, n (how many values its output has), arrival, local, rounding, excess and carrying; in half
    precision also `whole`: LAVIS's distance to float64 on the float32 weights and inputs, over the half-precision
    output's distance to that. LAVIS's own output stands for the exact one there: it is ten thousand times nearer to
    it. Where transformers keeps a stage in float32, it is the excess itself.
    """
    rows = []
    for place, stage in zip(table, found.stages, strict=True):
        row = {"stage": stage.name, "kind": kind_of(stage.name), "n": recorded[place.reference].numel()}
        row |= {"arrival": stage.arrival_error, "local": stage.local_error}
        row |= {"rounding": stage.rounding, "excess": stage.excess}
        if stage.local_error:
            row["carrying"] = carrying(found.local_outputs[stage.name].double() - recorded[place.reference].double())
        if stage.name in exact:
            theirs, single = exact[stage.name]
            in_single = stage.local_error == 0 or 0 < stage.rounding < IN_SINGLE * single
            row["whole"] = stage.excess if in_single else theirs / stage.local_error
        rows.append(row)
    if not exact:
        judged = [one for one in found.stages if one.excess is not None]
        exact.update((one.name, (one.excess * one.rounding, one.rounding)) for one in judged)
    return rows


def carrying(error: torch.Tensor) -> float:
    """How many values an error is spread over: about as many as there are if all are alike, few where a few large ones
    carry it (three times the squared sum of squares over the sum of fourth powers, which of n values on a bell curve
    gives n)."""
    squares = error.flatten() ** 2
    return 3 * (squares.sum() ** 2 / (squares**2).sum()).item()


_KINDS = (
    ("pixels", "junction"),
    ("language.inputs_embeds", "junction"),
    ("language.attention_mask", "junction"),
    ("language.decoder.input_ids", "junction"),
    ("vision.embeddings", "patches"),
    ("vision.block", "vision block"),
    ("vision.post_layernorm", "norm"),
    ("qformer.embeddings", "norm"),
    ("qformer.layer", "Q-Former layer"),
    ("projection", "linear"),
    ("logits", "linear"),
    ("language.positions", "look-up"),
    ("language.block", "OPT block"),
    ("language.encoder.block", "T5 encoder block"),
    ("language.decoder.block", "T5 decoder block"),
    ("language.encoder.position_bias", "look-up"),
    ("language.decoder.position_bias", "look-up"),
    ("language", "norm"),
)


def kind_of(stage: str) -> str:
    """What a stage is, by its name."""
    return next(kind for start, kind in _KINDS if stage.startswith(start))

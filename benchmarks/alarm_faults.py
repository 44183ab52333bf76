"""A twin with a fault of a known size: how large one has to be to be seen."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.alarm_lavis import Ask
from benchmarks.alarm_rates import Row
from benchmarks.alarm_rows import DTYPES, IN_SINGLE, Exact, run_row
from benchmarks.alarm_twins import measure_twin, show, twin_pair
from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.stages import stages
from blip2nb.trace.stage import Stage
from blip2nb.variants import Variant, variant

FAULT_SIZES = (1, 3, 10)
"""How many times a stage's own rounding, in the dtype of the run, a planted fault changes its output by: an excess
of 1.4, 3.2 and 10 where both sides round alike, below, at and above the threshold of 3."""

_NORMS = {
    "vision.block.02": ("vision_model.encoder.layers.2.layer_norm2", "eps"),
    "vision.post_layernorm": ("vision_model.post_layernorm", "eps"),
    "qformer.layer.01": ("qformer.encoder.layer.1.output_query.LayerNorm", "eps"),
    "language.block.02": ("language_model.model.decoder.layers.2.final_layer_norm", "eps"),
    "language.encoder.block.01": ("language_model.encoder.block.1.layer.1.layer_norm", "variance_epsilon"),
}
"""Stage -> a norm in it, and what its eps is called: a fault there can be made as small as one likes, and half
precision does not round it away."""


@dataclasses.dataclass(frozen=True)
class FaultJob:
    """A twin with a norm's eps changed, at one stage after another, by so much as gives a fault of a known size."""

    model: str
    seed: int
    part: str = "planted"

    @property
    def name(self) -> str:
        return f"fault/{self.model}/{self.seed}"

    def measure(self, ask: Ask, work: Path) -> list[Row]:
        model = variant(self.model)
        shutil.rmtree(work, ignore_errors=True)
        request, loaded = twin_pair(model, self.seed, work)
        asked = show(request, model, "picture", random.Random(self.name), work)
        ask(job="twin", request=asked, threads=1)
        torch.set_num_threads(1)
        recorded = load_file(asked["output"])
        rows = []
        for stage in (one for one in stages(model) if one.name in _NORMS):
            for dtype in DTYPES:
                found = [_planted(model, stage, loaded, dtype, recorded, asked, size) for size in FAULT_SIZES]
                rows.append(run_row(self.part, f"{self.name}/{stage.name}", dtype, found))
        shutil.rmtree(work)
        return rows


def _planted(
    model: Variant,
    stage: Stage,
    loaded: Callable[[str], huggingface.Loaded],
    dtype: str,
    recorded: Mapping[str, torch.Tensor],
    request: Row,
    size: float,
) -> Row:
    """What is measured at a stage with a fault `size` times its own rounding."""
    path, eps = _NORMS[stage.name]

    def measure(dtype: str, change: float, exact: Exact) -> Row:
        norm = loaded(dtype).model.get_submodule(path)
        right = getattr(norm, eps)
        setattr(norm, eps, right + change)
        try:
            return measure_twin(model, loaded(dtype), recorded, request, exact, [stage])[0]
        finally:
            setattr(norm, eps, right)

    probe = 1e-3  # moves the output by far more than rounding, and by little enough to be in proportion
    single = measure("float32", probe, {})
    unbroken = measure(dtype, 0, {})
    change = size * unbroken["rounding"] * probe / single["local"]
    fault = measure("float32", change, {})["local"]
    row = measure(dtype, change, {})
    if dtype != "float32":
        # what is exact has the fault too, so the half-precision output is as far from it as it was
        kept = unbroken["rounding"] < IN_SINGLE * single["rounding"]
        row["whole"] = row["excess"] if kept else fault / unbroken["local"]
    return {**row, "wanted": size, "fault": fault}

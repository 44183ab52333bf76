"""What the figures need beside the numbers: arrays and words gathered while both proofs run.

Every function takes what the proofs have at hand anyway, runs nothing twice that takes long, and returns plain values
for report.json and arrays for arrays.safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from blip2nb.families.captioners import configuration, huggingface
from blip2nb.families.captioners.recording import Step
from blip2nb.report import schema
from blip2nb.trace.metrics import kl_per_position
from blip2nb.trace.results import Comparison
from blip2nb.trace.stage import Stage
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image

    from blip2nb.trace.tape import Tape

Arrays = dict[str, np.ndarray]
Recorded: TypeAlias = "Tape | Mapping[str, torch.Tensor]"

EXAMINED_VALUES = 1_500_000
"""At most so many values of each side are kept of the stage that is looked at closely: 6 MB. Chosen: a vision block's,
677 positions of 1,408 channels, are kept whole; of the logits of a short text every second channel."""


_TOP = 50
"""So many likely tokens are kept at each position. Chosen: five times what the figure draws."""

# -- the inputs


def pixels(folder: Path, tape: Tape, pil: torch.Tensor, image: Image) -> tuple[schema.Pixels, Arrays]:
    """The PIL processor's pixels, which must be LAVIS's, and the default one's, whose difference is shown."""
    from transformers import AutoImageProcessor

    expected = tape["pixel_values"]
    default = AutoImageProcessor.from_pretrained(folder, local_files_only=True)  # as AutoProcessor makes it
    other = default(images=[image], return_tensors="pt")["pixel_values"]
    std = torch.tensor(configuration.IMAGE_STD).view(3, 1, 1)
    mean = torch.tensor(configuration.IMAGE_MEAN).view(3, 1, 1)
    fits = {name: one for name, one in (("pil", pil), ("default", other)) if one.shape == expected.shape}
    levels = {name: ((expected - value)[0] * std * 255).round() for name, value in fits.items()}
    shown = ((expected[0] * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)
    arrays = {f"pixels/{name}": value.clamp(-127, 127).to(torch.int8).numpy() for name, value in levels.items()}
    return schema.Pixels(
        max_abs=(pil - expected).abs().max().item() if "pil" in fits else math.inf,
        equal=torch.equal(pil, expected),
        default=schema.DefaultPixels(
            processor=type(default).__name__,
            max_abs=(other - expected).abs().max().item() if "default" in fits else math.inf,
            share=(levels["default"] != 0).double().mean().item() if "default" in fits else 1.0,
            grey_levels=int(levels["default"].abs().max()) if "default" in fits else 255,
        ),
    ), arrays | {"pixels/image": shown.numpy().copy()}


def sequences(
    loaded: huggingface.Loaded, variant: Variant, tape: Recorded, inputs: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """What stands at each position, as text, by the part of the network whose stages have those positions.

    OPT has "language"; T5 "language.encoder" and "language.decoder". The queries' places are "<image>".
    """
    decode = loaded.processor.tokenizer.decode
    texts = [decode([token]) for token in inputs["input_ids"][0].tolist()]
    texts[: variant.qformer.queries] = ["<image>"] * variant.qformer.queries
    if variant.language.kind == "opt":
        return {"language": tuple(texts)}
    started = tape[f"{variant.language_prefix}.decoder:input_ids"][0].tolist()
    return {"language.encoder": tuple(texts), "language.decoder": tuple(decode([token]) for token in started)}


# -- the activations


def activations(stages: Sequence[Stage], found: Mapping[str, torch.Tensor], tape: Tape) -> Arrays:
    """How large both models' values are at every stage: (stages, 4) float32 each, of |value|: root of the mean square,
    1st percentile, 99th percentile, maximum. NaN where there are no floating-point values."""
    sides = {
        "lavis": [tape[stage.reference] for stage in stages],
        "transformers": [found.get(stage.name) for stage in stages],
    }
    return {f"activations/{side}": np.stack([_magnitudes(value) for value in values]) for side, values in sides.items()}


def _magnitudes(values: torch.Tensor | None) -> np.ndarray:
    if values is None or not values.is_floating_point() or not values.numel():
        return np.full(4, np.nan, np.float32)
    sizes = values.detach().cpu().double().abs().flatten().numpy()
    low, high = np.quantile(sizes, [0.01, 0.99])  # chosen: single values do not widen the band
    return np.array([np.sqrt(np.mean(sizes**2)), low, high, sizes.max()], np.float32)


def token_errors(comparison: Comparison) -> Arrays:
    """Each stage's local error at each position of the first image: (positions,) float32."""
    return {f"tokens/{name}": errors[0].numpy() for name, errors in comparison.token_errors.items()}


def examined(
    comparison: Comparison, stages: Sequence[Stage], tape: Tape, variant: Variant, first: schema.FirstDivergence | None
) -> tuple[schema.Examined | None, Arrays]:
    """Both models' values at the first divergence, or, where there is none, at the stage whose error is the largest
    multiple of its rounding: `examined/lavis` and `examined/transformers`, (positions, channels) float32.

    They are the stage's output when it is fed LAVIS's inputs; of a place where something arrives, what arrived. Where
    that would be more than EXAMINED_VALUES, every n-th channel is kept, and `channel_step` is n.
    """
    name = first.stage if first else _worst(comparison)
    stage = next((stage for stage in stages if stage.name == name), None)
    if stage is None:
        return None, {}
    ours, theirs = tape[stage.reference], comparison.local_outputs.get(name, comparison.outputs.get(name))
    if theirs is None or ours.shape != theirs.shape or ours.dim() not in (2, 3):
        return None, {}
    pair = [value[0].float().reshape(value.shape[1], -1) for value in (ours, theirs)]
    step = -(-pair[0].numel() // EXAMINED_VALUES)
    kept = [value[:, ::step].contiguous().cpu().numpy() for value in pair]
    about = schema.Examined(name, heads_of(variant, name), channels=pair[0].shape[1], channel_step=step)
    return about, {"examined/lavis": kept[0], "examined/transformers": kept[1]}


def _worst(comparison: Comparison) -> str:
    judged = [stage for stage in comparison.stages if stage.excess is not None and not stage.junction]
    return max(judged, key=lambda stage: stage.excess or 0.0).name if judged else ""


def heads_of(variant: Variant, stage: str) -> int | None:
    """How many heads share the channels of a stage's output; None where there are no heads."""
    if "block" not in stage and "layer." not in stage:
        return None
    heads = {"vision": variant.vision.heads, "qformer": variant.qformer.heads, "language": variant.language.heads}
    return heads[stage.split(".")[0]]


def fusion(candidate: torch.nn.Module, tape: Tape) -> tuple[schema.Fusion, Arrays]:
    """What a key bias does to block 0's attention, and, for contrast, what a query bias of the same size does."""
    block = candidate.get_submodule("vision_model.encoder.layers.0")
    bias = block.self_attn.qkv.bias
    width = len(bias) // 3
    fused = bias.detach().numpy().copy()
    effects = {}
    with torch.no_grad():
        x = block.layer_norm1(tape["visual_encoder.blocks.0:x"])
        plain = block.self_attn(x)[0]
        noise = torch.randn(width, generator=torch.Generator().manual_seed(0)) * bias[:width].std()
        for name, rows in (("key", slice(width, 2 * width)), ("query", slice(0, width))):
            bias[rows] += noise
            effects[f"{name}_bias_effect"] = ((block.self_attn(x)[0] - plain).norm() / plain.norm()).item()
            bias[rows] -= noise
        bias.copy_(torch.from_numpy(fused))  # adding and taking away may round
    arrays = {"query": fused[:width].copy(), "value": fused[2 * width :].copy(), "fused": fused}
    return schema.Fusion(block=0, **effects), {f"fusion/{name}": array for name, array in arrays.items()}


# -- what the model says


def logits(found: torch.Tensor, expected: torch.Tensor) -> Arrays:
    """Per position of the first text: KL divergence, largest difference, margin of the first two, and the likeliest."""
    if found.shape != expected.shape:
        return {}
    top = expected[0].topk(min(_TOP, expected.shape[-1]), dim=-1)
    return {
        "logits/kl": kl_per_position(found[:1], expected[:1]).numpy(),
        "logits/max_abs": (found - expected)[0].abs().amax(-1).numpy(),
        "logits/margin": (top.values[:, 0] - top.values[:, 1]).numpy().copy(),
        "logits/top_ids": top.indices.numpy().copy(),
        "logits/top_lavis": top.values.numpy().copy(),
        "logits/top_huggingface": found[0].gather(-1, top.indices).numpy(),
    }


def ladder(
    loaded: huggingface.Loaded, ours: Iterable[Sequence[Step]], theirs: Iterable[Sequence[Step]]
) -> tuple[schema.Ladder, ...]:
    """Both models' greedy captions token by token, an item an image."""
    decode = loaded.processor.tokenizer.decode

    def words(steps: Sequence[Step]) -> tuple[schema.Step, ...]:
        return tuple((decode([token]), chosen, decode([other]), second) for token, chosen, other, second in steps)

    return tuple(schema.Ladder(words(a), words(b)) for a, b in zip(ours, theirs, strict=True))

"""A block of a released model at its full size, with random weights, recorded by LAVIS and compared like a twin."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.alarm_lavis import Ask
from benchmarks.alarm_rates import Row
from benchmarks.alarm_rows import DTYPES, HALF_EVERY, THREADS, Exact, measured, run_row
from blip2nb import twins
from blip2nb.families.captioners import configuration
from blip2nb.families.captioners.stages import parameter_pairs, stages
from blip2nb.trace.comparison import compare
from blip2nb.trace.stage import Stage
from blip2nb.variants import Variant, variant

BLOCK_INPUTS = 4  # chosen: scales of the inputs for each set of weights; the last has one value far above all others


@dataclasses.dataclass(frozen=True)
class Shape:
    """One of the released models' modules at its full size.

    Attributes:
        model, stage: where it stands. tokens: how many positions it is shown.
        kind: which module of LAVIS's that is, in `lavis_side.build_block`'s words.
    """

    name: str
    model: str
    stage: str
    kind: str
    tokens: int


_TEXT, _ANSWER = 44, 10  # chosen: 32 queries and a short text, a short answer

# positions of the vision tower: patches of 14 by 14 pixels, (224 / 14)² + 1 = 257 and (364 / 14)² + 1 = 677
SHAPES = (
    Shape("patches-224", "blip2-opt-2.7b", "vision.embeddings", "patches", 257),
    Shape("patches-364", "blip2-opt-2.7b-coco", "vision.embeddings", "patches", 677),
    Shape("vision-257", "blip2-opt-2.7b", "vision.block.00", "vision", 257),
    Shape("vision-677", "blip2-opt-2.7b-coco", "vision.block.00", "vision", 677),
    Shape("post-norm", "blip2-opt-2.7b", "vision.post_layernorm", "vision_norm", 257),
    Shape("q-former-norm", "blip2-opt-2.7b", "qformer.embeddings", "norm", 32),
    Shape("q-former-cross-257", "blip2-opt-2.7b", "qformer.layer.00", "qformer", 32),
    Shape("q-former-cross-677", "blip2-opt-2.7b-coco", "qformer.layer.00", "qformer", 32),
    Shape("q-former-self", "blip2-opt-2.7b", "qformer.layer.01", "qformer", 32),
    Shape("projection", "blip2-opt-2.7b", "projection", "linear", 32),
    Shape("opt-2.7b", "blip2-opt-2.7b", "language.block.00", "opt", _TEXT),
    Shape("opt-6.7b", "blip2-opt-6.7b", "language.block.00", "opt", _TEXT),
    Shape("opt-norm", "blip2-opt-6.7b", "language.final_layer_norm", "norm", _TEXT),
    Shape("t5-xl-encoder", "blip2-flan-t5-xl", "language.encoder.block.01", "t5_encoder", _TEXT),
    Shape("t5-xl-decoder", "blip2-flan-t5-xl", "language.decoder.block.01", "t5_decoder", _ANSWER),
    Shape("t5-xxl-encoder", "blip2-flan-t5-xxl", "language.encoder.block.01", "t5_encoder", _TEXT),
    Shape("t5-xxl-decoder", "blip2-flan-t5-xxl", "language.decoder.block.01", "t5_decoder", _ANSWER),
    Shape("t5-norm", "blip2-flan-t5-xxl", "language.encoder.final_layer_norm", "t5_norm", _TEXT),
    Shape("t5-logits", "blip2-flan-t5-xl", "logits", "linear", _ANSWER),
)


def shape(name: str) -> Shape:
    """The shape of this name."""
    return next(one for one in SHAPES if one.name == name)


class Alone(torch.nn.Module):
    """A module that is a model by itself, so that `compare` can run it."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, **arguments: Any) -> Any:
        return self.block(**arguments)


@dataclasses.dataclass(frozen=True)
class BlockJob:
    """A block with the weights of a seed, on inputs of several scales."""

    part: str
    shape: Shape
    seed: int
    dtypes: Sequence[str] = tuple(DTYPES)

    @property
    def name(self) -> str:
        return f"block/{self.shape.name}/{self.part}/{self.seed}"

    def measure(self, ask: Ask, work: Path) -> list[Row]:
        model = variant(self.shape.model)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        chance = random.Random(self.name)
        generator = torch.Generator().manual_seed(chance.getrandbits(32))
        torch.set_num_threads(2)
        place = next(one for one in stages(model) if one.name == self.shape.stage)
        candidate = Alone(empty_block(model, place)).eval()
        # weights so large that attention looks at one token alone, so small that it looks at all alike, and between
        gain = 10 ** chance.uniform(-1, 0.5)
        save_file(fill_block(candidate.block, model, place, generator, gain), work / "weights.safetensors")
        rows = []
        for number in range(BLOCK_INPUTS):
            theirs, ours = THREADS[(self.seed * BLOCK_INPUTS + number) % len(THREADS)]
            half = number % HALF_EVERY == 0
            # float16 ends at 65504 and loses digits below 6e-5, so it sees a narrower range
            scale = 10 ** (chance.uniform(-1, 0.5) if half else chance.uniform(-3, 3))
            given = block_inputs(self.shape, model, generator, scale, massive=number == BLOCK_INPUTS - 1)
            save_file(_for_lavis(self.shape, place, given), work / "inputs.safetensors")
            ask(
                job="block",
                block=_sizes(self.shape, model),
                weights=str(work / "weights.safetensors"),
                inputs=str(work / "inputs.safetensors"),
                output=str(work / "output.safetensors"),
                threads=theirs,
            )
            torch.set_num_threads(ours)
            expected = load_file(work / "output.safetensors")["output"]
            run = f"{self.name}/{number} scale {scale:.1e}/{theirs}-{ours}"
            exact: Exact = {}
            for dtype in self.dtypes if half else ["float32"]:
                there = in_dtype(candidate, self.shape, place, dtype)
                rows.append(
                    run_row(self.part, run, dtype, compare_block(there, place, self.shape, given, expected, exact))
                )
        shutil.rmtree(work)
        return rows


def empty_block(model: Variant, place: Stage) -> torch.nn.Module:
    """transformers' module at a stage, as its whole model makes it, without values."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    short = dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, layers=1),
        qformer=dataclasses.replace(model.qformer, layers=2),
        language=dataclasses.replace(model.language, layers=2),
    )
    config = configuration.model_config(
        short, twins.language_config(short), image_token=model.language.vocabulary - 1, newline=0
    )
    with torch.device("meta"):
        whole = Blip2ForConditionalGeneration(Blip2Config(**config))
    whole.vision_model.post_layernorm.eps = 1e-5  # LAVIS's: the one known difference, repaired
    return whole.get_submodule(place.candidate).to_empty(device="cpu").float()


def fill_block(
    block: torch.nn.Module, model: Variant, place: Stage, generator: torch.Generator, gain: float
) -> dict[str, torch.Tensor]:
    """Give a block random weights, rows of unlike size and a few strong channels; returns them by LAVIS's names.

    How unlike and how strong is chosen, not measured on released weights.

    Args:
        gain: how large the matrices' values are, in units of 1 / √(inputs).
    """
    for name, value in block.named_parameters():
        value.requires_grad_(False)
        if value.dim() == 1:
            value.normal_(generator=generator).mul_(0.1)
            if name.endswith("weight"):
                value.add_(1)
                value[:4] *= 8
        else:
            value.normal_(generator=generator).mul_(gain / value[0].numel() ** 0.5)
            value *= torch.randn(len(value), *[1] * (value.dim() - 1), generator=generator).mul_(0.3).exp_()
    theirs = {}
    held = dict(block.named_parameters())
    for name, (target, rows) in parameter_pairs(model).items():
        own = held.get(target.removeprefix(f"{place.candidate}.")) if target.startswith(f"{place.candidate}.") else None
        if own is None:
            continue
        if name.endswith("q_bias"):
            own[len(own) // 3 : 2 * len(own) // 3] = 0  # the key's
        for start in (f"{place.reference}.", "visual_encoder.", "LayerNorm."):
            name = name.removeprefix(start)
        theirs[name] = (own if rows is None else own[rows]).clone()
    return theirs


def block_inputs(
    shape: Shape, model: Variant, generator: torch.Generator, scale: float, massive: bool
) -> dict[str, torch.Tensor]:
    """What a block is called with, by the candidate's names: noise of a scale, with strong channels and a strong token.
    How strong is chosen, not measured on released models.

    Args:
        massive: whether a single value is a thousand times as large as the rest, as trained models have them: it
            passes on through the residual, and carries most of the output's norm and of its rounding.
    """
    kind, place = shape.kind, next(one for one in stages(model) if one.name == shape.stage)

    def noise(tokens: int, width: int) -> torch.Tensor:
        values = torch.randn(1, tokens, width, generator=generator) * scale
        values[..., torch.randint(width, (4,), generator=generator)] *= 50
        values[:, torch.randint(tokens, (1,), generator=generator)] *= 5
        if massive:
            values[0, 0, int(torch.randint(width, (1,), generator=generator))] = 1000 * scale
        return values

    if kind == "patches":
        size = model.image_size
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator) * scale}
    first = next(name for name in ("hidden_states", "input") if name in place.inputs)
    given = {first: noise(shape.tokens, _width(shape, model))}
    if kind == "qformer" and "encoder_hidden_states" in place.inputs:
        given["encoder_hidden_states"] = noise(model.vision_tokens, model.vision.width)
    if kind == "t5_decoder":
        given["encoder_hidden_states"] = noise(_TEXT, model.language.width)
        causal = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril()
        given["attention_mask"] = causal[None, None]
    if kind in ("t5_encoder", "t5_decoder"):
        table = (shape.tokens, shape.tokens, model.language.heads)
        given["position_bias"] = torch.randn(*table, generator=generator).permute(2, 0, 1)[None].contiguous()
    return given


def _for_lavis(shape: Shape, place: Stage, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by LAVIS's names. Its T5 wants the mask added to the positions' bias, its OPT a mask of numbers."""
    out = {name: value.contiguous() for name, value in given.items()}
    lowest = torch.finfo(torch.float32).min
    if "attention_mask" in out:
        out["position_bias"] = out["position_bias"].masked_fill(~out.pop("attention_mask"), lowest)
    if shape.kind == "opt":
        out["attention_mask"] = torch.full((1, 1, shape.tokens, shape.tokens), lowest).triu(1)
    renamed = {name: where[1:] for name, where in place.inputs.items() if where.startswith(":")}
    if shape.kind == "patches":
        renamed["pixel_values"] = "x"
    if shape.kind in ("norm", "vision_norm", "linear"):
        renamed["input"] = "x" if shape.kind == "vision_norm" else "input"
    return {renamed.get(name, name): value for name, value in out.items()}


def _width(shape: Shape, model: Variant) -> int:
    if shape.stage.startswith("vision"):
        return model.vision.width
    return model.qformer.width if shape.stage.startswith(("qformer", "projection")) else model.language.width


def _sizes(shape: Shape, model: Variant) -> Row:
    """What `lavis_side.build_block` needs to know."""
    sizes: Row = {"kind": shape.kind, "width": _width(shape, model), "heads": model.vision.heads}
    if shape.kind.startswith(("opt", "t5")):
        language = model.language
        sizes |= {"heads": language.heads, "mlp": language.mlp, "head_width": language.head_width}
    if shape.kind == "qformer":
        sizes |= {"encoder_width": model.vision.width, "layer": int(shape.stage[-2:]), "queries": model.qformer.queries}
        sizes["cross_every"] = model.qformer.cross_every
    if shape.kind == "patches":
        sizes["image"] = model.image_size
    if shape.kind == "norm":
        sizes["eps"] = 1e-12 if shape.stage.startswith("qformer") else 1e-5  # BERT's, torch's own default
    if shape.kind == "linear":
        logits = shape.stage == "logits"
        sizes |= {"outputs": model.language.vocabulary if logits else model.language.width, "bias": not logits}
    return sizes


def in_dtype(candidate: Alone, shape: Shape, place: Stage, dtype: str) -> Alone:
    """A copy of a block in a dtype. In float16 transformers keeps T5's `wo` and the Q-Former in float32."""
    there = copy.deepcopy(candidate)
    if dtype == "float16" and place.name.startswith("qformer"):
        return there
    kept = ".wo" if dtype == "float16" else "nothing"
    for name, module in there.named_modules():
        if not name.endswith(kept) and not list(module.children()):
            module.to(DTYPES[dtype])
    return there


def compare_block(
    candidate: Alone,
    place: Stage,
    shape: Shape,
    given: Mapping[str, torch.Tensor],
    expected: torch.Tensor,
    exact: Exact,
) -> list[Row]:
    """Judge a block as a stage of its own, with the table's own inputs and arrangement."""
    dtype = next(candidate.parameters()).dtype
    alone = dataclasses.replace(
        place,
        reference="block",
        candidate="block",
        inputs={name: f"block:{name}" for name in place.inputs},
        arrange={},
        modules={},
    )
    recorded = {"block": expected, **{f"block:{name}": given[name] for name in place.inputs}}
    arguments = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    if shape.kind == "qformer":
        arguments["query_length"] = shape.tokens  # type: ignore[assignment]
    return measured(compare(recorded, candidate, [alone], arguments, explain=False), recorded, [alone], exact)

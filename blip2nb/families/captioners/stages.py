"""BLIP-2's stages: their names, where they are in LAVIS and in transformers, and which modules hold which parameters.

This table and the mapping's rules say in two independent ways what belongs together: the rules by tensor name, this
one by module. A mistake would have to be made twice to go unseen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from blip2nb.trace.diagnosis.known import AttributeDifference
from blip2nb.trace.stage import Stage
from blip2nb.variants import Variant

_BLOCK = {
    "": "",
    "norm1": "layer_norm1",
    "attn": "self_attn",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp": "mlp",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ATTENTION = {
    "{kind}.self.query": "{kind}.attention.query",
    "{kind}.self.key": "{kind}.attention.key",
    "{kind}.self.value": "{kind}.attention.value",
    "{kind}.self": "{kind}.attention",
    "{kind}.output": "{kind}.output",
    "{kind}.output.dense": "{kind}.output.dense",
    "{kind}.output.LayerNorm": "{kind}.output.LayerNorm",
}
_FEED_FORWARD = (
    "intermediate_query", "intermediate_query.dense", "output_query", "output_query.dense", "output_query.LayerNorm",
)  # fmt: skip
_OPT_LAYER = (
    "self_attn_layer_norm", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.out_proj", "final_layer_norm", "fc1", "fc2",
)  # fmt: skip
_T5_SELF = (
    "layer.0", "layer.0.layer_norm", "layer.0.SelfAttention", *(f"layer.0.SelfAttention.{part}" for part in "qkvo")
)  # fmt: skip
_T5_CROSS = (
    "layer.1", "layer.1.layer_norm", "layer.1.EncDecAttention", *(f"layer.1.EncDecAttention.{part}" for part in "qkvo")
)  # fmt: skip
_T5_MLP = ("layer_norm", "DenseReluDense", *(f"DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")))


def stages(variant: Variant) -> list[Stage]:
    """The variant's stages in the order in which data passes through them."""
    return [*_vision(variant), *_qformer(variant), *_language(variant)]


def token_ids(variant: Variant) -> str:
    """The place in LAVIS where the text's token ids arrive, without the image's."""
    return {"opt": "opt_model.model.decoder.embed_tokens:0", "t5": "t5_model.encoder.embed_tokens:0"}[
        variant.language.kind
    ]


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _vision(variant: Variant) -> Iterator[Stage]:
    yield Stage("pixels", "visual_encoder:x", "vision_model:pixel_values")
    yield Stage(
        "vision.embeddings",
        "visual_encoder.pos_drop",
        "vision_model.embeddings",
        inputs={"pixel_values": "visual_encoder:x"},
    )
    for n in range(variant.vision.layers):
        yield Stage(
            f"vision.block.{n:02d}",
            f"visual_encoder.blocks.{n}",
            f"vision_model.encoder.layers.{n}",
            inputs={"hidden_states": ":x"},
            modules=_BLOCK,
        )
    yield Stage(
        "vision.post_layernorm",
        "ln_vision",
        "vision_model.post_layernorm",
        inputs={"input": ":x"},
        modules=_same(""),
    )


def _qformer(variant: Variant) -> Iterator[Stage]:
    yield Stage(
        "qformer.embeddings",
        "Qformer.bert.embeddings",
        "qformer.layernorm",
        inputs={"input": ":query_embeds"},
        modules={"LayerNorm": ""},
    )
    for n in range(variant.qformer.layers):
        crossed = n % variant.qformer.cross_every == 0
        kinds = ("attention", "crossattention") if crossed else ("attention",)
        modules = {a.format(kind=kind): b.format(kind=kind) for kind in kinds for a, b in _ATTENTION.items()}
        yield Stage(
            f"qformer.layer.{n:02d}",
            f"Qformer.bert.encoder.layer.{n}",
            f"qformer.encoder.layer.{n}",
            inputs={"hidden_states": ":hidden_states"}
            | ({"encoder_hidden_states": ":encoder_hidden_states"} if crossed else {}),
            modules=modules | _same("", *_FEED_FORWARD),
        )
    projection = {"opt": "opt_proj", "t5": "t5_proj"}[variant.language.kind]
    yield Stage("projection", projection, "language_projection", inputs={"input": ":input"}, modules=_same(""))


def _language(variant: Variant) -> Iterator[Stage]:
    prefix = variant.language_prefix
    for argument in ("inputs_embeds", "attention_mask"):
        yield Stage(f"language.{argument}", f"{prefix}:{argument}", f"language_model:{argument}")
    yield from {"opt": _opt, "t5": _t5}[variant.language.kind](variant)
    yield Stage("logits", f"{prefix}.lm_head", "language_model.lm_head", inputs={"input": ":input"}, modules=_same(""))


def _opt(variant: Variant) -> Iterator[Stage]:
    ours, theirs = "opt_model.model.decoder", "language_model.model.decoder"
    yield Stage("language.positions", f"{ours}.embed_positions", f"{theirs}.embed_positions", modules=_same(""))
    for n in range(variant.language.layers):
        yield Stage(
            f"language.block.{n:02d}",
            f"{ours}.layers.{n}",
            f"{theirs}.layers.{n}",
            inputs={"hidden_states": ":hidden_states"},
            modules=_same("", *_OPT_LAYER),
        )
    yield Stage(
        "language.final_layer_norm",
        f"{ours}.final_layer_norm",
        f"{theirs}.final_layer_norm",
        inputs={"input": ":input"},
        modules=_same(""),
    )


def _heads_first(values: torch.Tensor) -> torch.Tensor:
    """(query, key, heads), as the table of relative positions gives them, to (1, heads, query, key)."""
    return values.permute(2, 0, 1).unsqueeze(0)


def _t5(variant: Variant) -> Iterator[Stage]:
    for stack in ("encoder", "decoder"):
        ours, theirs = f"t5_model.{stack}", f"language_model.{stack}"
        if stack == "decoder":
            yield Stage("language.decoder.input_ids", f"{ours}:input_ids", f"{theirs}:input_ids")
        table = "block.0.layer.0.SelfAttention.relative_attention_bias"
        yield Stage(
            f"language.{stack}.position_bias",
            f"{ours}.{table}",
            f"{theirs}.{table}",
            inputs={"input": ":input"},  # which distance belongs to which bucket
            modules=_same(""),
        )
        for n in range(variant.language.layers):
            inputs = {"hidden_states": ":hidden_states"}
            if n > 0:  # block 0 looks the bias up and hands it on
                inputs["position_bias"] = f"{ours}.{table}"
            if stack == "decoder":
                inputs["encoder_hidden_states"] = ":encoder_hidden_states"
            parts = _T5_SELF + (_T5_CROSS if stack == "decoder" else ())
            if n == 0:
                parts += (table.removeprefix("block.0."),)
            last = 2 if stack == "decoder" else 1
            yield Stage(
                f"language.{stack}.block.{n:02d}",
                f"{ours}.block.{n}",
                f"{theirs}.block.{n}",
                inputs=inputs,
                arrange={"position_bias": _heads_first},
                modules=_same("", *parts, f"layer.{last}", *(f"layer.{last}.{part}" for part in _T5_MLP)),
            )
        yield Stage(
            f"language.{stack}.final_layer_norm",
            f"{ours}.final_layer_norm",
            f"{theirs}.final_layer_norm",
            inputs={"hidden_states": ":hidden_states"},
            modules=_same(""),
        )


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two modules that hold the same parameters, by path in LAVIS and in transformers."""

    stage: str
    reference: str
    candidate: str


def module_pairs(variant: Variant) -> list[Pair]:
    """Every pair of modules that the stages name, each once."""
    pairs: dict[str, Pair] = {}
    for stage in stages(variant):
        for ours, theirs in stage.modules.items():
            reference = _join(stage.reference, ours)
            pairs.setdefault(reference, Pair(stage.name, reference, _join(stage.candidate, theirs)))
    for reference, pair in _OUTSIDE[variant.language.kind].items():
        pairs[reference] = Pair(pair[0], reference, pair[1])
    return list(pairs.values())


# Modules with parameters that no stage calls as a whole, embeddings whose sum is a stage and look-up tables: the stage
# where what they give arrives, and their path in transformers.
_PATCHES = ("vision.embeddings", "vision_model.embeddings.patch_embedding")
_OUTSIDE = {
    "opt": {
        "visual_encoder.patch_embed.proj": _PATCHES,
        "opt_model.model.decoder.embed_tokens": (
            "language.inputs_embeds",
            "language_model.model.decoder.embed_tokens",
        ),
    },
    "t5": {
        "visual_encoder.patch_embed.proj": _PATCHES,
        "t5_model.shared": ("language.inputs_embeds", "language_model.shared"),
    },
}

# Parameters that belong to no module of their own, by full name.
LOOSE_PARAMETERS = {
    "query_tokens": "query_tokens",
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
}


def parameter_pairs(variant: Variant) -> dict[str, tuple[str, slice | None]]:
    """LAVIS's parameter name -> (transformers' parameter name, the rows of it that are meant).

    Built from the modules that are paired, not from the mapping's rules. LAVIS keeps the vision attention's query and
    value bias apart; in transformers they are the first and last third of one.
    """
    width = variant.vision.width
    thirds = {"q_bias": slice(0, width), "v_bias": slice(2 * width, 3 * width)}
    pairs: dict[str, tuple[str, slice | None]] = {name: (other, None) for name, other in LOOSE_PARAMETERS.items()}
    for pair in module_pairs(variant):
        if pair.reference.endswith(".attn"):
            for name, rows in thirds.items():
                pairs[f"{pair.reference}.{name}"] = (f"{pair.candidate}.qkv.bias", rows)
        else:
            for leaf in ("weight", "bias"):
                pairs[f"{pair.reference}.{leaf}"] = (f"{pair.candidate}.{leaf}", None)
    return pairs


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if part else path


@dataclasses.dataclass(frozen=True)
class KnownDifference:
    """A difference between LAVIS's code and today's transformers that no conversion can remove.

    Attributes:
        id: its name in reports.
        module, attribute: where it shows in transformers.
        values: LAVIS's value and transformers'. Any other is a fault like every other.
        fix: the line that removes it after loading.
    """

    id: str
    stage: str
    module: str
    attribute: str
    values: tuple[Any, Any]
    words: str
    why: str
    fix: str

    def explains(self, difference: AttributeDifference) -> bool:
        values = (difference.reference, difference.candidate)
        return (difference.module, difference.attribute, values) == (self.module, self.attribute, self.values)


KNOWN_DIFFERENCES = (
    KnownDifference(
        id="post_layernorm_eps",
        stage="vision.post_layernorm",
        module="vision_model.post_layernorm",
        attribute="eps",
        values=(1e-5, 1e-6),
        words="eps of the post layer norm",
        why="LAVIS's ln_vision is a plain LayerNorm (eps 1e-5); transformers gives it the vision tower's eps (1e-6), "
        "and its configuration has only one for both.",
        fix="model.vision_model.post_layernorm.eps = 1e-5",
    ),
)

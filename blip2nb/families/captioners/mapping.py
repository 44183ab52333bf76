"""The rules that turn LAVIS's tensors into transformers' and back: one line each, read like the table they are.

A template names tensors on both sides. `{block}` counts the vision tower's blocks, `{layer}` the Q-Former's layers,
`{cross}` those of them with cross-attention, `{n}` the language model's layers; `{weight|bias}` stands for either
word, the same one on both sides. The third column is the shape, in the letters of `dimensions()`; a bias has only
the first of them. Everything here is pure: names and shapes, and arithmetic on the tensors that are handed in.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping

from blip2nb.errors import RequestError
from blip2nb.nearest import nearest
from blip2nb.variants import VARIANTS, Variant
from blip2nb.weights.rules import (
    Drop,
    Entry,
    FuseQueryValueBias,
    InterpolatePositions,
    Plan,
    Rename,
    Rule,
    Tied,
    Unused,
    count_up,
)
from blip2nb.weights.rules import entries as _written_out

# fmt: off
VISION: tuple[Rule, ...] = (
    Rename("visual_encoder.cls_token", "vision_model.embeddings.class_embedding", "1 1 v"),
    Rename("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding", "1 v_tokens v"),
    Rename("visual_encoder.patch_embed.proj.{weight|bias}", "vision_model.embeddings.patch_embedding.{weight|bias}", "v rgb patch patch"),
    Rename("visual_encoder.blocks.{block}.norm1.{weight|bias}", "vision_model.encoder.layers.{block}.layer_norm1.{weight|bias}", "v"),
    Rename("visual_encoder.blocks.{block}.attn.qkv.weight", "vision_model.encoder.layers.{block}.self_attn.qkv.weight", "3v v"),
    FuseQueryValueBias("visual_encoder.blocks.{block}.attn.{q,v}_bias", "vision_model.encoder.layers.{block}.self_attn.qkv.bias", "v"),
    Rename("visual_encoder.blocks.{block}.attn.proj.{weight|bias}", "vision_model.encoder.layers.{block}.self_attn.projection.{weight|bias}", "v v"),
    Rename("visual_encoder.blocks.{block}.norm2.{weight|bias}", "vision_model.encoder.layers.{block}.layer_norm2.{weight|bias}", "v"),
    Rename("visual_encoder.blocks.{block}.mlp.fc1.{weight|bias}", "vision_model.encoder.layers.{block}.mlp.fc1.{weight|bias}", "v_mlp v"),
    Rename("visual_encoder.blocks.{block}.mlp.fc2.{weight|bias}", "vision_model.encoder.layers.{block}.mlp.fc2.{weight|bias}", "v v_mlp"),
    Rename("ln_vision.{weight|bias}", "vision_model.post_layernorm.{weight|bias}", "v"),
)

UNUSED: tuple[Unused, ...] = (
    Unused("visual_encoder.blocks.{beyond}.*", why="LAVIS builds its vision tower without the last block of the file"),
    Unused("visual_encoder.norm.*", why="LAVIS builds its vision tower without a final norm and uses ln_vision instead"),
    Unused("visual_encoder.fc_norm.*", why="LAVIS builds its vision tower without a pooling head"),
    Unused("visual_encoder.head.*", why="LAVIS builds its vision tower without a classifier"),
    Unused("visual_encoder.mask_token", why="used in the vision tower's own pretraining alone"),
)

# What LAVIS can put into a checkpoint and transformers' BLIP-2 has no place for: pattern, what it is and what to do.
FOREIGN: tuple[tuple[str, str], ...] = (
    (r"^visual_encoder\.(conv1|class_embedding|positional_embedding|ln_pre|transformer)\b", "a CLIP-L vision tower (vit_model: clip_L), which transformers' BLIP-2 does not have. Only models with LAVIS's eva_clip_g can be converted"),
    (r"(^|\.)(lora_|base_layer\.|base_model\.)", "LoRA adapters. Merge them into the weights they adapt (peft's `merge_and_unload`) and save again"),
    (r"^llm_(proj|model)\.", "an InstructBLIP or Vicuna model, which is another architecture"),
    (r"^(itm_head|vision_proj|text_proj|temp\b|Qformer\.cls\.)", "a model for image-text matching or of the first training stage, which writes no captions. Name a checkpoint of a captioner"),
)

QFORMER: tuple[Rule, ...] = (
    Rename("query_tokens", "query_tokens", "1 queries q"),
    Drop("Qformer.bert.embeddings.position_ids", why="a buffer that transformers recomputes", shape="1 q_positions", restore=count_up),
    Rename("Qformer.bert.embeddings.LayerNorm.{weight|bias}", "qformer.layernorm.{weight|bias}", "q"),
    Rename("Qformer.bert.encoder.layer.{layer}.attention.self.{query|key|value}.{weight|bias}", "qformer.encoder.layer.{layer}.attention.attention.{query|key|value}.{weight|bias}", "q q"),
    Rename("Qformer.bert.encoder.layer.{layer}.attention.output.dense.{weight|bias}", "qformer.encoder.layer.{layer}.attention.output.dense.{weight|bias}", "q q"),
    Rename("Qformer.bert.encoder.layer.{layer}.attention.output.LayerNorm.{weight|bias}", "qformer.encoder.layer.{layer}.attention.output.LayerNorm.{weight|bias}", "q"),
    Rename("Qformer.bert.encoder.layer.{cross}.crossattention.self.query.{weight|bias}", "qformer.encoder.layer.{cross}.crossattention.attention.query.{weight|bias}", "q q"),
    Rename("Qformer.bert.encoder.layer.{cross}.crossattention.self.{key|value}.{weight|bias}", "qformer.encoder.layer.{cross}.crossattention.attention.{key|value}.{weight|bias}", "q v"),
    Rename("Qformer.bert.encoder.layer.{cross}.crossattention.output.dense.{weight|bias}", "qformer.encoder.layer.{cross}.crossattention.output.dense.{weight|bias}", "q q"),
    Rename("Qformer.bert.encoder.layer.{cross}.crossattention.output.LayerNorm.{weight|bias}", "qformer.encoder.layer.{cross}.crossattention.output.LayerNorm.{weight|bias}", "q"),
    Rename("Qformer.bert.encoder.layer.{layer}.intermediate_query.dense.{weight|bias}", "qformer.encoder.layer.{layer}.intermediate_query.dense.{weight|bias}", "q_mlp q"),
    Rename("Qformer.bert.encoder.layer.{layer}.output_query.dense.{weight|bias}", "qformer.encoder.layer.{layer}.output_query.dense.{weight|bias}", "q q_mlp"),
    Rename("Qformer.bert.encoder.layer.{layer}.output_query.LayerNorm.{weight|bias}", "qformer.encoder.layer.{layer}.output_query.LayerNorm.{weight|bias}", "q"),
)

OPT: tuple[Rule, ...] = (
    Rename("opt_proj.{weight|bias}", "language_projection.{weight|bias}", "l q"),
    Rename("opt_model.model.decoder.embed_tokens.weight", "language_model.model.decoder.embed_tokens.weight", "vocab l"),
    Rename("opt_model.model.decoder.embed_positions.weight", "language_model.model.decoder.embed_positions.weight", "l_positions l"),
    Rename("opt_model.model.decoder.layers.{n}.self_attn_layer_norm.{weight|bias}", "language_model.model.decoder.layers.{n}.self_attn_layer_norm.{weight|bias}", "l"),
    Rename("opt_model.model.decoder.layers.{n}.self_attn.{q|k|v|out}_proj.{weight|bias}", "language_model.model.decoder.layers.{n}.self_attn.{q|k|v|out}_proj.{weight|bias}", "l l"),
    Rename("opt_model.model.decoder.layers.{n}.final_layer_norm.{weight|bias}", "language_model.model.decoder.layers.{n}.final_layer_norm.{weight|bias}", "l"),
    Rename("opt_model.model.decoder.layers.{n}.fc1.{weight|bias}", "language_model.model.decoder.layers.{n}.fc1.{weight|bias}", "l_mlp l"),
    Rename("opt_model.model.decoder.layers.{n}.fc2.{weight|bias}", "language_model.model.decoder.layers.{n}.fc2.{weight|bias}", "l l_mlp"),
    Rename("opt_model.model.decoder.final_layer_norm.{weight|bias}", "language_model.model.decoder.final_layer_norm.{weight|bias}", "l"),
    Tied("opt_model.lm_head.weight", "language_model.lm_head.weight", of="opt_model.model.decoder.embed_tokens.weight", shape="vocab l"),
)

T5: tuple[Rule, ...] = (
    Rename("t5_proj.{weight|bias}", "language_projection.{weight|bias}", "l q"),
    Rename("t5_model.shared.weight", "language_model.shared.weight", "vocab l"),
    Tied("t5_model.{encoder|decoder}.embed_tokens.weight", "language_model.{encoder|decoder}.embed_tokens.weight", of="t5_model.shared.weight", shape="vocab l"),
    Rename("t5_model.{encoder|decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "language_model.{encoder|decoder}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "buckets heads"),
    Rename("t5_model.{encoder|decoder}.block.{n}.layer.0.SelfAttention.{q|k|v}.weight", "language_model.{encoder|decoder}.block.{n}.layer.0.SelfAttention.{q|k|v}.weight", "inner l"),
    Rename("t5_model.{encoder|decoder}.block.{n}.layer.0.SelfAttention.o.weight", "language_model.{encoder|decoder}.block.{n}.layer.0.SelfAttention.o.weight", "l inner"),
    Rename("t5_model.{encoder|decoder}.block.{n}.layer.0.layer_norm.weight", "language_model.{encoder|decoder}.block.{n}.layer.0.layer_norm.weight", "l"),
    Rename("t5_model.decoder.block.{n}.layer.1.EncDecAttention.{q|k|v}.weight", "language_model.decoder.block.{n}.layer.1.EncDecAttention.{q|k|v}.weight", "inner l"),
    Rename("t5_model.decoder.block.{n}.layer.1.EncDecAttention.o.weight", "language_model.decoder.block.{n}.layer.1.EncDecAttention.o.weight", "l inner"),
    Rename("t5_model.decoder.block.{n}.layer.1.layer_norm.weight", "language_model.decoder.block.{n}.layer.1.layer_norm.weight", "l"),
    Rename("t5_model.{encoder.block.{n}.layer.1|decoder.block.{n}.layer.2}.DenseReluDense.{wi_0|wi_1}.weight", "language_model.{encoder.block.{n}.layer.1|decoder.block.{n}.layer.2}.DenseReluDense.{wi_0|wi_1}.weight", "l_mlp l"),
    Rename("t5_model.{encoder.block.{n}.layer.1|decoder.block.{n}.layer.2}.DenseReluDense.wo.weight", "language_model.{encoder.block.{n}.layer.1|decoder.block.{n}.layer.2}.DenseReluDense.wo.weight", "l l_mlp"),
    Rename("t5_model.{encoder.block.{n}.layer.1|decoder.block.{n}.layer.2}.layer_norm.weight", "language_model.{encoder.block.{n}.layer.1|decoder.block.{n}.layer.2}.layer_norm.weight", "l"),
    Rename("t5_model.{encoder|decoder}.final_layer_norm.weight", "language_model.{encoder|decoder}.final_layer_norm.weight", "l"),
    Rename("t5_model.lm_head.weight", "language_model.lm_head.weight", "vocab l"),
)
# fmt: on

LANGUAGE = {"opt": OPT, "t5": T5}


def rules(variant: Variant) -> tuple[Rule, ...]:
    """The mapping of one variant."""
    return VISION + QFORMER + LANGUAGE[variant.language.kind]


def dimensions(variant: Variant) -> dict[str, int]:
    """What the letters in the shape column stand for."""
    vision, qformer, language = variant.vision, variant.qformer, variant.language
    return {
        "1": 1,
        "rgb": 3,
        "v": vision.width,
        "3v": 3 * vision.width,
        "v_mlp": vision.mlp,
        "v_tokens": variant.vision_tokens,
        "patch": vision.patch,
        "q": qformer.width,
        "q_mlp": qformer.mlp,
        "q_positions": 512,
        "queries": qformer.queries,
        "l": language.width,
        "l_mlp": language.mlp,
        "l_positions": language.positions + 2,  # OPT reserves two rows
        "vocab": language.vocabulary,
        "heads": language.heads,
        "inner": language.heads * language.head_width,
        "buckets": language.buckets,
    }


def _counters(variant: Variant) -> dict[str, range]:
    layers = variant.qformer.layers
    return {
        "{block}": range(variant.vision.layers),
        "{layer}": range(layers),
        "{cross}": range(0, layers, variant.qformer.cross_every),
        "{n}": range(variant.language.layers),
    }


def entries(variant: Variant, table: Iterable[Rule] | None = None) -> list[Entry]:
    """Every rule written out for this variant: the whole mapping by name and shape, without a single weight.

    Args:
        table: other rules than the variant's own, for those who try some out.

    Raises:
        MappingError: two rules take the same name.
    """
    if table is not None:
        return _written_out(table, dimensions(variant), _counters(variant))
    return list(_entries(variant, rules(variant)))


@functools.cache
def _entries(variant: Variant, table: tuple[Rule, ...]) -> tuple[Entry, ...]:
    return tuple(_written_out(table, dimensions(variant), _counters(variant)))


def plan(
    variant: Variant,
    shapes: Mapping[str, tuple[int, ...]],
    table: Iterable[Rule] | None = None,
    interpolate: bool = False,
) -> Plan:
    """Account for every tensor of a source, by name and shape.

    Args:
        shapes: LAVIS name to shape, of everything the source holds.
        table: other rules than the variant's own, for those who try some out.
        interpolate: positions for another image size are made into the variant's, as LAVIS does with those of the
            vision file (and of no other).

    Raises:
        RequestError: a tensor is missing, unknown, or of another shape, or the source belongs to another variant.
            The sentence names the tensors.
    """
    whole = entries(variant, table)
    by_source = {name: entry for entry in whole for name in entry.sources}
    left_over = {name: unused_by(variant, name) for name in shapes if name not in by_source}
    unused = {name: rule for name, rule in left_over.items() if rule is not None}
    unknown = [name for name in left_over if name not in unused]
    missing = [name for name, entry in by_source.items() if name not in shapes and not entry.optional]
    misshapen = [name for name in by_source if name in shapes and tuple(shapes[name]) != by_source[name].source_shape]
    if interpolate and misshapen == [POSITIONS] and _square(shapes[POSITIONS], by_source[POSITIONS].source_shape):
        whole = [_interpolated(entry, shapes[POSITIONS]) if POSITIONS in entry.sources else entry for entry in whole]
        misshapen = []
    if unknown or missing or misshapen:
        other = recognise(shapes)
        if other is not None and other != variant.name and table is None:
            raise RequestError(
                f"These weights belong to another variant: expected {variant.name}, found what {other} holds "
                f"({_difference(variant, shapes, unknown, misshapen)}). Convert them as {other}."
            )
        raise RequestError(_complaint(variant, shapes, by_source, unknown, missing, misshapen))
    present = [entry for entry in whole if not entry.optional or entry.sources[0] in shapes]
    return Plan(
        variant,
        written=tuple(entry for entry in present if not entry.optional),
        tied=tuple(entry for entry in present if isinstance(entry.rule, Tied)),
        dropped=tuple(entry for entry in present if isinstance(entry.rule, Drop)),
        unused=unused,
    )


POSITIONS = "visual_encoder.pos_embed"


def _square(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether these are positions of another square image: a class token and k × k patches of the same width."""
    patches = found[1] - 1 if len(found) == 3 else 0
    return (*found[:1], *found[2:]) == (1, expected[2]) and patches > 0 and math.isqrt(patches) ** 2 == patches


def _interpolated(entry: Entry, found: tuple[int, ...]) -> Entry:
    rule = entry.rule
    resized = InterpolatePositions(rule.source, rule.target, rule.shape, tokens=entry.shape[1])
    return dataclasses.replace(entry, rule=resized, source_shape=tuple(found))


def check_part(variant: Variant, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a file that holds anything the variant has no place for, by name and shape.

    Raises:
        RequestError: it does; the sentence says of which family of models it is, where that can be told.
    """
    by_source = variant_sources(variant)
    for family in LANGUAGE:
        if family != variant.language.kind and any(name.startswith(f"{family}_") for name in shapes):
            raise RequestError(
                f"{where} is a checkpoint for {family.upper()} (it holds {family}_proj or {family}_model), and "
                f"{variant.name} is built on {variant.language.kind.upper()}. Name the model it was trained from."
            )
    unknown = [name for name in shapes if name not in by_source and unused_by(variant, name) is None]
    misshapen = [name for name in shapes if name in by_source and tuple(shapes[name]) != by_source[name]]
    if misshapen == [POSITIONS] and _square(shapes[POSITIONS], by_source[POSITIONS]):
        misshapen = []  # LAVIS's way to another image size
    if unknown or misshapen:
        by_name = {name: entry for entry in entries(variant) for name in entry.sources}
        raise RequestError(f"{where}: {_complaint(variant, shapes, by_name, unknown, [], misshapen)}")


def unused_by(variant: Variant, name: str) -> Unused | None:
    """The rule that leaves this name out, if one does."""
    for rule in UNUSED:
        pattern = re.escape(rule.source).replace(r"\*", ".*").replace(re.escape("{beyond}"), r"(\d+)")
        match = re.fullmatch(pattern, name)
        if match and (not match.groups() or int(match.group(1)) >= variant.vision.layers):
            return rule
    return None


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The variant whose expected tensors these are, by name and shape, or None.

    Language model and sizes decide; the released and the coco form of one model differ only in their positions.
    """
    for candidate in VARIANTS.values():
        expected = {name: entry for entry in entries(candidate) for name in entry.sources}
        fits = all(
            tuple(shape) == expected[name].source_shape if name in expected else unused_by(candidate, name) is not None
            for name, shape in shapes.items()
        )
        if fits and all(name in shapes for name, entry in expected.items() if not entry.optional):
            return candidate.name
    return None


def _difference(variant: Variant, shapes: Mapping[str, tuple[int, ...]], unknown: list[str], wrong: list[str]) -> str:
    if unknown:
        return f"for one, {unknown[0]}"
    entry = next(entry for entry in entries(variant) if wrong[0] in entry.sources)
    return f"for one, {wrong[0]} is {tuple(shapes[wrong[0]])}, not {entry.source_shape}"


def _complaint(
    variant: Variant,
    shapes: Mapping[str, tuple[int, ...]],
    by_source: Mapping[str, Entry],
    unknown: list[str],
    missing: list[str],
    misshapen: list[str],
) -> str:
    for pattern, words in FOREIGN:
        foreign = next((name for name in unknown if re.search(pattern, name)), None)
        if foreign is not None:
            return f"{foreign} belongs to {words}."
    sentences = []
    if misshapen:
        name = misshapen[0]
        sentences.append(
            f"{_count(misshapen, 'tensor has', 'tensors have')} another shape: {name} is {tuple(shapes[name])}, "
            f"expected {by_source[name].source_shape}"
        )
    if missing:
        sentences.append(f"{_count(missing, 'tensor is', 'tensors are')} missing: {_some(missing)}")
    if unknown:
        near = nearest(unknown[0], by_source)
        hint = f" (the nearest rule takes {near})" if near else ""
        sentences.append(f"{_count(unknown, 'tensor is', 'tensors are')} not in the mapping: {_some(unknown)}{hint}")
    return (
        f"This is not a whole {variant.name}, which has {len(variant_sources(variant))} tensors: "
        + "; ".join(sentences)
        + ". Check that the files are the variant's own and complete."
    )


def variant_sources(variant: Variant) -> dict[str, tuple[int, ...]]:
    """LAVIS name to shape, of everything a whole source of this variant holds, aliases and buffers included."""
    return {name: entry.source_shape for entry in entries(variant) for name in entry.sources}


def parameter_count(variant: Variant) -> int:
    """How many parameters the variant has, each tied tensor counted once."""
    return sum(math.prod(entry.source_shape) * len(entry.sources) for entry in entries(variant) if not entry.optional)


def _count(names: list[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")

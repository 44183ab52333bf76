"""The rules that turn LAVIS's tensors into transformers' and back: one line each, read like the table they are.

A template names tensors on both sides. `{block}` counts the vision tower's blocks, `{layer}` the Q-Former's layers,
`{cross}` those of them with cross-attention, `{n}` the language model's layers; `{weight|bias}` stands for either
word, the same one on both sides. The third column is the shape, in the letters of `dimensions()`; a bias has only
the first of them. Everything here is pure: names and shapes, and arithmetic on the tensors that are handed in.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blip2nb.errors import RequestError
from blip2nb.variants import VARIANTS, Variant

Tensor = Any  # a torch.Tensor; torch itself is not needed here


class MappingError(RequestError):
    """A tensor does not hold what its rule promises, so that the way back would lose something."""


def count_up(shape: tuple[int, ...]) -> list[list[int]]:
    """0, 1, 2, … as one row: what a buffer of position ids holds."""
    return [list(range(shape[-1]))]


@dataclasses.dataclass(frozen=True)
class Rename:
    """The same bytes under another name."""

    source: str
    target: str
    shape: str

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor

    def inverse(self, tensor: Tensor) -> tuple[Tensor]:
        return (tensor,)


@dataclasses.dataclass(frozen=True)
class FuseQueryValueBias:
    """One bias out of two: query, zeros for the key, value. LAVIS does this in every forward pass.

    A constant added to every key's score of a query drops out of the softmax, which is why the key needs no bias,
    and why a wrong one shows in no activation: only this rule's inverse finds it.
    """

    source: str
    target: str
    shape: str

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """Two of shape (width,) and one dtype to one of shape (3 * width,). Tensors, or numpy arrays of their bits."""
        if query.dtype != value.dtype or query.shape != value.shape:
            raise MappingError(
                f"{self.source}: query and value bias should be alike, found {tuple(query.shape)} {query.dtype} and "
                f"{tuple(value.shape)} {value.dtype}. The checkpoint is damaged or was cast in part."
            )
        width = len(query)
        fused = query.repeat(3)  # of the right length in either library; every third is overwritten
        fused[:width] = query
        fused[width : 2 * width] = 0
        fused[2 * width :] = value
        return fused

    def inverse(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves again. Raises MappingError unless the key's third is exactly zero."""
        query, key, value = fused.chunk(3)
        if bool((key != 0).any()) or bool(key.signbit().any()):
            raise MappingError(
                f"{self.target}: the key's third of a fused bias should be zero, found up to {key.abs().max():.3g}. "
                "LAVIS has no key bias, so this tensor cannot go back."
            )
        return query, value


@dataclasses.dataclass(frozen=True)
class InterpolatePositions:
    """The vision tower's position embedding for another image size than the file's, as LAVIS makes it when it builds the
    tower: patches bicubically, the class token kept (lavis/models/eva_vit.py, `interpolate_pos_embed`). Takes the place
    of a `Rename` where the numbers of positions differ."""

    source: str
    target: str
    shape: str
    tokens: int

    def forward(self, positions: Tensor) -> Tensor:
        """(1, 1 + k², width) of any dtype to (1, tokens, width) in float32."""
        from torch import cat
        from torch.nn.functional import interpolate

        positions = positions.float()
        side, new = math.isqrt(positions.shape[1] - 1), math.isqrt(self.tokens - 1)
        patches = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = interpolate(patches, size=(new, new), mode="bicubic", align_corners=False)
        return cat((positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    def inverse(self, positions: Tensor) -> tuple[Tensor]:
        raise MappingError(f"{self.source} was interpolated for another image size, which has no way back.")


@dataclasses.dataclass(frozen=True)
class Tied:
    """A second name of one tensor, in both libraries: accounted for, checked against the original, never written."""

    source: str
    target: str
    of: str
    shape: str


@dataclasses.dataclass(frozen=True)
class Drop:
    """A tensor transformers has no place for. `restore` rebuilds its values from its shape, and the content is
    checked against that, so that nothing is lost."""

    source: str
    why: str
    shape: str
    restore: Callable[[tuple[int, ...]], list]


@dataclasses.dataclass(frozen=True)
class Unused:
    """What a file may hold beyond what LAVIS itself builds: left out by name, reported, and with no way back.

    `{beyond}` is the number of a vision block past the last one LAVIS builds, `*` the rest of a name.
    """

    source: str
    why: str


Rule = Rename | InterpolatePositions | FuseQueryValueBias | Tied | Drop

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


@dataclasses.dataclass(frozen=True)
class Entry:
    """One rule applied to one tensor (or pair): `sources` in the order the rule's `forward` takes them.

    `target` is None for a dropped tensor. `shape` is the target's, or the dropped tensor's own.
    """

    rule: Any  # one of `Rule`: which methods it has, `kind` says
    sources: tuple[str, ...]
    target: str | None
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    of: str | None = None

    @property
    def kind(self) -> str:
        return type(self.rule).__name__

    @property
    def optional(self) -> bool:
        """Aliases and recomputable buffers may be missing from a file; everything else may not."""
        return isinstance(self.rule, Tied | Drop)


def entries(variant: Variant, table: Iterable[Rule] | None = None) -> list[Entry]:
    """Every rule written out for this variant: the whole mapping by name and shape, without a single weight.

    Raises:
        MappingError: two rules take the same name.
    """
    sizes = dimensions(variant)
    counters = _counters(variant)
    out: list[Entry] = []
    for rule in rules(variant) if table is None else table:
        target_template = getattr(rule, "target", None)
        for source, target in _expand(rule.source, target_template, counters):
            dims = [sizes[letter] for letter in rule.shape.split()]
            if source.endswith("bias") and target is not None and target.endswith(".bias"):
                dims = dims[:1]
            if isinstance(rule, FuseQueryValueBias):
                pair = tuple(source.replace("{q,v}", letter) for letter in "qv")
                out.append(Entry(rule, pair, target, (3 * dims[0],), (dims[0],)))
            else:
                out.append(Entry(rule, (source,), target, tuple(dims), tuple(dims), of=getattr(rule, "of", None)))
    for side in (lambda entry: entry.sources, lambda entry: (entry.target,) if entry.target else ()):
        taken: dict[str, Entry] = {}
        for entry in out:
            for name in side(entry):
                if name in taken:
                    raise MappingError(f"Two rules take {name}: {taken[name].rule.source} and {entry.rule.source}.")
                taken[name] = entry
    return out


_CHOICE = re.compile(r"\{([^{}]*(?:\{n\}[^{}]*)*\|[^{}]*(?:\{n\}[^{}]*)*)\}")


def _expand(source: str, target: str | None, counters: Mapping[str, range]) -> Iterable[tuple[str, str | None]]:
    """All (source, target) pairs of a template: first the alternatives, the same on both sides, then the counters."""
    choice = _CHOICE.search(source)
    if choice:
        for word in choice.group(1).split("|"):
            yield from _expand(
                source.replace(choice.group(), word),
                target.replace(choice.group(), word) if target is not None else None,
                counters,
            )
        return
    used = [name for name in counters if name in source]
    for values in itertools.product(*(counters[name] for name in used)):
        one_source, one_target = source, target
        for name, value in zip(used, values, strict=True):
            one_source = one_source.replace(name, str(value))
            one_target = one_target.replace(name, str(value)) if one_target is not None else None
        yield one_source, one_target


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rules applied to one source's names. Every source name is in exactly one entry."""

    variant: Variant
    written: tuple[Entry, ...]
    tied: tuple[Entry, ...]
    dropped: tuple[Entry, ...]
    unused: Mapping[str, Unused]

    def __repr__(self) -> str:
        return (
            f"Plan({self.variant.name}: {len(self.written)} tensors to write, "
            f"{len(self.tied)} tied, {len(self.dropped)} dropped, {len(self.unused)} unused)"
        )


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
        near = difflib.get_close_matches(unknown[0], by_source, n=1, cutoff=0.0)
        nearest = f" (the nearest rule takes {near[0]})" if near else ""
        sentences.append(f"{_count(unknown, 'tensor is', 'tensors are')} not in the mapping: {_some(unknown)}{nearest}")
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

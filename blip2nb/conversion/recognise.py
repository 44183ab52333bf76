"""Which model a source is, and with which sizes: told from the tensors, the language model's configuration, and what
LAVIS's trainer wrote into a checkpoint. Image size, number of queries, language model and prompt may be other than the
variant's; what transformers has no place for is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2nb.errors import RequestError
from blip2nb.families.captioners.mapping import POSITIONS, check_part
from blip2nb.variants import VARIANTS, LanguageSizes, QFormerSizes, Variant, VisionSizes
from blip2nb.weights.sources import Assembled, open_checkpoint, shapes

log = logging.getLogger("blip2nb")


def told_by(path: Path) -> Variant:
    """The variant a checkpoint says it was trained from.

    Raises:
        RequestError: it does not say, or it is none of those that can be converted.
    """
    tensors, config = open_checkpoint(path)
    model = model_config(config)
    if not model:
        raise RequestError(
            f"{path} does not say which model it was trained from, as a file of LAVIS's trainer does. "
            "Name the model: blip2nb convert MODEL --source FILE."
        )
    _refuse_foreign(model, path)
    kind = str(model.get("model_type", ""))
    candidates = [one for one in VARIANTS.values() if one.lavis_type == kind]
    if not candidates:
        raise RequestError(
            f"{path} was trained as {model.get('arch')!r}, model_type {kind!r}, expected one of "
            f"{', '.join(sorted({one.lavis_type for one in VARIANTS.values()}))}. Name the model it is built as."
        )
    for candidate in candidates:
        try:
            check_part(configured(candidate, model), shapes(tensors), str(path))
        except RequestError:
            continue
        return candidate
    return candidates[0]  # of another size than either: what does not fit is said where the parts are put together


def configured(variant: Variant, config: Mapping[str, Any]) -> Variant:
    """The variant with what a training's configuration changes: image size, queries, language model, prompt.

    Args:
        config: as LAVIS's trainer writes it, or the "model" part of it.
    """
    model = model_config(config)
    out = variant
    if isinstance(model.get("image_size"), int):
        out = dataclasses.replace(out, image_size=model["image_size"])
    if isinstance(model.get("num_query_token"), int):
        out = dataclasses.replace(out, qformer=dataclasses.replace(out.qformer, queries=model["num_query_token"]))
    if isinstance(model.get("prompt"), str):
        out = dataclasses.replace(out, prompt=model["prompt"])
    language = model.get(f"{variant.language.kind}_model")
    if isinstance(language, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", language) and ".." not in language:
        out = dataclasses.replace(out, language_model=language)
    return out


def model_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The "model" part of a training's configuration, or the whole where there are no parts."""
    model = config.get("model", config)
    return model if isinstance(model, Mapping) else {}


def _refuse_foreign(model: Mapping[str, Any], path: Path) -> None:
    arch, tower = model.get("arch"), model.get("vit_model", "eva_clip_g")
    known = {variant.lavis_class for variant in VARIANTS.values()} | {one.lavis_type for one in VARIANTS.values()}
    if arch is not None and arch not in known:
        raise RequestError(
            f"{path} was trained as {arch!r}; expected blip2_opt or blip2_t5, BLIP-2's captioners. "
            "Other models of LAVIS cannot be converted."
        )
    if tower != "eva_clip_g":
        raise RequestError(
            f"{path} was trained with the vision tower {tower!r}, expected 'eva_clip_g'. transformers' BLIP-2 has no "
            "other, so it cannot be converted."
        )


def with_language(variant: Variant, text: Mapping[str, Any], where: Path) -> Variant:
    """The variant with the language model that a configuration describes.

    Args:
        text: the language model's own config.json, found at `where`.

    Raises:
        RequestError: it is another kind of language model, one that transformers builds otherwise than LAVIS, or
            another variant's.
    """
    kind = variant.language.kind
    if text.get("model_type") != kind:
        raise RequestError(
            f"{where}: model_type should be {kind} for {variant.name}, found {text.get('model_type')!r}. "
            f"Give the folder of {variant.language_model}."
        )
    try:
        sizes = (_opt_sizes if kind == "opt" else _t5_sizes)(text)
    except KeyError as error:
        raise RequestError(
            f"{where} lacks {error.args[0]}, which a language model's configuration has. Copy it from the hub page."
        ) from error
    if kind == "t5" and text.get("num_decoder_layers", sizes.layers) != sizes.layers:
        raise RequestError(f"{where}: encoder and decoder should have as many layers as each other, as LAVIS's have.")
    if sizes == variant.language:
        return variant
    for other in VARIANTS.values():
        if other.language == sizes and (other.vision, other.image_size) == (variant.vision, variant.image_size):
            raise RequestError(
                f"These weights belong to another variant: expected {variant.name}, found what {other.name} holds "
                f"(a language model of width {sizes.width}). Convert them as {other.name}."
            )
    log.info(
        "another language model than %s's: width %d, %d layers, %d tokens",
        variant.name, sizes.width, sizes.layers, sizes.vocabulary,
    )  # fmt: skip
    return dataclasses.replace(variant, language=sizes)


def _opt_sizes(text: Mapping[str, Any]) -> LanguageSizes:
    return LanguageSizes(
        "opt",
        width=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        mlp=text["ffn_dim"],
        vocabulary=text["vocab_size"],
        positions=text["max_position_embeddings"],
    )


def _t5_sizes(text: Mapping[str, Any]) -> LanguageSizes:
    return LanguageSizes(
        "t5",
        width=text["d_model"],
        layers=text["num_layers"],
        heads=text["num_heads"],
        mlp=text["d_ff"],
        vocabulary=text["vocab_size"],
        head_width=text["d_kv"],
        buckets=text.get("relative_attention_num_buckets", 32),
    )


_EMBEDDINGS = {"opt": "opt_model.model.decoder.embed_tokens.weight", "t5": "t5_model.shared.weight"}
_LAYERS = {"opt": r"opt_model\.model\.decoder\.layers\.(\d+)\.", "t5": r"t5_model\.encoder\.block\.(\d+)\."}


def with_sizes(variant: Variant, source: Assembled, where: Path) -> Variant:
    """The variant with the image size, the queries and the prompt that its tensors and its training say.

    Args:
        source: all of its tensors.
        where: the language model's configuration, for the sentence that says it does not fit.

    Raises:
        RequestError: the training was of a model that cannot be converted, or the language model's weights are not
            those its configuration describes.
    """
    found = source.shapes()
    _check_language(variant, found, where)
    out = variant
    if source.trained(POSITIONS):
        side = math.isqrt(max(found[POSITIONS][1] - 1, 0))
        out = dataclasses.replace(out, image_size=side * variant.vision.patch)
    if "query_tokens" in found and len(found["query_tokens"]) == 3:
        queries = found["query_tokens"][1]
        out = dataclasses.replace(out, qformer=dataclasses.replace(out.qformer, queries=queries))
    for config in source.configs:
        if model_config(config):
            _refuse_foreign(model_config(config), where)
            told = configured(out, config)
            out = dataclasses.replace(out, prompt=told.prompt, image_size=told.image_size)
    if out.image_size % out.vision.patch:
        raise RequestError(
            f"The image size should be a multiple of {out.vision.patch}, the vision tower's patch, found "
            f"{out.image_size}."
        )
    for what, before, after in (
        ("image size", variant.image_size, out.image_size),
        ("number of queries", variant.qformer.queries, out.qformer.queries),
        ("prompt", variant.prompt, out.prompt),
    ):
        if before != after:
            log.info("%s: %r, not %r as %s has it", what, after, before, variant.name)
    return out


def _check_language(variant: Variant, found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    language = variant.language
    width, layers = ("hidden_size", "num_hidden_layers") if language.kind == "opt" else ("d_model", "num_layers")
    numbers = {int(match.group(1)) for name in found if (match := re.match(_LAYERS[language.kind], name))}
    held = {layers: len(numbers)}
    if len(found.get(_EMBEDDINGS[language.kind], ())) == 2:
        held |= dict(zip(("vocab_size", width), found[_EMBEDDINGS[language.kind]], strict=True))
    said = {layers: language.layers, "vocab_size": language.vocabulary, width: language.width}
    for name, value in held.items():
        if said[name] != value:
            raise RequestError(
                f"{where}: {name} should be {value}, as the weights have it, found {said[name]}. "
                f"Give the folder of {variant.language_model}, whole and unmixed."
            )


def from_config(config: Mapping[str, Any], where: Path) -> Variant:
    """The variant that a BLIP-2 directory of transformers is, by its config.json: the released one of these sizes, or
    the nearest, with these sizes.

    Raises:
        RequestError: it is no BLIP-2 captioner on OPT or T5.
    """
    text, vision, qformer = (config.get(f"{part}_config", {}) for part in ("text", "vision", "qformer"))
    kind = text.get("model_type", "opt")
    if config.get("model_type") != "blip-2" or kind not in ("opt", "t5"):
        raise RequestError(
            f"{where} should be of a BLIP-2 model on OPT or T5, found {config.get('model_type')!r} on {kind!r}."
        )
    sizes = (_opt_sizes if kind == "opt" else _t5_sizes)({**_DEFAULTS[kind], **text})
    # where a configuration is silent, it has what is transformers' own default
    tower = VisionSizes(
        width=vision.get("hidden_size", 1408),
        layers=vision.get("num_hidden_layers", 39),
        heads=vision.get("num_attention_heads", 16),
        mlp=vision.get("intermediate_size", 6144),
        patch=vision.get("patch_size", 14),
    )
    queries = QFormerSizes(
        width=qformer.get("hidden_size", 768),
        layers=qformer.get("num_hidden_layers", 12),
        heads=qformer.get("num_attention_heads", 12),
        mlp=qformer.get("intermediate_size", 3072),
        queries=config.get("num_query_tokens", 32),
        cross_every=qformer.get("cross_attention_frequency", 2),
    )
    known = [one for one in VARIANTS.values() if one.language.kind == kind]
    side = vision.get("image_size", 224)
    known.sort(key=lambda one: (one.language != sizes, one.vision != tower, one.image_size != side))
    return dataclasses.replace(known[0], image_size=side, vision=tower, qformer=queries, language=sizes)


# What transformers 4 left out of a configuration because it was the default
_DEFAULTS: dict[str, dict[str, int]] = {
    "opt": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    },
    "t5": {"d_model": 512, "num_layers": 6, "num_heads": 8, "d_ff": 2048, "vocab_size": 32128, "d_kv": 64},
}

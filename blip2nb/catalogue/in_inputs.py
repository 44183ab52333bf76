"""Faults in what a captioner is called with: where each fits, and making it. For the catalogue in `captioners`.

A recording holds one text at a time, so that nothing in it is padded: padding can be added to what transformers is
called with, but padding at the wrong side of a shorter text cannot be told from that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from blip2nb.catalogue.planting import Target
from blip2nb.catalogue.right import RightModel
from blip2nb.families.captioners import huggingface

if TYPE_CHECKING:
    from PIL.Image import Image

Inputs = dict[str, Any]
Where = Callable[[RightModel], list[Target]]
How = Callable[[RightModel, huggingface.Loaded, Target], Inputs]

EMBEDS, MASK, ANSWER = "language.inputs_embeds", "language.attention_mask", "language.decoder.input_ids"
"""The stages where the language model takes in the text, which of it to see, and T5 its answer."""


# -- where they fit


def at_image(_: RightModel) -> list[Target]:
    """A mistake in the image shows in its pixels."""
    return [Target(("vision_model",), ("images",), stages=("pixels",))]


def at_text(*, kind: str = "", stages: tuple[str, ...] = (EMBEDS,), forms: tuple[str, ...] = ("",)) -> Where:
    """A mistake in the text shows where the language model takes it in.

    Args:
        kind: only where the language model is of this kind.
    """

    def where(right: RightModel) -> list[Target]:
        if kind and right.variant.language.kind != kind:
            return []
        return [Target(("language_model",), ("text",), form, stages) for form in forms]

    return where


def at_longer_text(*, kind: str = "", forms: tuple[str, ...] = ("",)) -> Where:
    """More tokens or fewer: the mask has another length too."""
    return at_text(kind=kind, stages=(EMBEDS, MASK), forms=forms)


def at_mask(right: RightModel) -> list[Target]:
    """Two forms: what should be seen is hidden, of the image or of the text."""
    # OPT counts its positions by the mask
    stages = (MASK, *(["language.positions"] if right.variant.language.kind == "opt" else []))
    forms = ("image tokens hidden", "last token hidden")
    return [Target(("language_model",), ("attention_mask",), form, stages) for form in forms]


def at_answer(right: RightModel) -> list[Target]:
    """Only T5 has a decoder that is shown an answer."""
    if right.variant.language.kind != "t5":
        return []
    return [Target(("language_model.decoder",), ("text",), stages=(ANSWER,))]


# -- images


def with_image(change: Callable[[Image], Any]) -> How:
    """Another image than LAVIS was shown."""

    def how(right: RightModel, loaded: huggingface.Loaded, _: Target) -> Inputs:
        image = change(right.image)
        pixels = loaded.processor.image_processor([image], return_tensors="pt")["pixel_values"]
        return {**right.prepared(loaded), "pixel_values": pixels.expand_as(right.inputs["pixel_values"]).contiguous()}

    return how


def blue_first(image: Image) -> Image:
    """As OpenCV reads it."""
    from PIL import Image as PIL

    return PIL.merge("RGB", image.split()[::-1])


def default_processor(right: RightModel, loaded: huggingface.Loaded, _: Target) -> Inputs:
    """The image processor that transformers takes unless it is asked for PIL's."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(right.folder, local_files_only=True)
    pixels = processor([right.image] * len(right.texts["text_input"]), return_tensors="pt")["pixel_values"]
    return {**right.prepared(loaded), "pixel_values": pixels}


def mirrored(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def rescaled_already(image: Image) -> Any:
    """Between 0 and 1, as the processor is about to make it."""
    import numpy as np

    return np.asarray(image, dtype=np.float32) / 255


# -- texts


def with_text(change: Callable[[str], str]) -> How:
    """Another text where LAVIS's was meant."""

    def how(right: RightModel, loaded: huggingface.Loaded, _: Target) -> Inputs:
        texts = {**right.texts, "text_input": [change(text) for text in right.texts["text_input"]]}
        return huggingface.forward_inputs(loaded, right.variant, right.image, texts)

    return how


def exchange_words(text: str) -> str:
    """A prompt of as many tokens that asks something else."""
    return text.replace("photo", "picture") if "photo" in text else f"{text} of"


def with_tokens(change: Callable[[torch.Tensor, RightModel], torch.Tensor]) -> How:
    """Other token ids, (batch, positions), than the processor gives; all of them are attended to."""

    def how(right: RightModel, loaded: huggingface.Loaded, _: Target) -> Inputs:
        inputs = right.prepared(loaded)
        ids = change(inputs["input_ids"], right)
        mask = inputs["attention_mask"]
        if ids.shape != mask.shape:
            mask = torch.ones_like(ids)
        return {**inputs, "input_ids": ids, "attention_mask": mask}

    return how


def without(column: Callable[[torch.Tensor, RightModel], torch.Tensor]) -> How:
    """Leave out the tokens of a column: the same one of each row."""

    def change(ids: torch.Tensor, right: RightModel) -> torch.Tensor:
        keep = ~column(ids, right)
        return torch.stack([row[kept] for row, kept in zip(ids, keep, strict=True)])

    return with_tokens(change)


def first_text(ids: torch.Tensor, right: RightModel) -> torch.Tensor:
    """The first token that is not the image's, of each row: OPT's beginning of a sequence."""
    text = ids != right.loaded.model.config.image_token_id
    return text & (text.cumsum(-1) == 1)


def last(ids: torch.Tensor, _: RightModel) -> torch.Tensor:
    """The last column. OPT's texts end in a line break, T5's in the end of the sequence."""
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    return last


def text_first(ids: torch.Tensor, right: RightModel) -> torch.Tensor:
    """The image behind the text."""
    token = right.loaded.model.config.image_token_id
    rows = [torch.cat([row[row != token], row[row == token]]) for row in ids]
    return torch.stack(rows)


def one_more(ids: torch.Tensor, right: RightModel) -> torch.Tensor:
    """An end of the sequence behind the text, as tokenizers of other families add."""
    end = right.loaded.processor.tokenizer.eos_token_id
    return torch.cat([ids, torch.full((len(ids), 1), end)], dim=1)


PADS = ("left", "right", "left and seen", "right and seen")
"""On which side, and whether the mask shows what should be hidden."""

_MORE = 4  # tokens; any number shows, since a recording's text has none


def padded(right: RightModel, loaded: huggingface.Loaded, target: Target) -> Inputs:
    """Padded to more tokens than needed, with a mask that hides them or with none."""
    inputs = right.prepared(loaded)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pads = torch.full((len(ids), _MORE), loaded.processor.tokenizer.pad_token_id)
    none = torch.ones_like(pads) if "seen" in target.form else torch.zeros_like(pads)
    left = target.form.startswith("left")
    return {
        **inputs,
        "input_ids": torch.cat([pads, ids] if left else [ids, pads], dim=1),
        "attention_mask": torch.cat([none, mask] if left else [mask, none], dim=1),
    }


def masked(right: RightModel, loaded: huggingface.Loaded, target: Target) -> Inputs:
    """The same tokens, one of them or the image's hidden."""
    inputs = right.prepared(loaded)
    mask = inputs["attention_mask"].clone()
    if target.form == "last token hidden":
        mask[:, -1] = 0
    else:
        mask[inputs["input_ids"] == loaded.model.config.image_token_id] = 0
    return {**inputs, "attention_mask": mask}


# -- answers


def with_answer(change: Callable[[torch.Tensor], torch.Tensor]) -> How:
    """Another answer than the one that T5's decoder was shown."""

    def how(right: RightModel, loaded: huggingface.Loaded, _: Target) -> Inputs:
        inputs = right.prepared(loaded)
        return {**inputs, "labels": change(inputs["labels"])}

    return how

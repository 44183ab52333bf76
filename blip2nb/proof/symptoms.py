"""What goes into the model, looked at before the model is: pixels and tokens, and why they may not be LAVIS's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from blip2nb.families.captioners.configuration import IMAGE_MEAN, IMAGE_STD
from blip2nb.families.captioners.huggingface import Loaded
from blip2nb.families.captioners.stages import token_ids
from blip2nb.trace import arrivals
from blip2nb.trace.causes import Cause, CounterTest
from blip2nb.trace.metrics import distance
from blip2nb.trace.tape import Tape
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = "vision_model.embeddings"
TOKENS = "language_model"

_BICUBIC = 3  # PIL's number for it


def pixel_causes(loaded: Loaded, variant: Variant, image: Image, found: torch.Tensor, tape: Tape) -> list[Cause]:
    """Why the pixel values are not LAVIS's, the likeliest first; none where they are."""
    expected = tape["pixel_values"]
    if torch.equal(found.cpu(), expected):
        return []
    processor = loaded.processor.image_processor
    wrong = {
        name: value for name, value in _right(variant).items() if not _equal(getattr(processor, name, None), value)
    }
    causes = []
    for name in wrong:
        own = _word(getattr(processor, name, None))
        words = f"the image processor's {name} is {own}, LAVIS's {_word(wrong[name])}"
        now = processor(images=[image], return_tensors="pt", **wrong)["pixel_values"]
        before, after = distance(found, expected), distance(now, expected)
        change = f"with {', '.join(f'{key} {_word(value)}' for key, value in wrong.items())}"
        test = CounterTest(change, (before, after), (math.inf, 1.0 if after == 0 else math.inf), after == 0)
        causes.append(Cause(_PROCESSOR[name], words, PIXELS, "read off the image processor", test))
    return causes or [arrivals.explain(PIXELS, "pixel_values", found, expected, {})]


_PROCESSOR = {
    "image_mean": "image_mean_std", "image_std": "image_mean_std", "do_normalize": "image_mean_std",
    "do_rescale": "image_mean_std", "rescale_factor": "image_mean_std", "resample": "interpolation",
    "size": "interpolation", "do_resize": "interpolation", "do_center_crop": "interpolation",
    "do_convert_rgb": "pixels",
}  # fmt: skip
"""What each setting of the image processor is a cause of."""


def _right(variant: Variant) -> dict[str, Any]:
    side = variant.image_size
    return {
        "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD, "resample": _BICUBIC, "size": {"height": side, "width": side},
        "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
    }  # fmt: skip


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return {name: getattr(found, name, None) or dict(found or {}).get(name) for name in wanted} == dict(wanted)
    if isinstance(wanted, tuple):
        return isinstance(found, list | tuple) and tuple(found) == wanted
    return found == wanted


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(f"{one:.4g}" for one in value) + ")"
    if hasattr(value, "height"):
        return f"{value.height} × {value.width}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def token_causes(loaded: Loaded, variant: Variant, inputs: Mapping[str, Any], tape: Tape) -> list[Cause]:
    """Why the text is not what LAVIS's language model reads; none where it is, or where that was not recorded."""
    place = token_ids(variant)
    ids = inputs.get("input_ids")
    if place not in tape or not isinstance(ids, torch.Tensor):
        return []
    tokenizer, placeholder = loaded.processor.tokenizer, loaded.model.config.image_token_id
    causes = []
    for ours, theirs in zip(ids.tolist(), tape[place].tolist(), strict=False):
        front = next((number for number, token in enumerate(ours) if token != tokenizer.pad_token_id), 0)
        images = [number - front for number, token in enumerate(ours) if token == placeholder]
        text = [token for token in ours[front:] if token != placeholder]
        if front and theirs[0] != tokenizer.pad_token_id:
            words = f"{front} padding tokens stand in front, where LAVIS has none"
            causes.append(Cause("padding_side", words, TOKENS, "read off the input ids"))
        if images != list(range(variant.qformer.queries)):
            first = f"at {images[0]}" if images else "nowhere"
            words = f"the image's {len(images)} places begin {first}, LAVIS's {variant.qformer.queries} at 0"
            id = "sequence_order" if len(images) == variant.qformer.queries else "tokens"
            causes.append(Cause(id, words, TOKENS, "read off the input ids"))
        if text != theirs:
            causes.append(_text(text, theirs, tokenizer))
    return causes


def _text(ours: list[int], theirs: list[int], tokenizer: Any) -> Cause:
    def read(ids: list[int]) -> str:
        return repr(tokenizer.decode(ids))

    words = f"{read(ours)} is read, by LAVIS {read(theirs)}"
    pad = tokenizer.pad_token_id
    bare = [[token for token in ids if token != pad] for ids in (ours, theirs)]
    if bare[0] == bare[1] and len(ours) == len(theirs):
        side = "left" if ours[0] == pad else "right"
        return Cause("padding_side", f"the text is padded on the {side}: {words}", TOKENS, "the same tokens elsewhere")
    if bare[0] == bare[1]:
        return Cause("padding_side", f"the text is padded otherwise: {words}", TOKENS, "the tokens but for padding")
    if theirs[1:] == ours and theirs[0] == tokenizer.bos_token_id:
        return Cause(
            "bos_missing", f"the beginning-of-sequence token is missing: {words}", TOKENS, "compared one by one"
        )
    if theirs[:-1] == ours and tokenizer.decode([theirs[-1]]).strip(" ") == "\n":
        return Cause(
            "newline_missing", f"the line break behind the text is missing: {words}", TOKENS, "compared one by one"
        )
    special = set(tokenizer.all_special_ids)
    plain = [[token for token in ids if token not in special] for ids in (ours, theirs)]
    id = "tokens" if plain[0] == plain[1] else "prompt"
    return Cause(id, words, TOKENS, "compared one by one")

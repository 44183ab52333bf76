"""The transformers side of a converted directory: loading it as its users do, and running it."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.families.captioners.recording import Captioned
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Blip2ForConditionalGeneration, Blip2Processor


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A converted model as its users load it."""

    model: Blip2ForConditionalGeneration
    processor: Blip2Processor


def import_all() -> None:
    """Import what `load` needs, which takes seconds. A conversion that follows then writes its configuration with it,
    and not by a process that imports half of it again."""
    from transformers import AutoProcessor, Blip2ForConditionalGeneration  # noqa: F401


def load(folder: Path, dtype: str = "float32") -> Loaded:
    """Load a converted directory with `from_pretrained`: on the CPU, in eval mode, with the PIL image processor.

    Args:
        dtype: "float32", "bfloat16" or "float16"; transformers keeps some parts in float32 whatever it is.

    Raises:
        RequestError: the directory lacks a tensor of the model, or holds one too many.
    """
    import torch
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    try:
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = Blip2ForConditionalGeneration.from_pretrained(
                folder, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
            )
        processor = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        if memory_ran_out(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise RequestError(
            f"{folder} does not load ({type(error).__name__}: {first}). Convert again with overwrite."
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise RequestError(f"{folder} does not load whole: {what.replace('_', ' ')}: {sorted(info[what])[:3]}.")
    return Loaded(model.eval(), processor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warning that T5's lm_head stays untied, which is what is wanted, and without its bar, which
    in an executed notebook is a widget that stands at 0 %."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def forward_inputs(loaded: Loaded, variant: Variant, image: Image, texts: dict[str, list[str]]) -> dict[str, Any]:
    """What to call the model with to compute what LAVIS's `forward` computes on the same image and texts."""
    words = texts["text_input"]
    if variant.language.kind == "opt":
        words = [f"{word}\n" for word in words]
    inputs = dict(loaded.processor(images=[image] * len(words), text=words, return_tensors="pt", padding=True))
    if variant.language.kind == "t5":
        answer = loaded.processor.tokenizer(texts["text_output"], return_tensors="pt", padding=True)
        inputs["labels"] = answer.input_ids.masked_fill(answer.attention_mask == 0, -100)
    inputs["use_cache"] = False
    return {name: value.to(loaded.model.device) if hasattr(value, "to") else value for name, value in inputs.items()}


def caption(loaded: Loaded, images: list[Image], prompt: str, **options: Any) -> Captioned:
    """Caption images with `generate` and the processor's own output.

    Returns:
        Token ids and text, and where one beam is followed `steps`.
    """
    import torch

    from blip2nb.families.captioners.lavis import ladder, until

    inputs = loaded.processor(images=images, text=[prompt] * len(images), return_tensors="pt").to(loaded.model.device)
    language = loaded.model.language_model
    greedy = options.get("num_beams") == 1
    with torch.no_grad():
        out = loaded.model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=greedy)
    start = 1 if language.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    end = language.config.eos_token_id
    ids = [until(row[start:].tolist(), end) for row in out.sequences]
    texts = loaded.processor.batch_decode(ids, skip_special_tokens=True)
    said: Captioned = {"ids": ids, "text": [one.strip() for one in texts]}
    if greedy:
        said["steps"] = ladder(ids, out.logits)
    return said

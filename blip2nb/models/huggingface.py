"""The transformers side: configuration and processor of a converted directory, and loading it as a user would."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.errors import RequestError
from blip2nb.variants import Variant

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Blip2ForConditionalGeneration, Blip2Processor, PreTrainedTokenizerBase

# LAVIS's `generate`, by the names transformers gives the same settings. LAVIS's min_length of 1 is met by the prompt's
# first token, so that it never holds a caption back; transformers' min_new_tokens would.
GENERATION = {"num_beams": 5, "max_new_tokens": 30, "length_penalty": 1.0}

# What `Blip2Image…Processor`s of both libraries normalise with: CLIP's statistics
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A converted model as its users load it."""

    model: Blip2ForConditionalGeneration
    processor: Blip2Processor


def load(folder: Path) -> Loaded:
    """Load a converted directory with `from_pretrained`: float32 on the CPU, eval mode, the PIL image processor.

    Raises:
        RequestError: the directory lacks a tensor of the model, or holds one too many.
    """
    import torch
    from transformers import AutoProcessor, Blip2ForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that T5's lm_head stays untied, which is what is wanted
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = Blip2ForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise RequestError(f"{folder} does not load whole: {what.replace('_', ' ')}: {sorted(info[what])[:3]}.")
    processor = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    return Loaded(model.eval(), processor)


def write_configuration(
    variant: Variant, text: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "float32"
) -> None:
    """Write config.json, generation_config.json and the processor's files into `folder`.

    Args:
        text, tokenizer: the language model's own, as `read_language_config` and `load_tokenizer` give them. The
            tokenizer gets `<image>` added.
        dtype: what `from_pretrained` is to load the weights as, unless it is told otherwise.

    Raises:
        RequestError: the tokenizer has more entries than the embedding has rows.
    """
    newline = tokenizer("\n", add_special_tokens=False).input_ids
    write_processor(variant, tokenizer, folder)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    if image_token >= variant.language.vocabulary:
        raise RequestError(
            f"{tokenizer.name_or_path}: <image> would be token {image_token}, but the embedding has "
            f"{variant.language.vocabulary} rows. The tokenizer belongs to another language model."
        )
    config = model_config(variant, text, image_token, newline[0] if newline else None)
    config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    ends = {
        name: config["text_config"][name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
        if name in config["text_config"]
    }
    _write_json(folder / "generation_config.json", {**ends, **GENERATION})


def model_config(variant: Variant, text: dict[str, Any], image_token: int, newline: int | None) -> dict[str, Any]:
    """The content of config.json.

    Args:
        text: the language model's own config.json.
        newline: the token LAVIS ends an OPT caption with.
    """
    vision, qformer = variant.vision, variant.qformer
    text = {
        name: value
        for name, value in text.items()
        if name not in ("_name_or_path", "torch_dtype", "transformers_version")
    }
    if variant.language.kind == "opt":
        text["eos_token_id"] = newline
    else:
        # LAVIS overrides the activation; a BOS is needed to caption without a prompt; lm_head has weights of its own
        text |= {"dense_act_fn": "gelu", "bos_token_id": 1, "tie_word_embeddings": False}
    config: dict[str, Any] = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "dtype": "float32",  # without it, loading takes one tensor's dtype and rounds the rest
        "image_token_index": image_token,
        "num_query_tokens": qformer.queries,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "use_decoder_only_language_model": variant.language.kind == "opt",
        "is_encoder_decoder": variant.language.kind == "t5",
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": variant.image_size,
            "patch_size": vision.patch,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "hidden_size": qformer.width,
            "intermediate_size": qformer.mlp,
            "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": vision.width,
        },
        "text_config": text,
    }
    if variant.language.kind == "t5":
        config["tie_word_embeddings"] = False  # transformers 4 reads it here
    return config


def read_language_config(variant: Variant, folder: Path) -> dict[str, Any]:
    """The language model's config.json, checked against the variant's sizes.

    Raises:
        RequestError: it is missing, unreadable, or of another model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} should be the language model's configuration ({error}).") from error
    language = variant.language
    width, layers = ("hidden_size", "num_hidden_layers") if language.kind == "opt" else ("d_model", "num_layers")
    expected = {
        "model_type": language.kind,
        width: language.width,
        layers: language.layers,
        "vocab_size": language.vocabulary,
    }
    for name, value in expected.items():
        if config.get(name) != value:
            raise RequestError(
                f"{path}: {name} should be {value} for {variant.name}, found {config.get(name)!r}. "
                f"Give the folder of {variant.language_model}."
            )
    return config


def load_tokenizer(variant: Variant, folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer from its folder, no network, no remote code.

    Raises:
        RequestError: there is none, or it does not begin and end a text as the language model expects.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # transformers would make an empty tokenizer of it, without a word
        raise RequestError(
            f"{folder} should hold the language model's tokenizer too: tokenizer.json, or vocab.json with merges.txt. "
            "Copy it from the language model's hub page."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        ids = tokenizer("a").input_ids
    except Exception as error:  # the tokenizers library raises nothing narrower
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{folder} should hold the language model's tokenizer too ({first}).") from error
    place, wanted = (0, tokenizer.bos_token_id) if variant.language.kind == "opt" else (-1, tokenizer.eos_token_id)
    if ids[place] != wanted:
        raise RequestError(
            f"{folder}: the tokenizer should put token {wanted} at the {'end' if place else 'start'} of a text, "
            "and does not. Its tokenizer_config.json is missing or another model's; copy it from the hub page."
        )
    return tokenizer


def write_processor(variant: Variant, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save image processor and tokenizer together; this adds `<image>` to the tokenizer."""
    from transformers import Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    side = variant.image_size
    images = BlipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_STD)
    )
    Blip2Processor(images, tokenizer, num_query_tokens=variant.qformer.queries).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("local_files_only", "is_local", "name_or_path"):  # how it was loaded here is nobody else's business
        config.pop(name, None)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 knows them by another name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    _write_json(path, config)


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


def caption(loaded: Loaded, images: list[Image], prompt: str, **options: Any) -> dict[str, list]:
    """Caption images with `generate` and the processor's own output.

    Returns:
        {"ids": one list per image, from the first new token to the end-of-sequence token, "text": one string per image}
    """
    import torch

    from blip2nb.models.lavis import until

    inputs = loaded.processor(images=images, text=[prompt] * len(images), return_tensors="pt").to(loaded.model.device)
    language = loaded.model.language_model
    with torch.no_grad():
        out = loaded.model.generate(**inputs, **options)
    start = 1 if language.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    end = language.config.eos_token_id
    ids = [until(row[start:].tolist(), end) for row in out]
    return {"ids": ids, "text": [one.strip() for one in loaded.processor.batch_decode(ids, skip_special_tokens=True)]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

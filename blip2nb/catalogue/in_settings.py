"""Faults in a captioner's configuration: where each fits, and writing it. For the catalogue in `captioners`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from blip2nb.catalogue.anatomy import ACTIVATIONS, activations, attentions, norms
from blip2nb.catalogue.in_code import EPS
from blip2nb.catalogue.planting import Target
from blip2nb.families.captioners.configuration import IMAGE_MEAN, IMAGE_STD


def configured(folder: Path, target: Target) -> None:
    """Targets name the file's settings as `setting=value`, the value in JSON."""
    for name in target.names:
        setting, _, value = name.partition("=")
        path = folder / ("processor_config.json" if setting.startswith("image_processor.") else "config.json")
        _edit(path, setting, json.loads(value))


def _edit(path: Path, setting: str, value: Any) -> None:
    """Set one value in a JSON file, by its dotted path. Raises ValueError where it is that already."""
    content = json.loads(path.read_text(encoding="utf-8"))
    *parents, name = setting.split(".")
    part = functools.reduce(lambda inner, key: inner[key], parents, content)
    if part.get(name) == value:
        raise ValueError(f"{setting} is {value!r} already.")
    part[name] = value
    path.unlink()  # not written through a link
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_TOWERS = {"vision_model": "vision_config", "qformer": "qformer_config", "language_model": "text_config"}
_ENCODERS = ("vision_model", "qformer")


def _tower(path: str) -> str:
    return path.split(".")[0]


def _settings_of(model: Any, name: str, found: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """For each tower that has it: the setting's dotted path, and those of the modules that it configures."""
    for tower, config in _TOWERS.items():
        modules = tuple(path for path in found if _tower(path) == tower)
        if modules and hasattr(model.get_submodule(tower).config, name):
            yield f"{config}.{name}", modules


def eps_settings(model: Any) -> Iterator[Target]:
    """Each tower's eps, with the others that its norms could have."""
    eps = {path: getattr(module, attribute) for path, module, attribute in norms(model)}
    for name in ("layer_norm_eps", "layer_norm_epsilon"):
        for setting, modules in _settings_of(model, name, eps):
            for value in EPS:
                if eps[modules[0]] != value:
                    # with LAVIS's own eps in all of the tower, the post layer norm is right at last
                    wrong = tuple(one for one in modules if not (one.endswith("post_layernorm") and value == 1e-5))
                    yield Target(wrong, (f"{setting}={value}",), f"{value:g}")


def activation_settings(model: Any) -> Iterator[Target]:
    """Each tower's activation function, with every other."""
    kinds = dict(activations(model))
    for name in ("hidden_act", "activation_function", "dense_act_fn"):
        for setting, modules in _settings_of(model, name, kinds):
            for other in ACTIVATIONS:
                if other != kinds[modules[0]]:
                    yield Target(modules, (f'{setting}="{other}"',), f"{kinds[modules[0]]} → {other}")


def head_settings(model: Any) -> Iterator[Target]:
    """Each tower's number of heads, halved and doubled."""
    # T5's would need another table of relative positions too, and is refused when it is loaded
    heads = {one.path: one.heads for one in attentions(model) if not _seq2seq(model) or _tower(one.path) in _ENCODERS}
    for setting, modules in _settings_of(model, "num_attention_heads", heads):
        for form, value in (("half as many", heads[modules[0]] // 2), ("twice as many", heads[modules[0]] * 2)):
            width = model.get_submodule(_tower(modules[0])).config.hidden_size
            if value and width % value == 0:
                yield Target(modules, (f"{setting}={value}",), form)


def _seq2seq(model: Any) -> bool:
    return bool(model.language_model.config.is_encoder_decoder)


def tie_setting(model: Any) -> Iterator[Target]:
    """T5: flan-t5's own is false."""
    if _seq2seq(model):
        yield Target(("language_model.lm_head",), ("text_config.tie_word_embeddings=true",))


def distance_setting(model: Any) -> Iterator[Target]:
    """T5: flan-t5's own is 128."""
    if _seq2seq(model):
        paths = tuple(
            f"language_model.{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
            for stack in ("encoder", "decoder")
        )
        names = ("text_config.relative_attention_max_distance=32",)
        yield Target(paths, names, stages=("language.encoder.position_bias",))


def start_setting(model: Any) -> Iterator[Target]:
    """T5: it starts with the padding, 0; 1 is the end of the sequence."""
    if _seq2seq(model):
        names = ("text_config.decoder_start_token_id=1",)
        yield Target(("language_model.decoder",), names, stages=("language.decoder.input_ids",))


def image_token_setting(model: Any) -> Iterator[Target]:
    """A token that is not in the text: nothing is replaced by the image."""
    names = (f"image_token_index={model.config.image_token_id + 1}",)
    yield Target(("language_model",), names, stages=("language.inputs_embeds",))


STATISTICS = (
    "image_mean=[0.485, 0.456, 0.406]; image_std=[0.229, 0.224, 0.225]",  # ImageNet's
    "image_mean=[0.5, 0.5, 0.5]; image_std=[0.5, 0.5, 0.5]",  # many vision transformers'
    f"image_mean={list(IMAGE_STD)}; image_std={list(IMAGE_MEAN)}",  # one for the other
    "do_normalize=false",
)
FILTERS = ("resample=0", "resample=1", "resample=2")  # PIL's nearest, Lanczos and bilinear; CLIP's is 3, bicubic
FACTORS = ("do_rescale=false", "rescale_factor=0.00390625")  # not at all, or by 1/256


def image_settings(*settings: str) -> Callable[[Any], Iterator[Target]]:
    """Each setting of the image processor is a target of its own."""

    def where(_: Any) -> Iterator[Target]:
        for setting in settings:
            names = tuple(f"image_processor.{one}" for one in setting.split("; "))
            yield Target(("vision_model",), names, setting, stages=("pixels",))

    return where

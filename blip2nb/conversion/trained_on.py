"""Which files a fine-tuning began from, by its own configuration, and whether these are the ones that the kit takes.

LAVIS trains on top of what its configuration names, and its trainer saves little more than what was trained. The kit
completes such a checkpoint with the released files of its model type. They are the right ones only if the configuration
names them too, or if the checkpoint needs nothing of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from blip2nb.conversion.recognise import model_config
from blip2nb.families.captioners.mapping import entries
from blip2nb.variants import RELEASED, VARIANTS, Variant
from blip2nb.weights.download import LAVIS_URL

_TABLE = [VARIANTS[name] for name in RELEASED]
_PRETRAINED = {one.language_model: one.checkpoint for one in _TABLE if not one.vision_in_checkpoint}

DEFAULTS: dict[str, dict[str, Any]] = {
    one.lavis_type: {
        "load_finetuned": one.vision_in_checkpoint,
        "load_pretrained": True,
        "pretrained": LAVIS_URL + _PRETRAINED[one.language_model],
        "finetuned": LAVIS_URL + one.checkpoint if one.vision_in_checkpoint else "",
        one.language_prefix: one.language_model,
        "resume_ckpt_path": None,
    }
    for one in _TABLE
}
"""LAVIS's model type → the settings that decide what lies under a training, as lavis/configs/models/blip2/*.yaml have
them, in 1.0.2 and on GitHub. Two are not there: `load_pretrained` is as lavis/models/base_model.py takes it if absent,
`resume_ckpt_path`, which stands under `run`, as lavis/runners/runner_base.py does."""

_PATHS = ("pretrained", "finetuned", "resume_ckpt_path")


def changed(variant: Variant, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a training's configuration has otherwise than its model type's defaults, with their values.

    A type that is none of LAVIS's is taken for the variant's. Paths are compared as text: of a file in another place
    nobody knows that it is the released one.

    Args:
        config: as LAVIS's trainer writes it: merged, so that defaults stand there too.
    """
    run = config.get("run")
    resumed = run.get("resume_ckpt_path") if isinstance(run, Mapping) else None
    settings = {**model_config(config), "resume_ckpt_path": resumed}
    return {
        name: settings[name]
        for name, default in DEFAULTS[_type(variant, config)].items()
        if name in settings and not _equal(settings[name], default)
    }


def _type(variant: Variant, config: Mapping[str, Any]) -> str:
    named = str(model_config(config).get("model_type"))
    return named if named in DEFAULTS else variant.lavis_type


def _equal(value: Any, default: Any) -> bool:
    """Whether LAVIS reads both alike: null is False as a flag, and an empty path names nothing."""
    return (value or type(default)()) == default if default is not None else not value


def wrong_base(variant: Variant, config: Mapping[str, Any], held: Collection[str]) -> str:
    """What a checkpoint was trained with, if that may be other than the variant's released files, and if these would
    supply a tensor that could differ; else "".

    Args:
        variant: the one whose released files would complete the checkpoint.
        held: the names of the checkpoint's tensors.
    """
    kind, settings = _type(variant, config), changed(variant, config)
    if kind == variant.lavis_type and not settings:
        return ""
    tower = variant.vision_in_checkpoint or DEFAULTS[kind]["load_finetuned"]
    if variant.language_prefix not in settings and _at_stake(variant, settings, tower) <= set(held):
        return ""
    return in_words(variant, config) or f"model_type: {kind!r} (of {variant.name}: {variant.lavis_type!r})"


def in_words(variant: Variant, config: Mapping[str, Any]) -> str:
    """The settings of `changed`, each with its value and its default; "" if there is none."""
    kind = _type(variant, config)
    return " and ".join(
        f"{name}: {value!r} (default of {kind}: {DEFAULTS[kind][name]!r})"
        for name, value in changed(variant, config).items()
    )


def lacks(variant: Variant, config: Mapping[str, Any], held: Collection[str]) -> list[str]:
    """The tensors that a checkpoint needs of the released fine-tuned file, if it was trained on that one."""
    if not config or changed(variant, config) or not DEFAULTS[_type(variant, config)]["load_finetuned"]:
        return []
    return sorted(_at_stake(variant, {}, tower=True) - set(held))


def _at_stake(variant: Variant, settings: Mapping[str, Any], tower: bool) -> set[str]:
    """The names of all tensors that the files under a training may have supplied: of a released file, those in it,
    the vision tower among them or not; of any other file, all."""
    names = {name for entry in entries(variant) if not entry.optional for name in entry.sources}
    if any(settings.get(path) for path in _PATHS) or settings.get("load_finetuned"):
        return names
    apart = variant.language_prefix if tower else (variant.language_prefix, "visual_encoder.")
    return {name for name in names if not name.startswith(apart)}

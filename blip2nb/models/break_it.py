"""Faults in a converted BLIP-2: the catalogue's, and those of its configuration, its processor and its inputs.

    from blip2nb.models import break_it

    bench = break_it.Bench(run.model, tape)
    case = bench.cases(break_it.CATALOGUE["image_mean"])[0]
    with case.planted(bench, scratch, seed=0) as broken:          # broken.folder, broken.loaded, broken.inputs
        trace.compare(tape, broken.loaded.model, bench.stages, broken.inputs)

The converted directory itself is never touched: faults of files and configuration are put into a copy. A recording
holds one text at a time, so that nothing in it is padded: padding can be added to what transformers is called with, but
padding at the wrong side of a shorter text cannot be told from that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip2nb.models import huggingface
from blip2nb.models.configuration import IMAGE_MEAN, IMAGE_STD
from blip2nb.models.stages import stages
from blip2nb.models.verify import tape_images
from blip2nb.trace import faults
from blip2nb.trace.anatomy import ACTIVATIONS, activations, attentions, norms
from blip2nb.trace.faults import Fault, Target, catalogue
from blip2nb.trace.tape import Tape
from blip2nb.weights.convert import Manifest

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclasses.dataclass(frozen=True)
class Broken:
    """A model with a fault in it.

    Attributes:
        folder: the converted directory; the original, unless the fault is in a file.
        loaded: the model, as loaded from there.
        inputs: what it is called with.
    """

    folder: Path
    loaded: huggingface.Loaded
    inputs: dict[str, Any]


class Bench:
    """A converted directory and LAVIS's recording of it: what faults are put into.

    Attributes:
        folder, tape: as given.
        variant, stages: what the directory holds, and the places to compare.
        loaded, image, inputs: the model as it is, the image it is shown, and what it is called with.
    """

    def __init__(self, folder: Path, tape: Tape):
        self.folder, self.tape = folder, tape
        self.variant = Manifest.read(folder).model_variant
        self.stages = stages(self.variant)
        self.loaded = huggingface.load(folder)
        self.image: Image = tape_images(tape)[0]
        self.texts: dict[str, list[str]] = tape.metadata["texts"]
        self.inputs = self.prepared(self.loaded)

    def prepared(self, loaded: huggingface.Loaded) -> dict[str, Any]:
        """What a model is called with, by its own processor."""
        return huggingface.forward_inputs(loaded, self.variant, self.image, self.texts)

    def cases(self, fault: Fault) -> list[Case]:
        """Everywhere the fault fits, at every depth."""
        targets = fault.targets(self if fault.kind == "inputs" else self.loaded.model)  # type: ignore[arg-type]
        found = [Case((Placed(fault, target, self._stages_of(fault, target)),)) for target in targets]
        return [case for case in found if case.stages]  # a whole stack in training mode leaves nothing out itself

    def _stages_of(self, fault: Fault, target: Target) -> tuple[str, ...]:
        """The stages where a target's fault arises, in the order of the network."""
        if target.stages:
            return target.stages
        found = {stage for module in target.modules for stage in self._stages_at(module, fault.kind == "code")}
        return tuple(stage.name for stage in self.stages if stage.name in found)

    def _stages_at(self, module: str, code: bool) -> Sequence[str]:
        outside = _OUTSIDE[self.variant.language.kind].get(module)
        if outside is not None:
            return outside[:1] if code and module.endswith(_TABLES) else self._named(outside)
        holders = [one for one in self.stages if not one.is_junction and f"{module}.".startswith(f"{one.module}.")]
        return [max(holders, key=lambda one: len(one.module)).name] if holders else []

    def _named(self, patterns: Sequence[str]) -> list[str]:
        return [one.name for one in self.stages if any(fnmatch.fnmatchcase(one.name, each) for each in patterns)]


# Modules that no stage holds, and the stages at which what they give arrives
_OUTSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "opt": {
        "query_tokens": ("qformer.embeddings",),
        "qformer.dropout": ("qformer.layer.00",),
        "language_model.model.decoder.embed_tokens": ("language.inputs_embeds", "logits"),
    },
    "t5": {
        "query_tokens": ("qformer.embeddings",),
        "qformer.dropout": ("qformer.layer.00",),
        "language_model.shared": ("language.inputs_embeds", "language.decoder.block.00"),
        "language_model.encoder.embed_tokens": ("language.inputs_embeds",),
        "language_model.decoder.embed_tokens": ("language.decoder.block.00",),
        "language_model.encoder.dropout": ("language.encoder.block.00", "language.decoder.block.*"),
        "language_model.decoder.dropout": ("language.decoder.block.00", "logits"),
    },
}
_TABLES = ("embed_tokens", "shared")  # shared with the last layer or the other stack as weights, not as modules


@dataclasses.dataclass(frozen=True)
class Placed:
    """A fault at one place, and the stages where it arises, in the order of the network."""

    fault: Fault
    target: Target
    stages: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fault.name} at {self.target}"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planted at once: one fault, or several."""

    faults: tuple[Placed, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        """Where they arise: a right answer names these, and no other."""
        return tuple(dict.fromkeys(stage for one in self.faults for stage in one.stages))

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))

    def __add__(self, other: Case) -> Case:
        """Both at once."""
        return Case((*self.faults, *other.faults))

    @contextlib.contextmanager
    def planted(self, bench: Bench, scratch: Path, seed: int = 0) -> Iterator[Broken]:
        """The model with the fault, for as long as the block lasts.

        Args:
            scratch: an empty or missing folder, for a copy of the directory where one is needed; removed afterwards.

        Raises:
            ValueError: a fault changes nothing there.
        """
        stored = [one for one in self.faults if one.fault.kind in ("files", "configuration")]
        try:
            if stored:
                shutil.copytree(bench.folder, scratch, dirs_exist_ok=True)
            for one in stored:
                write(one.fault, scratch, one.target, seed)
            folder = scratch if stored else bench.folder
            loaded = huggingface.load(folder) if stored else bench.loaded
            with contextlib.ExitStack() as stack:
                inputs = bench.prepared(loaded) if stored else dict(bench.inputs)
                for one in self.faults:
                    if one.fault.kind == "inputs":
                        inputs = one.fault.how(bench, loaded, one.target)
                    elif one.fault.kind == "code":
                        stack.enter_context(one.fault.planted(loaded.model, one.target, seed))
                yield Broken(folder, loaded, inputs)
        finally:
            if stored:
                shutil.rmtree(scratch, ignore_errors=True)


def write(fault: Fault, folder: Path, target: Target, seed: int = 0) -> None:
    """Put a fault of files or configuration into a converted directory, for good.

    Raises:
        ValueError: it changes nothing there.
    """
    if fault.kind == "configuration":
        fault.how(folder, target)
        return
    shards = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
    before: dict[str, torch.Tensor] = {}
    for path in {shards[name] for name in target.names}:
        with safe_open(path, framework="pt") as file:
            before |= {name: file.get_tensor(name) for name in target.names if shards[name] == path}
    changed = fault.changed(before, target, seed)
    if not changed:
        raise ValueError(f"{fault.name} changes nothing at {target}.")
    for path in {shards[name] for name in changed}:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors |= {name: tensor.contiguous() for name, tensor in changed.items() if shards[name] == path}
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)  # a new file: what other directories link to stays as it is


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


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


# -- faults in the configuration


def _configured(folder: Path, target: Target) -> None:
    """Targets name the file's settings as `setting=value`, the value in JSON."""
    for name in target.names:
        setting, _, value = name.partition("=")
        path = folder / ("processor_config.json" if setting.startswith("image_processor.") else "config.json")
        _edit(path, setting, json.loads(value))


_TOWERS = {
    "vision_model": "vision_config",
    "qformer": "qformer_config",
    "language_model": "text_config",
}


_ENCODERS = ("vision_model", "qformer")


def _tower(path: str) -> str:
    return path.split(".")[0]


def _settings_of(model: Any, found: Sequence[str], setting: Callable[[str], str | None]) -> Iterator[tuple[str, tuple]]:
    """For each tower that has it: the setting's dotted path, and the modules that it configures."""
    for tower, config in _TOWERS.items():
        modules = tuple(path for path in found if _tower(path) == tower)
        name = setting(tower)
        if modules and name is not None and hasattr(model.get_submodule(tower).config, name):
            yield f"{config}.{name}", modules


def _eps_settings(model: Any) -> Iterator[Target]:
    eps = {path: getattr(module, attribute) for path, module, attribute in norms(model)}
    for name in ("layer_norm_eps", "layer_norm_epsilon"):
        for setting, modules in _settings_of(model, list(eps), lambda tower, name=name: name):  # type: ignore[misc]
            for value in (1e-5, 1e-6, 1e-12):
                if eps[modules[0]] != value:
                    # with LAVIS's own eps in all of the tower, the post layer norm is right at last
                    wrong = tuple(one for one in modules if not (one.endswith("post_layernorm") and value == 1e-5))
                    yield Target(wrong, (f"{setting}={value}",), f"{value:g}")


def _activation_settings(model: Any) -> Iterator[Target]:
    kinds = dict(activations(model))
    for name in ("hidden_act", "activation_function", "dense_act_fn"):
        for setting, modules in _settings_of(model, list(kinds), lambda tower, name=name: name):  # type: ignore[misc]
            for other in ACTIVATIONS:
                if other != kinds[modules[0]]:
                    yield Target(modules, (f'{setting}="{other}"',), f"{kinds[modules[0]]} → {other}")


def _head_settings(model: Any) -> Iterator[Target]:
    # T5's would need another table of relative positions too, and is refused when it is loaded
    heads = {one.path: one.heads for one in attentions(model) if not _seq2seq(model) or _tower(one.path) in _ENCODERS}
    for setting, modules in _settings_of(model, list(heads), lambda tower: "num_attention_heads"):
        for form, value in (("half as many", heads[modules[0]] // 2), ("twice as many", heads[modules[0]] * 2)):
            width = model.get_submodule(_tower(modules[0])).config.hidden_size
            if value and width % value == 0:
                yield Target(modules, (f"{setting}={value}",), form)


def _seq2seq(model: Any) -> bool:
    return bool(model.language_model.config.is_encoder_decoder)


def _tie_setting(model: Any) -> Iterator[Target]:
    if _seq2seq(model):
        yield Target(("language_model.lm_head",), ("text_config.tie_word_embeddings=true",))


def _distance_setting(model: Any) -> Iterator[Target]:
    if _seq2seq(model):
        paths = tuple(
            f"language_model.{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
            for stack in ("encoder", "decoder")
        )
        names = ("text_config.relative_attention_max_distance=32",)
        yield Target(paths, names, stages=("language.encoder.position_bias",))


def _start_setting(model: Any) -> Iterator[Target]:
    if _seq2seq(model):
        names = ("text_config.decoder_start_token_id=1",)
        yield Target(("language_model.decoder",), names, stages=("language.decoder.input_ids",))


def _image_token_setting(model: Any) -> Iterator[Target]:
    # one that is not in the text: nothing is replaced by the image
    names = (f"image_token_index={model.config.image_token_id + 1}",)
    yield Target(("language_model",), names, stages=("language.inputs_embeds",))


_STATISTICS = (
    "image_mean=[0.485, 0.456, 0.406]; image_std=[0.229, 0.224, 0.225]",  # ImageNet's
    "image_mean=[0.5, 0.5, 0.5]; image_std=[0.5, 0.5, 0.5]",  # many vision transformers'
    f"image_mean={list(IMAGE_STD)}; image_std={list(IMAGE_MEAN)}",  # one for the other
)


def _pixels(*settings: str) -> Callable[[Any], Iterator[Target]]:
    """Each setting of the image processor is a target of its own."""

    def where(_: Any) -> Iterator[Target]:
        for setting in settings:
            names = tuple(f"image_processor.{one}" for one in setting.split("; "))
            yield Target(("vision_model",), names, setting, stages=("pixels",))

    return where


# -- faults in the inputs


def _pixel_input(*forms: str) -> Callable[[Any], Iterator[Target]]:
    return lambda bench: (Target(("vision_model",), ("images",), form, ("pixels",)) for form in forms or ("",))


_EMBEDS = ("language.inputs_embeds",)
_ANSWER = ("language.decoder.input_ids",)


def _text_input(*forms: str, kind: str = "", stages: tuple[str, ...] = _EMBEDS) -> Callable[[Any], list[Target]]:
    """A mistake in the text shows where the language model takes it in."""

    def where(bench: Bench) -> list[Target]:
        if kind and bench.variant.language.kind != kind:
            return []
        module = "language_model.decoder" if stages is _ANSWER else "language_model"
        return [Target((module,), ("text",), form, stages) for form in forms or ("",)]

    return where


# More tokens or fewer: the mask has another length too
_longer = functools.partial(_text_input, stages=(*_EMBEDS, "language.attention_mask"))


Inputs = dict[str, Any]
Change = Callable[[Bench, huggingface.Loaded, Target], Inputs]


def _shown(change: Callable[[Image, Target], Any], **settings: Any) -> Change:
    """Another image, or the processor called in another way."""

    def how(bench: Bench, loaded: huggingface.Loaded, target: Target) -> Inputs:
        image = change(bench.image, target)
        pixels = loaded.processor.image_processor([image], return_tensors="pt", **settings)["pixel_values"]
        return {**bench.prepared(loaded), "pixel_values": pixels.expand_as(bench.inputs["pixel_values"]).contiguous()}

    return how


def _blue_first(image: Image, _: Target) -> Image:
    """As OpenCV reads it."""
    from PIL import Image as PIL

    return PIL.merge("RGB", image.split()[::-1])


def _default_processor(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
    """The image processor that transformers takes unless it is asked for PIL's."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(bench.folder, local_files_only=True)
    pixels = processor([bench.image] * len(bench.texts["text_input"]), return_tensors="pt")["pixel_values"]
    return {**bench.prepared(loaded), "pixel_values": pixels}


def _mirrored(image: Image, _: Target) -> Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)


def _rescaled_already(image: Image, _: Target) -> Any:
    import numpy as np

    return np.asarray(image, dtype=np.float32) / 255


def _said(change: Callable[[str], str]) -> Change:
    """Another text where LAVIS's was meant."""

    def how(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
        texts = {**bench.texts, "text_input": [change(text) for text in bench.texts["text_input"]]}
        return huggingface.forward_inputs(loaded, bench.variant, bench.image, texts)

    return how


def _tokens(change: Callable[[torch.Tensor, Bench], torch.Tensor]) -> Change:
    """Other token ids, (batch, positions), than the processor gives; all of them are attended to."""

    def how(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
        inputs = bench.prepared(loaded)
        ids = change(inputs["input_ids"], bench)
        mask = inputs["attention_mask"]
        if ids.shape != mask.shape:
            mask = torch.ones_like(ids)
        return {**inputs, "input_ids": ids, "attention_mask": mask}

    return how


def _without(column: Callable[[torch.Tensor, Bench], torch.Tensor]) -> Change:
    """Leave out the tokens of a column: the same one of each row."""

    def change(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
        keep = ~column(ids, bench)
        return torch.stack([row[kept] for row, kept in zip(ids, keep, strict=True)])

    return _tokens(change)


def _first_text(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
    """The first token that is not the image's, of each row: OPT's beginning of a sequence."""
    text = ids != bench.loaded.model.config.image_token_id
    return text & (text.cumsum(-1) == 1)


def _last(ids: torch.Tensor, _: Bench) -> torch.Tensor:
    """The last column. OPT's texts end in a line break, T5's in the end of the sequence."""
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    return last


def _text_first(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
    token = bench.loaded.model.config.image_token_id
    rows = [torch.cat([row[row != token], row[row == token]]) for row in ids]
    return torch.stack(rows)


def _one_more(ids: torch.Tensor, bench: Bench) -> torch.Tensor:
    """An end of the sequence behind the text, as tokenizers of other families add."""
    end = bench.loaded.processor.tokenizer.eos_token_id
    return torch.cat([ids, torch.full((len(ids), 1), end)], dim=1)


_PADS = ("left", "right", "left and seen", "right and seen")


def _padded(bench: Bench, loaded: huggingface.Loaded, target: Target) -> Inputs:
    """Padded to four tokens more than needed, with a mask that hides them or with none."""
    inputs = bench.prepared(loaded)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pads = torch.full((len(ids), 4), loaded.processor.tokenizer.pad_token_id)
    none = torch.ones_like(pads) if "seen" in target.form else torch.zeros_like(pads)
    left = target.form.startswith("left")
    return {
        **inputs,
        "input_ids": torch.cat([pads, ids] if left else [ids, pads], dim=1),
        "attention_mask": torch.cat([none, mask] if left else [mask, none], dim=1),
    }


def _mask_forms(bench: Bench) -> list[Target]:
    # OPT counts its positions by the mask
    stages = ("language.attention_mask", *(["language.positions"] if bench.variant.language.kind == "opt" else []))
    forms = ("image tokens hidden", "last token hidden")
    return [Target(("language_model",), ("attention_mask",), form, stages) for form in forms]


def _masked(bench: Bench, loaded: huggingface.Loaded, target: Target) -> Inputs:
    inputs = bench.prepared(loaded)
    mask = inputs["attention_mask"].clone()
    if target.form == "last token hidden":
        mask[:, -1] = 0
    else:
        mask[inputs["input_ids"] == loaded.model.config.image_token_id] = 0
    return {**inputs, "attention_mask": mask}


def _answered(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Another answer than the one that T5's decoder was shown."""

    def how(bench: Bench, loaded: huggingface.Loaded, _: Target) -> Inputs:
        inputs = bench.prepared(loaded)
        return {**inputs, "labels": change(inputs["labels"])}

    return how


def _exchange_words(text: str) -> str:
    """A prompt of as many tokens that asks something else."""
    return text.replace("photo", "picture") if "photo" in text else f"{text} of"


def _configuration(name: str, words: str, cause: str, where: Callable, *also: str) -> Fault:
    return Fault(name, words, "configuration", cause, where, _configured, frozenset(also))


def _input(name: str, words: str, cause: str, where: Callable, how: Change, *also: str) -> Fault:
    return Fault(name, words, "inputs", cause, where, how, frozenset(also))


_LENGTH = ("tokens",)

# fmt: off
CATALOGUE: Mapping[str, Fault] = faults.CATALOGUE | catalogue([
    _configuration("eps_configured", "A tower's eps is another.",
                   "eps", _eps_settings),
    _configuration("activation_configured", "A tower's activation function is another.",
                   "activation", _activation_settings),
    _configuration("heads_configured", "A tower has another number of heads.",
                   "head_count", _head_settings, "attention_scale"),
    _configuration("tie_configured", "T5's configuration says that its embedding is tied, which scales the logits too.",
                   "logits_scale", _tie_setting, "scale", "tied"),
    _configuration("distance_configured", "T5's relative positions end at another distance.",
                   "position_bias", _distance_setting),
    _configuration("start_configured", "T5's decoder starts with another token.",
                   "tokens", _start_setting, "bos_missing"),
    _configuration("image_token", "The image is put where another token stands, which is nowhere.",
                   "tokens", _image_token_setting, "sequence_order"),
    _configuration("image_mean", "Images are normalised with other statistics than CLIP's.",
                   "image_mean_std", _pixels(*_STATISTICS, "do_normalize=false")),
    _configuration("image_resample", "Images are resized otherwise than bicubically.",
                   "interpolation", _pixels("resample=0", "resample=1", "resample=2")),
    _configuration("image_rescale", "Pixel values are not brought to between 0 and 1, or not by 1/255.",
                   "pixels", _pixels("do_rescale=false", "rescale_factor=0.00390625"), "image_mean_std"),
    _input("channel_order", "Images come with blue first.",
           "channel_order", _pixel_input(), _shown(_blue_first)),
    _input("rescaled_twice", "Images come with values between 0 and 1, and are divided by 255 again.",
           "pixels", _pixel_input(), _shown(_rescaled_already), "image_mean_std"),
    _input("image_mirrored", "Images are mirrored.",
           "pixels", _pixel_input(), _shown(_mirrored)),
    _input("default_processor", "The image processor that is the default resizes with another library.",
           "interpolation", _pixel_input(), _default_processor, "pixels"),
    _input("prompt", "The text is another.",
           "prompt", _text_input(), _said(_exchange_words), *_LENGTH),
    _input("prompt_missing", "There is no text at all.",
           "prompt", _longer(), _said(lambda text: ""), *_LENGTH),
    _input("bos_missing", "OPT's text does not begin with the beginning of a sequence.",
           "bos_missing", _longer(kind="opt"), _without(_first_text)),
    _input("newline_missing", "OPT's text does not end in a line break.",
           "newline_missing", _longer(kind="opt"), _without(_last)),
    _input("eos_missing", "T5's text does not end in the end of the sequence.",
           "tokens", _longer(kind="t5"), _without(_last)),
    _input("token_too_many", "An end of the sequence is put behind the text.",
           "tokens", _longer(), _tokens(_one_more)),
    _input("padded", "The text is padded to a fixed length.",
           "tokens", _longer(*_PADS), _padded, "padding_side", "attention_mask"),
    _input("text_first", "The text comes before the image.",
           "sequence_order", _text_input(), _tokens(_text_first)),
    _input("input_mask", "The mask hides tokens that should be seen, or shows what should be hidden.",
           "attention_mask", _mask_forms, _masked),
    _input("answer_shifted", "T5's answer is shifted by hand, and again by the model.",
           "tokens", _text_input(kind="t5", stages=_ANSWER), _answered(lambda ids: ids.roll(1, dims=1)), "bos_missing"),
    _input("answer_short", "T5's answer lacks its last token.",
           "tokens", _text_input(kind="t5", stages=_ANSWER), _answered(lambda ids: ids[:, :-1])),
])
# fmt: on

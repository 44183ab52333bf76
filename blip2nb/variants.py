"""The table of variants: the seven released BLIP-2 captioners, and a small twin of each.

Everything that differs between variants is a field here, so that no other module asks a model's name what it is.
Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses

from blip2nb.errors import RequestError
from blip2nb.forms import record
from blip2nb.nearest import did_you_mean


@record
class VisionSizes:
    """EVA-CLIP's ViT-g as LAVIS builds it. `mlp` is what LAVIS's ratio of 4.3637 makes of `width`."""

    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp: int = 6144
    patch: int = 14


@record
class QFormerSizes:
    """The Q-Former: bert-base with cross-attention in every second layer and learned queries."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    queries: int = 32
    cross_every: int = 2


@record
class LanguageSizes:
    """The language model. `kind` is "opt" or "t5"; `head_width` and `buckets` matter to T5, `positions` to OPT."""

    kind: str
    width: int
    layers: int
    heads: int
    mlp: int
    vocabulary: int
    head_width: int = 64
    buckets: int = 32
    positions: int = 2048


@record
class Variant:
    """One model: what it is called, how LAVIS builds it, which files hold it, and every size.

    `prompt` is what LAVIS's `generate` puts before the caption. `vision_in_checkpoint` says that the checkpoint
    holds the vision tower too (it was trained), at this variant's own image size.
    """

    name: str
    lavis_class: str
    lavis_type: str
    image_size: int
    prompt: str
    language_model: str
    checkpoint: str
    vision_in_checkpoint: bool
    vision: VisionSizes
    qformer: QFormerSizes
    language: LanguageSizes
    twin: bool = False

    def _repr_html_(self) -> str:
        rows = {
            "LAVIS": f"{self.lavis_class}, {self.lavis_type}",
            "image": f"{self.image_size} × {self.image_size} pixels, {self.vision_tokens} tokens",
            "vision tower": f"{self.vision.layers} blocks, width {self.vision.width}",
            "Q-Former": f"{self.qformer.layers} layers, width {self.qformer.width}, {self.qformer.queries} queries",
            "language model": f"{self.language_model}, {self.language.layers} layers, width {self.language.width}",
            "checkpoint": self.checkpoint,
            "prompt": repr(self.prompt),
        }
        cells = "".join(
            f"<tr><th align='left'>{name}</th><td align='left'>{text}</td></tr>" for name, text in rows.items()
        )
        note = "<p>A twin: this architecture and file layout, small and with random weights.</p>" if self.twin else ""
        return f"<strong>{self.name}</strong>{note}<table>{cells}</table>"

    @property
    def language_folder(self) -> str:
        """The last part of the language model's hub name: its folder in the released layout."""
        return self.language_model.rsplit("/", 1)[-1]

    @property
    def vision_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.vision.patch) ** 2 + 1

    @property
    def language_prefix(self) -> str:
        """What LAVIS calls the language model inside its state dict."""
        return {"opt": "opt_model", "t5": "t5_model"}[self.language.kind]


# as their configurations on the hub have them
_OPT_27B = LanguageSizes("opt", width=2560, layers=32, heads=32, mlp=10240, vocabulary=50272)
_OPT_67B = LanguageSizes("opt", width=4096, layers=32, heads=32, mlp=16384, vocabulary=50272)
_T5_XL = LanguageSizes("t5", width=2048, layers=24, heads=32, mlp=5120, vocabulary=32128)
_T5_XXL = LanguageSizes("t5", width=4096, layers=24, heads=64, mlp=10240, vocabulary=32128)

# name, LAVIS's type, hub name of the language model, its sizes, the checkpoint file
_RELEASED = (
    ("blip2-opt-2.7b", "pretrain_opt2.7b", "facebook/opt-2.7b", _OPT_27B, "blip2_pretrained_opt2.7b.pth"),
    ("blip2-opt-6.7b", "pretrain_opt6.7b", "facebook/opt-6.7b", _OPT_67B, "blip2_pretrained_opt6.7b.pth"),
    ("blip2-opt-2.7b-coco", "caption_coco_opt2.7b", "facebook/opt-2.7b", _OPT_27B, "blip2_caption_opt2.7b.pth"),
    ("blip2-opt-6.7b-coco", "caption_coco_opt6.7b", "facebook/opt-6.7b", _OPT_67B, "blip2_caption_opt6.7b.pth"),
    ("blip2-flan-t5-xl", "pretrain_flant5xl", "google/flan-t5-xl", _T5_XL, "blip2_pretrained_flant5xl.pth"),
    ("blip2-flan-t5-xl-coco", "caption_coco_flant5xl", "google/flan-t5-xl", _T5_XL, "blip2_caption_flant5xl.pth"),
    ("blip2-flan-t5-xxl", "pretrain_flant5xxl", "google/flan-t5-xxl", _T5_XXL, "blip2_pretrained_flant5xxl.pth"),
)

# Chosen: a twin keeps the proportions, widths divided, heads and depth reduced, the ratio of LAVIS's MLP kept.
_TWIN_VISION = VisionSizes(width=44, layers=6, heads=4, mlp=192)
_TWIN_QFORMER = QFormerSizes(width=48, layers=4, heads=4, mlp=192)
_TWIN_LANGUAGE = {
    _OPT_27B: LanguageSizes("opt", width=40, layers=4, heads=4, mlp=160, vocabulary=512, positions=128),
    _OPT_67B: LanguageSizes("opt", width=64, layers=5, heads=4, mlp=256, vocabulary=512, positions=128),
    _T5_XL: LanguageSizes("t5", width=32, layers=3, heads=4, mlp=80, vocabulary=512, head_width=8),
    _T5_XXL: LanguageSizes("t5", width=64, layers=4, heads=8, mlp=160, vocabulary=512, head_width=8),
}


def _table() -> dict[str, Variant]:
    table = {}
    for name, lavis_type, hub_name, language, checkpoint in _RELEASED:
        coco = name.endswith("-coco")
        released = Variant(
            name=name,
            lavis_class=f"blip2_{language.kind}",
            lavis_type=lavis_type,
            image_size=364 if coco else 224,
            prompt="a photo of" if coco else "",
            language_model=hub_name,
            checkpoint=checkpoint,
            vision_in_checkpoint=coco,
            vision=VisionSizes(),
            qformer=QFormerSizes(),
            language=language,
        )
        twin = dataclasses.replace(
            released,
            name=f"tiny-{name}",
            vision=_TWIN_VISION,
            qformer=_TWIN_QFORMER,
            language=_TWIN_LANGUAGE[language],
            twin=True,
        )
        table[released.name] = released
        table[twin.name] = twin
    return table


VARIANTS: dict[str, Variant] = _table()
RELEASED: tuple[str, ...] = tuple(name for name, variant in VARIANTS.items() if not variant.twin)
TWINS: tuple[str, ...] = tuple(name for name, variant in VARIANTS.items() if variant.twin)


def variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        RequestError: there is none; the message names the nearest.
    """
    short = name.rsplit("/", 1)[-1]  # "Salesforce/blip2-opt-2.7b" is the same model
    if short in VARIANTS:
        return VARIANTS[short]
    hint = did_you_mean(short, VARIANTS)
    raise RequestError(f"There is no model {name!r}.{hint} `blip2nb variants` lists all {len(VARIANTS)}.")

"""What both models are shown: the demo image and its variations, and the texts around it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from io import BytesIO

from PIL import Image, ImageDraw, ImageOps

from blip2nb.variants import Variant

DEMO_TEXT = "a photo of a small boat on the sea"
ANSWER = "a boat and the sun"


def demo_image() -> Image.Image:
    """A harbour at dusk, drawn with integer coordinates: the same pixels on every machine. RGB, 320 × 240."""
    image = Image.new("RGB", (320, 240))
    draw = ImageDraw.Draw(image)
    for y in range(150):
        draw.line([(0, y), (319, y)], fill=(60 + y, 40 + y * 3 // 4, 120 - y // 3))
    for y in range(150, 240):
        draw.line([(0, y), (319, y)], fill=(20 + (y - 150) // 2, 50 + (y - 150) // 3, 90 + (y * 7) % 23))
    draw.ellipse([226, 60, 282, 116], fill=(255, 214, 120))
    for x, top, width in ((0, 118, 70), (52, 132, 90), (120, 124, 60), (262, 134, 58)):
        draw.polygon([(x, 150), (x + width // 2, top), (x + width, 150)], fill=(38, 56, 48))
    for n in range(18):
        x, y = 226 + (n * 37) % 60, 154 + n * 4
        draw.line([(x, y), (x + 12 + n % 5, y)], fill=(250, 200 - n * 4, 120))
    draw.polygon([(70, 172), (180, 172), (160, 196), (90, 196)], fill=(150, 40, 44))
    draw.polygon([(118, 168), (118, 84), (166, 168)], fill=(236, 232, 220))
    draw.polygon([(112, 168), (112, 98), (82, 168)], fill=(210, 204, 190))
    draw.line([(115, 172), (115, 78)], fill=(70, 44, 30), width=3)
    for n in range(9):
        draw.ellipse([20 + n * 31, 18 + (n * n * 7) % 40, 23 + n * 31, 21 + (n * n * 7) % 40], fill=(250, 250, 240))
    return image


def demo_images(variant: Variant) -> list[Image.Image]:
    """What a variant is shown: the demo image, and for a twin five variations of it.

    The first is the one whose activations are recorded; all are captioned. With small random weights one caption
    proves little. At full size one has to do: LAVIS loses its cache on the transformers it pins and computes the whole
    sequence again for every token, so that a caption takes minutes.
    """
    demo = demo_image()
    if not variant.twin:
        return [demo]
    return [
        demo,
        ImageOps.mirror(demo),
        ImageOps.flip(demo),
        demo.crop((60, 60, 200, 220)),
        ImageOps.invert(demo),
        demo.rotate(90, expand=True).crop((0, 0, 200, 320)),
    ]


def png(image: Image.Image) -> bytes:
    """The image as PNG: lossless, so that both models see the same pixels."""
    out = BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def texts(variant: Variant) -> dict[str, list[str]]:
    """What LAVIS's `forward` takes beside the image. LAVIS itself adds a line break for OPT."""
    if variant.language.kind == "opt":
        return {"text_input": [DEMO_TEXT]}
    return {"text_input": [DEMO_TEXT], "text_output": [ANSWER]}


def inputs_hash(images: Iterable[Image.Image], words: dict[str, list[str]]) -> str:
    """One hash for everything that goes in: pixels and texts, not how the images were compressed."""
    sha = hashlib.sha256(repr(sorted(words.items())).encode())
    for image in images:
        sha.update(repr(image.size).encode() + image.tobytes())
    return sha.hexdigest()

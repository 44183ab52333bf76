"""What both models are shown: the demo image and its variations, or images of one's own, and the texts around them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.families.captioners.recording import ShownTake
from blip2nb.variants import Variant

log = logging.getLogger("blip2nb")

DEMO_TEXT = "a photo of a small boat on the sea"
ANSWER = "a boat and the sun"

LONGEST_TEXT = 32
"""In tokens, with those that begin and end it: LAVIS's `max_txt_len`."""


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


def png(image: Image.Image, small: bool = True) -> bytes:
    """The image as PNG: lossless, so that both models see the same pixels. Not `small` is many times as fast."""
    out = BytesIO()
    image.save(out, "PNG", **({"optimize": True} if small else {"compress_level": 1}))
    return out.getvalue()


def texts(variant: Variant, text: str = DEMO_TEXT) -> dict[str, list[str]]:
    """What LAVIS's `forward` takes beside the image. LAVIS itself adds a line break for OPT."""
    if variant.language.kind == "opt":
        return {"text_input": [text]}
    return {"text_input": [text], "text_output": [ANSWER]}


def inputs_hash(images: Iterable[Image.Image], words: dict[str, list[str]]) -> str:
    """One hash for everything that goes in: pixels and texts, not how the images were compressed."""
    sha = hashlib.sha256(repr(sorted(words.items())).encode())
    for image in images:
        sha.update(repr(image.size).encode() + image.tobytes())
    return sha.hexdigest()


def demo_hash(variant: Variant) -> str:
    """`inputs_hash` of what a variant is shown where nothing was chosen."""
    return inputs_hash(demo_images(variant), texts(variant))


# -- one's own images and texts


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image to show, decoded when it is asked for.

    Attributes:
        name: the file's, without its folder.
        size, mode: width and height, and PIL's name for how the file holds its pixels, such as RGBA.
        sha256: of its pixels as RGB.
        load: gives them.
    """

    name: str
    size: tuple[int, int]
    mode: str
    sha256: str
    load: Callable[[], Image.Image]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """What stood where images were looked for and cannot be shown, and why."""

    name: str
    why: str


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Images and texts of one's own. Each image is shown with each text: a *take*.

    Attributes:
        texts: each stands beside the image in `forward`, and before the caption. None is the demo's text beside the
            image and the model's own prompt before the caption.
    """

    pictures: tuple[Picture, ...]
    texts: tuple[str | None, ...]
    skipped: tuple[Skipped, ...]

    def takes(self, variant: Variant) -> list[ShownTake]:
        """What a request and a tape say of each take."""
        return [
            {
                "picture": number,
                "image": picture.name,
                "size": list(picture.size),
                "mode": picture.mode,
                "texts": texts(variant) if text is None else texts(variant, text),
                "prompt": variant.prompt if text is None else text,
            }
            for number, picture in enumerate(self.pictures)
            for text in self.texts
        ]

    def inputs_hash(self, variant: Variant) -> str:
        """One hash for all that goes in: pixels, texts and prompts; names do not count."""
        words = [(take["picture"], sorted(take["texts"].items()), take["prompt"]) for take in self.takes(variant)]
        pixels = [picture.sha256 for picture in self.pictures]
        return hashlib.sha256(repr((pixels, words)).encode()).hexdigest()


Paths = str | Path | Sequence[str | Path]


def choose(variant: Variant, images: Paths = (), wanted_texts: str | Sequence[str] = ()) -> Chosen | None:
    """What was asked to be shown, looked through before any work starts; None where nothing was: then it is the demo.

    Args:
        images: files and folders; "" for none. Of a folder all files by name, without hidden ones and without folders
            in it. One that is no image, or damaged, is skipped with a warning.
        wanted_texts: with none, each image is shown with the demo's text; with texts and no images, the demo's images.

    Raises:
        RequestError: a path is not there, or there is no image to show.
    """
    places = ([images] if images else []) if isinstance(images, str | Path) else list(images)
    words = ((wanted_texts,) if wanted_texts else ()) if isinstance(wanted_texts, str) else tuple(wanted_texts)
    if not places and not words:
        return None
    if not places:
        demo = demo_images(variant)
        pictures = [_picture(f"demo-{n}.png", image.mode, image, image.copy) for n, image in enumerate(demo)]
        return Chosen(tuple(pictures), words, ())
    found: dict[Path, Picture | Skipped] = {}
    for place in map(Path, places):
        _look_into(place.expanduser(), found)
    skipped = [one for one in found.values() if isinstance(one, Skipped)]
    for one in skipped:
        log.warning("%s is skipped: %s", one.name, one.why)
    pictures = list(_told_apart([one for one in found.values() if isinstance(one, Picture)]))
    if not pictures:
        raise RequestError(f"There is no image to show: {skipped[0].name} is skipped, {skipped[0].why}.")
    return Chosen(tuple(pictures), words or (None,), tuple(skipped))


def read_texts(path: str | Path) -> list[str]:
    """Texts from a file, one a line; empty lines do not count.

    Raises:
        RequestError: there is no such file, it is no text, or holds none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not a text file in UTF-8. Expected one text a line.") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror}). Expected a file with one text a line.") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise RequestError(f"{path} holds no text. Expected one a line.")
    return found


def _look_into(place: Path, found: dict[Path, Picture | Skipped]) -> None:
    """Read a file, or all files of a folder, each once however often it is named."""
    files = _files_in(place) if place.is_dir() else [place]
    if not place.exists():
        raise RequestError(f"{place} does not exist. Expected an image, or a folder of images.")
    new = {file.resolve(): _read(file) for file in files if file.resolve() not in found}
    found |= new
    held = [found[file.resolve()] for file in files]
    if place.is_dir() and not any(isinstance(one, Picture) for one in held):
        first = next((f"; {one.name}: {one.why}" for one in held if isinstance(one, Skipped)), "")
        raise RequestError(f"No image in {place} can be shown ({len(held)} looked at{first}).")


def _files_in(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise RequestError(f"{folder} cannot be read ({error.strerror}).") from None


def _read(path: Path) -> Picture | Skipped:
    """Decode an image once, to know that it can be. PIL's readers raise whatever a damaged file leads them to."""
    name = path.name.encode("utf-8", "replace").decode()
    if path.is_dir():
        return Skipped(name, "a folder, whose images are shown when it is named itself")
    if not path.is_file():
        return Skipped(name, "not a file")
    try:
        return _picture(name, *_decode(path), lambda: _decode(path)[1])
    except UnidentifiedImageError:
        return Skipped(name, "not an image that PIL can read")
    except Image.DecompressionBombError:
        return Skipped(name, f"larger than PIL's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels")
    except Exception as error:
        if memory_ran_out(error):
            raise  # which says nothing about the image
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Skipped(name, f"damaged or not readable ({words.replace(str(path), name)})")


def _decode(path: Path) -> tuple[str, Image.Image]:
    """An image file's mode, and the image as LAVIS's demos open it: PIL's own conversion to RGB, with no look at EXIF's
    orientation, and the first frame."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about transparency and size: it is converted all the same
        with Image.open(path) as file:
            return file.mode, file.convert("RGB")


def _picture(name: str, mode: str, image: Image.Image, load: Callable[[], Image.Image]) -> Picture:
    sha = hashlib.sha256(repr(image.size).encode() + image.tobytes())
    return Picture(name, image.size, mode, sha.hexdigest(), load)


def _told_apart(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Files of one name in several folders get a number behind it."""
    seen: collections.Counter[str] = collections.Counter()
    for picture in pictures:
        seen[picture.name] += 1
        number = seen[picture.name]
        yield dataclasses.replace(picture, name=f"{picture.name} ({number})") if number > 1 else picture

"""What a recording of LAVIS says beside its tensors, as `lavis.run` writes it and everything else reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    from blip2nb.trace.tape import Tape

Step = tuple[int, float, int, float]
"""A token of a greedy caption, its log-probability, the likeliest other token, and that one's: see `lavis.ladder`."""


class Captioned(TypedDict):
    """Captions of some images, an item an image.

    Attributes:
        ids: from the first new token to the end-of-sequence token.
        text: the same in words.
        steps: where one beam was followed, how sure the model was.
    """

    ids: list[list[int]]
    text: list[str]
    steps: NotRequired[list[list[Step]]]


class ShownTake(TypedDict):
    """One image with one text, of those that somebody chose.

    Attributes:
        picture: the image's number in the recording; `image` is its file's name.
        size, mode: as for `inputs.Picture`.
        texts: what LAVIS's `forward` is given, by its own names.
        prompt: before the caption.
    """

    picture: int
    image: str
    size: list[int]
    mode: str
    texts: dict[str, list[str]]
    prompt: str


class Recording(TypedDict):
    """What the kit reads of a tape's metadata.

    Attributes:
        model: the variant's name.
        texts, prompt: what was shown with the demo's images.
        captions: by mode of decoding.
        parameters: LAVIS's name -> SHA-256, of what LAVIS ran with; `weights_hash` is over all of them.
        source_hash: of the files, as in a manifest.
        attributes: module -> the plain attributes that it carries.
        takes, skipped: where images or texts were chosen.
    """

    model: str
    texts: dict[str, list[str]]
    prompt: str
    captions: Mapping[str, Captioned]
    parameters: dict[str, str]
    weights_hash: str
    source_hash: str
    inputs_hash: str
    attributes: Mapping[str, Mapping[str, object]]
    device: str
    versions: dict[str, str]
    takes: NotRequired[list[ShownTake]]
    skipped: NotRequired[list[dict[str, str]]]


def recording(tape: Tape) -> Recording:
    """A tape's metadata. An older tape may lack a field."""
    found: Recording = tape.metadata
    return found

"""A right model, and what it is called with: what faults are put into, and what those of the inputs start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2nb.families.captioners import huggingface
from blip2nb.families.captioners.recording import recording
from blip2nb.proof.behaviour import tape_images
from blip2nb.report.manifest import Manifest
from blip2nb.trace.tape import Tape

if TYPE_CHECKING:
    from PIL.Image import Image


class RightModel:
    """A converted directory as it is, loaded, and called with what LAVIS was shown in a recording.

    Attributes:
        folder: as given; never written to.
        variant: what it holds.
        loaded: the model and its processor.
        image, texts: what LAVIS was shown.
        inputs: what the model is called with.
    """

    def __init__(self, folder: Path, tape: Tape):
        self.folder = folder
        self.variant = Manifest.read(folder).variant
        self.loaded = huggingface.load(folder)
        self.image: Image = tape_images(tape)[0]
        self.texts = recording(tape)["texts"]
        self.inputs = self.prepared(self.loaded)

    def prepared(self, loaded: huggingface.Loaded) -> dict[str, Any]:
        """What a model is called with, by its own processor."""
        return huggingface.forward_inputs(loaded, self.variant, self.image, self.texts)

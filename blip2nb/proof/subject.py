"""What a proof is about: a converted directory, LAVIS's recording of it if there is one, and what it was made from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from blip2nb.errors import RequestError, memory_ran_out
from blip2nb.report.manifest import Manifest
from blip2nb.variants import Variant
from blip2nb.weights.convert import LOSSY
from blip2nb.weights.sources import open_folder
from blip2nb.weights.stored import Stored

if TYPE_CHECKING:
    from blip2nb.conversion.files import Opened
    from blip2nb.trace.tape import Tape


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A converted directory under proof. What is in the files is read once.

    Attributes:
        folder: the directory.
        tape: LAVIS's recording of the same weights; None where only the weights are proven.
        open_source: opens what it was converted from, or gives None; asked when a weight is wrong, for the right one.
    """

    folder: Path
    tape: Tape | None = None
    open_source: Callable[[], Opened | None] = lambda: None

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Raises RequestError when the directory is not one of ours."""
        return Manifest.read(self.folder)

    @property
    def variant(self) -> Variant:
        """With the sizes this directory has."""
        return self.manifest.variant

    @functools.cached_property
    def saved(self) -> Mapping[str, Stored]:
        """The directory's tensors, by transformers' names."""
        return open_folder(self.folder)

    @property
    def lossy(self) -> bool:
        """Whether the weights were cast on request, so that there is no way back."""
        return self.manifest.dtype in LOSSY

    @functools.cached_property
    def source(self) -> Opened | None:
        """What it was converted from; None if it is gone or damaged."""
        try:
            return self.open_source()
        except (RequestError, OSError) as error:
            if memory_ran_out(error):
                raise
            return None

    @property
    def recording(self) -> Tape:
        """The recording, where there has to be one."""
        if self.tape is None:
            raise ValueError("There is no recording of LAVIS here.")
        return self.tape

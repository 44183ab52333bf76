"""The manifest of a converted directory, blip2nb.json: where every tensor came from, and its hash."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2nb.errors import RequestError
from blip2nb.variants import Variant, variant_of

MANIFEST = "blip2nb.json"
FORMAT = 1
"""Of the manifest. To be raised when a field is added that has no default, or means another thing than before."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a converted directory says of itself.

    Attributes:
        model: the variant's name.
        variant: all of the variant's sizes, which a fine-tuned checkpoint may have changed.
        dtype: as asked for: auto keeps every tensor's own.
        weights_hash: one hash over the source's parameters by LAVIS name, in their stored dtype.
        parameters: LAVIS name -> digest, of what was read.
        origins: LAVIS name -> the file's name it was read from.
        checkpoints: the names of those files that were trained: laid over vision tower and language model.
        written: transformers' name -> digest, of what was written.
        shards: file -> its size in bytes, and one hash over its header and the digests of its tensors.
        configuration: the other files of the directory -> their BLAKE3 hash.
        tied, dropped, unused: names left out, each with the rule's reason.
        no_way_back: names that the inverse rules cannot restore, each with why.
        bytes_by_kind: component -> kind of rule -> bytes written.
        versions: what wrote it.
        files: name, size and time of change of every file read.
        recipe: what else decided what was written: options, configuration, versions.
        format: FORMAT when it was written.
    """

    model: str
    variant: Mapping[str, Any]
    dtype: str
    weights_hash: str
    parameters: Mapping[str, str]
    origins: Mapping[str, str]
    checkpoints: Sequence[str]
    written: Mapping[str, str]
    shards: Mapping[str, Mapping[str, Any]]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    unused: Mapping[str, str]
    no_way_back: Mapping[str, str]
    bytes_by_kind: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    configuration: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Sequence[Mapping[str, Any]] = ()
    recipe: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: int = 1

    @property
    def model_variant(self) -> Variant:
        """The variant with the sizes this directory has."""
        return variant_of(self.variant)

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises RequestError when the folder is not one of ours, or of a version that is not understood."""
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if (found := content.get("format", 1)) != FORMAT:
                raise RequestError(
                    f"{folder / MANIFEST} has format {found!r}, expected {FORMAT}: another blip2nb wrote it. "
                    "Use that one, or convert again with overwrite."
                )
            return cls(**content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RequestError(
                f"{folder} has no {MANIFEST}: expected a directory that `blip2nb convert` wrote. Convert it first."
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"{folder / MANIFEST} is damaged ({error}). Convert again with overwrite.") from error

"""The manifest of a converted directory, blip2nb.json: where every tensor came from, and its hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from blip2nb.errors import RequestError
from blip2nb.forms import OtherFormat, dumps, reads_format, record
from blip2nb.once import once
from blip2nb.report.schema import Provenance, ReadFile, Reference
from blip2nb.variants import Variant

MANIFEST = "blip2nb.json"
FORMAT = 1
"""Of the manifest. To be raised when a field is added that has no default, or means another thing than before."""


@record
class Shard:
    """A file of weights: its size in bytes, and one hash over its header and the digests of its tensors."""

    bytes: int
    hash: str


@record
class SourceFile:
    """A file that was read: what tells at a glance whether it is the same still."""

    name: str
    size: int
    mtime_ns: int


@record
class Manifest:
    """What a converted directory says of itself.

    Attributes:
        model: the variant's name.
        variant: with the sizes that this directory has, which a fine-tuned checkpoint may have changed.
        dtype: as asked for: auto keeps every tensor's own.
        weights_hash: one hash over the source's parameters by LAVIS name, in their stored dtype.
        parameters: LAVIS name -> digest, of what was read.
        origins: LAVIS name -> the file's name it was read from.
        checkpoints: the names of those files that were trained: laid over vision tower and language model.
        written: transformers' name -> digest, of what was written.
        shards: file -> size and hash.
        configuration: the other files of the directory -> their BLAKE3 hash.
        tied, dropped, unused: names left out, each with the rule's reason.
        no_way_back: names that the inverse rules cannot restore, each with why.
        bytes_by_kind: component -> kind of rule -> bytes written.
        versions: what wrote it.
        files: every file that was read.
        recipe: what else decided what was written: options, configuration, versions.
        format: FORMAT when it was written.
    """

    model: str
    variant: Variant
    dtype: str
    weights_hash: str
    parameters: Mapping[str, str]
    origins: Mapping[str, str]
    checkpoints: tuple[str, ...]
    written: Mapping[str, str]
    shards: Mapping[str, Shard]
    tied: Mapping[str, str]
    dropped: Mapping[str, str]
    unused: Mapping[str, str]
    no_way_back: Mapping[str, str]
    bytes_by_kind: Mapping[str, Mapping[str, int]]
    versions: Mapping[str, str]
    configuration: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[SourceFile, ...] = ()
    recipe: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(dumps(self), encoding="utf-8")

    def provenance(self, state: str, reference: Reference | None) -> Provenance:
        """What a report says of this conversion. Names and hashes only: a report travels, and paths of this machine do
        not.

        Args:
            state: of the directory; "" where there is nothing to tell by it.
            reference: what it was compared with; None for the weights alone.
        """
        return Provenance(
            state=state,
            files=tuple(ReadFile(one.name, one.size) for one in self.files),
            checkpoints=self.checkpoints,
            weights_hash=self.weights_hash,
            dtype=self.dtype,
            prompt=self.variant.prompt,
            image_size=self.variant.image_size,
            language_model=self.variant.language_model,
            reference=reference,
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises RequestError when the folder is not one of ours, or of a version that is not understood."""
        try:
            return _parsed(folder / MANIFEST)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RequestError(
                f"{folder} has no {MANIFEST}: expected a directory that `blip2nb convert` wrote. Convert it first."
            ) from error
        except OtherFormat as error:
            raise RequestError(
                f"{folder / MANIFEST} has format {error.found!r}, expected {FORMAT}: another blip2nb wrote it. "
                "Use that one, or convert again with overwrite."
            ) from error
        except ValueError as error:
            raise RequestError(f"{folder / MANIFEST} is damaged ({error}). Convert again with overwrite.") from error


@once
def _parsed(path: Path) -> Manifest:
    return reads_format(Manifest, path.read_bytes(), FORMAT, unsaid=1)

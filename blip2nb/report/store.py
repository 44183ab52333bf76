"""A report on disk: report.json with the arrays that a number cannot hold beside it. One writer, one reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from blip2nb.errors import Diverges, RequestError
from blip2nb.forms import OtherFormat, dumps, reads_format
from blip2nb.report.schema import FORMAT, Content, Missing
from blip2nb.whole import whole_file, write_whole

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The content of report.json and of arrays.safetensors."""

    content: Content
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """match, explained, diverges or incomplete."""
        return self.content.verdict

    @property
    def incomplete(self) -> tuple[Missing, ...]:
        """What was not run or could not be judged; `complete_with` is the command that completes the proof."""
        return self.content.incomplete

    def status(self, proof: str = "auto") -> int:
        """The exit status of a verification: 0 for match and explained, 1 for diverges, 4 for incomplete.

        Args:
            proof: what was asked for. If that is "weights", proven weights are all of it: 0.
        """
        if self.verdict == "diverges":
            return Diverges.exit_status
        return INCOMPLETE if lacking(self.content, proof) else 0

    def save(self, folder: Path) -> Path:
        """Write report.json and arrays.safetensors into `folder`, each whole or not at all, and never one without the
        other. Returns the former."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays, text = folder / "arrays.safetensors", folder / "report.json"
        content = dumps(self.content)
        with whole_file(arrays) as beside:
            save_file(dict(self.arrays), beside)
            text.unlink(missing_ok=True)  # killed now, there is no report, and never one beside another's arrays
        write_whole(text, content)
        return text

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a run's report. Raises RequestError when there is none, or a damaged one."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = folder / "report.json"
        try:
            content = content_of(path.read_text(encoding="utf-8"), str(path))
            return cls(content, load_file(folder / "arrays.safetensors"))
        except FileNotFoundError as error:
            raise RequestError(
                f"{error.filename or path} does not exist: expected a run's folder under outputs/. "
                "`blip2nb verify` writes one."
            ) from error
        except (ValueError, SafetensorError, NotADirectoryError) as error:
            raise RequestError(f"{path} is damaged ({error}). Run `blip2nb verify` again.") from error


def content_of(text: str | bytes, path: str) -> Content:
    """Parse report.json.

    Args:
        path: where it is, for the error.

    Raises:
        RequestError: it was written by a version of the kit with other words.
        ValueError: it is no JSON, or has other fields than a report.
    """
    try:
        return reads_format(Content, text, FORMAT)
    except OtherFormat as error:
        raise RequestError(
            f"{path} has format {error.found}; this version of blip2nb reads format {FORMAT}. Run `blip2nb verify` "
            "again."
        ) from error


INCOMPLETE = 4
"""The exit status of a proof of which something was not run or could not be judged."""


def lacking(content: Content, proof: str = "auto") -> list[Missing]:
    """List what an incomplete report lacks of what was asked for.

    Args:
        proof: "weights" asks for the weights alone, anything else for the whole proof.
    """
    if content.verdict != "incomplete":
        return []
    return [one for one in content.incomplete if proof != "weights" or one.proof == "weights"]

"""A report: everything a verification found, as plain values, with the arrays that a number cannot hold beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from blip2nb.errors import Diverges, RequestError
from blip2nb.whole import write_whole

if TYPE_CHECKING:
    import numpy as np

FORMAT = 2
"""The version of report.json's content. 1 had the verdict weights_only."""

INFINITE = 1e9
"""What stands for infinity in report.json, which has no word for it."""


@dataclasses.dataclass(frozen=True)
class Missing:
    """Something that belongs to the proof and was not run, or could not be judged.

    Attributes:
        id: not_asked, no_lavis, no_memory, does_not_load, weights, stages, images or captions.
        proof: the proof that lacks it: weights, behaviour or text.
        words: what is missing and why, as a sentence.
    """

    id: str
    proof: str
    words: str


@dataclasses.dataclass(frozen=True)
class ReportData:
    """The content of report.json and of arrays.safetensors."""

    content: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """match, explained, diverges or incomplete."""
        return self.content["verdict"]

    @property
    def incomplete(self) -> tuple[Missing, ...]:
        """What was not run or could not be judged; `complete_with` is the command that completes the proof."""
        return tuple(Missing(**one) for one in self.content["incomplete"])

    def status(self, proof: str = "auto") -> int:
        """The exit status of a verification: 0 for match and explained, 1 for diverges, 4 for incomplete.

        Args:
            proof: what was asked for. If that is "weights", proven weights are all of it: 0.
        """
        if self.verdict == "diverges":
            return Diverges.exit_status
        return INCOMPLETE if lacking(self.content, proof) else 0

    def __getitem__(self, name: str) -> Any:
        return self.content[name]

    def save(self, folder: Path) -> Path:
        """Write report.json and arrays.safetensors into `folder`, each whole or not at all, and never one without the
        other. Returns the former."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays, text = folder / "arrays.safetensors", folder / "report.json"
        beside = arrays.with_name(f"{arrays.name}.partial")
        content = json.dumps(finite(self.content), indent=1, allow_nan=False) + "\n"
        try:
            save_file(dict(self.arrays), beside)
            text.unlink(missing_ok=True)  # killed now, there is no report, and never one beside another's arrays
            os.replace(beside, arrays)
        finally:
            beside.unlink(missing_ok=True)
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


def content_of(text: str | bytes, path: str) -> dict[str, Any]:
    """Parse report.json.

    Args:
        path: where it is, for the error.

    Raises:
        RequestError: it was written by a version of the kit with other words.
        ValueError: it is no JSON.
    """
    content = json.loads(text)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise RequestError(
            f"{path} has format {found}; this version of blip2nb reads format {FORMAT}. Run `blip2nb verify` again."
        )
    return content


INCOMPLETE = 4
"""The exit status of a proof of which something was not run or could not be judged."""


def lacking(content: Mapping[str, Any], proof: str = "auto") -> list[Mapping[str, Any]]:
    """List what an incomplete report lacks of what was asked for.

    Args:
        content: of report.json.
        proof: "weights" asks for the weights alone, anything else for the whole proof.
    """
    if content["verdict"] != "incomplete":
        return []
    return [one for one in content["incomplete"] if proof != "weights" or one["proof"] == "weights"]


def finite(value: Any) -> Any:
    """NaN as null and infinity as INFINITE, since JSON has neither."""
    if isinstance(value, float):
        return None if math.isnan(value) else math.copysign(INFINITE, value) if math.isinf(value) else value
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value
